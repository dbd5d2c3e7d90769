"""Inductor, the compiler of PyTorch: what it is told, and where and how it works."""

from __future__ import annotations

import contextlib
import contextvars
import os
import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from fastddpm.kernels.kept import private_folder
from fastddpm.kernels.native import ALIGNED, shims

OPTIONS = {
    "freezing": True,
    "cpp.min_chunk_size": 4096,
    "aot_inductor.precompile_headers": False,
}
"""Weights are laid out for the processor at compile time, and a loop is shared out among threads only where each gets
so many elements, since it takes microseconds to wake them. Headers are not compiled beforehand for the sake of later
steps, which takes longer than a step's own code."""

_COMPILING = threading.Lock()


def compile_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile an exported step and write its package, within `own_folder`.

    Args:
        program: the step.
        path: where the package goes.

    Raises:
        Exception: whatever Inductor or the C++ compiler raise.
    """
    options = {**OPTIONS, "aot_inductor.custom_ops_to_c_shims": shims()}
    with two_at_once():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


@contextlib.contextmanager
def own_folder() -> Iterator[None]:
    """Let the compiler work where nobody else can write: by itself it takes a folder that anybody could make first.

    A process has one such folder, and one of its threads compiles at a time.
    """
    with _COMPILING, mock.patch.dict(os.environ):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_folder() / "inductor"))
        yield


@contextlib.contextmanager
def vectors_tried_out() -> Iterator[None]:
    """Find out beside the block, with a compiler and a process of its own, what vectors there are, as Inductor does."""
    import torch._inductor.codecache  # noqa: F401 - late, for it takes seconds, and not in two threads at once
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    with ThreadPoolExecutor(1) as beside:
        # What it raises, it will raise again where Inductor asks.
        beside.submit(contextvars.copy_context().run, valid_vec_isa_list)
        yield


@contextlib.contextmanager
def two_at_once() -> Iterator[None]:
    """In the block, compile what calls this thread's kernels while they are compiled; Inductor does one by one.

    Besides, let it ask for the weights' memory as `aligned.h` says.
    """
    from torch._inductor.cpp_builder import CppBuilder  # late, as above

    build, thread = CppBuilder.build, threading.get_ident()
    begun: list[Future[None]] = []

    def build_or_begin(builder: CppBuilder) -> None:
        target = builder.get_target_file_path()
        if threading.get_ident() != thread:
            build(builder)
        elif target.endswith(".wrapper.o"):
            builder._cflags_args += f" -include {shlex.quote(str(ALIGNED))} "
            begun.append(beside.submit(contextvars.copy_context().run, build, builder))
        else:
            if not target.endswith(".o"):  # it is made of all that was begun
                _wait_for(begun)
            build(builder)
            _wait_for(begun)

    with ThreadPoolExecutor(1) as beside, mock.patch.object(CppBuilder, "build", build_or_begin):
        yield


def _wait_for(begun: list[Future[None]]) -> None:
    while begun:
        begun.pop().result()
