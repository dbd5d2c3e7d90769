"""Solvers by name: noise schedule × timesteps → StepTable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from torch import Tensor

from fastddpm.process.ddim import ClippedEps, ddim_table
from fastddpm.process.ddpm import NoiseGate, ddpm_table
from fastddpm.process.dpmpp import SecondDifference, dpmpp_2m_table, dpmpp_3m_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction, Variance
from fastddpm.process.table import DynamicThreshold, Solver, StepTable, check_choice


def make_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    solver: Solver = "ddpm",
    prediction: Prediction = "eps",
    clip: float | DynamicThreshold | None = 1.0,
    prev_timesteps: Tensor | Sequence[int] | None = None,
    variance: Variance | None = None,
    noise_gate: NoiseGate | None = None,
    eta: float | None = None,
    clipped_eps: ClippedEps | None = None,
    final_alpha_to_one: bool | None = None,
    lower_order_final: bool | None = None,
    lower_order_second: bool | None = None,
    second_difference: SecondDifference | None = None,
) -> StepTable:
    """The table of any solver; see `ddpm_table`, `ddim_table`, `dpmpp_2m_table`, `dpmpp_3m_table`.

    An option left at None takes the solver's own default.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        solver: "ddpm", "ddim", "dpmpp_2m" or "dpmpp_3m".
        prediction: what the network returns.
        clip: bound of |x̂_0|, None, or a DynamicThreshold.
        prev_timesteps: int [S], where each row leads.
        variance: ddpm only.
        noise_gate: ddpm only.
        eta: ddim only.
        clipped_eps: ddim only.
        final_alpha_to_one: ddim, dpmpp_2m and dpmpp_3m.
        lower_order_final: dpmpp_2m and dpmpp_3m.
        lower_order_second: dpmpp_3m only.
        second_difference: dpmpp_3m only.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an option that the solver does not have, or one of the solver's own errors.
    """
    check_choice("make_table", "solver", solver, get_args(Solver))
    solvers: dict[Solver, tuple[Callable[..., StepTable], set[str]]] = {
        "ddpm": (ddpm_table, {"variance", "noise_gate"}),
        "ddim": (ddim_table, {"eta", "clipped_eps", "final_alpha_to_one"}),
        "dpmpp_2m": (dpmpp_2m_table, {"final_alpha_to_one", "lower_order_final"}),
        "dpmpp_3m": (
            dpmpp_3m_table,
            {"final_alpha_to_one", "lower_order_final", "lower_order_second", "second_difference"},
        ),
    }
    table, known = solvers[solver]
    given: dict[str, Any] = {
        "variance": variance, "noise_gate": noise_gate, "eta": eta, "clipped_eps": clipped_eps,
        "final_alpha_to_one": final_alpha_to_one, "lower_order_final": lower_order_final,
        "lower_order_second": lower_order_second, "second_difference": second_difference,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if foreign := sorted(options.keys() - known):
        raise ValueError(
            f"make_table: options of {solver} must be among {', '.join(sorted(known))}, got {', '.join(foreign)}; "
            "leave the others out"
        )
    return table(schedule, timesteps, prediction=prediction, clip=clip, prev_timesteps=prev_timesteps, **options)
