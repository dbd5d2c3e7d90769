"""The normals of `philox.py` in C, for CPUs, where that is asked for: a twentieth of the time of PyTorch's operations.

Compiled steps ask for it, for which Inductor would take as long as for a small network; steps whose network another
library runs, whose eager update would; and x_T is made so, whatever the engine.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.kernels.native import Choice, can_load, load, register
from fastddpm.kernels.philox import normals_reference

_SOURCE = Path(__file__).with_name("normals.c")
DECLARATION = """AOTITorchError aoti_torch_cpu_normals(
    AtenTensorHandle seed, AtenTensorHandle sample_id, AtenTensorHandle t, int64_t numel, int64_t threads,
    AtenTensorHandle* y)"""
"""How a compiled step calls the kernel."""
_choice = Choice()


def native_normals() -> AbstractContextManager[None]:
    """In the block, this thread's normals on the CPU are made in C where that can be compiled."""
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
    if not (_choice.made and seed.device.type == "cpu" and is_there()):
        return normals_reference(seed, sample_id, t, numel)
    numbers = (tensor.contiguous() for tensor in (seed, sample_id, t))
    return torch.as_tensor(torch.ops.fastddpm.normals(*numbers, numel, torch.get_num_threads()))


def is_there() -> bool:
    """Whether the kernel can be compiled here; it is loaded then."""
    return can_load(loaded)


@functools.cache
def loaded() -> ctypes.CDLL:
    """The compiled kernel."""
    library = load(_SOURCE, ("philox_normals", "aoti_torch_cpu_normals"))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.philox_normals.argtypes = [pointer] * 4 + [size] * 2 + [ctypes.c_int]
    library.philox_normals.restype = None
    return library


def _normals(seed: Tensor, sample_id: Tensor, t: Tensor, numel: int, threads: int) -> Tensor:
    out = _fake(seed, sample_id, t, numel, threads)
    pointers = (tensor.data_ptr() for tensor in (seed, sample_id, t, out))
    loaded().philox_normals(*pointers, len(seed), numel, threads)
    return out


def _fake(seed: Tensor, sample_id: Tensor, t: Tensor, numel: int, threads: int) -> Tensor:
    return seed.new_empty((seed.shape[0], numel), dtype=torch.float32)


_SCHEMA = "normals(Tensor seed, Tensor sample_id, Tensor t, int numel, int threads) -> Tensor"
register(_SCHEMA, _normals, _fake, loaded, DECLARATION)
