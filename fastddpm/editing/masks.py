"""Masks: which part of a picture is to be drawn anew, as a caller has them (names, files, arrays, tensors)."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastddpm.pictures.inputs import Picture, from_pictures

Part = Literal["middle", "left", "right", "top", "bottom"]
"""Parts of a picture by name: the square or rectangle of half the sides in the middle, or one of the halves."""
PARTS: tuple[Part, ...] = typing.get_args(Part)


def from_mask(mask: Picture | Part, n: int, shape: tuple[int, int, int]) -> Tensor:
    """A mask for each of n pictures: 1 (white, True) where it is to be drawn anew, 0 (black) where it stays.

    Args:
        mask: one mask for all pictures or one for each: a name, an image file, a PIL image, an array (bool, uint8 or
            float, [H, W], [H, W, C] or [N, H, W, C]) or a tensor ([H, W], [C, H, W] or [N, C, H, W]). Colours count by
            their luma; gray mixes.
        n: how many pictures there are.
        shape: (C, H, W) of the network.

    Returns:
        float32 [n, C, H, W] in [0, 1] on the CPU, contiguous.

    Raises:
        TypeError: it is no picture, or of another dtype.
        ValueError: size, values or number do not fit, or nothing is to be drawn.
        OSError: a file cannot be opened.
    """
    C, H, W = shape
    if isinstance(mask, (str, os.PathLike)) and str(mask) not in PARTS and not Path(mask).exists():
        raise ValueError(
            f"inpaint: mask must be an image file or one of {', '.join(PARTS)}, got {str(mask)!r}; mend the path"
        )
    if isinstance(mask, str) and mask in PARTS:
        planes = _part(mask, H, W)
    else:
        numbers = [_numbers(mask)]
        planes = from_pictures(numbers, (1, H, W), unit_range=True, function="inpaint", argument="mask").cpu()
    if len(planes) not in (1, n):
        raise ValueError(f"inpaint: mask must be one for all or {n}, one for each picture, got {len(planes)}")
    if not bool((planes > 0).flatten(1).any(1).all()):
        raise ValueError("inpaint: mask must be white where the picture is to be drawn anew, got one that is black")
    return planes.clamp(0, 1).expand(n, C, H, W).contiguous()


def _part(name: Part, height: int, width: int) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    rows, columns = slice(None), slice(None)
    if name == "middle":
        rows, columns = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    elif name in ("left", "right"):
        columns = slice(0, width // 2) if name == "left" else slice(width // 2, width)
    else:
        rows = slice(0, height // 2) if name == "top" else slice(height // 2, height)
    mask[..., rows, columns] = 1.0
    return mask


def _numbers(mask: Picture) -> Picture:
    """A mask in a form that pictures have: truth values as numbers, a plane of a tensor with its channel."""
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = mask.astype(np.float32)
    if isinstance(mask, Tensor):
        mask = mask.float() if mask.dtype == torch.bool else mask
        mask = mask[None] if mask.ndim == 2 else mask
    if isinstance(mask, (np.ndarray, Tensor)) and "uint8" in str(mask.dtype) and mask.size and int(mask.max()) == 1:
        raise ValueError("inpaint: mask of bytes must be 0 … 255, got 0 and 1; convert it to bool or float")
    return mask
