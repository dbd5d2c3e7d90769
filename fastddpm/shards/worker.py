"""Worker: one process that goes through the shards of a run until all are there, whoever draws them."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fastddpm.shards import claims
from fastddpm.shards.claims import Claims
from fastddpm.shards.maker import Maker
from fastddpm.shards.part import Part
from fastddpm.shards.plan import Shard
from fastddpm.shards.shard_set import ShardSet

LOOK_S = 2.0
"""How often a worker looks, that has nothing left to do, whether the others' shards are there."""


class Report(Protocol):
    """Is told how far a set is."""

    def there(self, pictures: int) -> None:
        """So many pictures more are there, drawn by us now or found."""

    def waiting(self, shards: int) -> None:
        """So many shards are still being drawn by others."""


class Unheard:
    """A report that nobody reads."""

    def there(self, pictures: int) -> None:
        """See `Report.there`."""

    def waiting(self, shards: int) -> None:
        """See `Report.waiting`."""


@dataclasses.dataclass
class Done:
    """What a worker did.

    Attributes:
        drawn: shards that it drew.
        mended: how many of them were there already, but damaged.
        pictures: that it drew.
    """

    drawn: int = 0
    mended: int = 0
    pictures: int = 0


class Worker:
    """Draws what is missing or damaged: first of its own part, then of the others', and at last what they left."""

    def __init__(
        self,
        maker: Maker,
        part: Part | None = None,
        report: Report | None = None,
        *,
        patience: float | None = None,
        look: float = LOOK_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take up a part.

        Args:
            maker: draws a shard.
            part: where to begin; None begins at the first shard.
            report: is told how far the set is.
            patience: see `Claims`.
            look: seconds between two looks at what others are drawing.
            sleep: waits so many seconds.
        """
        self._maker, self._part, self._report = maker, part or Part(), report or Unheard()
        self._look, self._sleep = look, sleep
        self._claims = Claims(maker.set.store, self._part.name, patience=patience)
        self._done = Done()
        self._damaged: set[int] = set()

    def run(self) -> Done:
        """Work until every shard is there.

        One's own shards that are there already are verified, every byte of them; of the others' the record is enough.

        Returns:
            What was drawn here.

        Raises:
            FloatingPointError: the samples ran into NaN or infinity.
            OSError: the store cannot be read or written.
        """
        shards: ShardSet = self._maker.set
        shards.store.tidy()
        own, others = self._part.order(len(shards.plan), random.Random())
        left = [shard for shard in map(shards.plan.__getitem__, own) if not self._settled(shard, thorough=True)]
        left += [shards.plan[number] for number in others]
        while left := self._passed(left):
            self._report.waiting(len(left))
            self._sleep(self._look)
        claims.remove_all(shards.store)
        shards.store.tidy()
        return self._done

    def _passed(self, shards: Sequence[Shard]) -> list[Shard]:
        """Go through the shards once; returns those that others are at."""
        recorded = self._maker.set.recorded()
        return [shard for shard in shards if not self._settled_or_drawn(shard, shard.number in recorded)]

    def _settled(self, shard: Shard, *, thorough: bool = False) -> bool:
        """Whether a shard is there; what was found damaged is not, until it is drawn anew."""
        if shard.number in self._damaged:
            return False
        found = self._maker.set.look(shard, thorough=thorough)
        if found:
            self._report.there(shard.count)
        elif found.state == "damaged":
            self._damaged.add(shard.number)
        return bool(found)

    def _settled_or_drawn(self, shard: Shard, recorded: bool) -> bool:
        if recorded and self._settled(shard):
            return True
        if not self._claims.take(shard):
            return False
        try:
            # The claim's owner may have finished between our look and the claim.
            if not self._settled(shard):
                self._draw(shard)
        finally:
            self._claims.release(shard)
        return True

    def _draw(self, shard: Shard) -> None:
        told = 0

        def tell(drawn: int) -> None:
            nonlocal told
            self._claims.beat(shard, drawn)
            self._report.there(drawn - told)
            told = drawn

        self._maker.make(shard, tell)
        self._done.drawn += 1
        self._done.mended += shard.number in self._damaged
        self._damaged.discard(shard.number)
        self._done.pictures += shard.count
