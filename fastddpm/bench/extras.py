"""What is looked at besides speed, where time is left: memory, steps outside the network, runs of several lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from fastddpm.bench.entrants import COMPILES
from fastddpm.bench.figures import BatchResult, PeerResult
from fastddpm.bench.lineup import Lineup
from fastddpm.bench.process import WorkerError

OUTSIDE_S = {False: 5.0, True: 45.0}
"""What measuring a step outside the network takes, without and with compiling."""
REPEATS = 3


def look(lineup: Lineup, result: BatchResult, spare: Callable[[], float], is_first: bool) -> None:
    """Memory of each timed peer, and its time outside the network; a failure only leaves these out.

    Args:
        lineup: the workers.
        result: of a batch size; it is filled in.
        spare: tells the seconds that are left beside what comes.
        is_first: whether this is the smallest batch, where the time outside the network weighs most.
    """
    for peer in [peer for peer in result.peers if peer.seconds]:
        compiles = peer.peer in COMPILES
        lineup.say(result.batch, peer.peer, "memory and overhead")
        try:
            memory = lineup.ask(peer.peer, do="memory")
            peer.run_bytes, peer.whole_bytes = memory["run_bytes"], memory["whole_bytes"]
            time_is_left = spare() > OUTSIDE_S[compiles]
            if lineup.job.model and not lineup.job.steps_only and time_is_left and (is_first or not compiles):
                peer.outside_ms = lineup.ask(peer.peer, do="outside")["ms"]
        except WorkerError as error:
            lineup.say(result.batch, peer.peer, f"memory and overhead are left out: {error}")
            lineup.end(peer.peer)  # it may still be at it


def over_steps(lineup: Lineup, result: BatchResult, counts: Sequence[int], spare: Callable[[], float]) -> None:
    """Whole runs of several lengths, the fastest of three counted, of those in float32."""
    for peer in [peer for peer in result.peers if peer.seconds and peer.precision == "fp32"]:
        if peer.peer not in lineup.workers or spare() < _estimate(peer, result.steps, counts):
            continue
        lineup.say(result.batch, peer.peer, "cost over steps")
        costs: dict[str, float] = {}
        with contextlib.suppress(WorkerError):
            for steps in filter(lineup.job.T.__ge__, counts):
                out = str(lineup.folder / "steps.npy")
                lineup.ask(peer.peer, do="check", batch=result.batch, steps=steps, out=out)
                costs[str(steps)] = min(lineup.ask(peer.peer, do="run")["seconds"] for _ in range(REPEATS))
            result.over_steps[peer.peer] = costs


def _estimate(peer: PeerResult, steps: int, counts: Sequence[int]) -> float:
    return (REPEATS + 2) * sum(counts) * min(peer.seconds) / steps
