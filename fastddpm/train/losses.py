"""Training losses and the variational bound of Ho et al. 2020 and Nichol & Dhariwal 2021.

Bounds are in bits per dimension: nats divided by ln 2 and averaged over all elements of a sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastddpm.process.reference import p_mean_variance
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction, Variance

_LN2 = math.log(2.0)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) ‖ N(mean2, var2)) per element, in nats; the arguments broadcast.

    ½ (ln var2 − ln var1 + (var1 + (mean1 − mean2)²)/var2 − 1), the terms of Ho et al. 2020, eq. 5.
    """
    ratio = (log_variance1 - log_variance2).exp()
    distance = (mean1 - mean2) ** 2 * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1.0)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the mass that N(mean, scale²) puts on x's bin of 256 (Ho et al. 2020, eq. 13), in nats.

    Bins are 2/255 wide, centred on the 256 levels of [−1, 1]; the outermost reach to infinity. Φ is
    Page's tanh approximation (1977), with which the published bits per dimension were computed.

    Args:
        x: levels in [−1, 1], [B, …].
        mean: broadcastable to x.
        log_scale: log of the standard deviation, broadcastable to x.

    Returns:
        Log-likelihoods, [B, …], at least ln 1e-12.
    """
    centred, inverse = x - mean, (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def vlb_terms(
    schedule: NoiseSchedule,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    out: Tensor,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "learned_range",
    clip: float | None = None,
) -> Tensor:
    """One term of the variational bound per sample: L_{t} for t > 0, the decoder's L_0 for t = 0.

    Ho et al. 2020, eq. 5 (the KL between posterior and model) and eq. 13 (the discrete decoder).

    Args:
        schedule: [T] betas.
        x_start: [B, C, H, W] in [−1, 1].
        x_t: [B, C, H, W], noised x_start.
        t: int64 [B].
        out: the network's output at (x_t, t), [B, C, H, W] or [B, 2C, H, W].
        prediction: what the first C channels of `out` are.
        variance: the model's variance.
        clip: bound of |x̂_0|, or None, as in training.

    Returns:
        Float [B], bits per dimension.
    """
    target, _, target_log = schedule.q_posterior(x_start, x_t, t)
    p = p_mean_variance(schedule, out, x_t, t, prediction=prediction, variance=variance, clip=clip)
    kl = normal_kl(target, target_log, p.mean, p.log_variance).flatten(1).mean(1)
    nll = -discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / _LN2


def prior_bits(schedule: NoiseSchedule, x_start: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) per sample (Ho et al. 2020, eq. 5); float [B], bits per dim."""
    t = torch.full((x_start.shape[0],), schedule.T - 1, dtype=torch.int64)
    mean, variance = schedule.q_mean_variance(x_start, t)
    zero = torch.zeros_like(mean)
    return normal_kl(mean, variance.log(), zero, zero).flatten(1).mean(1) / _LN2


def target_of(schedule: NoiseSchedule, x_start: Tensor, eps: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """What the network should return: ε, x_0, or v (Salimans & Ho 2022, sec. 4); [B, C, H, W].

    Raises:
        ValueError: unknown prediction.
    """
    if prediction == "eps":
        return eps
    if prediction == "x_start":
        return x_start
    if prediction == "v":
        return schedule.v_from(x_start, eps, t)
    raise ValueError(f"target_of: prediction must be eps, x_start or v, got {prediction!r}; pick one of them")


def simple_loss(
    schedule: NoiseSchedule,
    x_start: Tensor,
    t: Tensor,
    eps: Tensor,
    out: Tensor,
    prediction: Prediction = "eps",
) -> Tensor:
    """L_simple per sample: mean squared error of the network's output (Ho et al. 2020, eq. 14).

    Args:
        schedule: [T] betas.
        x_start: [B, C, H, W] in [−1, 1].
        t: int64 [B].
        eps: the noise in x_t, [B, C, H, W].
        out: the network's output, [B, C or 2C, H, W]; a variance half is ignored.
        prediction: what the first C channels of `out` are.

    Returns:
        Float [B].

    Raises:
        ValueError: unknown prediction.
    """
    target = target_of(schedule, x_start, eps, t, prediction)
    return ((target - out[:, : target.shape[1]]) ** 2).flatten(1).mean(1)


def hybrid_loss(
    schedule: NoiseSchedule,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    eps: Tensor,
    out: Tensor,
    prediction: Prediction = "eps",
    vlb_weight: float = 1e-3,
) -> Tensor:
    """L_hybrid = L_simple + λ L_vlb for networks with learned variance (Nichol & Dhariwal 2021, eq. 16).

    L_vlb is estimated by T times the term of the sampled t. It trains the variance only: the mean enters
    it with its gradient stopped.

    Args:
        schedule: [T] betas.
        x_start: [B, C, H, W] in [−1, 1].
        x_t: [B, C, H, W], noised x_start.
        t: int64 [B], uniform in 0 … T−1.
        eps: the noise in x_t, [B, C, H, W].
        out: the network's output, [B, 2C, H, W].
        prediction: what the first C channels of `out` are.
        vlb_weight: λ.

    Returns:
        The loss averaged over the batch, 0-d.

    Raises:
        ValueError: `out` has not 2C channels, or the prediction is unknown.
    """
    C = x_start.shape[1]
    frozen = torch.cat([out[:, :C].detach(), out[:, C:]], dim=1)
    bound = vlb_terms(schedule, x_start, x_t, t, frozen, prediction=prediction, variance="learned_range")
    simple = simple_loss(schedule, x_start, t, eps, out, prediction)
    return (simple + vlb_weight * schedule.T * bound).mean()
