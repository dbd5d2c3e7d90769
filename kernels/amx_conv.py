"""A convolution in bfloat16 on the matrix unit of Intel's processors (AMX), which PyTorch's own uses to a half.

    y[b, o] = bias[o] + Σ_{c, i, j} w[o, c, i, j] · x[b, c, · + i − 1, · + j − 1]

and the same with one tap, which is a linear layer too, where PyTorch's way to the product takes as long as the product.
Behind an upsampling by repetition it takes the smaller pictures, and less than half of the products: there a pixel's
neighbours are equal in pairs, whose weights are summed.

The products are exact, the sums float32, and the result is rounded once; denormal numbers count as 0. The
kernel is `amx_conv.c`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.kernels.amx import PART, load_amx
from fastddpm.kernels.native import can_load, register
from fastddpm.kernels.packed_conv import call_of, check_pictures, result_of

DECLARATION = """AOTITorchError aoti_torch_cpu_amx_conv(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle bias, int64_t threads, AtenTensorHandle* y)"""
"""How a compiled step calls the kernel."""
_SOURCE = Path(__file__).with_name("amx_conv.c")
_ROWS = 16  # of a tile


@functools.cache
def loaded() -> ctypes.CDLL:
    """The compiled kernel; raises NativeError as `load_amx`."""
    return load_amx(_SOURCE, [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 6 + [ctypes.c_int])


def is_there() -> bool:
    """Whether the kernel runs here; it is loaded then."""
    return can_load(loaded)


def fits(channels_in: int, channels_out: int) -> bool:
    """Whether the kernel takes a layer of so many channels."""
    return channels_in % PART == 0 and channels_out % PART == 0


def weights_behind_upsampling(weight: Tensor) -> Tensor:
    """The weights of a 3×3 convolution for pictures that have yet to be doubled by repetition.

    Pixel 2h of a doubled picture has beside it the pixels h − 1 and h of the picture, pixel 2h + 1 has h and h + 1:
    two taps, (w_0, w_1 + w_2) and (w_0 + w_1, w_2).

    Args:
        weight: [O, C, 3, 3].

    Returns:
        float32 [4 · O, C, 2, 2]: for even rows and columns, even and odd, odd and even, odd and odd.
    """

    def pairs(w: Tensor, dim: int) -> list[Tensor]:
        before, same, after = w.unbind(dim)
        return [torch.stack((before, same + after), dim), torch.stack((before + same, after), dim)]

    return torch.cat([both for rows in pairs(weight.detach().float(), 2) for both in pairs(rows, 3)])


def pack(weight: Tensor) -> Tensor:
    """The weights of a convolution in the form that `amx_conv` takes.

    Args:
        weight: [O, C, 3, 3] or [O, C, 1, 1], that of a linear layer, [O, C], or one from `weights_behind_upsampling`.

    Returns:
        bfloat16 [O / 16, C / 32, taps, 16, 16, 2]: tiles of 16 pairs of channels by 16 output channels.
    """
    outputs, inputs = weight.shape[:2]
    tiles = weight.detach().bfloat16().reshape(outputs // _ROWS, _ROWS, inputs // PART, PART // 2, 2, -1)
    return tiles.permute(0, 2, 5, 3, 1, 4).contiguous()


def amx_conv(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """A 3×3 convolution with stride 1 and padding 1, of x or of x doubled by repetition, or a 1×1 convolution.

    Args:
        x: bfloat16 [B, C, H, W], best in channels-last layout; another one is copied.
        packed: bfloat16, from `pack`.
        bias: float32 [O].

    Returns:
        bfloat16 [B, O, H, W], or [B, O, 2H, 2W], channels-last.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: the channels are not those of the weights.
        NativeError: the kernel does not run here.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.as_tensor(torch.ops.fastddpm.amx_conv(x, packed, bias, torch.get_num_threads()))


def _amx_conv(x: Tensor, packed: Tensor, bias: Tensor, threads: int) -> Tensor:
    if (x.dtype, packed.dtype, bias.dtype) != (torch.bfloat16, torch.bfloat16, torch.float32):
        raise TypeError(f"amx_conv: x must be bfloat16, the bias float32, got {x.dtype} and {bias.dtype}; convert them")
    (batch, channels, height, width), y = x.shape, _result(x, packed, bias, threads)
    sizes = (batch, height, width, channels, bias.shape[0])
    blocks = _scale_of(packed) ** 2 * len(bias) // _ROWS, channels // PART
    of_these = fits(channels, len(bias)) and packed.shape[:2] == blocks
    check_pictures("amx_conv", x, fits=of_these and packed.shape[2] in (1, 4, 9))
    if loaded().amx_conv(*(tensor.data_ptr() for tensor in (x, packed, bias, y)), *sizes, packed.shape[2], threads):
        raise MemoryError("amx_conv: there must be memory for the pictures spread out, got none")
    return y


def _scale_of(packed: Tensor) -> int:
    """How much larger the result is: four taps are those of `weights_behind_upsampling`."""
    return 2 if packed.shape[2] == 4 else 1


def _result(x: Tensor, packed: Tensor, bias: Tensor, threads: int) -> Tensor:
    return result_of(x, packed, bias, threads, _scale_of(packed))


def as_called(x: Tensor, packed: Tensor, bias: Tensor) -> Callable[[], object]:
    """A call of the kernel as a compiled step makes it, without Python's checks: they take as long as a small layer."""
    y = _amx_conv(x, packed, bias, torch.get_num_threads())  # checked once
    return call_of(loaded().amx_conv, (x, packed, bias, y), packed.shape[2])


register(
    "amx_conv(Tensor x, Tensor packed, Tensor bias, int threads) -> Tensor", _amx_conv, _result, loaded, DECLARATION
)
