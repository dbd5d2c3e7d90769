"""The normals of `philox.py` where steps run eagerly on a CPU: in C, if that is asked for, a tenth of PyTorch's time.

Steps whose network another library runs ask for it: their eager update would take as long as a small network.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.kernels.native import Choice, NativeError, load
from fastddpm.kernels.philox import normals_reference

_SOURCE = Path(__file__).with_name("normals.c")
_choice = Choice()


def native_normals() -> AbstractContextManager[None]:
    """In the block, this thread's normals on the CPU are made in C where that can be compiled.

    Nothing may be traced in it: a tracer would not see them.
    """
    return _choice.block()


def normals(seed: Tensor, sample_id: Tensor, t: Tensor, numel: int) -> Tensor:
    """Standard normals of a batch of samples; see `normals_reference`, to which they are equal up to `NORMALS_ATOL`.

    Args:
        seed: int64 [B], 64-bit patterns.
        sample_id: int64 [B], likewise.
        t: int64 [B], the counter.
        numel: elements of one sample.

    Returns:
        float32 [B, numel] on the device of `seed`, contiguous.
    """
    library = loaded() if _choice.made and seed.device.type == "cpu" else None
    if library is None:
        return normals_reference(seed, sample_id, t, numel)
    seed, sample_id, t = seed.contiguous(), sample_id.contiguous(), t.contiguous()
    out = torch.empty(len(seed), numel)
    pointers = (tensor.data_ptr() for tensor in (seed, sample_id, t, out))
    library.normals(*pointers, len(seed), numel, torch.get_num_threads())
    return out


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be compiled, which costs time and nothing else."""
    try:
        library = load(_SOURCE, ("normals",))
    except NativeError:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.normals.argtypes = [pointer] * 4 + [size] * 2 + [ctypes.c_int]
    library.normals.restype = None
    return library
