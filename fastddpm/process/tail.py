"""Tails: the rows of a run from a noise level on, for runs that start from a picture."""

from __future__ import annotations

from dataclasses import replace

from fastddpm.common.arguments import number
from fastddpm.process.method import Method
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable


def tail_table(
    method: Method,
    schedule: NoiseSchedule,
    spec: ModelSpec,
    strength: float,
    *,
    function: str = "tail_table",
    name: str = "strength",
) -> StepTable:
    """The rows of a method from the first timestep t ≤ strength · T on (Meng et al. 2022, "SDEdit", Algorithm 1).

    A solver that looks back finds nothing before its first row, so its first rows are those of a run that begins there.

    Args:
        method: how to sample.
        schedule: the schedule that the network was trained with.
        spec: its conventions.
        strength: in (0, 1]; 1 is the whole run.
        function: name that starts the error messages.
        name: what they call `strength`.

    Returns:
        The table; the run starts from the level of its first timestep.

    Raises:
        TypeError: strength is no number.
        ValueError: strength is out of range, or the run visits no timestep so low.
    """
    strength = number(function, name, strength)
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"{function}: {name} must be above 0 and at most 1, got {strength:g}; 0 would change nothing")
    table = method.table(schedule, spec)
    timesteps = table.timesteps[:-1]
    low = (timesteps <= strength * schedule.T).nonzero()
    if not low.numel():
        raise ValueError(
            f"{function}: {name} must be at least {int(timesteps[-1]) / schedule.T:.3g} for these {table.S} steps, got "
            f"{strength:g}; take more of either"
        )
    first = int(low[0, 0])
    if first == 0:
        return table
    rows = table.rows[first:].clone()
    if table.history:
        prev = method.prev_timesteps
        later = replace(
            method, steps=None, timesteps=timesteps[first:], prev_timesteps=None if prev is None else prev[first:]
        ).table(schedule, spec)
        rows[: table.history] = later.rows[: table.history]
    guides = None if table.guides is None else table.guides[first:]
    return replace(table, rows=rows, timesteps=table.timesteps[first:], counters=table.counters[first:], guides=guides)
