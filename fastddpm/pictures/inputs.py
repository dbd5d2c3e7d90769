"""Pictures as a caller has them (paths, PIL images, arrays, tensors), brought into a network's own form and range."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastddpm.pictures.picture_file import read_picture

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.generic] | Tensor
Pictures = Picture | list[Picture] | tuple[Picture, ...]

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray picture (ITU-R BT.601), as Pillow's own."""


def from_pictures(
    pictures: Pictures,
    shape: tuple[int, int, int],
    *,
    unit_range: bool = False,
    function: str = "from_pictures",
    argument: str = "images",
) -> Tensor:
    """Pictures in the range that a network works in.

    Bytes v become v/127.5 − 1 and floats v in [0, 1], as `Sampler.sample` returns them, 2v − 1. Gray becomes colour by
    repetition, colour becomes gray by its luma (ITU-R BT.601), as the network has it; nothing is resized.

    Args:
        pictures: one or several image files, PIL images, arrays (uint8 or float, [H, W], [H, W, C] or [N, H, W, C]) or
            tensors (uint8 or float, [C, H, W] or [N, C, H, W]).
        shape: (C, H, W) of the network.
        unit_range: whether the network works in [0, 1] rather than in [−1, 1].
        function: name that starts the error messages.
        argument: what they call the pictures.

    Returns:
        float32 [N, C, H, W] on the CPU, or on the tensors' device.

    Raises:
        TypeError: something is no picture, or of another dtype.
        ValueError: there is none, a file cannot be read, or size, channels or values do not fit.
        OSError: a file cannot be opened.
    """
    name = f"{function}: {argument}"
    units = torch.cat([_fitted(name, units, shape) for units in _units(pictures, name)])
    return units if unit_range else 2 * units - 1


def _unit(name: str, picture: object) -> Tensor:
    """One picture or a stack of them as float32 [N, C, H, W] in [0, 1]."""
    if isinstance(picture, (str, os.PathLike)):
        if not Path(picture).exists():
            raise ValueError(f"{name} must exist, got {os.fspath(picture)}; mend the path")
        picture = read_picture(Path(picture)).pixels
    elif isinstance(picture, Image.Image):
        picture = _pixels(picture)
    if isinstance(picture, np.ndarray):
        layout = "[H, W], [H, W, C] or [N, H, W, C]"
        stack = picture[..., None] if picture.ndim == 2 else picture
        stack = stack[None] if stack.ndim == 3 else stack
        tensor = torch.tensor(stack).movedim(-1, 1) if stack.ndim == 4 else None
    elif isinstance(picture, Tensor):
        layout = "[C, H, W] or [N, C, H, W]"
        tensor = picture[None] if picture.ndim == 3 else picture if picture.ndim == 4 else None
    else:
        kind = type(picture).__name__
        raise TypeError(f"{name} must be paths, PIL images, arrays or tensors, got {kind}; convert them")
    if tensor is None:
        raise ValueError(f"{name} must be {layout}, got {tuple(picture.shape)}; reshape them")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be uint8 or float, got {tensor.dtype}; convert them")
    # What was sampled without clipping may leave [0, 1] by a rounding, and NaN is in no range.
    if not bool(((tensor >= -1e-3) & (tensor <= 1 + 1e-3)).all()):
        low, high = tensor.min().item(), tensor.max().item()
        raise ValueError(f"{name} of floats must be in [0, 1], got {low:.4g} … {high:.4g}; map them there")
    return tensor.float()


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """A PIL image as uint8 [H, W] or [H, W, C]."""
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _fitted(name: str, units: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The pictures with the network's channels; their size must be right."""
    C, H, W = shape
    if units.shape[2:] != (H, W):
        height, width = units.shape[2:]
        raise ValueError(f"{name} must be {W}×{H} pixels, got {width}×{height}; resize them")
    found = units.shape[1]
    if found in (2, 4) and C in (1, 3) and bool((units[:, -1] == 1).all()):
        units, found = units[:, :-1], found - 1  # opaque throughout
    if found == C:
        return units
    if found == 3 and C == 1:
        return (units * units.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    if found == 1 and C == 3:
        return units.expand(-1, 3, -1, -1)
    raise ValueError(f"{name} must have {C} channels, got {found}; the network knows no others")


def low_res(
    pictures: Pictures, shape: tuple[int, int, int], *, unit_range: bool = False, function: str = "low_res"
) -> Tensor:
    """Small pictures, enlarged bilinearly to a network's size, as super-resolution networks are given them.

    It is what OpenAI's `SuperResModel` does to its `low_res`: the pixels' centres are mapped onto each other (no
    corners are aligned), and nothing is smoothed.

    Args:
        pictures: one or several, as `from_pictures` takes them, of any one size.
        shape: (C, H, W) of the condition, H and W those of the pictures that the network draws.
        unit_range: whether the network works in [0, 1] rather than in [−1, 1].
        function: name that starts the error messages.

    Returns:
        float32 [N, C, H, W], in the network's range.

    Raises:
        TypeError: something is no picture, or of another dtype.
        ValueError: there is none, a file cannot be read, channels or values do not fit, or sizes differ.
        OSError: a file cannot be opened.
    """
    each = _units(pictures, f"{function}: images")
    sizes = {tuple(units.shape[2:]) for units in each}
    if len(sizes) > 1:
        (h, w), (other_h, other_w) = sorted(sizes)[:2]
        raise ValueError(f"{function}: images must be of one size, got {w}×{h} and {other_w}×{other_h}; resize them")
    units = torch.cat([_fitted(f"{function}: images", one, (shape[0], *one.shape[2:])) for one in each])
    enlarged = F.interpolate(units if unit_range else 2 * units - 1, shape[1:], mode="bilinear")
    return torch.as_tensor(enlarged)


def picture_size(pictures: Pictures, *, function: str = "picture_size") -> tuple[int, int] | None:
    """Height and width of pictures, as `from_pictures` takes them; None where they differ.

    Raises:
        TypeError: something is no picture, or of another dtype.
        ValueError: there is none, or a file cannot be read.
        OSError: a file cannot be opened.
    """
    sizes = {(units.shape[2], units.shape[3]) for units in _units(pictures, f"{function}: images")}
    return sizes.pop() if len(sizes) == 1 else None


def _units(pictures: Pictures, name: str) -> list[Tensor]:
    """Each picture, or stack of them, as float32 [N, C, H, W] in [0, 1]."""
    each = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    if not each:
        raise ValueError(f"{name} must be at least one, got none")
    return [_unit(name, picture) for picture in each]
