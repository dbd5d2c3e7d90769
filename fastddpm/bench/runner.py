"""The run: makes each workload's files, starts its workers, compares their pictures, times them in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.bench.figures import BatchResult, Equality, PeerResult, Quantiles, WorkloadResult
from fastddpm.bench.process import WorkerError, WorkerProcess, side_by_side
from fastddpm.bench.twins import NoTwinError, random_folder, twin_folder
from fastddpm.bench.worker import COMPILES, precision_of
from fastddpm.bench.workloads import OURS, Job, Workload
from fastddpm.checkpoints import load_checkpoint

LIMITS = "limits"
WARM_UP_SHARE = 0.8
"""Of a batch's time, how much may go into the first runs, compilation included."""
ANSWER_S = 120.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is done.

    Attributes:
        seconds: the whole run's time.
        rounds: most timed runs of each peer at a batch size.
        threads: CPU threads.
        jobs: workers that load and compile at a time.
        device: "cpu" or "cuda".
        cold: whether compilers start with empty caches, so that compile times are those of a first use.
        reuse: whether a peer keeps its process for all workloads, which saves time; its memory then says little.
        over_steps: numbers of steps whose whole runs are timed, for the first workload's smallest batch.
    """

    seconds: float
    rounds: int
    threads: int
    jobs: int = 2
    device: str = "cpu"
    cold: bool = False
    reuse: bool = False
    over_steps: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, quick: bool, threads: int, device: str = "cpu", cold: bool = False, minutes: float | None = None
    ) -> Settings:
        """Those of a quick or a full run: two minutes or fifteen, unless the caller says otherwise.

        A part is set aside for the memory curve and the files. Cold compilers get twice the time.
        """
        minutes = minutes or (2 if quick else 15) * (1 + cold)
        seconds = 60 * minutes - min(30 * minutes, 30 if quick else 120)
        rounds, steps = (5, (5, 10, 20)) if quick else (9, (5, 10, 20, 40))
        return cls(seconds, rounds, threads, device=device, cold=cold, reuse=quick, over_steps=steps)


OnEvent = Callable[[str, int, str, str], None]
"""(workload, batch, peer, what happens)"""
OnResult = Callable[[WorkloadResult, BatchResult], None]


def run(
    workloads: Sequence[Workload],
    settings: Settings,
    on_event: OnEvent = lambda *_: None,
    on_result: OnResult = lambda *_: None,
) -> Iterator[WorkloadResult]:
    """Measure workloads one after the other.

    Args:
        workloads: what to measure.
        settings: how.
        on_event: is told what is going on.
        on_result: is called when a batch size is done.

    Yields:
        The result of each workload when it is there.
    """
    end = time.monotonic() + settings.seconds
    shares = sum(workload.share for workload in workloads)
    pool: dict[str, WorkerProcess] = {}
    with tempfile.TemporaryDirectory(prefix="fastddpm-bench-") as scratch, contextlib.ExitStack() as stack:
        stack.callback(_close_all, pool)
        for workload in workloads:
            allowed = (end - time.monotonic()) * workload.share / shares
            shares -= workload.share
            folder = Path(scratch) / workload.name
            folder.mkdir()
            with WorkloadRun(workload, settings, folder, Path(scratch), on_event, pool) as one:
                yield one.measure(time.monotonic() + allowed, on_result)


def make_job(workload: Workload, folder: Path, settings: Settings) -> Job:
    """Make a workload's files and say where they are.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ImportError: diffusers is needed to make the network and is not there.
    """
    common: dict[str, Any] = {"scratch": str(folder), "threads": settings.threads, "device": settings.device}
    if workload.is_update:
        return Job("", {}, (3, 32, 32), 1000, None, "", "", None, **common)
    model, flags = workload.model, workload.flags
    if workload.unet is not None:
        model = str(random_folder(folder / "diffusers", workload.unet, workload.variance))
    checkpoint = load_checkpoint(model, **flags)
    twin, why = (model if workload.unet is not None else ""), ""
    if not twin:
        try:
            twin = str(twin_folder(folder / "diffusers", checkpoint))
        except (NoTwinError, ImportError) as error:
            why = str(error)
    spec = checkpoint.spec
    return Job(
        model, flags, spec.shape, checkpoint.schedule.T, spec.num_classes, twin, why, workload.lucidrains, **common
    )


class WorkloadRun:
    """The workers of one workload; a context that ends them.

    Args:
        workload: what is measured.
        settings: how.
        folder: for the workload's files.
        scratch: for files of the whole run, such as compilers' caches.
        on_event: is told what is going on.
        pool: workers that earlier workloads left, and where this one leaves its own if they are used again.
    """

    def __init__(
        self,
        workload: Workload,
        settings: Settings,
        folder: Path,
        scratch: Path,
        on_event: OnEvent = lambda *_: None,
        pool: dict[str, WorkerProcess] | None = None,
    ) -> None:
        self.workload, self.settings, self.folder = workload, settings, folder
        self._environment = _caches(scratch) if settings.cold else {}
        self._say = functools.partial(on_event, workload.name)
        self._pool = {} if pool is None else pool
        self._workers: dict[str, WorkerProcess] = {}
        self._loaded: dict[str, dict[str, Any]] = {}
        self._gone: dict[str, str] = {}
        self.result = WorkloadResult(workload.name, workload.title)

    def __enter__(self) -> WorkloadRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.settings.reuse:
            self._pool.update(self._workers)
        else:
            _close_all(self._workers)

    def measure(self, until: float, on_result: OnResult = lambda *_: None) -> WorkloadResult:
        """Measure all batch sizes by `time.monotonic()` = until."""
        self._say(0, "", "making the network")
        try:
            self._job = make_job(self.workload, self.folder, self.settings)
        except ImportError as error:
            self.result.note = str(error)
            return self.result
        weights = [1.0 for _ in self.workload.batches]  # compiling takes as long for small batches as for large ones
        weights[0] = 2.0  # every peer is loaded there
        for i, (batch, steps) in enumerate(zip(self.workload.batches, self.workload.steps, strict=True)):
            allowed = (until - time.monotonic()) * weights[i] / sum(weights[i:])
            one = self._measure_batch(batch, steps, time.monotonic() + allowed)
            self.result.batches.append(one)
            on_result(self.result, one)
        return self.result

    # ------------------------------------------------------------------ the first runs

    def _measure_batch(self, batch: int, steps: int, until: float) -> BatchResult:
        result = BatchResult(batch, steps)
        result.peers = [PeerResult(peer, precision_of(peer)) for peer in self.workload.peers]
        allowed = until - time.monotonic()
        self._warm_up(result, time.monotonic() + WARM_UP_SHARE * allowed)
        self._judge(result)
        self._count_flops()
        self._time(result, until)
        for peer in result.peers:
            if peer.seconds:
                self._look_closer(result, peer, until)
        is_first = self.workload.batches[0] == batch
        if self.settings.over_steps and is_first and not self.workload.is_update and self.workload.model:
            self._cost_over_steps(result)
        self._summarise(result)
        return result

    def _warm_up(self, result: BatchResult, until: float) -> None:
        """Load and run each peer for the first time; what fails is noted and left out from here on."""
        found = {peer.peer: peer for peer in result.peers}
        everyone = [LIMITS, *found]
        for name in everyone:
            if name in self._gone and name in found:
                found[name].note = self._gone[name]
            elif name not in self._workers:
                left = self._pool.pop(name, None)
                self._workers[name] = self._start(name) if left is None else left
        fresh = [name for name in everyone if name in self._workers and name not in self._loaded]
        load: dict[str, Any] = {"do": "load", "job": dataclasses.asdict(self._job)}
        check: dict[str, Any] = {
            "do": "check",
            "batch": result.batch,
            "steps": result.steps,
            "out": str(self.folder / "{peer}.npy"),
        }

        def on_answer(worker: WorkerProcess, answers: list[dict[str, Any]] | WorkerError) -> None:
            self._take_in(worker, answers, found.get(worker.peer), result.batch)

        def on_start(worker: WorkerProcess) -> None:
            self._say(result.batch, worker.peer, "first run")

        # Ours first, without which there is nothing to compare; other compilers last: they must not cost the others
        # their turn. What needs no loading runs alone, because thread pools that spin slow each other down.
        known = [name for name in found if name not in fresh]
        several, both = self.settings.jobs, [load, check]
        turns: list[tuple[int, list[str], list[dict[str, Any]]]] = [
            (1, [name for name in fresh if name == LIMITS], [load]),
            (several, [name for name in fresh if name in COMPILES and name in OURS], both),
            (1, [name for name in known if name in OURS], [check]),
            (1, [name for name in known if name not in COMPILES and name not in OURS], [check]),
            (several, [name for name in fresh if name not in COMPILES and name != LIMITS], both),
            (several, [name for name in fresh if name in COMPILES and name not in OURS], both),
            (1, [name for name in known if name in COMPILES and name not in OURS], [check]),
        ]
        for jobs, those, requests in turns:
            workers = [self._workers[name] for name in those if name in self._workers]
            side_by_side(workers, requests, jobs, until, on_answer, on_start)

    def _start(self, name: str) -> WorkerProcess:
        return WorkerProcess(name, self.folder, self.settings.threads, self._environment)

    def _take_in(
        self,
        worker: WorkerProcess,
        answers: list[dict[str, Any]] | WorkerError,
        peer: PeerResult | None,
        batch: int,
    ) -> None:
        if isinstance(answers, WorkerError):
            if not answers.postponed:
                self._lose(worker.peer, str(answers), peer, batch)
            elif peer is not None:
                peer.note = str(answers)
                self._say(batch, peer.peer, peer.note)
            return
        if worker.peer not in self._loaded:
            self._loaded[worker.peer] = answers[0]
        if peer is not None:
            peer.load_s = self._loaded[worker.peer]["load_s"]
            peer.first_s, peer.again_s = answers[-1]["first_s"], answers[-1]["again_s"]
            self._say(batch, peer.peer, f"first run took {peer.first_s:.1f} s")

    def _lose(self, name: str, why: str, peer: PeerResult | None, batch: int) -> None:
        self._gone[name] = why
        if name in self._workers:
            self._workers.pop(name).close()
        if peer is not None:
            peer.note = why
            self._say(batch, name, why)

    def _judge(self, result: BatchResult) -> None:
        """Compare all pictures with the textbook's, or with our eager engine's where there is no textbook."""
        there = [peer for peer in result.peers if peer.first_s is not None]
        drawn = {peer.peer: np.load(self.folder / f"{peer.peer}.npy") for peer in there}
        base = next((name for name in ("reference", "fastddpm-eager", "diffusers") if name in drawn), None)
        for peer in there:
            reference = None if base is None else drawn[base]
            compares = bool(self._loaded[peer.peer]["compares"])
            peer.equality = Equality.judge(drawn[peer.peer], reference, peer.precision, compares)
            if not peer.equality.holds:
                peer.note = f"not timed: its pictures differ from those of {base} by {peer.equality}"
                self._say(result.batch, peer.peer, peer.note)

    def _count_flops(self) -> None:
        for field, names in (
            ("flop", ("reference", "fastddpm-eager", "diffusers")),
            ("lucidrains_flop", ("lucidrains",)),
        ):
            for name in names:
                if not getattr(self.result, field) and name in self._loaded and name in self._workers:
                    with contextlib.suppress(WorkerError):
                        setattr(self.result, field, self._workers[name].ask({"do": "flops"}, ANSWER_S)["flops"])

    # ------------------------------------------------------------------ the timed runs

    def _time(self, result: BatchResult, until: float) -> None:
        """Rounds in which each peer runs once; every other round in reverse, so that a drift takes no side."""
        timed = [peer for peer in result.peers if peer.equality is not None and peer.equality.holds]
        precisions = sorted({peer.precision for peer in timed})
        self._peaks: list[dict[str, float]] = []
        began = time.monotonic()
        for number in range(self.settings.rounds):
            per_round = (time.monotonic() - began) / max(1, number)
            if not timed or (number >= 2 and time.monotonic() + per_round > until):
                break
            self._peaks.append(self._measure_limits(precisions))
            for peer in timed if number % 2 == 0 else reversed(timed):
                self._say(result.batch, peer.peer, f"round {number + 1}")
                try:
                    answer = self._workers[peer.peer].ask({"do": "run"}, ANSWER_S)
                except WorkerError as error:
                    self._lose(peer.peer, str(error), peer, result.batch)
                    peer.seconds = []
                    continue
                peer.seconds.append(answer["seconds"])
            timed = [peer for peer in timed if peer.peer in self._workers]
            result.rounds = number + 1

    def _measure_limits(self, precisions: Sequence[str]) -> dict[str, float]:
        if LIMITS not in self._workers:
            return {}
        try:
            answer = self._workers[LIMITS].ask({"do": "measure", "precisions": precisions}, ANSWER_S)
        except WorkerError:
            return {}
        measured: dict[str, float] = answer["measured"]
        return measured

    def _look_closer(self, result: BatchResult, peer: PeerResult, until: float) -> None:
        """Memory, and the time of a step outside the network; a failure only leaves these out."""
        self._say(result.batch, peer.peer, "memory and overhead")
        worker = self._workers[peer.peer]
        try:
            if peer.peer not in OURS or "compiled" not in peer.peer:
                self._look_at_memory(worker, peer)
            elif result.batch == self.workload.batches[-1]:
                self._look_at_memory_of_second_start(result, peer)
            # A compiled engine compiles anew for this: once, at the smallest batch, where it weighs most.
            is_cheap = "compiled" not in peer.peer or result.batch == self.workload.batches[0]
            if not self.workload.is_update and is_cheap and time.monotonic() < until:
                peer.outside_ms = worker.ask({"do": "outside"}, ANSWER_S)["ms"]
        except WorkerError as error:
            if peer.peer in self._workers and "no answer" in str(error):
                self._lose(peer.peer, str(error), None, result.batch)

    def _look_at_memory(self, worker: WorkerProcess, peer: PeerResult) -> None:
        memory = worker.ask({"do": "memory"}, ANSWER_S)
        peer.run_bytes, peer.whole_bytes = memory["run_bytes"], memory["whole_bytes"]

    def _look_at_memory_of_second_start(self, result: BatchResult, peer: PeerResult) -> None:
        """In a new process that finds its package: one that has compiled keeps what the compiler took."""
        again = self.folder / "again"
        again.mkdir(exist_ok=True)
        began = time.monotonic()
        worker = WorkerProcess(peer.peer, again, self.settings.threads, self._environment)
        try:
            worker.ask({"do": "load", "job": dataclasses.asdict(self._job)}, ANSWER_S)
            out = str(again / "pictures.npy")
            answer = worker.ask({"do": "check", "batch": result.batch, "steps": result.steps, "out": out}, ANSWER_S)
            peer.second_s = time.monotonic() - began - answer["again_s"]
            self._look_at_memory(worker, peer)
        finally:
            worker.close()

    def _cost_over_steps(self, result: BatchResult) -> None:
        """Whole runs of several lengths, three of each, the fastest counted."""
        request = {"do": "check", "batch": result.batch, "out": str(self.folder / "steps.npy")}
        for peer in result.peers:
            if not peer.seconds or peer.peer not in self._workers or peer.precision != "fp32":
                continue
            self._say(result.batch, peer.peer, "cost over steps")
            with contextlib.suppress(WorkerError):
                worker, costs = self._workers[peer.peer], {}
                for steps in filter(self._job.T.__ge__, self.settings.over_steps):
                    worker.ask({**request, "steps": steps}, ANSWER_S)
                    costs[str(steps)] = min(worker.ask({"do": "run"}, ANSWER_S)["seconds"] for _ in range(3))
                result.over_steps[peer.peer] = costs

    def _summarise(self, result: BatchResult) -> None:
        for peer in result.peers:
            flop = self.result.lucidrains_flop if peer.peer == "lucidrains" else self.result.flop
            peaks = [measured.get(peer.precision, 0.0) for measured in self._peaks]
            peer.summarise(result.steps, flop * result.batch, peaks)
        for precision in {key for measured in self._peaks for key in measured}:
            values = Quantiles.of([measured[precision] for measured in self._peaks if precision in measured])
            if precision == "copy":
                result.copy_gb_s = values
            else:
                result.peak_gflops[precision] = values
        result.compare()


def _close_all(workers: Mapping[str, WorkerProcess]) -> None:
    for worker in workers.values():
        worker.close()


def _caches(scratch: Path) -> Mapping[str, str]:
    """Empty caches for compilers."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "FASTDDPM_CACHE": str(scratch / "fastddpm"),
    }


def default_threads() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
