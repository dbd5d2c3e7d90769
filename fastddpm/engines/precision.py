"""The arithmetic of the network; the state and the update are float32 in all of them."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Those that a network is cast to."""


def processor_has_bf16() -> bool:
    """Whether the processor has the instructions for bfloat16 that compiled code needs; without, it is emulated."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        ValueError: the name is unknown, or it is "tf32" or "fp16" on a CPU.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}; pick one")
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise ValueError(f"precision must be fp32 or bf16 on a CPU, got {precision}; it is for GPUs")
