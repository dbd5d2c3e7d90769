"""The arithmetic of what is measured: its precision, and what float32 means on a GPU meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """In the block, float32 on a GPU means float32, or TF32 where `precision` says so; afterwards all is as before."""
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
