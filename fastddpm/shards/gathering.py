"""Gathering: all pictures of a set of shards again, one after the other, and one archive of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastddpm.files import atomic_path
from fastddpm.shards.npz import Pictures, write_npz
from fastddpm.shards.records import ShardRecord
from fastddpm.shards.shard_set import Finding, ShardSet


def gather_npz(shards: ShardSet, path: Path) -> list[Finding]:
    """Write all pictures into one archive, arr_0 uint8 [n, H, W, C] and arr_1 int64 [n] where there are labels.

    Args:
        shards: the set.
        path: the .npz file, written atomically.

    Returns:
        The shards that are not whole; then nothing is written.

    Raises:
        OSError: the store cannot be read, or the file not be written.
        ValueError: a shard that was whole a moment ago no longer is.
    """
    wrong = [finding for finding in shards.verify() if not finding]
    if wrong:
        return wrong
    records = [_record(shards, number) for number in range(len(shards.plan))]
    parts = [record.labels for record in records if record.labels is not None]
    labels = np.concatenate(parts).tolist() if parts else None
    pictures = _pictures(shards, records)
    first = next(pictures)
    with atomic_path(path) as temporary:
        write_npz(temporary, itertools.chain([first], pictures), (shards.run.n, *first.shape[1:]), labels)
    return []


def stream_shards(shards: ShardSet) -> Iterator[tuple[Pictures, tuple[int, ...] | None]]:
    """The pictures of each shard in the order of their ids, in pieces uint8 [B, H, W, C], with their labels.

    They are not compared with their SHA-256; `ShardSet.verify` does that.

    Raises:
        ValueError: a shard is missing or damaged.
        OSError: the store cannot be read.
    """
    for shard in shards.plan:
        record, done = _record(shards, shard.number), 0
        for piece in _pictures(shards, [record]):
            labels = None if record.labels is None else record.labels[done : done + len(piece)]
            done += len(piece)
            yield piece, labels


def _record(shards: ShardSet, number: int) -> ShardRecord:
    record = shards.record(shards.plan[number])
    if record is None:
        raise ValueError(
            f"{shards.store.address}: shard {number} must be there, got none; the command that draws them continues"
        )
    return record


def _pictures(shards: ShardSet, records: list[ShardRecord]) -> Iterator[Pictures]:
    for record in records:
        for name in record.files:
            with shards.store.reading(name) as path:
                yield from shards.format.read(path)
