"""DPM-Solver++ as a table (Lu et al. 2022, "DPM-Solver++"), in float64, rounded once to float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.process.pairs import StepPairs
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction
from fastddpm.process.table import DynamicThreshold, StepTable, assemble


def dpmpp_2m_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    prediction: Prediction = "eps",
    clip: float | DynamicThreshold | None = 1.0,
    prev_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_to_one: bool = True,
    lower_order_final: bool = False,
) -> StepTable:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, "DPM-Solver++", Algorithm 2).

    With λ = ln(√ᾱ/√(1−ᾱ)), h = λ_prev − λ_t, h' the previous row's h and κ = h/(2 h'):
    x_{t−1} = √((1−ᾱ_prev)/(1−ᾱ_t)) x_t + √ᾱ_prev (1 − e^{−h}) ((1 + κ) x̂_0 − κ x̂_0'), where x̂_0' is
    the previous row's estimate. κ = 0 (first order, DDIM's step) in the first row, in a row that leads
    to x_0 (λ = ∞) and in the one after a row with ᾱ_t = 0 (λ = −∞). Deterministic; a network with 2C
    output channels works too.

    diffusers visits `spaced_timesteps(T, S + 1, "leading")[:-1]` by default, does not clip and sets
    lower_order_final where S < 15.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        prediction: what the network returns.
        clip: bound of |x̂_0|, above 0; None for none; a DynamicThreshold for a bound per sample.
        prev_timesteps: int [S], where each row leads. All but the last must be the next timestep,
            because the method looks back along its own path. Default: the next timestep, −1 for the last.
        final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0 (final_sigmas_type="sigma_min" of
            diffusers).
        lower_order_final: make the last row first order also where its λ is finite.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    pairs = StepPairs.of("dpmpp_2m_table", schedule, timesteps, prev_timesteps, final_alpha_to_one)
    broken = (pairs.prev[:-1] != pairs.t[1:]).nonzero()
    if broken.numel():
        i = int(broken[0, 0])
        raise ValueError(
            f"dpmpp_2m_table: prev_timesteps must continue with the next timestep, got {int(pairs.prev[i])} before "
            f"{int(pairs.t[i + 1])}; leave prev_timesteps out, or choose only its last entry"
        )
    lam_t, lam_prev = (0.5 * (a.log() - (1.0 - a).log()) for a in (pairs.a_t, pairs.a_prev))
    h = lam_prev - lam_t
    kappa = torch.zeros_like(h)
    kappa[1:] = h[1:] / (2.0 * h[:-1])  # an infinite h of the row before gives 0, as it must
    kappa[lam_prev.isposinf()] = 0.0
    if lower_order_final:
        kappa[-1] = 0.0
    gain = -pairs.a_prev.sqrt() * torch.expm1(-h)
    columns = pairs.x_start_columns("dpmpp_2m_table", prediction)
    columns["c_0"] = gain * (1.0 + kappa)
    columns["c_h"] = -gain * kappa
    columns["c_x"] = ((1.0 - pairs.a_prev) / (1.0 - pairs.a_t)).sqrt()
    return assemble(
        "dpmpp_2m_table", "dpmpp_2m", pairs.t, columns, prediction=prediction, variance="fixed_small", clip=clip
    )
