"""Resampling: a run that jumps back up in noise again and again is a longer table (RePaint, Lugmayr et al. 2022)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from fastddpm.common.arguments import whole
from fastddpm.kernels.operands import COLUMNS
from fastddpm.kernels.philox import VISIT
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.table import StepTable

MOST_RESAMPLINGS = 128
"""Visits of a timestep that have noise of their own; rows that only jump have as many again."""
USUAL_JUMP = 10
"""Lugmayr et al.'s jump length, of 250 steps."""

_COLUMN = {name: i for i, name in enumerate(COLUMNS)}


def resampled(
    table: StepTable,
    schedule: NoiseSchedule,
    *,
    jump_length: int | None = None,
    resamplings: int = 10,
    function: str = "resampled",
) -> StepTable:
    """The rows of a table in RePaint's order (Lugmayr et al. 2022, Algorithm 1 and sec. 4.2), jumps included.

    Every `jump_length` rows, counted from the last, the run goes back up by as many rows and makes them again, until
    each was made `resamplings` times: the order of the authors' code as diffusers' RePaintScheduler has it. A row that
    lands at x with ᾱ_prev and then jumps to ᾱ_to gives r·x + √(1 − r²)·z', r² = ᾱ_to/ᾱ_prev. That is one row: the
    coefficients of the mean times r, and σ² = r² σ_prev² + 1 − r². So a jump asks the network for nothing.

    Where the variance is learned, r² σ_prev² + 1 − r² is no exponential of what the network says, and a jump is a row
    of its own, x ← r·x + √(1 − r²)·z, which is exact, and whose output of the network counts for nothing.

    Args:
        table: the run, whose rows each lead to where the next begins or above it.
        schedule: the schedule that it was made for.
        jump_length: rows that a jump goes back, 1 … S−1; None is a fifth of them, and 10 at the most.
        resamplings: how often each row that jumps lead back to is made, 1 … 128; 1 is the table as it is.
        function: name that starts the error messages.

    Returns:
        The longer table. A timestep's noise is another one each time that it is come back to.

    Raises:
        TypeError: a number is not an int.
        ValueError: it is out of range, or the solver looks back at rows before.
    """
    S, resamplings = table.S, whole(function, "resamplings", resamplings)
    if not 1 <= resamplings <= MOST_RESAMPLINGS:
        raise ValueError(
            f"{function}: resamplings must be in 1 … {MOST_RESAMPLINGS}, got {resamplings}; the paper takes 10"
        )
    if resamplings == 1:
        return table
    if table.history:
        raise ValueError(
            f"{function}: solver must be ddpm or ddim where a run jumps back, got {table.solver}, which looks back at "
            "rows of another level; or take resamplings=1"
        )
    length = min(USUAL_JUMP, max(1, S // 5)) if jump_length is None else whole(function, "jump_length", jump_length)
    if not 1 <= length < S:
        raise ValueError(
            f"{function}: jump_length must be in 1 … {S - 1} for {S} steps, got {length}; "
            + ("jump a shorter way" if S > 1 else "take more steps, or resamplings=1")
        )
    return _in_order(table, schedule.alphas_cumprod_exact, _visits(S, length, resamplings))


def _visits(S: int, length: int, resamplings: int) -> list[int]:
    """The rows in the order in which they are made."""
    order = []
    for row in range(S):
        order.append(row)
        left = S - 1 - row
        if left % length == 0 and left < S - length:
            order += list(range(row - length + 1, row + 1)) * (resamplings - 1)
    return order


def _in_order(table: StepTable, alphas_cumprod: Tensor, order: list[int]) -> StepTable:
    """The table with its rows in another order, each landing where the next begins."""
    exact, times, seen = table.rows.double(), table.timesteps.tolist(), Counter[int]()
    guides = torch.zeros(table.S + 1, 2) if table.guides is None else table.guides
    rows, timesteps, counters, moves = [], [], [], []

    def add(row: Tensor, t: int, visit: int, guide: Tensor) -> None:
        rows.append(row)
        timesteps.append(t)
        counters.append(t + visit * VISIT)
        moves.append(guide)

    for here, after in zip(order, [*order[1:], table.S], strict=True):
        visit = seen[here]
        seen[here] += 1
        if after > here:
            add(exact[here], times[here], visit, guides[here])
            continue
        target = float(alphas_cumprod[times[after]])
        if table.variance == "learned_range":
            add(exact[here], times[here], visit, guides[here])
            add(_jumped(_resting(exact[here]), target), times[after], MOST_RESAMPLINGS + visit, torch.zeros(2))
        else:
            kept = torch.stack((_kept(exact[here], target).sqrt().float(), torch.ones(())))
            add(_jumped(exact[here], target), times[here], visit, guides[here] * kept)
    add(exact[table.S], 0, 0, torch.zeros(2))
    return replace(
        table,
        rows=torch.stack(rows).float(),
        timesteps=torch.tensor(timesteps),
        counters=torch.tensor(counters),
        uses_noise=True,
        guides=None if table.guides is None else torch.stack(moves),
    )


def _kept(row: Tensor, target: float) -> Tensor:
    """The part of the signal's square that is left when a row goes on to the level ᾱ = target from where it lands."""
    signal, noise = row[_COLUMN["k_0"]] ** 2, row[_COLUMN["k_z"]] ** 2
    return target / (1.0 - noise if noise < 0.5 else signal)  # of the two, the one that float32 holds more closely


def _jumped(row: Tensor, target: float) -> Tensor:
    """A row that goes on to the level ᾱ = target from where it lands."""
    kept, new = _kept(row, target), row.clone()
    for name in ("c_0", "c_x", "c_o"):
        new[_COLUMN[name]] *= kept.sqrt()
    new[_COLUMN["sigma"]] = (kept * row[_COLUMN["sigma"]] ** 2 + 1.0 - kept).sqrt()
    new[_COLUMN["k_0"]], new[_COLUMN["k_z"]] = target**0.5, (1.0 - target) ** 0.5
    return new


def _resting(row: Tensor) -> Tensor:
    """A row that stays at the level where another one lands, and takes x as it is for its estimate."""
    new = torch.zeros_like(row)
    for name in ("a_x", "c_x"):
        new[_COLUMN[name]] = 1.0
    for name in ("bound", "k_0", "k_z"):
        new[_COLUMN[name]] = row[_COLUMN[name]]
    return new
