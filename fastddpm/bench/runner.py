"""The run: makes each workload's files, gets its peers ready, compares their pictures, times them in turn."""

from __future__ import annotations

import concurrent.futures
import functools
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from fastddpm.bench import extras
from fastddpm.bench.entrants import COMPILES, PACKAGED, cannot, precision_of
from fastddpm.bench.figures import BatchResult, PeerResult, Quantiles, WorkloadResult
from fastddpm.bench.job import make_job
from fastddpm.bench.lineup import ANSWER_S, LIMITS, Lineup
from fastddpm.bench.process import WorkerError
from fastddpm.bench.settings import Deadline, Settings
from fastddpm.bench.timing import in_turn
from fastddpm.bench.workloads import Workload

LEAST_ROUNDS = 3
"""That are made in any case."""
LEAST_ROUNDS_S = 10.0
"""More rounds are not cut below this, however late it is."""
NO_TIME = "left out: no time was left for it; --minutes gives more"

OnEvent = Callable[[str, int, str, str], None]
"""(workload, batch, peer, what happens)"""
OnResult = Callable[[WorkloadResult, BatchResult], None]


def run(
    workloads: Sequence[Workload],
    settings: Settings,
    on_event: OnEvent = lambda *_: None,
    on_result: OnResult = lambda *_: None,
) -> Generator[WorkloadResult]:
    """Measure workloads one after the other.

    Args:
        workloads: what to measure.
        settings: how.
        on_event: is told what is going on.
        on_result: is called when a batch size is done.

    Yields:
        The result of each workload when it is there.
    """
    deadline, pace = Deadline(settings.seconds), Pace()
    with tempfile.TemporaryDirectory(prefix="fastddpm-bench-") as scratch:
        environment = _caches(Path(scratch)) if settings.cold else {}
        for i, workload in enumerate(workloads):
            folder = Path(scratch) / workload.name
            folder.mkdir()
            ahead_s = sum(_cold_s(later, settings) * len(later.batches) for later in workloads[i + 1 :])
            one = WorkloadRun(workload, settings, deadline, ahead_s, on_event, pace)
            yield one.measure(folder, environment, on_result)


class Pace:
    """How much slower than estimated peers get ready here: learnt from those that did, never below 1."""

    def __init__(self) -> None:
        self._taken = self._estimated = 0.0

    def learn(self, name: str, seconds: float) -> None:
        """A peer got ready."""
        self._taken += seconds
        self._estimated += estimate(name)

    @property
    def factor(self) -> float:
        """What estimates are to be multiplied by."""
        return max(1.0, self._taken / self._estimated) if self._estimated else 1.0


class WorkloadRun:
    """One workload, measured.

    Args:
        workload: what is measured.
        settings: how.
        deadline: of the whole run.
        ahead_s: seconds that later workloads need.
        on_event: is told what is going on.
        pace: of the machine.
    """

    def __init__(
        self,
        workload: Workload,
        settings: Settings,
        deadline: Deadline,
        ahead_s: float = 0.0,
        on_event: OnEvent = lambda *_: None,
        pace: Pace | None = None,
    ) -> None:
        self.pace = pace or Pace()
        self.workload, self.settings, self.deadline, self.ahead_s = workload, settings, deadline, ahead_s
        self.say = functools.partial(on_event, workload.name)
        self.result = WorkloadResult(workload.name, workload.title)

    def measure(
        self, folder: Path, environment: Mapping[str, str], on_result: OnResult = lambda *_: None
    ) -> WorkloadResult:
        """Measure all batch sizes; what there is no time for has a note."""
        if self.deadline.left <= 0:
            self.result.note = NO_TIME
            return self.result
        self.say(0, "", "making the network")
        settings = self.settings
        job = make_job(
            self.workload, folder, threads=settings.threads, device=settings.device, steps_only=settings.steps_only,
            dry=settings.dry,
        )  # fmt: skip
        # The pool outlives its lineup: workers end with the thread that started them.
        pool = concurrent.futures.ThreadPoolExecutor(settings.side_by_side)
        with pool, Lineup(job, folder, settings, environment, self.say) as lineup:
            map_ = pool.map if settings.side_by_side > 1 else map
            for i, (batch, steps) in enumerate(zip(self.workload.batches, self.workload.steps, strict=True)):
                later = len(self.workload.batches) - i - 1
                one = BatchResult(batch, steps, peers=[PeerResult(n, precision_of(n)) for n in self.workload.everyone])
                self.result.batches.append(one)
                ahead_s = self.ahead_s + later * _cold_s(self.workload, settings)
                self.say(batch, "", "peers get ready")
                lineup.open_limits()
                list(map_(functools.partial(self._make_ready, lineup, one, ahead_s), one.peers))
                self._measure_batch(lineup, one, ahead_s)
                on_result(self.result, one)
        return self.result

    def _measure_batch(self, lineup: Lineup, one: BatchResult, ahead_s: float) -> None:
        lineup.judge(one)
        self.result.flop = self.result.flop or lineup.flops("reference", *self.workload.everyone)
        self.result.lucidrains_flop = self.result.lucidrains_flop or lineup.flops("lucidrains")
        spare = functools.partial(self._spare, ahead_s)
        peaks = self.time_rounds(lineup, one, min(self.settings.rounds_s, max(LEAST_ROUNDS_S, spare())))
        is_first = one.batch == self.workload.batches[0]
        if self.settings.looks:
            extras.look(lineup, one, spare, is_first)
        if self.settings.over_steps and is_first and self.workload.model:
            extras.over_steps(lineup, one, self.settings.over_steps, spare)
        self._summarise(one, peaks)

    def _make_ready(self, lineup: Lineup, one: BatchResult, ahead_s: float, peer: PeerResult) -> None:
        # In miniature slowness does not matter, and everything is to run once.
        peer.note = "" if self.settings.dry else cannot(peer.peer, self.settings.device)
        if peer.note:
            self.say(one.batch, peer.peer, peer.note)
            return
        rounds_s = LEAST_ROUNDS * sum(other.again_s or 0.0 for other in one.peers)
        seconds = self.allowed(peer.peer, ahead_s + self.settings.rounds_s, rounds_s)
        if seconds > 0:
            lineup.make_ready(peer, one.batch, one.steps, seconds)
            if peer.ready_s is not None:
                self.pace.learn(peer.peer, peer.ready_s)
        else:
            peer.note = NO_TIME
            self.say(one.batch, peer.peer, NO_TIME)

    def allowed(self, name: str, ahead_s: float, rounds_s: float = 0.0) -> float:
        """Seconds in which a peer may get ready; 0 if it is left out.

        Those that always take part may have all that is left but for the rounds of those that are ready, which take
        `rounds_s`; the others what is spare.
        """
        if name not in self.workload.more:
            return max(0.0, min(self.settings.allowance_s, self.deadline.left - rounds_s))
        spare = self._spare(ahead_s)
        return min(self.settings.allowance_s, spare) if spare >= self.pace.factor * estimate(name) else 0.0

    def _spare(self, ahead_s: float) -> float:
        """Seconds that are left when what is still to come takes as much longer than estimated as what is done did."""
        return self.deadline.left - self.pace.factor * ahead_s

    def time_rounds(self, lineup: Lineup, one: BatchResult, within_s: float) -> list[dict[str, float]]:
        """Rounds in which each peer runs once, within `within_s`; returns the machine's limits in each of them."""
        timed = {peer.peer: peer for peer in one.peers if peer.equality is not None and peer.equality.holds}
        precisions = sorted({peer.precision for peer in timed.values()})
        peaks: list[dict[str, float]] = []

        def measure_limits(number: int) -> None:
            self.say(one.batch, "", f"round {number + 1} of {self.settings.rounds}")
            try:
                peaks.append(lineup.ask(LIMITS, do="measure", precisions=precisions)["measured"])
            except (WorkerError, KeyError):
                peaks.append({})

        def measure(peer: PeerResult) -> float | None:
            try:
                return float(lineup.ask(peer.peer, ANSWER_S, do="run")["seconds"])
            except WorkerError as error:
                lineup.lose(peer, str(error), one.batch)
                return None

        measures = {name: functools.partial(measure, peer) for name, peer in timed.items()}
        taken = in_turn(measures, self.settings.rounds, seconds=within_s, least=LEAST_ROUNDS, before=measure_limits)
        for name, seconds in taken.items():
            timed[name].seconds = seconds
        one.rounds = max((len(seconds) for seconds in taken.values()), default=0)
        return peaks

    def _summarise(self, one: BatchResult, peaks: Sequence[Mapping[str, float]]) -> None:
        for peer in one.peers:
            flop = self.result.lucidrains_flop if peer.peer == "lucidrains" else self.result.flop
            peer.summarise(one.steps, one.batch, flop, [measured.get(peer.precision, 0.0) for measured in peaks])
        for precision in {key for measured in peaks for key in measured}:
            values = Quantiles.of([measured[precision] for measured in peaks if precision in measured])
            if precision == "copy":
                one.copy_gb_s = values
            else:
                one.peak_gflops[precision] = values
        one.compare()


def estimate(name: str) -> float:
    """Seconds that a peer takes to get ready when nothing is compiled yet, on two cores."""
    if name.startswith(("openvino", "onnxruntime")):
        return 20.0
    return 60.0 if name in COMPILES or name in PACKAGED else 6.0


def _cold_s(workload: Workload, settings: Settings) -> float:
    """What a batch size of a workload needs: rounds may be shorter than usual, and so may allowances."""
    return min(workload.cold_s, len(workload.peers) * settings.allowance_s)


def left_out(results: Sequence[WorkloadResult]) -> list[str]:
    """A line for each peer that was not timed, and each workload that was not measured."""
    lines = [f"{result.name}: {result.note}" for result in results if result.note]
    for result in results:
        lines += [f"{result.name}, B = {one.batch}, {p.peer}: {p.note}" for one in result.batches for p in one.peers
                  if p.note]  # fmt: skip
    return lines


def _caches(scratch: Path) -> Mapping[str, str]:
    """Empty caches for compilers."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "FASTDDPM_CACHE": str(scratch / "fastddpm"),
    }
