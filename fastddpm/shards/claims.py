"""Claims: who is at which shard. They are hints: a shard that two draw has the same bytes, so there are no locks.

A claim is a small file that its owner writes anew as the work gets on. Nothing in it is a time, for the clocks of two
machines differ. Whoever looks at a claim measures by its own clock for how long the content has been the same; one that
has been for long enough is no longer heeded.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from fastddpm.shards.plan import Shard
from fastddpm.shards.store import Store

_SUFFIX = ".claim"
REFRESH_S = 10.0
"""A claim is written anew at most so often."""
LEAST_PATIENCE_S = 60.0
UNKNOWN_PATIENCE_S = 300.0
"""How long a claim may stay the same if nothing is known yet of how long a batch takes."""
_BATCHES = 5  # that an owner may be slower than we are


class Claims:
    """One worker's claims, and what it has seen of the others'."""

    def __init__(
        self, store: Store, part: str, *, patience: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin without claims.

        Args:
            store: where they are written.
            part: the worker's part, "" if there are none. What an earlier worker of the same part has claimed is void.
            patience: seconds for which another's claim may stay the same; None takes five times as long as one's own
                slowest batch, and at least a minute.
            clock: seconds that only grow.
        """
        self._store, self._part, self._clock, self._patience = store, part, clock, patience
        self._me = {"token": uuid.uuid4().hex, "part": part, "process": f"{_here()} {os.getpid()}"}
        self.seen: dict[int, tuple[bytes, float]] = {}
        self._slowest: float | None = None
        self._written, self._last_beat = 0.0, 0.0

    def take(self, shard: Shard) -> bool:
        """Claim a shard, unless somebody else is at it.

        Returns:
            Whether it is ours to draw.

        Raises:
            OSError: the store cannot be read or written.
        """
        name, mine = _name(shard), self.content(0)
        self._written = self._last_beat = self._clock()
        if self._store.create(name, mine):
            return True
        theirs = self._store.read(name)
        if theirs is not None and not self._is_void(shard, theirs):
            return False
        self._store.write(name, mine)
        return self._store.read(name) == mine  # of two that both found it void the later one goes on

    def beat(self, shard: Shard, drawn: int) -> None:
        """Tell that a batch of a claimed shard is done.

        Args:
            shard: which.
            drawn: pictures of it that are.

        Raises:
            OSError: the store cannot be written.
        """
        now = self._clock()
        self._slowest = max(self._slowest or 0.0, now - self._last_beat)
        self._last_beat = now
        if now - self._written >= REFRESH_S:
            self._store.write(_name(shard), self.content(drawn))
            self._written = now

    def release(self, shard: Shard) -> None:
        """Give a shard back, drawn or not.

        Raises:
            OSError: the store cannot be changed.
        """
        self._store.remove(_name(shard))

    @property
    def patience(self) -> float:
        """Seconds for which another's claim may stay the same."""
        if self._patience is not None:
            return self._patience
        if self._slowest is None:
            return UNKNOWN_PATIENCE_S
        return max(LEAST_PATIENCE_S, _BATCHES * self._slowest)

    def content(self, drawn: int) -> bytes:
        """The claim of this process, which has drawn so many pictures."""
        return json.dumps({**self._me, "drawn": drawn}).encode()

    def _is_void(self, shard: Shard, theirs: bytes) -> bool:
        """Whether whoever wrote a claim is certainly or probably gone."""
        claim = _read(theirs)
        if self._part and claim.get("part") == self._part:
            return True
        if _is_dead(claim.get("process", "")):
            return True
        now = self._clock()
        content, since = self.seen.get(shard.number, (None, now))
        if content != theirs:
            self.seen[shard.number] = (theirs, now)
            return False
        return now - since >= self.patience


def standing(store: Store) -> dict[str, int]:
    """The shards that somebody claims, by name, with the pictures of each that were drawn when it last told.

    Raises:
        OSError: the store cannot be read.
    """
    claims = {name.removesuffix(_SUFFIX): store.read(name) for name in _names(store)}
    return {name: int(_read(claim).get("drawn", "0")) for name, claim in claims.items() if claim is not None}


def remove_all(store: Store) -> None:
    """Remove all claims, when every shard is there.

    Raises:
        OSError: the store cannot be changed.
    """
    for name in _names(store):
        store.remove(name)


def _names(store: Store) -> list[str]:
    # Not what another process is just writing under a temporary name.
    return sorted(name for name in store.sizes() if name.startswith("shard-") and name.endswith(_SUFFIX))


def _name(shard: Shard) -> str:
    return f"{shard.name}{_SUFFIX}"


def _read(content: bytes) -> dict[str, str]:
    """A claim's fields as texts; none if it is damaged."""
    try:
        values = json.loads(content)
        return {name: str(value) for name, value in values.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _here() -> str:
    """Names this machine and this container as long as they run: process numbers mean the same within it."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("/pid") else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return ":".join(parts)


def _is_dead(process: str) -> bool:
    """Whether a process of this machine is gone; of others nothing is known."""
    here, _, number = process.rpartition(" ")
    if here != _here() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
