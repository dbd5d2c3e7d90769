"""Noise as diffusers draws it, from the same generators in the same order, without a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

Generator = torch.Generator | list[torch.Generator] | None


def draw(shape: torch.Size, generator: Generator, like: Tensor) -> Tensor:
    """Standard normals, drawn as diffusers draws them: by a CPU's generator on the CPU, by one per sample in turn.

    Args:
        shape: what to draw.
        generator: one, one per sample, or None for the device's own.
        like: its dtype and device count.

    Returns:
        Of `shape`, on the device of `like`, which is not waited for.

    Raises:
        ValueError: a generator of a GPU is to draw for another device.
    """
    device, dtype = like.device, like.dtype
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == device.type):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    from diffusers.utils.torch_utils import randn_tensor  # late: where it is missing, the schedulers say so better

    first = generator[0] if isinstance(generator, list) else generator
    drawn: Tensor
    if device.type == "cuda" and first.device.type == "cpu":
        drawn = randn_tensor(tuple(shape), generator=generator, dtype=dtype)
        return drawn.pin_memory().to(device, non_blocking=True)
    drawn = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    return drawn
