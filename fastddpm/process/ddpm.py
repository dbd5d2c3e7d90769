"""DDPM: ancestral sampling as a table (Ho et al. 2020), in float64, rounded once to float32.

Row i leads from timestep t_i to prev_i, which is the next timestep of the list unless the caller says otherwise;
prev = −1 is x_0 itself, with ᾱ = 1. The equations hold for any such pair, adjacent or far apart: a strided run is a run
whose β_t is 1 − ᾱ_t/ᾱ_prev (Nichol & Dhariwal 2021, eq. 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from fastddpm.process.outline import Outline, RowOptions
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Variance
from fastddpm.process.table import StepTable, check_choice

NoiseGate = Literal["final", "t0"]
# What a peer that adds noise on a row with β̃ = 0 takes for it, so that its logarithm exists.
_SMALLEST_VARIANCE = 1e-20


def ddpm_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    variance: Variance = "fixed_small",
    noise_gate: NoiseGate = "final",
    **rows: Unpack[RowOptions],
) -> StepTable:
    """Ancestral sampling, over all timesteps or any of them (Ho et al. 2020, Algorithm 2, eq. 6–7 and 11).

    x_{t−1} = √ᾱ_prev β_t/(1−ᾱ_t) · x̂_0 + √α_t (1−ᾱ_prev)/(1−ᾱ_t) · x_t + σ_t z, with α_t = ᾱ_t/ᾱ_prev,
    β_t = 1 − α_t; σ_t² = β̃_t = (1−ᾱ_prev)/(1−ᾱ_t) β_t ("fixed_small"), β_t ("fixed_large"), or in
    between, chosen by the network ("learned_range": Nichol & Dhariwal 2021, eq. 15).

    A classifier's gradient moves the mean by σ_t² ∇ log p(y|x_t) (Dhariwal & Nichol 2021, Algorithm 1). In a row that
    adds no noise σ_t² is what OpenAI's code has there: 0 of "fixed_small", and of the others made of the β̃ before.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        variance: σ_t²; "learned_range" needs a network with 2C output channels.
        noise_gate: where no noise is added. "final": on rows that lead to x_0, as in the papers. "t0":
            on rows with t = 0, and nowhere else, as diffusers does: timesteps that end above 0 then
            leave noise in x_0 if the variance is not "fixed_small". On lists that end at 0 both are the
            same.
        rows: prediction, clip and prev_timesteps, see `fastddpm.process.outline.RowOptions`.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    check_choice("ddpm_table", "variance", variance, get_args(Variance))
    check_choice("ddpm_table", "noise_gate", noise_gate, get_args(NoiseGate))
    outline = Outline.of("ddpm_table", schedule, timesteps, **rows)
    a_t, a_prev = outline.a_t, outline.a_prev
    alpha = a_t / a_prev
    beta = 1.0 - alpha
    beta_tilde = (1.0 - a_prev) / (1.0 - a_t) * beta
    noisy = ((outline.prev >= 0) if noise_gate == "final" else (outline.t > 0)).double()
    columns = outline.x_start_columns() | outline.known_columns()
    columns["c_0"] = a_prev.sqrt() * beta / (1.0 - a_t)
    columns["c_x"] = alpha.sqrt() * (1.0 - a_prev) / (1.0 - a_t)
    if variance == "learned_range":
        columns["sigma"] = noisy
        columns["log_beta"] = beta.log()
        columns["log_beta_tilde"] = clipped_log(beta_tilde, beta, noisy)
    else:
        columns["sigma"] = noisy * (beta if variance == "fixed_large" else beta_tilde).sqrt()
    moved = {
        "fixed_small": beta_tilde,
        "fixed_large": torch.where(noisy > 0, beta, _lent(beta_tilde, beta)),
        "learned_range": torch.ones_like(beta),
    }[variance]
    return outline.table("ddpm", columns, variance=variance, guides=(moved, torch.zeros_like(beta)))


def clipped_log(beta_tilde: Tensor, beta: Tensor, noisy: Tensor) -> Tensor:
    """Log β̃, finite on rows that lead to x_0, where β̃ = 0.

    Without noise there only the bound's decoder uses it, and it follows Nichol & Dhariwal 2021, sec. 3.1: the row
    before lends its own. With noise (noise_gate "t0") it is the floor of the peer that adds it.

    Args:
        beta_tilde: float64 [S], β̃ of each row.
        beta: float64 [S].
        noisy: float64 [S], 1 where a row adds noise.

    Returns:
        float64 [S].
    """
    floor = torch.where(noisy > 0, torch.full_like(beta, _SMALLEST_VARIANCE), _lent(beta_tilde, beta))
    return torch.where(beta_tilde > 0, beta_tilde, floor).log()


def _lent(beta_tilde: Tensor, beta: Tensor) -> Tensor:
    """The β̃ of the row before each; the first row's own β, for want of one."""
    return torch.cat([beta[:1], beta_tilde[:-1]])
