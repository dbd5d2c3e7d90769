"""The textbook, equation by equation, in plain PyTorch: oracle of the tests and baseline of the benchmarks.

Nothing here knows of tables or kernels. Coefficients are computed in the schedule's dtype and rounded to
the dtype of the state. Models are callables `model(x_t, t)` or `model(x_t, t, y)` with t int64 [B].
Noise comes as a tensor [S, B, C, H, W] in the order of the loop, as a callable `noise(i)` → [B, C, H,
W], or from a torch.Generator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from fastddpm.common.arguments import only_options
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction, Variance

Noise = Tensor | Callable[[int], Tensor] | torch.Generator


class Model(Protocol):
    """A network: (x_t [B, C, H, W], t int64 [B], labels int64 [B] if any) → [B, C or 2C, H, W]."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, /) -> Tensor:
        """Evaluate the network."""
        ...


class EstimateOptions(TypedDict, total=False):
    """Fields of `Conventions` as keyword arguments: those that say how x̂_0 is had."""

    prediction: Prediction
    clip: float | None
    threshold: tuple[float, float] | None


class ReverseOptions(EstimateOptions, total=False):
    """Those of the reverse process."""

    variance: Variance


class DdimOptions(EstimateOptions, total=False):
    """Those of DDIM."""

    eta: float
    clipped_eps: Literal["rederive", "raw"]


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What a network was trained with, and what DDIM makes of it.

    Attributes:
        prediction: what its first C channels are.
        variance: which variance.
        clip: bound of |x̂_0|, or None.
        threshold: (ratio, max_value) of dynamic thresholding, instead of `clip`.
        eta: DDIM's η, in [0, 1].
        clipped_eps: DDIM: take ε from the clipped x̂_0 ("rederive") or from the output as it is ("raw").
    """

    prediction: Prediction = "eps"
    variance: Variance = "fixed_small"
    clip: float | None = 1.0
    threshold: tuple[float, float] | None = None
    eta: float = 0.0
    clipped_eps: Literal["rederive", "raw"] = "rederive"

    def clipped(self, x_start: Tensor) -> Tensor:
        """x̂_0 within its bound, if there is one."""
        if self.threshold is not None:
            return dynamic_threshold(x_start, *self.threshold)
        return x_start if self.clip is None else x_start.clamp(-self.clip, self.clip)


class PMeanVariance(NamedTuple):
    """p(x_{t−1} | x_t): mean [B, …], variance and its log (broadcastable), and the estimate of x_0."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


def predict_x_start(schedule: NoiseSchedule, out: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """x̂_0 from what the network returns: Ho et al. 2020, eq. 15, or Salimans & Ho 2022, appendix D.

    Raises:
        ValueError: unknown prediction.
    """
    if prediction == "eps":
        return schedule.predict_x_start_from_eps(x_t, t, out)
    if prediction == "v":
        return schedule.predict_x_start_from_v(x_t, t, out)
    if prediction == "x_start":
        return out
    raise ValueError(f"predict_x_start: prediction must be eps, x_start or v, got {prediction!r}; pick one of them")


def dynamic_threshold(x_start: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip each sample to its own quantile s of |x_0| and divide by s (Saharia et al. 2022, sec. 2.3)."""
    s = torch.quantile(x_start.abs().flatten(1), ratio, dim=1).clamp(1.0, max_value)
    s = s.reshape(-1, *[1] * (x_start.ndim - 1))
    return torch.minimum(torch.maximum(x_start, -s), s) / s


def p_mean_variance(
    schedule: NoiseSchedule,
    out: Tensor,
    x_t: Tensor,
    t: Tensor,
    **conventions: Unpack[ReverseOptions],
) -> PMeanVariance:
    """The reverse step's Gaussian (Ho et al. 2020, eq. 7 and 11 through x̂_0; Nichol & Dhariwal 2021, eq. 15).

    Args:
        schedule: [T] betas.
        out: [B, C, H, W], or [B, 2C, H, W] for "learned_range".
        x_t: [B, C, H, W].
        t: int64 [B].
        conventions: see `Conventions`.

    Returns:
        Mean, variance, log-variance and x̂_0; the logs are finite at t = 0 too, where the small variance is 0.

    Raises:
        ValueError: `out` has the wrong number of channels, or a name is unknown.
    """
    only_options("p_mean_variance", conventions, ReverseOptions)
    how = Conventions(**conventions)
    C, variance = x_t.shape[1], how.variance
    if out.shape[1] != (2 * C if variance == "learned_range" else C):
        raise ValueError(
            f"p_mean_variance: out must have {C} channels, or {2 * C} for learned_range, got {out.shape[1]} for "
            f"{variance}; check the variance"
        )
    x_start = how.clipped(predict_x_start(schedule, out[:, :C], x_t, t, how.prediction))
    mean, small, small_log = schedule.q_posterior(x_start, x_t, t)
    if variance == "fixed_small":
        return PMeanVariance(mean, small, small_log, x_start)
    if variance == "fixed_large":
        # At t = 0 the decoder would pay for β_0: β̃_1 stands in, as in Ho et al.'s code.
        log_large = torch.cat([schedule.posterior_log_variance_clipped[:1], schedule.betas[1:].log()])
        large = schedule.at(schedule.betas, t, x_t)
        return PMeanVariance(mean, large, schedule.at(log_large, t, x_t), x_start)
    if variance != "learned_range":
        raise ValueError(
            f"p_mean_variance: variance must be fixed_small, fixed_large or learned_range, got {variance!r}; pick one"
        )
    fraction = (out[:, C:] + 1.0) / 2.0
    log_variance = fraction * schedule.at(schedule.betas.log(), t, x_t) + (1.0 - fraction) * small_log
    return PMeanVariance(mean, log_variance.exp(), log_variance, x_start)


def classifier_free_guidance(model: Model, guidance_scale: float, null_class: int) -> Model:
    """A model whose output is out_u + w (out_c − out_u) (Ho & Salimans 2022, eq. 6, with w = 1 unguided).

    A learned-variance half is taken from the conditional output.
    """

    def guided(x_t: Tensor, t: Tensor, y: Tensor | None = None, /) -> Tensor:
        if y is None:
            raise ValueError("classifier_free_guidance: y must be labels [B], got None; pass class labels")
        conditional, unconditional = model(x_t, t, y), model(x_t, t, torch.full_like(y, null_class))
        C = x_t.shape[1]
        mixed = unconditional[:, :C] + guidance_scale * (conditional[:, :C] - unconditional[:, :C])
        return torch.cat([mixed, conditional[:, C:]], dim=1)

    return guided


@torch.no_grad()
def p_sample_loop(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    noise: Noise,
    *,
    timesteps: Tensor | None = None,
    y: Tensor | None = None,
    **conventions: Unpack[ReverseOptions],
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), strided if timesteps are given.

    A strided run is the full algorithm on the respaced schedule (Nichol & Dhariwal 2021, sec. 4).

    Args:
        model: the network.
        schedule: [T] betas.
        x_T: [B, C, H, W] standard normal; its dtype is the state's.
        noise: z of each step; the last step's is not used.
        timesteps: int64 [S], descending; default all T.
        y: int64 [B] labels, passed on to the model.
        conventions: see `Conventions`.

    Returns:
        x_0, [B, C, H, W].
    """
    steps = torch.arange(schedule.T - 1, -1, -1) if timesteps is None else timesteps
    spaced = schedule if timesteps is None else schedule.respaced(steps.flip(0))
    x = x_T
    for i, t in enumerate(steps.tolist()):
        out = _call(model, x, t, y)
        index = torch.full((x.shape[0],), len(steps) - 1 - i, dtype=torch.int64)
        p = p_mean_variance(spaced, out, x, index, **conventions)
        x = p.mean
        if i < len(steps) - 1:
            x = x + (0.5 * p.log_variance).exp() * _draw(noise, i, x)
    return x


@torch.no_grad()
def ddim_sample_loop(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    *,
    noise: Noise | None = None,
    y: Tensor | None = None,
    **conventions: Unpack[DdimOptions],
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 with σ of eq. 16).

    Args:
        model: the network; channels beyond the first C of its output are ignored.
        schedule: [T] betas.
        x_T: [B, C, H, W] standard normal; its dtype is the state's.
        timesteps: int64 [S], descending.
        noise: z of each step, needed where η > 0; the last step's is not used.
        y: int64 [B] labels, passed on to the model.
        conventions: see `Conventions`.

    Returns:
        x_0, [B, C, H, W].

    Raises:
        ValueError: η > 0 without noise.
    """
    only_options("ddim_sample_loop", conventions, DdimOptions)
    how = Conventions(**conventions)
    eta = how.eta
    if eta > 0.0 and noise is None:
        raise ValueError(f"ddim_sample_loop: noise must be given for eta > 0, got None with eta={eta}; pass noise")
    steps = timesteps.tolist()
    alpha_bar = schedule.alphas_cumprod.tolist()
    x = x_T
    for i, t in enumerate(steps):
        a_t, a_prev = alpha_bar[t], (alpha_bar[steps[i + 1]] if i + 1 < len(steps) else 1.0)
        index = torch.full((x.shape[0],), t, dtype=torch.int64)
        raw = predict_x_start(schedule, _call(model, x, t, y)[:, : x.shape[1]], x, index, how.prediction)
        x_start = how.clipped(raw)
        eps = schedule.predict_eps_from_x_start(x, index, x_start if how.clipped_eps == "rederive" else raw)
        sigma = eta * ((1 - a_prev) / (1 - a_t)) ** 0.5 * (1 - a_t / a_prev) ** 0.5
        x_next = a_prev**0.5 * x_start + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0.0 and noise is not None:
            x_next = x_next + sigma * _draw(noise, i, x)
        x = x_next
    return x


@torch.no_grad()
def dpmpp_2m_sample_loop(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    *,
    y: Tensor | None = None,
    **conventions: Unpack[EstimateOptions],
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), the last step straight to x_0.

    Args:
        model: the network; channels beyond the first C of its output are ignored.
        schedule: [T] betas, without zero terminal SNR.
        x_T: [B, C, H, W] standard normal; its dtype is the state's.
        timesteps: int64 [S], descending.
        y: int64 [B] labels, passed on to the model.
        conventions: see `Conventions`.

    Returns:
        x_0, [B, C, H, W].
    """
    only_options("dpmpp_2m_sample_loop", conventions, EstimateOptions)
    how, steps = Conventions(**conventions), timesteps.tolist()
    lam = (0.5 * schedule.log_snr).tolist()
    alpha, sigma = schedule.sqrt_alphas_cumprod.tolist(), schedule.sqrt_one_minus_alphas_cumprod.tolist()
    x, previous = x_T, x_T
    for i, t in enumerate(steps):
        index = torch.full((x.shape[0],), t, dtype=torch.int64)
        out = _call(model, x, t, y)[:, : x.shape[1]]
        x_start = how.clipped(predict_x_start(schedule, out, x, index, how.prediction))
        if i + 1 == len(steps):
            return x_start
        t_next = steps[i + 1]
        h = lam[t_next] - lam[t]
        estimate = x_start
        if i > 0:
            r = (lam[t] - lam[steps[i - 1]]) / h
            estimate = (1 + 1 / (2 * r)) * x_start - 1 / (2 * r) * previous
        decay = torch.expm1(torch.tensor(-h, dtype=torch.float64)).item()
        x = sigma[t_next] / sigma[t] * x - alpha[t_next] * decay * estimate
        previous = x_start
    return x


def _call(model: Model, x: Tensor, t: int, y: Tensor | None) -> Tensor:
    batch = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
    return model(x, batch) if y is None else model(x, batch, y)


def _draw(noise: Noise, i: int, like: Tensor) -> Tensor:
    if isinstance(noise, Tensor):
        return noise[i].to(like)
    if isinstance(noise, torch.Generator):
        drawn = torch.randn(like.shape, generator=noise, device=noise.device, dtype=torch.float32)
        return drawn.to(like)
    return noise(i).to(like)
