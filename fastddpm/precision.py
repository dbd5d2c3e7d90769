"""The arithmetic of the network; the state and the update are float32 in all of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastddpm.unet import UNet

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        ValueError: the name is unknown, or it is "tf32" or "fp16" on a CPU.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}; pick one")
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise ValueError(f"precision must be fp32 or bf16 on a CPU, got {precision}; it is for GPUs")


def in_precision(model: Callable[..., Tensor], precision: Precision, device: torch.device) -> Callable[..., Tensor]:
    """The network in a precision; the given one stays as it is.

    Our U-Net gets weights of that type, but for the part that makes the time embeddings, which is tabulated once and
    stays float32. Any other network runs under autocast.

    Args:
        model: (x, t[, y]) → output, float32.
        precision: what its arithmetic shall be.
        device: where it runs.

    Returns:
        A network that takes float32 states; its output may be of the lower type.
    """
    if precision not in _DTYPES:
        return model
    dtype = _DTYPES[precision]
    if isinstance(model, UNet):
        return copy.deepcopy(model).cast(dtype)
    return _Autocast(model, device.type, dtype)


class _Autocast(nn.Module):
    """A network under autocast."""

    def __init__(self, model: Callable[..., Tensor], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, *args: Tensor, **more: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            return self.model(*args, **more).float()


@contextlib.contextmanager
def float32_kernels(precision: Precision, device: torch.device) -> Iterator[None]:
    """In the block, float32 on GPUs means float32, or TF32 where `precision` says so; afterwards all is as before."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
