"""Attention in bfloat16 on the matrix unit of Intel's processors (AMX).

    y[n] = Σ_m p[n, m] v[m] / Σ_m p[n, m],  p[n, m] = exp((q[n]·k[m] − max_m q[n]·k[m]) / √D)

(Vaswani et al. 2017, eq. 1). Scores and sums are float32; p is rounded to bfloat16 for the second product, and the
result once. The kernel is `amx_attention.c`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.kernels.amx import PART, load_amx
from fastddpm.kernels.native import can_load, register

_SOURCE = Path(__file__).with_name("amx_attention.c")
DECLARATION = """AOTITorchError aoti_torch_cpu_amx_attention(
    AtenTensorHandle qkv, int64_t heads, int32_t heads_first, int64_t threads, AtenTensorHandle* y)"""
"""How a compiled step calls the kernel."""


@functools.cache
def loaded() -> ctypes.CDLL:
    """The compiled kernel; raises NativeError as `load_amx`."""
    return load_amx(_SOURCE, [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 4 + [ctypes.c_int] * 2)


def is_there() -> bool:
    """Whether the kernel runs here."""
    return can_load(loaded)


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether it takes such queries, keys and values [B, N, 3C], and runs here."""
    positions, width = qkv.shape[1:]
    right = qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu" and width % (3 * heads * PART) == 0
    return right and positions % PART == 0 and is_there()


def amx_attention(qkv: Tensor, heads: int, *, heads_first: bool = False) -> Tensor:
    """Each head's attention of a batch.

    Args:
        qkv: bfloat16 [B, N, 3C] on the CPU, one that `fits`: queries, keys and values of all heads, [3, heads, D]; best
            contiguous, another one is copied.
        heads: how many.
        heads_first: whether they lie as [heads, 3, D].

    Returns:
        bfloat16 [B, N, C], contiguous.

    Raises:
        ValueError: it does not fit.
        MemoryError: there is no memory for what is packed.
        NativeError: the kernel does not run here.
    """
    return torch.as_tensor(
        torch.ops.fastddpm.amx_attention(qkv.contiguous(), heads, heads_first, torch.get_num_threads())
    )


def _amx_attention(qkv: Tensor, heads: int, heads_first: bool, threads: int) -> Tensor:
    (batch, positions, width), y = qkv.shape, _fake(qkv, heads, heads_first, threads)
    run = loaded().amx_attention
    if not (fits(qkv, heads) and qkv.is_contiguous()):
        raise ValueError(
            f"amx_attention: qkv must be contiguous bfloat16, positions and channels of a head multiples of {PART}, "
            f"got {qkv.dtype} {[*qkv.shape]} of {heads} heads; use scaled_dot_product_attention"
        )
    sizes = (batch, positions, heads, width // (3 * heads))
    if run(qkv.data_ptr(), y.data_ptr(), *sizes, heads_first, threads):
        raise MemoryError("amx_attention: there must be memory for packed keys and values, got none")
    return y


def _fake(qkv: Tensor, heads: int, heads_first: bool, threads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


register(
    "amx_attention(Tensor qkv, int heads, bool heads_first, int threads) -> Tensor", _amx_attention, _fake, loaded,
    DECLARATION,
)  # fmt: skip
