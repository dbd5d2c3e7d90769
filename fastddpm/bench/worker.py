"""One peer in a process of its own: ``python -m fastddpm.bench.worker PEER`` answers requests, one JSON line each."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

PEERS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "reference": ("peers", "ReferencePeer", ()),
    "fastddpm-eager": ("peers", "EnginePeer", ("eager", "fp32")),
    "fastddpm-compiled": ("peers", "EnginePeer", ("compiled", "fp32")),
    "fastddpm-compiled-bf16": ("peers", "EnginePeer", ("compiled", "bf16")),
    "fastddpm-auto": ("peers", "EnginePeer", ("auto", "fp32")),
    "diffusers": ("foreign", "DiffusersPeer", ("fp32", False)),
    "diffusers-bf16": ("foreign", "DiffusersPeer", ("bf16", False)),
    "diffusers-compiled": ("foreign", "DiffusersPeer", ("fp32", True)),
    "diffusers-compiled-bf16": ("foreign", "DiffusersPeer", ("bf16", True)),
    "lucidrains": ("foreign", "LucidrainsPeer", ()),
    "onnxruntime": ("sessions", "OnnxRuntimePeer", ()),
    "openvino": ("sessions", "OpenVinoPeer", ("fp32",)),
    "openvino-bf16": ("sessions", "OpenVinoPeer", ("bf16",)),
    "limits": ("peers", "LimitsPeer", ()),
}
"""Name → module, class and its arguments."""

LABELS = {
    "reference": "textbook loop",
    "fastddpm-eager": "fastddpm, eager",
    "fastddpm-compiled": "fastddpm, compiled",
    "fastddpm-compiled-bf16": "fastddpm, compiled, bf16",
    "fastddpm-auto": "fastddpm, auto",
    "diffusers": "diffusers DDPMPipeline",
    "diffusers-bf16": "diffusers DDPMPipeline, bf16",
    "diffusers-compiled": "diffusers, torch.compile",
    "diffusers-compiled-bf16": "diffusers, torch.compile, bf16",
    "lucidrains": "lucidrains GaussianDiffusion (own U-Net)",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO, bf16",
}
"""Name → what people read."""


COMPILES = frozenset(name for name in PEERS if "compiled" in name or "openvino" in name)
"""Those whose first run has a compiler in it."""


def precision_of(name: str) -> str:
    """The precision of a peer's network."""
    return "bf16" if name.endswith("-bf16") else "fp32"


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
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            is_missing = type(error).__name__ == "MissingError"
            return {
                "ok": False,
                "missing": is_missing,
                "error": line if is_missing else f"{type(error).__name__}: {line}",
            }

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        import importlib

        import torch

        from fastddpm.bench.workloads import Job

        module, kind, arguments = PEERS[self.name]
        job = Job.from_dict(request["job"])
        torch.set_num_threads(job.threads)
        self.peer = getattr(importlib.import_module(f"fastddpm.bench.{module}"), kind)(*arguments)
        began = time.perf_counter()
        self.peer.load(job)
        return {"load_s": time.perf_counter() - began, "compares": self.peer.equality}

    def _check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the common pictures twice: the first time has everything that happens only once."""
        import numpy as np
        import torch

        began = time.perf_counter()
        with torch.no_grad():
            self.peer.prepare(request["batch"], request["steps"])
            pictures = self.peer.pictures()
            first = time.perf_counter() - began
            began = time.perf_counter()
            self.peer.run()
            again = time.perf_counter() - began
        np.save(request["out"], pictures.float().numpy())
        return {"first_s": first, "again_s": again}

    def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            began = time.perf_counter()
            self.peer.run()
            return {"seconds": time.perf_counter() - began}

    def _outside(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"ms": self.peer.outside()}

    def _flops(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"flops": self.peer.flops()}

    def _memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The peak of the resident memory during one run, and of the whole process so far."""
        whole = peak_bytes()
        alone = forget_peak()
        self._run(request)
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
