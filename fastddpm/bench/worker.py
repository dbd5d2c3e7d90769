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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from fastddpm.bench.entrants import PEERS
from fastddpm.common.wording import first_line


class Worker:
    """Holds a peer and answers requests about it."""

    def __init__(self, name: str) -> None:
        """Name the peer; it is made when it is loaded."""
        self.name = name
        self.peer: Any = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked.

        Returns:
            The answer; a failure has "error", and "missing" if the peer cannot take part here.
        """
        kinds: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "load": self._load, "check": self._check, "run": self._run, "outside": self._outside, "flops": self._flops,
            "memory": self._memory, "measure": self._measure,
        }  # fmt: skip
        try:
            return {"ok": True, **kinds[request["do"]](request)}
        except Exception as error:  # whatever a library raises is a line in the report
            line, name = first_line(error, 300), type(error).__name__
            is_missing = name == "MissingError"
            return {"ok": False, "missing": is_missing, "error": line if is_missing else f"{name}: {line}"}

    def release(self) -> None:
        """Let go of the peer, for the next one in the same process."""
        import torch

        self.peer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
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

    def _check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the common pictures, then make the timed call: the first runs have everything that happens only once."""
        import numpy as np
        import torch

        began = time.perf_counter()
        with torch.no_grad():
            self.peer.prepare(request["batch"], request["steps"])
            pictures = self.peer.pictures()
            if self.peer.job.steps_only:
                self._timed()
            first = time.perf_counter() - began
            again = self._timed()
        np.save(request["out"], pictures.float().cpu().numpy())
        return {"first_s": first, "again_s": again, "how": self.peer.how()}

    def _timed(self) -> float:
        import torch

        from fastddpm.bench.timing import Clock

        with torch.no_grad():
            return Clock.of(self.peer.job.device).spent(self.peer.run) / 1e3

    def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"seconds": self._timed()}

    def _outside(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"ms": self.peer.outside()}

    def _flops(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"flops": self.peer.flops()}

    def _memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
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

    def _measure(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"measured": self.peer.measure(request["precisions"])}


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
