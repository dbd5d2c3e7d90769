"""The peers of a workload: started, made ready one after the other, compared, and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from fastddpm.bench.entrants import PACKAGED
from fastddpm.bench.figures import BatchResult, Equality, PeerResult
from fastddpm.bench.hardware import memory_available
from fastddpm.bench.job import Job
from fastddpm.bench.process import AnyWorker, LocalWorker, WorkerError, WorkerProcess
from fastddpm.bench.settings import Settings
from fastddpm.bench.worker import Answer, Request

LIMITS = "limits"
ANSWER_S = 120.0
LEAST_BYTES = 1_500_000_000
"""Memory that must be left for whoever computes, beside those that wait."""
COMPILED_S = 5.0
"""A first run that took so much longer than the next one has compiled; to load what is compiled takes less."""
BASES = ("reference", "fastddpm-eager", "fastddpm-eager-tf32", "diffusers")
"""With whose pictures the others' are compared: the first that there is."""

Say = Callable[[int, str, str], None]
"""(batch, peer, what happens)"""


class Lineup:
    """The workers of one workload; a context that ends them.

    Args:
        job: what they load.
        folder: for their pictures and messages.
        settings: of the run.
        environment: added to that of their processes.
        say: is told what goes on.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        settings: Settings,
        environment: Mapping[str, str] | None = None,
        say: Say = lambda *_: None,
    ) -> None:
        self.job, self.folder, self.settings, self.say = job, folder, settings, say
        self.workers: dict[str, AnyWorker] = {}
        self._environment = environment or {}
        self._loaded: dict[str, Answer] = {}
        self._gone: dict[str, str] = {}

    def __enter__(self) -> Lineup:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.workers):
            self.end(name)
        if self.settings.local:
            torch.compiler.reset()  # what compilers keep would hold the networks

    def end(self, name: str) -> None:
        """End a worker, if it is there."""
        self._loaded.pop(name, None)
        if name in self.workers:
            self.workers.pop(name).close()

    def ask(self, name: str, seconds: float = ANSWER_S, **request: Unpack[Request]) -> Answer:
        """Put a request to a worker that is there.

        Raises:
            WorkerError: it failed, or did not answer within `seconds`.
        """
        return self.workers[name].ask(request, seconds)

    def open_limits(self) -> None:
        """Start the worker that measures the machine itself; without it, shares of peaks are left out."""
        if LIMITS not in self.workers:
            with contextlib.suppress(WorkerError):
                self._load(LIMITS, ANSWER_S)

    def make_ready(self, peer: PeerResult, batch: int, steps: int, seconds: float) -> None:
        """Start and load a peer unless that is done, and let it draw its first pictures.

        What fails, or takes more than `seconds`, has its reason in the result's note and is left out from then on.
        """
        name, began = peer.peer, time.monotonic()
        if name in self._gone:
            peer.note = self._gone[name]
            return
        self.say(batch, name, f"gets ready (up to {seconds:.0f} s)")
        try:
            self._first_runs(peer, batch, steps, began + seconds)
        except WorkerError as error:
            late = time.monotonic() - began >= seconds
            why = f"left out: not ready within the {seconds:.0f} s allowed" if late else str(error)
            self.lose(peer, why, batch)
            return
        peer.ready_s = time.monotonic() - began
        free = memory_available()
        if free is not None and free < LEAST_BYTES:
            self.lose(peer, f"left out: beside it only {free / 1e9:.1f} GB of memory would be free", batch)
            return
        self.say(batch, name, f"ready after {peer.ready_s:.1f} s")

    def lose(self, peer: PeerResult, why: str, batch: int) -> None:
        """Leave a peer out from now on."""
        peer.note = self._gone[peer.peer] = why
        peer.first_s = None
        self.end(peer.peer)
        self.say(batch, peer.peer, why)

    def judge(self, result: BatchResult) -> None:
        """Compare all pictures with the textbook's, or with our eager engine's where there is no textbook."""
        there = [peer for peer in result.peers if peer.first_s is not None]
        drawn = {peer.peer: np.load(self._pictures(peer.peer)) for peer in there}
        base = next((name for name in BASES if name in drawn), None)
        for peer in there:
            reference = None if base is None else drawn[base]
            compares = bool(self._loaded[peer.peer]["compares"])
            peer.equality = Equality.judge(drawn[peer.peer], reference, peer.precision, compares)
            if not peer.equality.holds:
                peer.note = f"not timed: its pictures differ from those of {base} by {peer.equality}"
                self.say(result.batch, peer.peer, peer.note)

    def flops(self, *names: str) -> float:
        """Arithmetic of a picture's evaluation as the first of these peers counts it; 0 where none can."""
        for name in names:
            if name in self._loaded:
                with contextlib.suppress(WorkerError):
                    return float(self.ask(name, do="flops")["flops"])
        return 0.0

    # ------------------------------------------------------------------ the first runs

    def _first_runs(self, peer: PeerResult, batch: int, steps: int, until: float) -> None:
        name = peer.peer
        packaged = name in PACKAGED and self.job.device == "cpu" and bool(self.job.model)  # of `Half` none is kept
        if packaged:
            self.end(name)  # a process that has compiled for another batch holds what the compiler took
        answer = self._one_start(name, batch, steps, until)
        loaded = self._loaded[name]
        peer.load_s, peer.export_s = loaded["load_s"], loaded["export_s"] or None
        peer.first_s, peer.again_s, peer.how = answer["first_s"], answer["again_s"], answer["how"]
        if not packaged:
            return
        if (peer.compile_s or 0.0) > COMPILED_S:
            # What is timed, and whose memory counts, is a process that finds the package.
            self.end(name)
            answer = self._one_start(name, batch, steps, until)
        peer.second_s = self._started_s - answer["again_s"]

    def _one_start(self, name: str, batch: int, steps: int, until: float) -> Answer:
        began = time.monotonic()
        if name not in self._loaded:
            self._load(name, until - began)
        out = str(self._pictures(name))
        answer = self.ask(name, until - time.monotonic(), do="check", batch=batch, steps=steps, out=out)
        self._started_s = time.monotonic() - began
        return answer

    def _load(self, name: str, seconds: float) -> None:
        if self.settings.local:
            self.workers[name] = LocalWorker(name)
        else:
            self.workers[name] = WorkerProcess(name, self.folder, self.settings.threads, self._environment)
        self._loaded[name] = self.ask(name, seconds, do="load", job=dataclasses.asdict(self.job))

    def _pictures(self, name: str) -> Path:
        return self.folder / f"{name}.npy"
