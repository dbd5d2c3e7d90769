"""Gaussian noise as a pure function of (seed, sample_id, t), and the forms in which callers may supply their own."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastddpm.common.arguments import integers, whole
from fastddpm.kernels import normals as kernel
from fastddpm.kernels.normals import native_normals
from fastddpm.kernels.philox import X_T_COUNTER

NoiseFunction = Callable[[int, int, Tensor], Tensor]
"""(loop step i, training timestep t, sample ids int64 [B]) → noise float [B, C, H, W]."""
NoiseSource = Tensor | NoiseFunction | torch.Generator


def seed_bits(seed: int) -> int:
    """The int64 that holds the same 64 bits as the unsigned `seed`.

    Raises:
        TypeError: seed is not an int.
        ValueError: seed is not in [0, 2**64).
    """
    return _bits("seed", seed)


def _bits(name: str, value: int) -> int:
    value = whole("sample", name, value)
    if not 0 <= value < 2**64:
        raise ValueError(f"sample: {name} must be in [0, 2**64), got {value}; it is a 64-bit number without sign")
    return value - 2**64 if value >= 2**63 else value


def _id(value: int) -> int:
    try:
        return _bits("sample_ids", value)
    except TypeError as error:
        raise TypeError(f"sample: sample_ids must be integers, got {reprlib.repr(value)}; convert them") from error


def id_bits(sample_ids: Tensor | Sequence[int]) -> Tensor:
    """Sample ids as an int64 tensor [n] on the CPU; ids of 2**63 and more become the negative number of the same bits.

    Raises:
        TypeError: the ids are not integers.
        ValueError: there are none, they are not 1-D, or one is not in [0, 2**64).
    """
    if isinstance(sample_ids, Tensor):
        ids = integers("sample", "sample_ids", sample_ids)
    elif isinstance(sample_ids, (str, bytes)) or not isinstance(sample_ids, Iterable):
        raise TypeError(f"sample: sample_ids must be integers, got {reprlib.repr(sample_ids)}; make a list of them")
    else:
        ids = torch.tensor([_id(i) for i in sample_ids], dtype=torch.int64)
    if ids.ndim != 1 or ids.numel() == 0:
        raise ValueError(f"sample: sample_ids must be a list of at least one id, got shape {tuple(ids.shape)}")
    return ids


def normals(seed: Tensor, sample_id: Tensor, t: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Standard normals of the samples at timestep t (Philox4x32-10 and Box–Muller, see `fastddpm.kernels.philox`).

    Args:
        seed: int64 [B], 64-bit patterns.
        sample_id: int64 [B], 64-bit patterns.
        t: int64 [B], training timesteps 0 … T−1.
        shape: (C, H, W) of a sample.

    Returns:
        float32 [B, C, H, W] on seed's device, contiguous.
    """
    channels, height, width = shape
    return kernel.normals(seed, sample_id, t, channels * height * width).reshape(-1, channels, height, width)


def initial_noise(seed: Tensor, sample_id: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """x_T ~ N(0, I) of the samples, float32 [B, C, H, W]; arguments as in `normals`.

    On CPUs it is made in C where there is a compiler, whatever engine makes the steps: PyTorch takes nearly a
    millisecond, most of it for calls of small operations.
    """
    with native_normals():
        return normals(seed, sample_id, torch.full_like(sample_id, X_T_COUNTER), shape)
