"""The one way in which times are taken: a device's clock, measures in turn, calls replayed as one launch.

A GPU works behind its host's back, so its time is read off CUDA events, which it passes itself; a CPU's off the wall.
Whoever is compared takes turns, A B, B A, A B, so that a drift of the machine takes no side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch

from fastddpm.engines.gpu import capture_cuda_graph

Mark = TypeVar("Mark")


@dataclasses.dataclass(frozen=True)
class Clock(Generic[Mark]):
    """Milliseconds between two marks on a device's time line.

    Attributes:
        name: "wall" or "events", for the results.
        mark: puts a mark.
        milliseconds: those between two marks; waits until the second one is reached.
    """

    name: str
    mark: Callable[[], Mark]
    milliseconds: Callable[[Mark, Mark], float]

    @staticmethod
    def of(device: torch.device | str) -> Clock[torch.cuda.Event] | Clock[float]:
        """The clock of a device."""
        if torch.device(device).type == "cuda":
            return Clock("events", _event, _between_events)
        return Clock("wall", time.perf_counter, lambda first, second: 1e3 * (second - first))

    def spent(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call."""
        first = self.mark()
        call()
        return self.milliseconds(first, self.mark())


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between_events(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    second.synchronize()
    return float(first.elapsed_time(second))


def in_turn(
    measures: Mapping[str, Callable[[], float | None]],
    rounds: int,
    *,
    seconds: float = float("inf"),
    least: int = 3,
    before: Callable[[int], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Rounds in which each measure is taken once; every other round in reverse.

    Args:
        measures: name → takes one measurement; None says that it dropped out, and its earlier ones are dropped too.
        rounds: at most so many.
        seconds: no further round is begun that would end later than this, beyond the `least` ones.
        least: rounds that are always made.
        before: called with each round's number before it begins.

    Returns:
        Name → a value per round, for those that took part in all rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in measures}
    began = time.monotonic()
    for number in range(rounds):
        gone = time.monotonic() - began
        if number >= least and gone + gone / number > seconds:
            break
        if not taken:
            break
        before(number)
        for name in list(taken) if number % 2 == 0 else list(reversed(taken)):
            value = measures[name]()
            if value is None:
                del taken[name]
            else:
                taken[name].append(value)
    return taken


def replayed(call: Callable[[int], object], times: int, device: torch.device | str) -> Callable[[], object]:
    """`call(0)` … `call(times − 1)` as one launch from the host, so that a kernel's time is not that of calling it.

    Args:
        call: what to repeat; its argument tells the repetitions apart, to use another buffer in each.
        times: how often.
        device: on a GPU the calls are captured in a CUDA graph; elsewhere they are a loop.

    Raises:
        RuntimeError: the calls cannot be captured: they wait for the GPU, or allocate outside of PyTorch.
    """

    def loop() -> None:
        for i in range(times):
            call(i)

    return capture_cuda_graph(loop).replay if torch.device(device).type == "cuda" else loop
