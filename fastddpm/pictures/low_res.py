"""low_res: small pictures as the condition of a network that enlarges them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.pictures.inputs import Pictures, fitted, unit


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
    each = _units(pictures, function)
    sizes = {tuple(units.shape[2:]) for units in each}
    if len(sizes) > 1:
        (h, w), (other_h, other_w) = sorted(sizes)[:2]
        raise ValueError(f"{function}: images must be of one size, got {w}×{h} and {other_w}×{other_h}; resize them")
    units = torch.cat([fitted(function, one, (shape[0], *one.shape[2:])) for one in each])
    enlarged = F.interpolate(units if unit_range else 2 * units - 1, shape[1:], mode="bilinear")
    return torch.as_tensor(enlarged)


def picture_size(pictures: Pictures, *, function: str = "picture_size") -> tuple[int, int] | None:
    """Height and width of pictures, as `from_pictures` takes them; None where they differ.

    Raises:
        TypeError: something is no picture, or of another dtype.
        ValueError: there is none, or a file cannot be read.
        OSError: a file cannot be opened.
    """
    sizes = {(units.shape[2], units.shape[3]) for units in _units(pictures, function)}
    return sizes.pop() if len(sizes) == 1 else None


def _units(pictures: Pictures, function: str) -> list[Tensor]:
    """Each picture, or stack of them, as float32 [N, C, H, W] in [0, 1]."""
    each = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    if not each:
        raise ValueError(f"{function}: images must be at least one, got none")
    return [unit(function, picture) for picture in each]
