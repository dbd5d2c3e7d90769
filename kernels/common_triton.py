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
    "GROUPS",
    "ON_INTERPRETER",
    "approximations",
    "jit",
    "launcher",
    "libdevice",
    "load_two_quads",
    "num_warps",
    "store_quad",
    "tl",
]

ON_INTERPRETER = tl.constexpr(triton.knobs.runtime.interpret)
"""For kernels: whether hardware instructions must be replaced by what NumPy can do."""

GROUPS = 128
"""Groups of consecutive elements in one program; each thread owns one group, so accesses are 128 bits wide."""


def jit(function: Callable[..., object]) -> triton.JITFunction:
    """`triton.jit`, with a type for the checker, which does not look into Triton."""
    return triton.jit(function)


def launcher(kernel: triton.JITFunction) -> triton.JITFunction:
    """`torch.library.wrap_triton`, by which compilers see into an op.

    On the interpreter, which no compiler sees, a kernel is something else, which torch 2.11 still refuses there.
    """
    return kernel if ON_INTERPRETER.value else wrap_triton(kernel)


def num_warps() -> int:
    """Warps that make `GROUPS` threads: AMD's data-centre GPUs have 64 lanes in each, NVIDIA's have 32."""
    return GROUPS // (64 if torch.version.hip else 32)


def approximations() -> bool:
    """Whether the kernels may use the transcendental instructions of NVIDIA's hardware."""
    return torch.version.hip is None


@jit
def load_two_quads(base: tl.tensor, group: tl.tensor, numel: tl.tensor) -> tl.tensor:
    """Elements 8g ... 8g+3 and 8g+4 ... 8g+7 of each group g as two float32 tensors [groups, 4].

    A thread owns eight consecutive elements, whatever their dtype: with fewer, 16-bit loads would be narrow, or
    would have to change layout through shared memory to meet the float32 state. Where a sample's size is not
    divisible by 16, its storage is aligned to nothing; Triton then loads narrowly and does take that detour.
    """
    if base.dtype.element_ty.primitive_bitwidth == 16:
        e = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        v = tl.load(base + e, mask=e < numel).to(tl.float32)
        low, high = tl.split(tl.permute(tl.reshape(v, (group.shape[0], 2, 4)), (0, 2, 1)))
    else:
        e = group[:, None] * 8 + tl.arange(0, 4)[None, :]
        low = tl.load(base + e, mask=e < numel)
        high = tl.load(base + e + 4, mask=e + 4 < numel)
    return low, high


@jit
def store_quad(base: tl.tensor, e: tl.tensor, value: tl.tensor, count: tl.tensor) -> None:
    """Store [groups, 4] values at those of the elements `e` that are below `count`."""
    tl.store(base + e, value, mask=e < count)
