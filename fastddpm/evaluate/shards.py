"""Shards as one side of a comparison: read from a disk or an object store, one picture after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastddpm.pictures.streams import in_batches
from fastddpm.shards.gathering import stream_shards
from fastddpm.shards.records import RUN_FILE
from fastddpm.shards.shard_set import ShardSet
from fastddpm.shards.store import Store


@dataclasses.dataclass(frozen=True)
class ShardStream:
    """The pictures of a finished set of shards, in the order of their ids.

    Attributes:
        shards: the set.
        shape: (C, H, W) of its pictures.
    """

    shards: ShardSet
    shape: tuple[int, int, int]

    @classmethod
    def open(cls, address: str, size: int | None = None) -> ShardStream | None:
        """The stream at a folder or URL; None if there are no shards.

        Raises:
            ValueError: shards are missing, or pictures would have to be resized; or the run's file is not readable.
            OSError: the store cannot be read.
        """
        if "://" not in address and not Path(address).is_dir():
            return None
        store = Store(address)
        if b'"shard_size"' not in (store.read(RUN_FILE) or b""):  # a folder of single pictures has such a file too
            return None
        shards = ShardSet.open(store)
        missing = len(shards.plan) - len(shards.recorded())
        if missing:
            raise ValueError(
                f"{address}: all {len(shards.plan)} shards must be there, {missing} are missing; "
                "the command that draws them continues"
            )
        first, _ = next(stream_shards(shards))
        H, W, C = first.shape[1:]
        if size is not None and (H, W) != (size, size):
            raise ValueError(f"{address}: pictures of shards must be {size}×{size} pixels, got {W}×{H}; leave out size")
        return cls(shards, (C, H, W))

    @property
    def source(self) -> str:
        """The folder or URL."""
        return self.shards.store.address

    def __len__(self) -> int:
        """How many pictures the run has."""
        return self.shards.run.n

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """See `PictureStream.batches`."""
        pieces = (pictures for pictures, _ in stream_shards(self.shards))
        return in_batches(pieces, batch_size, channels, self.source)
