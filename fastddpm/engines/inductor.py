"""Inductor, the compiler of PyTorch: what it is told, and where and how it works."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastddpm.kernels import group_norm_native, normals, winograd
from fastddpm.kernels.kept import private_folder

OPTIONS = {
    "freezing": True,
    "cpp.min_chunk_size": 4096,
    "aot_inductor.precompile_headers": False,
}
"""Weights are laid out for the processor at compile time, and a loop is shared out among threads only where each gets
so many elements: waking them takes as long as the noise of a thousand. Headers are not compiled beforehand for the sake
of later steps, which takes longer than a step's own code."""

_COMPILING = threading.Lock()


def compile_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile an exported step and write its package.

    Args:
        program: the step.
        path: where the package goes.

    Raises:
        Exception: whatever Inductor or the C++ compiler raise.
    """
    options = {**OPTIONS, "aot_inductor.custom_ops_to_c_shims": shims()}
    with _two_at_once():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def shims() -> dict[Any, list[str]]:
    """The operations that a compiled step calls in C, with their declarations."""
    ops = torch.ops.fastddpm
    return {
        ops.winograd_conv.default: [winograd.DECLARATION],
        ops.add_group_norm_native.default: [group_norm_native.DECLARATION],
        ops.normals.default: [normals.DECLARATION],
    }


@contextlib.contextmanager
def own_folder() -> Iterator[None]:
    """Let the compiler work where nobody else can write: by itself it takes a folder that anybody could make first."""
    with mock.patch.dict(os.environ):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_folder() / "inductor"))
        yield


@contextlib.contextmanager
def vectors_tried_out() -> Iterator[None]:
    """Find out beside the block, with a compiler and a process of its own, what vectors there are, as Inductor does."""
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list  # late: it takes seconds to import

    with ThreadPoolExecutor(1) as beside:
        beside.submit(valid_vec_isa_list)  # what it raises, it will raise again where Inductor asks
        yield


@contextlib.contextmanager
def _two_at_once() -> Iterator[None]:
    """Compile what calls a step's kernels while the kernels are compiled; Inductor does one after the other."""
    from torch._inductor.cpp_builder import CppBuilder  # late, as above

    build, caller = CppBuilder.build, Future[None]()

    def build_or_begin(builder: CppBuilder) -> None:
        nonlocal caller
        kind = Path(builder.get_target_file_path()).suffixes
        if kind == [".wrapper", ".o"]:
            caller = beside.submit(build, builder)
            return
        build(builder)
        if kind == [".kernel", ".o"]:
            caller.result()

    with _COMPILING, ThreadPoolExecutor(1) as beside, mock.patch.object(CppBuilder, "build", build_or_begin):
        yield
