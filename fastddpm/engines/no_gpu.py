"""Why a GPU that is there cannot be used, and what to do about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

_NVIDIA, _AMD = "/dev/nvidia0", "/dev/kfd"


def why_no_gpu() -> str:
    """Why this machine's GPU cannot be used, and what to do; "" where there is none or it can be."""
    if torch.cuda.is_available():
        return ""
    there = "an NVIDIA GPU" if Path(_NVIDIA).exists() else "an AMD GPU" if Path(_AMD).exists() else ""
    if torch.version.cuda is None and torch.version.hip is None:
        if not there:
            return ""
        build = "CUDA" if Path(_NVIDIA).exists() else "ROCm"
        return (
            f"there is {there}: torch {torch.__version__} is a build for CPUs; "
            f"install one for {build} (pytorch.org/get-started has the command)"
        )
    reason = _start_error()
    if "too old" in reason:
        found = re.search(r"found version (\d+)", reason)
        has = f", which knows CUDA {_cuda(int(found[1]))}" if found else ""
        return (
            f"there is a GPU: its driver{has}, is too old for torch {torch.__version__} (CUDA {torch.version.cuda}); "
            "update the driver, or install a torch for an older CUDA"
        )
    if not there:
        return ""
    hidden = next((n for n in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if n in os.environ), None)
    if hidden is not None:
        return f"there is {there}: {hidden}={os.environ[hidden]!r} hides it; unset that to use it"
    return f"there is {there}: it does not start ({reason or 'no reason given'}); see that its driver is installed"


def _start_error() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or [""])[0]
    return ""


def _cuda(version: int) -> str:
    """12020 → "12.2"."""
    return f"{version // 1000}.{version % 1000 // 10}"
