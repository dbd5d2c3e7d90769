"""What is compared: sets of pictures, of one that a sampler draws too, and statistics that stand for one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor

from fastddpm.engines.options import SampleOptions
from fastddpm.evaluate.shards import ShardStream
from fastddpm.evaluate.statistics import Statistics, read_statistics
from fastddpm.pictures.arrays import npz_names
from fastddpm.pictures.data import PICTURE_ARRAYS
from fastddpm.pictures.streams import PictureStream, open_pictures
from fastddpm.sampler import Batch, Sampler
from fastddpm.step.request import in_turn

Opener = Callable[[str, int | None], PictureStream | None]
OPENERS: tuple[Opener, ...] = (ShardStream.open,)
"""Readers of other layouts: each is asked for the stream at a path or URL, and says None where it knows none."""


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """One side of a comparison: pictures, statistics of inception's features, or both.

    Args:
        source: what it was read from, for people.
        pictures: the pictures, or None.
        statistics: mean and covariance that were computed before, or None. OpenAI's reference batches hold them for
            the whole data set beside some of its pictures.
    """

    source: str
    pictures: PictureStream | None
    statistics: Statistics | None = None


@dataclasses.dataclass(frozen=True)
class SampledPictures:
    """Pictures that a sampler draws when they are asked for, batch by batch; none is kept or written.

    Args:
        sampler: draws them.
        n: how many.
        seed: of the run; the ids are 0 … n − 1.
        classes: the classes that the ids go through in turn, or None for no class.
        options: the others of `Sampler.stream`.
    """

    sampler: Sampler
    n: int
    seed: int = 0
    classes: Sequence[int] | None = None
    options: SampleOptions = dataclasses.field(default_factory=lambda: SampleOptions())

    @property
    def source(self) -> str:
        """What draws them."""
        checkpoint = self.sampler.checkpoint
        return f"{'a sampler' if checkpoint is None else checkpoint.path}, seed {self.seed}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.sampler.spec.shape

    def __len__(self) -> int:
        """How many there are."""
        return self.n

    def check(self) -> None:
        """Refuse before the work what could not be drawn.

        Raises:
            TypeError: an option has the wrong type, or is unknown.
            ValueError: an option is out of range or does not fit the network.
        """
        self._stream(1)

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """See `PictureStream.batches`; a batch size among the options counts more."""
        for batch in self._stream(batch_size):
            pictures = cast(Tensor, batch.pictures)
            found = pictures.shape[1]
            if found not in (1, channels):
                raise ValueError(f"{self.source}: pictures must have {channels} channels, got {found}; leave them out")
            yield pictures if found == channels else pictures.expand(-1, channels, -1, -1)

    def _stream(self, batch_size: int) -> Iterator[Batch]:
        labels = in_turn(self.classes, range(self.n))
        mine = {"batch_size": batch_size, **self.options, "seed": self.seed, "class_labels": labels}
        return self.sampler.stream(self.n, output="uint8", **cast(SampleOptions, mine))


def open_set(path: str | os.PathLike[str], *, size: int | None = None) -> PictureSet:
    """Open one side of a comparison; of pictures no more than the first is read.

    Args:
        path: pictures as `open_pictures` takes them, or an .npz archive with mu and sigma.
        size: to which the images of a folder are resized, as in `open_pictures`.

    Returns:
        The set.

    Raises:
        FileNotFoundError: there is nothing of that path.
        ValueError: it holds neither pictures nor statistics, or pictures of another size.
        OSError: it cannot be read.
    """
    text = os.fspath(path)
    stream = next((found for opener in OPENERS if (found := opener(text, size)) is not None), None)
    if stream is not None:
        return PictureSet(text, stream)
    archive = Path(text)
    names = npz_names(archive) if archive.suffix == ".npz" and archive.is_file() else frozenset()
    if not names & {"mu", "sigma"}:
        return PictureSet(text, open_pictures(archive, size=size))
    pictures = open_pictures(archive, size=size) if names & set(PICTURE_ARRAYS) else None
    return PictureSet(text, pictures, read_statistics(archive))
