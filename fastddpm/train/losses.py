"""The two parts of the training loss (Ho et al. 2020, Nichol & Dhariwal 2021); the bound is that of `likelihood`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.process.likelihood import vlb_terms
from fastddpm.process.reference import p_mean_variance
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction


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


def variance_loss(
    schedule: NoiseSchedule,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    out: Tensor,
    prediction: Prediction = "eps",
) -> Tensor:
    """L_vlb of networks with learned variance, of which L_hybrid = L_simple + λ L_vlb (Nichol & Dhariwal 2021, eq. 16).

    It is estimated by T times the term of the sampled t, and trains the variance only: the mean enters with its
    gradient stopped.

    Args:
        schedule: [T] betas.
        x_start: [B, C, H, W] in [−1, 1].
        x_t: [B, C, H, W], noised x_start.
        t: int64 [B], uniform in 0 … T−1.
        out: the network's output, [B, 2C, H, W].
        prediction: what the first C channels of `out` are.

    Returns:
        Float [B].

    Raises:
        ValueError: `out` has not 2C channels, or the prediction is unknown.
    """
    C = x_start.shape[1]
    frozen = torch.cat([out[:, :C].detach(), out[:, C:]], dim=1)
    p = p_mean_variance(schedule, frozen, x_t, t, prediction=prediction, variance="learned_range", clip=None)
    return schedule.T * vlb_terms(schedule, x_start, x_t, t, p)
