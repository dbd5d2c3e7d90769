"""The arithmetic of what is measured: its precision, and what float32 means on a GPU meanwhile."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

from fastddpm.engines.surroundings import float32_kernels

Precision = Literal["fp32", "tf32", "bf16"]


def arithmetic(precision: Precision, device: torch.device | str) -> contextlib.AbstractContextManager[None]:
    """In the block, float32 on a GPU means float32, or TF32 where `precision` says so; afterwards all is as before."""
    return float32_kernels(precision) if torch.device(device).type == "cuda" else contextlib.nullcontext()
