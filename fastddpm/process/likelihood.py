"""The variational bound on the likelihood of pictures (Ho et al. 2020, eq. 5 and 13), term by term.

Bounds are in bits per dimension: nats divided by ln 2 and averaged over all elements of a sample.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastddpm.process.reference import PMeanVariance
from fastddpm.process.schedule import NoiseSchedule

_LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """What a model says of N pictures, row by row of its bound: S timesteps, descending.

    All in bits per dimension or in the network's own range, float32, but for the timesteps.

    Attributes:
        prior_bpd: [N], L_T = KL(q(x_T | x_0) ‖ N(0, I)).
        vlb: [N, S], the terms of the bound in the order of the timesteps: L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖
            p(x_{t−1} | x_t)), and last −log p(x_0 | x_1) of the discretised decoder.
        x_start_mse: [N, S], the mean of (x̂_0 − x_0)² at each timestep.
        eps_mse: [N, S], the mean of (ε̂ − ε)², ε̂ being what x̂_0, which is clipped, leaves of x_t.
        timesteps: int64 [S], training timesteps.
    """

    prior_bpd: Tensor
    vlb: Tensor
    x_start_mse: Tensor
    eps_mse: Tensor
    timesteps: Tensor

    @property
    def total_bpd(self) -> Tensor:
        """[N], the bound: at most so many bits per dimension are needed to write a picture down without loss."""
        return (self.vlb.double().sum(1) + self.prior_bpd.double()).float()

    def __len__(self) -> int:
        """N."""
        return len(self.prior_bpd)


def joined(parts: list[Likelihood]) -> Likelihood:
    """What is known of several batches, for the same timesteps, as one."""
    prior, vlb, x_start_mse, eps_mse = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("prior_bpd", "vlb", "x_start_mse", "eps_mse")
    )
    return Likelihood(prior, vlb, x_start_mse, eps_mse, parts[0].timesteps)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) ‖ N(mean2, var2)) per element, in nats; the arguments broadcast.

    ½ (ln var2 − ln var1 + (var1 + (mean1 − mean2)²)/var2 − 1), the terms of Ho et al. 2020, eq. 5.
    """
    excess = log_variance2 - log_variance1
    distance = (mean1 - mean2) ** 2 * (-log_variance2).exp()
    return 0.5 * (excess + (-excess).expm1() + distance)  # expm1, for the terms of good models are small


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
    p: PMeanVariance,
) -> Tensor:
    """One term of the variational bound per sample: L_{t} for t > 0, the decoder's L_0 for t = 0.

    Ho et al. 2020, eq. 5 (the KL between posterior and model) and eq. 13 (the discrete decoder).

    Args:
        schedule: [T] betas.
        x_start: [B, C, H, W] in [−1, 1].
        x_t: [B, C, H, W], noised x_start.
        t: int64 [B].
        p: the model's p(x_{t−1} | x_t), see `fastddpm.process.reference.p_mean_variance`.

    Returns:
        Float [B], bits per dimension.
    """
    target, _, target_log = schedule.q_posterior(x_start, x_t, t)
    kl = normal_kl(target, target_log, p.mean, p.log_variance).flatten(1).mean(1)
    nll = -discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / _LN2


def prior_bits(schedule: NoiseSchedule, x_start: Tensor, t: int | None = None) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) per sample (Ho et al. 2020, eq. 5).

    Args:
        schedule: [T] betas.
        x_start: [B, C, H, W].
        t: the timestep that takes T's place in a run over some of the timesteps; None is the last one.

    Returns:
        Float [B], bits per dimension.
    """
    alpha_bar = schedule.alphas_cumprod_exact[schedule.T - 1 if t is None else t]
    mean, zero = alpha_bar.sqrt().to(x_start) * x_start, torch.zeros_like(x_start[:, :1])
    return normal_kl(mean, torch.log1p(-alpha_bar).to(x_start), zero, zero).flatten(1).mean(1) / _LN2
