"""What a figure depends on: the processor, memory, versions, and the commit if this is a checkout."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TypedDict

import torch

from fastddpm.engines.devices import versions

PACKAGES = ("fastddpm", "torch", "triton", "numpy", "diffusers", "denoising-diffusion-pytorch", "onnx", "onnxruntime",
            "onnxruntime-gpu", "openvino")  # fmt: skip


class Machine(TypedDict):
    """Hardware, versions and commit; what the system does not tell is None."""

    date: str
    processor: str
    cores: int | None
    threads: int
    instructions: str
    memory_gb: float
    gpu: str | None
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None


def describe(threads: int) -> Machine:
    """Hardware, versions and commit, as JSON-ready values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(_memory() / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
        "commit": commit(),
    }


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def memory_available() -> int | None:
    """Bytes that could be had without swapping; None where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def commit() -> str | None:
    """The commit of the checkout that this package lies in, "-dirty" if files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
