"""Compiled steps: `advance` as one ahead-of-time compiled package per (network, batch), kept on disk.

`torch.export` captures `advance` as a whole, the network and the update in one graph, and Inductor compiles it with the
weights as constants: convolution weights are re-packed once for the processor, and a call has no Python in it. The rows
of the solver's table are arguments, so one package serves any solver and any number of steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.denoiser import Denoiser
from fastddpm.files import atomic_path
from fastddpm.kernels._native import cache_folder
from fastddpm.state import advance
from fastddpm.step_call import StepCall
from fastddpm.unet import UNet

CACHE_BYTES = 4 << 30
"""Most that the packages on disk may take; the ones that were used longest ago go first."""

OPTIONS = {"freezing": True, "cpp.min_chunk_size": 4096}
"""Inductor's: weights are laid out for the processor at compile time, and a loop is shared out among threads only where
each gets so many elements: waking them takes as long as the noise of a thousand."""

_TOLERANCE, _LOW_TOLERANCE = 1e-3, 5e-2  # of a compiled step against an eager one, relative to the samples
_UNFINISHED_S = 86400.0
_MADV_PAGEOUT = 21  # of Linux


class CompileError(RuntimeError):
    """A step could not be compiled; the message says why and what to do."""


def is_cacheable(denoiser: Denoiser) -> bool:
    """Whether the network is known by its configuration and weights alone, so that a package of it may be kept."""
    return isinstance(denoiser.unet, UNet)


def weights_hash(network: nn.Module) -> str:
    """A digest of all parameters and buffers, with their names and types."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def package_path(call: StepCall, weights: str) -> Path:
    """Where the package for such calls is or would be."""
    text = json.dumps(call.signature() | {"weights": weights, "options": OPTIONS}, sort_keys=True)
    return cache_folder() / f"{weights[:8]}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.pt2"


def compile_step(call: StepCall, path: Path) -> float:
    """Compile a step and write its package.

    Args:
        call: example of the calls; sizes other than the number of rows are fixed by it.
        path: where the package goes; it is whole or absent.

    Returns:
        Seconds that it took.

    Raises:
        CompileError: the network cannot be captured as one graph, or there is no working C++ compiler.
        OSError: the package cannot be written.
    """
    began = time.perf_counter()
    # Exporting runs the step on fake tensors, so the state stays as it is.
    try:
        with torch.no_grad(), warnings.catch_warnings(), atomic_path(path) as temporary:
            warnings.simplefilter("ignore")
            program = torch.export.export(
                call.module().eval(),
                tuple(call.tensors().values()),
                dynamic_shapes={"tensors": call.dynamic_shapes()},
                strict=False,
            )
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(temporary), inductor_configs=dict(OPTIONS)
            )
    except OSError:
        raise
    except Exception as error:  # whatever the exporter, the compiler or the C++ compiler raise
        raise not_one_graph(error) from error
    with contextlib.suppress(OSError):  # another process may be doing the same
        _prune(path.parent, keep=path)
    _give_memory_back()
    return time.perf_counter() - began


def not_one_graph(error: Exception) -> CompileError:
    """The error for a network that an exporter or compiler stumbled over, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return CompileError(
        f"engine: the network must compile as one graph, got {type(error).__name__}: {reason}; use engine='eager'"
    )


def load_step(path: Path) -> Callable[..., Any]:
    """Load a package: a function of the tensors of a `StepCall`, in order, to those of `CHANGED`, one step later.

    Raises:
        CompileError: the file is no package that runs here; it is removed.
    """
    try:
        os.utime(path)
        # As `torch._inductor.aoti_load_package` does it, without importing the compiler; and a call through its result
        # would flatten the arguments first, which takes longer than a small update.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except Exception as error:
        path.unlink(missing_ok=True)
        raise CompileError(f"engine: {path} must be a compiled step, got one that does not load; run again") from error
    _page_out(path.stem)

    def call(*tensors: Tensor) -> list[Tensor]:
        changed: list[Tensor] = loader.boxed_run(list(tensors))
        return changed

    return call


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


def _give_memory_back() -> None:
    """Hand what compiling took back to the system, where its C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def checked(step: Callable[..., Any], call: StepCall, path: Path) -> Callable[..., Any]:
    """A new package, after its first step was compared with an eager one; a compiler's mistake must not pass unseen.

    Raises:
        CompileError: the two differ by more than the arithmetic explains; the package is removed.
    """
    eager, compiled = call.copy(), call.copy()
    # At the first rows a network's rounding grows a hundredfold, at the last there is no noise.
    middle = call.table.S // 2
    for samples in (eager.state, compiled.state):
        samples.step.fill_(middle)
    advance(eager.denoiser, eager.table, eager.state, noise=eager.noise)
    compiled.bound(step)(compiled.noise)
    row = call.table.row(middle)
    gain = 1.0 + abs(row["a_o"] * row["c_0"]) + abs(row["c_o"])
    tolerance = gain * (_TOLERANCE if _is_float32(call.denoiser) else _LOW_TOLERANCE)
    # Per sample, root mean square: single values may jump from one clipping bound to the other.
    off = (eager.state.x - compiled.state.x).flatten(1).square().mean(1).sqrt()
    scale = eager.state.x.flatten(1).square().mean(1).sqrt().clamp(min=1.0)
    difference = float((off / scale).amax())
    if not difference <= tolerance or not torch.equal(eager.state.step, compiled.state.step):
        path.unlink(missing_ok=True)
        raise CompileError(
            f"engine: a compiled step must give what an eager one gives, got a difference of {difference:.2g}; "
            "use engine='eager'"
        )
    return step


def _is_float32(denoiser: Denoiser) -> bool:
    return not isinstance(denoiser.unet, UNet) or denoiser.unet.stem.weight.dtype == torch.float32


def packages(folder: Path) -> list[Path]:
    """The compiled steps in a folder, without unfinished ones."""
    return [path for path in folder.glob("*.pt2") if not path.name.startswith(".")]


def _prune(folder: Path, keep: Path) -> None:
    """Remove the packages that were used longest ago until all fit, and what processes left that were killed."""
    files = sorted((f for f in packages(folder) if f != keep), key=lambda f: f.stat().st_mtime, reverse=True)
    for unfinished in folder.glob(".*.pt2"):
        if time.time() - unfinished.stat().st_mtime > _UNFINISHED_S:
            unfinished.unlink(missing_ok=True)
    total = keep.stat().st_size
    for file in files:
        total += file.stat().st_size
        if total > CACHE_BYTES:
            file.unlink(missing_ok=True)
