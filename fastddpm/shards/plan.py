"""Plan: which sample ids are in which shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

MOST_IN_A_SHARD = 10**6


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some consecutive ids of a run.

    Attributes:
        number: k, from 0.
        first_id: the first of its ids.
        count: how many there are.
    """

    number: int
    first_id: int
    count: int

    @property
    def ids(self) -> range:
        """Its sample ids."""
        return range(self.first_id, self.first_id + self.count)

    @property
    def name(self) -> str:
        """What its files are called, without a suffix."""
        return f"shard-{self.number:05d}"

    @property
    def record(self) -> str:
        """The file with its record, which is written last: the shard counts when this is there."""
        return f"{self.name}.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is cut: shard k holds the ids first_id + [k · shard_size, (k + 1) · shard_size), the last one the rest.

    Args:
        n: pictures of the run, at least 1.
        shard_size: of each shard but the last, in [1, 10⁶].
        first_id: the first picture's id.

    Raises:
        ValueError: a number is out of range.
    """

    n: int
    shard_size: int = 1000
    first_id: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Plan: n must be at least 1, got {self.n}; ask for at least one picture")
        if not 1 <= self.shard_size <= MOST_IN_A_SHARD:
            raise ValueError(
                f"Plan: shard_size must be in 1 … {MOST_IN_A_SHARD:,}, got {self.shard_size}; 1000 suits most runs"
            )
        if not 0 <= self.first_id <= 2**63 - self.n:
            raise ValueError(f"Plan: first_id must be in 0 … 2**63 − n, got {self.first_id}; choose smaller ids")

    def __len__(self) -> int:
        return -(-self.n // self.shard_size)

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < len(self):
            raise IndexError(f"Plan: number must be in 0 … {len(self) - 1}, got {number}; there are no more shards")
        first = number * self.shard_size
        return Shard(number, self.first_id + first, min(self.shard_size, self.n - first))

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))


def even_batch_size(shard_size: int, most: int) -> int:
    """A batch size of at most `most` at which a shard's last batch needs little or no filling up.

    It is the largest divisor of `shard_size` in (most / 2, most], or, without one, that of parts of like size.

    Args:
        shard_size: pictures of a shard, at least 1.
        most: samples that may run together, at least 1.
    """
    for size in range(min(most, shard_size), most // 2, -1):
        if shard_size % size == 0:
            return size
    return -(-shard_size // -(-shard_size // most))
