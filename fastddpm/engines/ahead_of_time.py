"""Ahead of time: a step as one compiled package per (network, batch), for CPUs, kept on disk.

`torch.export` captures the step as a whole, the network and the update in one graph, and Inductor compiles it with the
weights as constants: convolution weights are re-packed once for the processor, and a call has no Python in it. The
book's rows are arguments, so one package serves any solver and any number of steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.common.wording import first_line
from fastddpm.engines import cache
from fastddpm.engines.compare import CompileError, check_step, not_one_graph
from fastddpm.engines.fast_layers import changed_layers, measured_layers
from fastddpm.engines.inductor import OPTIONS, compile_program, own_folder, vectors_tried_out
from fastddpm.engines.precision import processor_has_bf16
from fastddpm.engines.runner import Runner, StepFunction, StepRunner
from fastddpm.kernels.group_norm_native import native_norms
from fastddpm.kernels.native import load_all, processor
from fastddpm.kernels.normals import native_normals
from fastddpm.step.network import Network
from fastddpm.step.step import Call, step_of

_IN_BOOK = ("rows", "timesteps", "conditions")
_MADV_PAGEOUT = 21  # of Linux
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc


class AheadOfTime:
    """Makes, finds and loads packages of one network's steps."""

    name = "compiled"
    cost_s, gain = 45.0, 1 / 3

    def __init__(self, weights: Callable[[], str], layers: Sequence[str] | None = None) -> None:
        """Nothing is loaded yet.

        Args:
            weights: the digest of the network's weights as they are now.
            layers: the layers that run the other way (see `fastddpm.engines.fast_layers`); None measures them.
        """
        self._weights, self._layers = weights, layers
        self.steps: dict[str, StepFunction] = {}

    def formed(self, call: Call) -> Call:
        """The call that a package serves; see `for_packages` of its form."""
        return call.with_form(call.step.form.for_packages())

    def key(self, call: Call) -> str:
        """Names the package: all that it depends on. Two calls with the same key can share it."""
        shapes = {
            name: [str(value.dtype), list(value.shape[1:] if name in _IN_BOOK else value.shape)]
            for name, value in zip(call.step.names, call.arguments(), strict=True)
        }
        return cache.key_of(
            self._weights()[:8],
            tensors=shapes,
            form=dataclasses.astuple(call.step.form),
            network=_network(call).identity(),
            precision=str(_network(call).dtype),
            device=str(call.state.x.device),
            threads=torch.get_num_threads(),
            processor=f"{processor()} {torch.backends.cpu.get_cpu_capability()}",
            options=OPTIONS,
            weights=self._weights(),
        )

    def is_kept(self, call: Call) -> bool:
        """Whether the network is known by its configuration and weights alone, so that a package of it may be kept."""
        return _network(call).identity() is not None

    def is_ready(self, call: Call) -> bool:
        """Whether the step is loaded."""
        return self.key(call) in self.steps

    def is_there(self, call: Call) -> bool:
        """Whether the step can, as far as is known, be had without compiling."""
        key = self.key(call)
        return key in self.steps or (self.is_kept(call) and key in cache.packages())

    def prepare(self, call: Call, on_compile: Callable[[bool], None]) -> float | None:
        """Have the step loaded, compiled first where there is no package.

        Args:
            call: a call that `formed` made.
            on_compile: called with True before and False after compiling.

        Returns:
            Seconds that compiling took; None if there was a package.

        Raises:
            CompileError: the step does not compile, its package does not load, or it differs from an eager step.
            OSError: the package cannot be written.
        """
        key = self.key(call)
        if key in self.steps:
            return None
        _check_processor(call)
        began, made = time.perf_counter(), []

        def make(path: Path) -> None:
            on_compile(True)
            compile_step(call, path, self._layers)
            made.append(load_step(path, key))
            check_step(made[0], call)

        try:
            path = cache.find_or_make(key, make, keep=self.is_kept(call))
            if not made and not path.exists():  # another process has just made room for its own
                path = cache.find_or_make(key, make, keep=self.is_kept(call))
        finally:
            on_compile(False)
        self.steps[key] = made[0] if made else load_step(path, key)
        if not self.is_kept(call):
            path.unlink(missing_ok=True)
        return time.perf_counter() - began if made else None

    def runner(self, call: Call) -> Runner:
        """Drives a call whose step is ready."""
        return StepRunner(self.steps[self.key(call)], call)

    def forget(self, call: Call) -> None:
        """Let go of a package that is loaded; on disk it stays."""
        self.steps.pop(self.key(call), None)


def _network(call: Call) -> Network:
    network: Any = call.step.network
    return network  # type: ignore[no-any-return]


def _check_processor(call: Call) -> None:
    """Raise CompileError where Inductor would stumble over a processor without instructions for bfloat16."""
    half = any(p.dtype == torch.bfloat16 for p in call.step.network.parameters())
    if half and not processor_has_bf16():
        raise CompileError(
            "engine: precision must be fp32 for compiled steps on this processor, which has no instructions for "
            "bfloat16, got bf16; use engine='eager' or precision='fp32'"
        )


def compile_step(call: Call, path: Path, layers: Sequence[str] | None = None) -> None:
    """Compile a step and write its package.

    Args:
        call: example of the calls; sizes other than the book's capacity are fixed by it.
        path: where the package goes.
        layers: those that run the other way; None measures them.

    Raises:
        CompileError: the network cannot be captured as one graph, or there is no working C++ compiler.
        OSError: the package cannot be written.
    """
    rows = torch.export.Dim("rows", min=2, max=1 << 24)
    shapes = tuple({0: rows} if name in _IN_BOOK else None for name in call.step.names)
    # Exporting runs the step on fake tensors, so the samples stay as they are.
    try:
        with torch.no_grad(), warnings.catch_warnings(), own_folder():
            warnings.simplefilter("ignore")
            step = with_quick_layers(call, layers)
            with vectors_tried_out(), native_norms(), native_normals():
                program = torch.export.export(
                    step, tuple(call.arguments()), dynamic_shapes={"tensors": shapes}, strict=False
                )
            compile_program(program, path)
    except OSError:
        raise
    except Exception as error:  # whatever the exporter, the compiler or the C++ compiler raise
        raise not_one_graph(error) from error
    give_memory_back()


def with_quick_layers(call: Call, layers: Sequence[str] | None = None) -> nn.Module:
    """The call's step with its network's layers run the way that is quicker for this batch.

    Args:
        call: of the batch.
        layers: those that run the other way; None measures them.
    """
    names = quicker_layers(call) if layers is None else layers
    return step_of(changed_layers(call.step.network, names), call.step.form).eval()


def quicker_layers(call: Call) -> list[str]:
    """The layers of a call's network that run the other way quicker, measured."""
    arguments = call.copy().arguments()

    def run(network: nn.Module) -> None:
        step_of(network, call.step.form)(*arguments)

    with torch.no_grad():
        return [layer.name for layer in measured_layers(call.step.network, run) if layer.is_quicker]


def load_step(path: Path, key: str) -> StepFunction:
    """Load a package: a function of the arguments of its step to what the step returns.

    Args:
        path: the package.
        key: its key; the file that it was compiled to was called so.

    Raises:
        CompileError: the file is no package that runs here, or there is no room to unpack it.
    """
    load_all()  # the package looks their functions up
    _keep_memory()
    try:
        # As `torch._inductor.aoti_load_package` does it, without importing the compiler; and a call through its result
        # would flatten the arguments first, which takes longer than a small update.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except Exception as error:
        raise CompileError(
            f"engine: the compiled step {path} must load, got {first_line(error)}; see that "
            f"{tempfile.gettempdir()} has room, or use engine='eager'"
        ) from error
    _page_out(key)

    def call(*tensors: Tensor) -> list[Tensor]:
        changed: list[Tensor] = loader.boxed_run(list(tensors))
        return changed

    return call


@functools.cache
def _keep_memory() -> None:
    """Have the C library keep what a step gives back for the next one, which asks for the same: new pages cost time."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _page_out(part: str) -> None:
    """Let go of memory that files with `part` in their paths are mapped to: a package copies its weights from there.

    Linux reads the pages again if they are needed after all; elsewhere, and before Linux 5.4, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            if part in line:
                start, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def give_memory_back() -> None:
    """Hand what compiling took back to the system, where its C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
