"""What the 3×3 convolutions in C with weights of a form of their own have in common: their result, and a check."""

from __future__ import annotations

import torch
from torch import Tensor


def result_of(x: Tensor, packed: Tensor, bias: Tensor, threads: int) -> Tensor:
    """Memory for a convolution's result, [B, O, H, W] of x's type, channels-last; tracing asks for its shape."""
    shape = (x.shape[0], bias.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def check_pictures(function: str, x: Tensor, *, fits: bool) -> None:
    """Check the pictures that an op is given.

    Args:
        function: the op's name, for the error line.
        x: [B, C, H, W].
        fits: whether the weights are packed for so many channels.

    Raises:
        ValueError: they do not fit, or x is not channels-last.
    """
    if not fits or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{function}: x must be channels-last with the weights' channels, got {[*x.shape]}; pack those"
        )
