"""How a run is done: its time, its rounds, and what each peer is allowed."""

from __future__ import annotations

import dataclasses
import os
import time

ALLOWANCE_S = 300.0
MINUTES = {"full": 20.0, "quick": 3.0}
AFTERWARDS_S = {"full": 90.0, "quick": 10.0}
"""Kept free for the memory curve, the files and the plots."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is done.

    Attributes:
        seconds: the whole run's time. What has not begun by then is left out, with a line.
        rounds: timed runs of each peer at a batch size.
        threads: CPU threads of every peer.
        device: "cpu" or "cuda".
        allowance_s: what a peer gets to start, load, compile and draw its first pictures at a batch size.
        rounds_s: no further round is begun that would end later, beyond three.
        cold: whether compilers start with empty caches, so that compile times are those of a first use.
        looks: whether memory and the time outside the network are measured too.
        over_steps: numbers of steps whose whole runs are timed, for a checkpoint's smallest batch.
        local: whether all peers share this process: for one alone.
        side_by_side: how many peers may get ready at once: on GPUs, where compiling leaves most cores idle.
        steps_only: as in `Job`.
        dry: as in `Job`.
    """

    seconds: float
    rounds: int
    threads: int
    device: str = "cpu"
    allowance_s: float = ALLOWANCE_S
    rounds_s: float = 40.0
    cold: bool = False
    looks: bool = True
    over_steps: tuple[int, ...] = ()
    local: bool = False
    side_by_side: int = 1
    steps_only: bool = False
    dry: bool = False

    @classmethod
    def of(
        cls,
        quick: bool,
        threads: int,
        device: str = "cpu",
        cold: bool = False,
        minutes: float | None = None,
        allowance_s: float = ALLOWANCE_S,
    ) -> Settings:
        """Those of a quick or a full run: three minutes or twenty, unless the caller says otherwise."""
        kind = "quick" if quick else "full"
        minutes = minutes or MINUTES[kind]
        on_gpu = device != "cpu"
        return cls(
            seconds=60 * minutes - min(AFTERWARDS_S[kind], 15 * minutes),
            rounds=5 if quick else 9,
            threads=threads,
            device=device,
            allowance_s=allowance_s,
            rounds_s=12.0 if quick else 40.0,
            cold=cold,
            looks=not quick,
            over_steps=() if quick or on_gpu else (5, 10, 20, 40),
            steps_only=on_gpu,
        )

    def sentence(self) -> str:
        """The allowances in one line, for people."""
        return (
            f"each peer gets up to {self.allowance_s:.0f} s to get ready at a batch size, then up to {self.rounds} "
            f"rounds are shared; what has not begun after {self.seconds / 60:.3g} minutes is left out"
        )


class Deadline:
    """When a run must be done.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative afterwards."""
        return self._end - time.monotonic()


def default_threads() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
