"""Conditions: what a network with more input than output channels sees behind x, the same in all steps of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.pictures.inputs import Pictures, from_pictures, low_res, picture_size
from fastddpm.process.spec import ModelSpec

Condition = Tensor | Pictures
"""A float tensor [n, C', H, W] or [C', H, W] as the network takes it, or pictures."""


def condition_of(spec: ModelSpec, n: int, condition: Condition | None) -> Tensor | None:
    """The condition of each of n samples.

    Args:
        spec: the network's conventions.
        n: samples.
        condition: a float tensor [n, C', H, W], [1, C', H, W] or [C', H, W] in the network's own range, which is taken
            as it is; or one or n pictures of the samples' size, or 1/`spec.condition_scale` of it, in any form that
            `fastddpm.pictures.inputs.from_pictures` takes; None where the network takes none.

    Returns:
        float32 [n, C', H, W] on the CPU or the tensor's device, or None.

    Raises:
        TypeError: it is neither a tensor nor pictures.
        ValueError: it is missing, superfluous, of another shape, or holds NaN or infinity.
    """
    channels, size = spec.condition_channels, spec.shape[1:]
    if not channels:
        if condition is not None:
            raise ValueError("sample: condition must be left out, got one, but the network takes none; leave it out")
        return None
    shape = (channels, *size)
    if condition is None:
        raise ValueError(
            f"sample: condition must be given, a tensor {(n, *shape)} or pictures, got None; the network takes "
            f"{channels} channels behind x's {spec.shape[0]}"
        )
    if isinstance(condition, Tensor) and condition.is_floating_point():
        found = condition.detach().to(torch.float32)
        found = found[None] if found.ndim == 3 else found
    else:
        found = _from_pictures(spec, condition, shape)
    if found.shape[1:] != shape or len(found) not in (1, n):
        wanted = f"{(n, *shape)}" if n == 1 else f"{(n, *shape)} or {(1, *shape)}"
        raise ValueError(f"sample: condition must have shape {wanted}, got {tuple(found.shape)}; one or n of them")
    if not bool(found.isfinite().all()):
        raise ValueError("sample: condition must be finite, got NaN or infinity; mend it")
    return found.expand(n, -1, -1, -1)


def _from_pictures(spec: ModelSpec, condition: Pictures, shape: tuple[int, int, int]) -> Tensor:
    """Pictures in the network's range, enlarged where they are small and the network is one that enlarges."""
    unit_range, scale = spec.to_unit == "identity", spec.condition_scale
    small = tuple(side // scale for side in shape[1:])
    if scale > 1 and picture_size(condition, function="sample: condition") == small:
        return low_res(condition, shape, unit_range=unit_range, function="sample: condition")
    return from_pictures(condition, shape, unit_range=unit_range, function="sample", argument="condition")
