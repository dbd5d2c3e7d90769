"""ShardSet: the shards of one run under one address, and which of them are whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from fastddpm.shards.formats import FORMATS, Format
from fastddpm.shards.plan import Plan, Shard
from fastddpm.shards.records import RUN_FILE, RunFile, ShardRecord, differences, settings_digest, to_json
from fastddpm.shards.store import Store

State = Literal["whole", "missing", "damaged"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of a shard.

    Attributes:
        shard: which.
        state: "whole"; "missing", where there is no record yet; or "damaged".
        why: what is wrong with it; "" if nothing is.
    """

    shard: Shard
    state: State
    why: str = ""

    def __bool__(self) -> bool:
        return self.state == "whole"


@dataclasses.dataclass(frozen=True)
class ShardSet:
    """The shards of a run.

    Args:
        store: where they are.
        run: what the run's file says.
        settings: all of it.
    """

    store: Store
    run: RunFile
    settings: Mapping[str, Any]

    @classmethod
    def begin(cls, store: Store, settings: Mapping[str, Any]) -> ShardSet:
        """Write down a run's settings, or see that those that are there already are the same.

        Args:
            store: where the shards are to be.
            settings: all that decides pictures and files, as JSON-ready values.

        Raises:
            ValueError: another run is there; says what differs.
            OSError: it cannot be written or read.
        """
        mine = dict(json.loads(json.dumps(settings)))
        mine["digest"] = settings_digest(mine)
        theirs = _read_settings(store)
        if theirs is None:
            _check_no_shards(store)
            store.make()
            store.create(RUN_FILE, to_json(mine))
            theirs = _read_settings(store) or mine  # another process may have been first
        if different := differences(theirs, mine):
            raise ValueError(
                f"{store.address} holds a run with other settings: {'; '.join(different)}; use another place"
            )
        return cls(store, _run_file(store, theirs), theirs)

    @classmethod
    def open(cls, store: Store) -> ShardSet:
        """A run that has begun.

        Raises:
            ValueError: none has, or its file is not readable.
            OSError: the store cannot be read.
        """
        settings = _read_settings(store)
        if settings is None:
            raise ValueError(f"{store.address} must hold a run's shards, got no {RUN_FILE} there; check the place")
        return cls(store, _run_file(store, settings), settings)

    @property
    def plan(self) -> Plan:
        """Which ids are in which shard."""
        return self.run.plan

    @property
    def format(self) -> Format:
        """What the shards' files are."""
        return FORMATS[self.run.format]

    def recorded(self) -> Collection[int]:
        """The numbers of the shards that have a record, by one look at the store.

        Raises:
            OSError: the store cannot be read.
        """
        there = self.store.sizes()
        return {shard.number for shard in self.plan if shard.record in there}

    def record(self, shard: Shard) -> ShardRecord | None:
        """A shard's record; None if it is not there.

        Raises:
            ValueError: it is not readable, or belongs to another run or shard.
            OSError: the store cannot be read.
        """
        content = self.store.read(shard.record)
        if content is None:
            return None
        try:
            record = ShardRecord.from_dict(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{shard.record} is not readable") from error
        if not record.is_of(shard, self.run.digest):
            raise ValueError(f"{shard.record} belongs to another run or shard")
        return record

    def look(self, shard: Shard, *, thorough: bool) -> Finding:
        """Whether a shard is there and whole.

        Args:
            shard: which.
            thorough: whether every byte is read; otherwise only the record is.

        Raises:
            OSError: the store cannot be read.
        """
        try:
            record = self.record(shard)
        except ValueError as error:
            return Finding(shard, "damaged", str(error))
        if record is None:
            return Finding(shard, "missing")
        if thorough:
            for name, sha256 in zip(record.files, record.sha256, strict=True):
                found = self.store.sha256(name)
                if found != sha256:
                    why = "is not there" if found is None else "has another SHA-256 than its record says"
                    return Finding(shard, "damaged", f"{name} {why}")
        return Finding(shard, "whole")

    def verify(self) -> Iterator[Finding]:
        """Look at each shard, every byte of it.

        Raises:
            OSError: the store cannot be read.
        """
        for shard in self.plan:
            yield self.look(shard, thorough=True)


def _read_settings(store: Store) -> dict[str, Any] | None:
    content = store.read(RUN_FILE)
    if content is None:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        settings = json.loads(content)
        if isinstance(settings, dict):
            return settings
    raise ValueError(f"{store.address}: {RUN_FILE} must be a run's settings, got another file; use another place")


def _run_file(store: Store, settings: Mapping[str, Any]) -> RunFile:
    try:
        return RunFile.read(settings)
    except ValueError as error:
        raise ValueError(
            f"{store.address}: {RUN_FILE} must be of a run with shards, got another ({error}); use another place"
        ) from error


def _check_no_shards(store: Store) -> None:
    foreign = min((name for name in store.sizes() if name.startswith("shard-")), default=None)
    if foreign is not None:
        raise ValueError(f"{store.address} must be a run's, got {foreign} without {RUN_FILE}; use another place")
