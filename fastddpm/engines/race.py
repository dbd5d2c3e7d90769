"""A race: ways to make the same step, timed in turn, so that what else runs on the machine meets them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fastddpm.engines.runner import Runner, synchronize
from fastddpm.step.step import Call

ROUNDS = 4
"""Turns of each way, after one that is not counted."""
BUDGET_S = 3.0
"""After so long no further round is begun."""
_TURN_S = 0.02  # a turn of short steps is as many as fit
_PAUSE_S = 0.01  # before each turn: threads of another way's pool spin for a while before they sleep


Entrant = tuple[Callable[[Call], Runner], Call]
"""What makes a runner, and the call in the form that it takes."""


def race(ways: Sequence[Entrant]) -> list[float]:
    """The milliseconds of a step, the least of all timings: what else runs only ever adds.

    Args:
        ways: who takes part; the samples stay as they are.

    Returns:
        A time for each way.
    """
    runners: list[tuple[Runner, Call]] = []
    best, began = [float("inf")] * len(ways), time.perf_counter()
    try:
        for make, call in ways:
            runners.append((make(call.copy()), call))
        for runner, call in runners:
            _step(runner, call)
        for trial in range(ROUNDS):
            if trial and time.perf_counter() - began > BUDGET_S:
                break
            for i, (runner, call) in enumerate(runners):
                best[i] = min(best[i], _turn(runner, call))
    finally:
        for runner, _ in runners:
            runner.close()
    return [1000 * seconds for seconds in best]


def _turn(runner: Runner, call: Call) -> float:
    """The least seconds of a step in one turn."""
    if call.state.x.device.type == "cpu":
        time.sleep(_PAUSE_S)
    best, end = float("inf"), time.perf_counter() + _TURN_S
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _step(runner, call))
    return best


def _step(runner: Runner, call: Call) -> float:
    began = time.perf_counter()
    runner.run(1, call.noise)
    synchronize(runner.state)
    return time.perf_counter() - began
