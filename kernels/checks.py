"""Validation shared by the ops: one clear line for whoever passed the wrong tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the network's output may be; the state is always float32."""


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes as a person writes them: `float32 | bfloat16`."""
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None = None,
    fix: str = "",
) -> None:
    """Check one tensor argument.

    Args:
        name: the op's and the argument's name, `op: argument`, for the error line.
        value: what the caller passed.
        dtypes: the dtypes accepted.
        shape: expected sizes; a string stands for any size of at least 1.
        device: the device expected, if it matters.
        fix: how to mend a wrong shape.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape, or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; pass a torch.Tensor")
    if value.dtype not in dtypes:
        wanted = names_of(dtypes)
        raise TypeError(f"{name} must be {wanted}, got {names_of([value.dtype])}; convert it with .to()")
    if len(value.shape) != len(shape) or any(
        have < 1 if isinstance(want, str) else have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        wanted = f"[{', '.join(str(size) for size in shape)}]"
        raise ValueError(f"{name} must be of shape {wanted}, got {list(value.shape)}; {fix or 'reshape it'}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}; move it with .to({str(device)!r})")


def check_contiguous(function: str, **values: Tensor | None) -> None:
    """Check that the memory of an op's tensors, by the arguments' names, is dense and in order.

    Raises:
        ValueError: that of one is not.
    """
    for name, value in values.items():
        if value is not None and not value.is_contiguous():
            raise ValueError(
                f"{function}: {name} must be contiguous, got strides {tuple(value.stride())}; "
                "call .contiguous() once, outside the loop"
            )
