"""PictureBatches: pictures as a caller has them, brought into a network's form a batch at a time."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastddpm.pictures.inputs import Picture, Pictures, from_pictures


class PictureBatches:
    """Pictures that are read when they are asked for, so that a list of files takes the memory of one batch.

    Stacks (tensors and arrays of several pictures) are in memory anyway and are checked as a whole.
    """

    def __init__(
        self, pictures: Pictures, shape: tuple[int, int, int], *, unit_range: bool = False, function: str
    ) -> None:
        """Take the pictures; arguments as in `from_pictures`.

        Raises:
            TypeError: something is no picture, or of another dtype; of files, that of the first.
            ValueError: there is none, or size, channels or values do not fit; of files, those of the first.
        """
        each = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        self._shape, self._unit_range, self._function = shape, unit_range, function
        self._stack: Tensor | None = None
        self._each = each
        if any(map(_is_stack, each)):
            self._stack = self._formed(each)
        else:
            self._formed(each[:1])

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self._each if self._stack is None else self._stack)

    def read(self, first: int, end: int) -> Tensor:
        """Pictures first … end − 1, float32 [B, C, H, W] in the network's range.

        Raises:
            TypeError: one is no picture, or of another dtype.
            ValueError: one cannot be read, or its size, channels or values do not fit.
            OSError: a file cannot be opened.
        """
        return self._formed(self._each[first:end]) if self._stack is None else self._stack[first:end]

    def _formed(self, pictures: list[Picture]) -> Tensor:
        return from_pictures(pictures, self._shape, unit_range=self._unit_range, function=self._function)


def _is_stack(picture: object) -> bool:
    return isinstance(picture, (Tensor, np.ndarray)) and picture.ndim == 4
