"""DPM-Solver++ as a table (Lu et al. 2022, "DPM-Solver++"), in float64, rounded once to float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from fastddpm.process.outline import Outline, RowOptions
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.table import Solver, StepTable, check_choice

SecondDifference = Literal["whole", "half"]


def dpmpp_2m_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    final_alpha_to_one: bool = True,
    lower_order_final: bool = False,
    **rows: Unpack[RowOptions],
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
        final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0 (final_sigmas_type="sigma_min" of
            diffusers).
        lower_order_final: make the last row first order also where its λ is finite.
        rows: prediction, clip and prev_timesteps, see `fastddpm.process.outline.RowOptions`. All prev_timesteps but the
            last must be the next timestep, because the method looks back along its own path.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    outline = Outline.of("dpmpp_2m_table", schedule, timesteps, final_alpha_to_one, **rows)
    return _guided("dpmpp_2m", outline, _second_order(outline, _widths(outline), lower_order_final))


def dpmpp_3m_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    final_alpha_to_one: bool = True,
    lower_order_final: bool = False,
    lower_order_second: bool = False,
    second_difference: SecondDifference = "whole",
    **rows: Unpack[RowOptions],
) -> StepTable:
    """DPM-Solver++(3M), the multistep solver with two estimates to look back at (Lu et al. 2022).

    With λ, h and x̂_0 as in `dpmpp_2m_table`, h', h'' and x̂_0', x̂_0'' those of the two rows before, and
    D' = h/h' (x̂_0 − x̂_0'), D'' = h/h'' (x̂_0' − x̂_0''), D2 = h/(h' + h'') (D' − D''), D1 = D' + h'/h D2:
    x_{t−1} = √((1−ᾱ_prev)/(1−ᾱ_t)) x_t + √ᾱ_prev ((1 − e^{−h}) x̂_0 + φ_2 D1 − 2 φ_3 D2),
    φ_2 = (e^{−h} − 1)/h + 1, φ_3 = (e^{−h} − 1 + h)/h² − ½. The first two rows are those of `dpmpp_2m_table`, of first
    and second order, and a row that leads to x_0 (λ = ∞) is of first order. Where ᾱ_t = 0 two rows before (λ = −∞),
    D'' and D2 are 0. Deterministic; a network with 2C output channels works too.

    2 D2 stands for h² d²x̂_0/dλ² of the Taylor expansion that it comes from. The authors' code
    (https://github.com/LuChengTHU/dpm-solver, `multistep_dpm_solver_third_update`) and diffusers take φ_3 D2, half of
    it (second_difference="half"): their error falls with the square of the step, as that of `dpmpp_2m_table`, and not
    with the cube.

    diffusers visits the same timesteps as in second order, does not clip, and sets lower_order_final and
    lower_order_second where S < 15.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        final_alpha_to_one: as in `dpmpp_2m_table`.
        lower_order_final: make the last row first order also where its λ is finite.
        lower_order_second: make the row before the last second order.
        second_difference: "whole", of third order, or "half", as published code has it.
        rows: as in `dpmpp_2m_table`.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    check_choice("dpmpp_3m_table", "second_difference", second_difference, get_args(SecondDifference))
    outline = Outline.of("dpmpp_3m_table", schedule, timesteps, final_alpha_to_one, **rows)
    h = _widths(outline)
    columns = _second_order(outline, h, lower_order_final)
    third = torch.arange(len(h)) >= 2
    third[h.isposinf()] = False
    if lower_order_final:
        third[-1] = False
    if lower_order_second:
        third[-2:-1] = False
    columns["c_h2"] = torch.zeros_like(h)
    at, factor = third.nonzero().flatten(), 2.0 if second_difference == "whole" else 1.0
    for column, values in _third_order(outline.a_prev[at].sqrt(), h[at], h[at - 1], h[at - 2], factor).items():
        columns[column][at] = values
    return _guided("dpmpp_3m", outline, columns)


def _widths(outline: Outline) -> Tensor:
    """H = λ_prev − λ_t of each row, float64 [S]; each must lead to where the next one starts."""
    t, prev = outline.t, outline.prev
    broken = (prev[:-1] != t[1:]).nonzero()
    if broken.numel():
        i = int(broken[0, 0])
        raise ValueError(
            f"{outline.function}: prev_timesteps must continue with the next timestep, got {int(prev[i])} before "
            f"{int(t[i + 1])}; leave prev_timesteps out, or choose only its last entry"
        )
    lam_t, lam_prev = (0.5 * (a.log() - (1.0 - a).log()) for a in (outline.a_t, outline.a_prev))
    return lam_prev - lam_t


def _guided(solver: Solver, outline: Outline, columns: dict[str, Tensor]) -> StepTable:
    """The table; a classifier's gradient moves x_{t−1} by way of x̂_0, for the solver sees nothing else."""
    shift = outline.x_start_shift()
    return outline.table(solver, columns, guides=(columns["c_0"] * shift, shift))


def _second_order(outline: Outline, h: Tensor, lower_order_final: bool) -> dict[str, Tensor]:
    """All columns in second order, and in first where it must be."""
    a_t, a_prev = outline.a_t, outline.a_prev
    kappa = torch.zeros_like(h)
    kappa[1:] = h[1:] / (2.0 * h[:-1])  # an infinite h of the row before gives 0, as it must
    kappa[a_prev == 1.0] = 0.0
    if lower_order_final:
        kappa[-1] = 0.0
    gain = -a_prev.sqrt() * torch.expm1(-h)
    return {
        **outline.x_start_columns(),
        **outline.known_columns(),
        "c_0": gain * (1.0 + kappa),
        "c_h": -gain * kappa,
        "c_x": ((1.0 - a_prev) / (1.0 - a_t)).sqrt(),
    }


def _third_order(alpha: Tensor, h: Tensor, h1: Tensor, h2: Tensor, factor: float) -> dict[str, Tensor]:
    """c_0, c_h and c_h2 of rows with √ᾱ_prev = alpha and the steps h of this row and of the two before it."""
    phi_3 = third_exponential(h)
    phi_2 = h * (0.5 + phi_3)
    of_d2 = (phi_2 * h1 / h - factor * phi_3) * h / (h1 + h2)  # what D' gets by way of D2, and D'' loses
    newer = alpha * (phi_2 + of_d2) * h / h1  # of x̂_0 − x̂_0'
    older = -alpha * of_d2 * h / h2  # of x̂_0' − x̂_0''; an infinite h2 makes it and of_d2 0
    return {"c_0": newer - alpha * torch.expm1(-h), "c_h": older - newer, "c_h2": -older}


def third_exponential(h: Tensor) -> Tensor:
    """(e^{−h} − 1 + h)/h² − ½ for h > 0; by its series where the difference would lose digits."""
    low = h.clamp(max=0.5)
    series = torch.stack([(-low) ** (k - 2) / math.factorial(k) for k in range(3, 17)]).sum(0)
    return torch.where(h < 0.5, series, (torch.expm1(-h) + h) / h**2 - 0.5)
