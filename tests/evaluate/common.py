"""Sets and features for the tests of evaluation: small, and each computed in a moment."""

import numpy as np
import torch
from torch import Tensor, nn


class Pooled(nn.Module):
    """Means over rows and over columns of uint8 pictures, [B, C, H, W] → [B, C (H + W)]: features without weights."""

    def forward(self, pictures: Tensor) -> Tensor:
        """As `Features` wants it."""
        units = pictures.float() / 255
        return torch.cat((units.mean(2).flatten(1), units.mean(3).flatten(1)), 1)


class Plain:
    """The same as a plain Python class."""

    def __call__(self, pictures):
        return Pooled()(pictures)


class NeedsArguments:
    def __init__(self, size):
        raise AssertionError


class Wrong:
    """Returns what no features are."""

    def __call__(self, pictures):
        return pictures


class Raises:
    def __call__(self, pictures):
        raise RuntimeError("the first line\nand what is wrong")


def pictures(n: int, side: int = 8, seed: int = 0, bright: float = 1.0, channels: int = 1) -> np.ndarray:
    """Random pictures uint8 [n, side, side(, channels)], each with a brightness of its own."""
    random = np.random.default_rng(seed)
    level = random.uniform(0, 1, (n, 1, 1, 1)) * random.uniform(0, 1, (n, side, side, channels))
    array = (255 * bright * level).astype(np.uint8)
    return array[..., 0] if channels == 1 else array


def scripted(path, network=None):
    """A network as a TorchScript file."""
    torch.jit.save(torch.jit.script(network or Pooled()), path)
    return path
