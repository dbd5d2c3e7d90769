"""Winograd's F(4×4, 3×3) convolution on the CPU (Lavin & Gray 2016): a quarter of the direct one's multiplications.

    Y = Aᵀ [ (Bᵀ d B) ⊙ (G g Gᵀ) ] A        for each 4×4 tile of the output, summed over the input channels

The arithmetic is float32, also for bfloat16 pictures, and the result differs from the direct convolution's by rounding,
on average three to four times as much as that one's own. The kernel is `winograd.c`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.kernels.native import can_load, load, register
from fastddpm.kernels.packed_conv import call_of, check_pictures, result_of

WINOGRAD_RTOL = 2e-5
"""Kernel against the exact convolution, relative to the largest |x|, for weights as PyTorch starts them: the transforms
have factors up to 8, from the points ±2, so about 30 units in the last place."""

DECLARATION = """AOTITorchError aoti_torch_cpu_winograd_conv(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle bias, int64_t threads, AtenTensorHandle* y)"""
"""How a compiled step calls the kernel."""
_SOURCE = Path(__file__).with_name("winograd.c")
_G = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
      (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip


@functools.cache
def loaded() -> tuple[ctypes.CDLL, int]:
    """The compiled kernel and its channels per vector."""
    library = load(_SOURCE, ("winograd_conv", "winograd_lanes", "aoti_torch_cpu_winograd_conv"))
    library.winograd_conv.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 5 + [ctypes.c_int] * 2
    return library, int(library.winograd_lanes())


def is_there() -> bool:
    """Whether the kernel can be compiled here; it is loaded then."""
    return can_load(loaded)


def panel() -> int:
    """The output channels that a panel of packed weights holds, and whose multiples a layer must have.

    Raises:
        NativeError: the kernel cannot be compiled here.
    """
    return 2 * loaded()[1]


def fits(channels_in: int, channels_out: int) -> bool:
    """Whether the kernel takes a layer of so many channels.

    Raises:
        NativeError: the kernel cannot be compiled here.
    """
    return channels_in % loaded()[1] == 0 and channels_out % panel() == 0


def pack(weight: Tensor) -> Tensor:
    """The weights of a convolution in the form that `winograd_conv` takes: twice as many.

    T = G g, computed in float64 and rounded once; the kernel makes U = T Gᵀ of it, four times as many.

    Args:
        weight: [O, C, 3, 3].

    Returns:
        float32 [6, O / panel, C, 3, panel].
    """
    lines = torch.tensor(_G, dtype=torch.float64) @ weight.detach().double()
    outputs, inputs = weight.shape[:2]
    panels = lines.float().reshape(outputs // panel(), panel(), inputs, len(_G), 3)
    return panels.permute(3, 0, 2, 4, 1).contiguous()


def winograd_conv(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """A 3×3 convolution with stride 1 and padding 1.

    Args:
        x: float32 or bfloat16 [B, C, H, W], best in channels-last layout; another one is copied.
        packed: float32 [6, O / panel, C, 3, panel], from `pack`.
        bias: float32 [O].

    Returns:
        [B, O, H, W] of x's type, channels-last.

    Raises:
        TypeError: x is of another type.
        ValueError: the channels are not those of the weights.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.as_tensor(torch.ops.fastddpm.winograd_conv(x, packed, bias, torch.get_num_threads()))


def _winograd_conv(x: Tensor, packed: Tensor, bias: Tensor, threads: int) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or packed.dtype != torch.float32 or bias.dtype != torch.float32:
        raise TypeError(f"winograd_conv: x must be float32 or bfloat16, the rest float32, got {x.dtype}; convert it")
    (batch, channels, height, width), y = x.shape, result_of(x, packed, bias, threads)
    sizes = (batch, height, width, channels, bias.shape[0])
    of_these = fits(channels, len(bias)) and packed.shape[1:3] == (len(bias) // panel(), channels)
    check_pictures("winograd_conv", x, fits=of_these)
    pointers = (tensor.data_ptr() for tensor in (x, packed, bias, y))
    if loaded()[0].winograd_conv(*pointers, *sizes, x.dtype == torch.bfloat16, threads):
        raise MemoryError("winograd_conv: there must be memory for the transformed tiles, got none")
    return y


def as_called(x: Tensor, packed: Tensor, bias: Tensor) -> Callable[[], object]:
    """A call of the kernel as a compiled step makes it, without Python's checks: they take as long as a small layer."""
    y = _winograd_conv(x, packed, bias, torch.get_num_threads())  # checked once
    return call_of(loaded()[0].winograd_conv, (x, packed, bias, y), x.dtype == torch.bfloat16)


_SCHEMA = "winograd_conv(Tensor x, Tensor packed, Tensor bias, int threads) -> Tensor"
register(_SCHEMA, _winograd_conv, result_of, loaded, DECLARATION)
