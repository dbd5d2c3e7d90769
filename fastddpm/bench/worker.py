"""One peer in a process of its own: ``python -m fastddpm.bench.worker PEER`` answers requests, one JSON line each."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, TypedDict, cast

from fastddpm.bench.entrants import PEERS
from fastddpm.common.wording import first_line, named

if TYPE_CHECKING:
    from fastddpm.bench.peers import LimitsPeer, Peer


class Request(TypedDict, total=False):
    """What a worker is asked: `do`, and what that needs."""

    do: Literal["load", "check", "run", "outside", "flops", "memory", "measure"]
    job: Mapping[str, object]
    batch: int
    steps: int
    out: str
    precisions: Sequence[str]


class Answer(TypedDict, total=False):
    """What it answers: `ok`, and either the figures or the `error`, `missing` if the peer cannot take part here."""

    ok: bool
    error: str
    missing: bool
    load_s: float
    export_s: float
    compares: bool
    first_s: float
    again_s: float
    how: str
    seconds: float
    ms: float | None
    flops: float
    whole_bytes: int
    run_bytes: int | None
    measured: dict[str, float]


class Worker:
    """Holds a peer and answers requests about it."""

    peer: Peer

    def __init__(self, name: str) -> None:
        """Name the peer; it is made when it is loaded."""
        self.name = name

    def answer(self, request: Request) -> Answer:
        """Do what is asked."""
        kinds: dict[str, Callable[[Request], Answer]] = {
            "load": self._load,
            "check": self._check,
            "memory": self._memory,
            "run": lambda _: {"seconds": self._timed()},
            "outside": lambda _: {"ms": self.peer.outside()},
            "flops": lambda _: {"flops": self.peer.flops()},
            "measure": lambda asked: {"measured": cast("LimitsPeer", self.peer).measure(asked["precisions"])},
        }
        try:
            return {"ok": True, **kinds[request["do"]](request)}
        except Exception as error:  # whatever a library raises is a line in the report
            is_missing = isinstance(error, ImportError) or type(error).__name__ == "MissingError"
            said = first_line(error, 300) if is_missing else named(error, 300)
            return {"ok": False, "missing": is_missing, "error": said}

    def release(self) -> None:
        """Let go of the peer, for the next one in the same process."""
        import torch

        self.__dict__.pop("peer", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, request: Request) -> Answer:
        import importlib

        import torch

        from fastddpm.bench.job import Job

        module, kind, arguments = PEERS[self.name]
        job = Job.from_dict(request["job"])
        torch.set_num_threads(job.threads)
        peer = getattr(importlib.import_module(f"fastddpm.bench.{module}"), kind)(*arguments)
        began = time.perf_counter()
        peer.load(job)
        self.peer = peer
        seconds = time.perf_counter() - began
        return {"load_s": seconds - peer.export_s, "export_s": peer.export_s, "compares": peer.equality}

    def _check(self, request: Request) -> Answer:
        """Draw the common pictures, then make the timed call: the first runs have everything that happens only once.

        The pictures take two steps at least: one alone, at t = 0, hardly shows what the network says.
        """
        import numpy as np
        import torch

        began, steps = time.perf_counter(), request["steps"]
        with torch.no_grad():
            self.peer.prepare(request["batch"], max(steps, 2))
            pictures = self.peer.pictures()
            if self.peer.job.steps_only:
                self._timed()
            first = time.perf_counter() - began
            if steps == 1:
                self.peer.prepare(request["batch"], steps)
            again = self._timed()
            first -= again if steps == 1 else 0.0
        np.save(request["out"], pictures.float().cpu().numpy())
        return {"first_s": first, "again_s": again, "how": self.peer.how()}

    def _timed(self) -> float:
        import torch

        from fastddpm.bench.timing import Clock

        with torch.no_grad():
            return Clock.of(self.peer.job.device).spent(self.peer.run) / 1e3

    def _memory(self, request: Request) -> Answer:
        """The peak of the memory during one run (a GPU's own, or resident), and of the whole process so far."""
        import torch

        if self.peer.job.device != "cpu":
            whole = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._timed()
            return {"whole_bytes": whole, "run_bytes": torch.cuda.max_memory_allocated()}
        whole = peak_bytes()
        alone = forget_peak()
        self._timed()
        return {"whole_bytes": whole, "run_bytes": peak_bytes() if alone else None}


def peak_bytes() -> int:
    """The most resident memory that this process has had since the peak was last forgotten."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> bool:
    """Start the peak of the resident memory anew; returns whether that is possible here."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: no worker outlives a parent that was killed


def _private_stdout() -> TextIO:
    """Standard output for answers alone: whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main(name: str) -> None:
    """Answer until standard input ends."""
    _die_with_parent()
    answers = _private_stdout()
    worker = Worker(name)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
