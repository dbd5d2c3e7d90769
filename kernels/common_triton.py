"""What the modules of kernels share: Triton itself, and parts that several kernels are made of.

It imports Triton, so only modules that hold kernels (`…_triton.py`) may import it; see `dispatch` for the others.
"""

from collections.abc import Callable

import torch
import triton
from torch.library import wrap_triton
from triton import language as tl
from triton.language.extra import libdevice

__all__ = [
    "ON_INTERPRETER",
    "QUADS",
    "approximations",
    "jit",
    "launcher",
    "libdevice",
    "load_quad",
    "num_warps",
    "store_quad",
    "tl",
]

ON_INTERPRETER = tl.constexpr(triton.knobs.runtime.interpret)
"""For kernels: whether hardware instructions must be replaced by what NumPy can do."""

QUADS = 128
"""Groups of four consecutive elements in one program, one for each thread.

A warp's access is then one piece of memory without gaps, which counts for more than its width: eight elements to a
thread, whose float32 stores leave gaps between threads, took 1.05 to 1.7 times as long on an H200, and sixteen bytes
1.7 to 3 times.
"""


def jit(function: Callable[..., object]) -> triton.JITFunction:
    """`triton.jit`, with a type for the checker, which does not look into Triton."""
    return triton.jit(function)


def launcher(kernel: triton.JITFunction) -> triton.JITFunction:
    """`torch.library.wrap_triton`, by which compilers see into an op.

    On the interpreter, which no compiler sees, a kernel is something else, which torch 2.11 still refuses there.
    """
    return kernel if ON_INTERPRETER.value else wrap_triton(kernel)


def num_warps() -> int:
    """Warps that make `QUADS` threads: AMD's data-centre GPUs have 64 lanes in each, NVIDIA's have 32."""
    return QUADS // (64 if torch.version.hip else 32)


def approximations() -> bool:
    """Whether the kernels may use the transcendental instructions of NVIDIA's hardware."""
    return torch.version.hip is None


@jit
def load_quad(base: tl.tensor, e: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Those of the elements `e` [quads, 4] that are below `count`, as float32."""
    return tl.load(base + e, mask=e < count).to(tl.float32)


@jit
def store_quad(base: tl.tensor, e: tl.tensor, value: tl.tensor, count: tl.tensor) -> None:
    """Store [quads, 4] values at those of the elements `e` that are below `count`."""
    tl.store(base + e, value, mask=e < count)
