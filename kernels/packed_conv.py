"""What the products in C with weights of a form of their own have in common: result, check, and a call to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def result_of(x: Tensor, packed: Tensor, bias: Tensor, threads: int, scale: int = 1) -> Tensor:
    """Memory for a result [B, O, scale·H, scale·W] of x's type, channels-last; tracing asks for its shape."""
    shape = (x.shape[0], bias.shape[0], scale * x.shape[2], scale * x.shape[3])
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


def call_of(run: Callable[..., int], tensors: tuple[Tensor, Tensor, Tensor, Tensor], kind: int) -> Callable[[], object]:
    """A call of a kernel for x, packed weights, bias and result, without Python's checks; `kind` is its own number."""
    (batch, channels, height, width), outputs = tensors[0].shape, len(tensors[2])
    sizes = batch, height, width, channels, outputs, kind, torch.get_num_threads()
    arguments = (*(tensor.data_ptr() for tensor in tensors), *sizes)

    def call() -> object:
        if run(*arguments):
            raise MemoryError("there must be memory for what the kernel prepares, got none")
        return tensors  # which must be there as long as the call

    return call
