"""The C kernel of `add_group_norm` for CPUs and its op; the equations stand in `group_norm.py`.

Compiled steps ask for it: there it is called without Python between, and a compiler has no norms to make code for,
which is most of what it would do.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.kernels.native import Choice, can_load, load, register

_SOURCE = Path(__file__).with_name("group_norm.c")
LANES = 8
"""Channels that the kernel takes at a time."""
_DTYPES = (torch.float32, torch.bfloat16)
_LEAST_ELEMENTS = 1 << 12
"""Elements for which it pays to wake a thread."""
DECLARATION = """AOTITorchError aoti_torch_cpu_add_group_norm_native(
    AtenTensorHandle x, AtenTensorHandle* bias, AtenTensorHandle* row, AtenTensorHandle* index,
    AtenTensorHandle* residual, AtenTensorHandle* skip, AtenTensorHandle weight, AtenTensorHandle beta, int64_t groups,
    double eps, int64_t column, int32_t scale_shift, int32_t silu, int32_t keep, int64_t threads,
    AtenTensorHandle* total, AtenTensorHandle* y)"""
"""How a compiled step calls the kernel."""
_choice = Choice()


class _Job(ctypes.Structure):
    """`job` of the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "row", "residual", "skip", "weight", "beta")),
        *((name, ctypes.c_void_p) for name in ("index", "total", "y")),
        *((name, ctypes.c_int64) for name in ("B", "P", "own", "rest", "groups", "width", "rows", "column")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int) for name in ("scale_shift", "silu", "half", "halves_in_norm", "halves_in_row")),
        ("threads", ctypes.c_int),
    ]


def native_norms() -> AbstractContextManager[None]:
    """In the block, this thread's group norms on the CPU are made in C where that can be compiled."""
    return _choice.block()


def is_there() -> bool:
    """Whether the kernel can be compiled here; it is loaded then."""
    return can_load(loaded)


def is_asked(device_type: str) -> bool:
    """Whether norms on this kind of device are to be made in C, and can be."""
    return device_type == "cpu" and _choice.made and is_there()


def takes(x: Tensor, skip: Tensor | None) -> bool:
    """Whether the kernel is asked for and takes pictures of this type and so many channels."""
    fits = all(pictures is None or pictures.shape[1] % LANES == 0 for pictures in (x, skip))
    return fits and x.dtype in _DTYPES and is_asked(x.device.type)


def threads_for(elements: int) -> int:
    """Threads for so many elements."""
    return max(1, min(torch.get_num_threads(), elements // _LEAST_ELEMENTS))


@functools.cache
def loaded() -> ctypes.CDLL:
    """The compiled kernel."""
    library = load(_SOURCE, ("add_group_norm", "aoti_torch_cpu_add_group_norm_native"))
    library.add_group_norm.argtypes = [ctypes.POINTER(_Job)]
    return library


def _add_group_norm(
    x: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    index: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    column: int,
    *flags: int,
) -> tuple[Tensor, Tensor]:
    scale_shift, silu, keep, threads = flags
    total, y = _results(x, skip, bool(keep))
    tensors = (x, bias, row, residual, skip, weight, beta, index, total if keep else None, y)
    rest, (rows, width) = 0 if skip is None else skip.shape[1], (0, 0) if row is None else row.shape
    half = (tensor is not None and tensor.dtype == torch.bfloat16 for tensor in (x, weight, row))
    job = _Job(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors), len(x), x.shape[2] * x.shape[3],
        x.shape[1], rest, groups, width, rows, column, eps, scale_shift, silu, *half, threads,
    )  # fmt: skip
    if loaded().add_group_norm(ctypes.byref(job)):
        raise MemoryError("add_group_norm: there must be memory for the sums, got none")
    return total, y


def _fake(
    x: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    index: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    return _results(x, skip, keep=bool(rest[-2]))


def _results(x: Tensor, skip: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    batch, own, height, width = x.shape
    shape = (height, width, own + (0 if skip is None else skip.shape[1]))
    total, y = (x.new_empty((size, *shape)).permute(0, 3, 1, 2) for size in (batch if keep else 0, batch))
    return total, y


_SCHEMA = (
    "add_group_norm_native(Tensor x, Tensor? bias, Tensor? row, Tensor? index, Tensor? residual, Tensor? skip, "
    "Tensor weight, Tensor beta, int groups, float eps, int column, bool scale_shift, bool silu, bool keep, "
    "int threads) -> (Tensor, Tensor)"
)
register(_SCHEMA, _add_group_norm, _fake, loaded, DECLARATION)
