"""Solvers by name: noise schedule × timesteps → StepTable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Unpack, get_args

from torch import Tensor

from fastddpm.process.ddim import ClippedEps, ddim_table
from fastddpm.process.ddpm import NoiseGate, ddpm_table
from fastddpm.process.dpmpp import SecondDifference, dpmpp_2m_table, dpmpp_3m_table
from fastddpm.process.outline import RowOptions
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Variance
from fastddpm.process.table import Solver, StepTable, check_choice

_TABLES: dict[Solver, Callable[..., StepTable]] = {
    "ddpm": ddpm_table, "ddim": ddim_table, "dpmpp_2m": dpmpp_2m_table, "dpmpp_3m": dpmpp_3m_table,
}  # fmt: skip


class TableOptions(RowOptions, total=False):
    """What some solver's table takes besides the schedule and the timesteps; None is its own default."""

    variance: Variance | None
    noise_gate: NoiseGate | None
    eta: float | None
    clipped_eps: ClippedEps | None
    final_alpha_to_one: bool | None
    lower_order_final: bool | None
    lower_order_second: bool | None
    second_difference: SecondDifference | None


def make_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    solver: Solver = "ddpm",
    **options: Unpack[TableOptions],
) -> StepTable:
    """The table of any solver; see `ddpm_table`, `ddim_table`, `dpmpp_2m_table`, `dpmpp_3m_table`.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        solver: "ddpm", "ddim", "dpmpp_2m" or "dpmpp_3m".
        options: of the solver's own table; but for `clip`, whose None is no bound, None stands for its default.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an option that the solver does not have, or one of the solver's own errors.
    """
    check_choice("make_table", "solver", solver, get_args(Solver))
    table = _TABLES[solver]
    given = {name: value for name, value in options.items() if value is not None or name == "clip"}
    own = inspect.signature(table).parameters.keys() - {"schedule", "timesteps", "rows"}
    known = own | RowOptions.__annotations__.keys()
    if foreign := sorted(given.keys() - known):
        raise ValueError(
            f"make_table: options of {solver} must be among {', '.join(sorted(known))}, got {', '.join(foreign)}; "
            "leave the others out"
        )
    return table(schedule, timesteps, **given)
