"""Versions, compilers, and the folder for what they make."""

from __future__ import annotations

import os
import platform
import shutil

import torch

from fastddpm.bench.hardware import PACKAGES
from fastddpm.doctor.surroundings import ProblemError
from fastddpm.engines.cache import cache_folder, no_cache, packages
from fastddpm.engines.devices import versions
from fastddpm.kernels.dispatch import HAS_TRITON
from fastddpm.kernels.kept import is_damaged
from fastddpm.kernels.native import compiler

SUFFIXES = (".pt2", ".onnx", ".so")
"""Of what is kept in the cache."""


def check_versions(device: torch.device) -> str:
    """The versions of what pictures and their speed depend on.

    Raises:
        ProblemError: there is a GPU and no Triton for it.
    """
    found = {"python": platform.python_version(), **versions(*PACKAGES), "torch": torch.__version__}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if device.type == "cuda" and not HAS_TRITON:
        raise ProblemError(f"{text}; Triton is missing: kernels run as plain PyTorch, slowly; pip install triton")
    return text


def check_compilers(device: torch.device) -> str:
    """The compilers for C and C++: Winograd's kernel and Triton's launchers need the one, compiled steps the other.

    Raises:
        ProblemError: one is missing.
    """
    c = compiler()
    cxx = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    missing = [language for language, path in (("C", c), ("C++", cxx)) if path is None]
    if missing:
        raise ProblemError(
            f"no compiler for {' and '.join(missing)}; install gcc and g++; until then sampling goes on eagerly"
        )
    return f"{c}, {cxx}"


def check_cache(device: torch.device) -> str:
    """Where compiled steps are kept, and that those which are there are as they were written.

    Raises:
        ProblemError: nothing can be kept, or a file is damaged.
    """
    problem = no_cache()
    if problem:
        raise ProblemError(problem)
    files = [path for suffix in SUFFIXES for path in packages(suffix).values()]
    damaged = [path.name for path in files if is_damaged(path)]
    if damaged:
        raise ProblemError(
            f"{len(damaged)} of {len(files)} files in {cache_folder()} are damaged, {damaged[0]} is one; remove them: "
            "they are never run, and made again when needed"
        )
    return f"{cache_folder()}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB, all sound"
