"""What is written down beside the pictures: the run's settings, once, and a record for each shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from fastddpm.common.records import Record, Within, read_record
from fastddpm.shards.formats import FormatName
from fastddpm.shards.plan import Plan, Shard

RUN_FILE = "run.json"
FOR_PEOPLE = ("model", "flags")
"""Settings that say where the network came from; what it is, its digest says."""

_Count = Annotated[int, Within(1, 2**63)]
_Number = Annotated[int, Within(0, 2**63)]


@dataclasses.dataclass(frozen=True)
class RunFile(Record):
    """What a reader must know of a run; `run.json` holds it among the settings.

    Args:
        n: pictures.
        shard_size: of each shard but the last.
        first_id: the first picture's id.
        format: of the shards' files.
        digest: SHA-256 of all settings that decide pictures and files.
    """

    n: _Count
    shard_size: _Count
    first_id: _Number
    format: FormatName
    digest: str

    @property
    def plan(self) -> Plan:
        """Which ids are in which shard."""
        return Plan(self.n, self.shard_size, self.first_id)

    @classmethod
    def read(cls, values: object) -> Self:
        """From a run's settings, which hold more than this.

        Raises:
            RecordError: a field is missing, or not of its type and range.
        """
        return read_record(cls, values, more=True)


def settings_digest(settings: Mapping[str, object]) -> str:
    """SHA-256 of those settings that decide pictures and files, as hexadecimal digits."""
    deciding = {name: value for name, value in settings.items() if name not in FOR_PEOPLE and name != "digest"}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> list[str]:
    """What differs between two runs' settings, as readable phrases."""
    names = [name for name in dict.fromkeys([*mine, *theirs]) if name not in (*FOR_PEOPLE, "digest")]
    return [f"{n} was {theirs.get(n)!r}, is {mine.get(n)!r}" for n in names if theirs.get(n) != mine.get(n)]


@dataclasses.dataclass(frozen=True)
class ShardRecord(Record):
    """A shard's record. It says nothing of when, where and by whom, so that it is the same whoever writes it.

    Args:
        shard: its number.
        first_id: the first of its ids; the others follow.
        count: how many.
        run: the digest of the run's settings.
        files: names of its files, in the order of the pictures.
        sizes: of the files, in bytes.
        sha256: of the files, as hexadecimal digits.
        labels: the class of each picture, or None.
    """

    shard: _Number
    first_id: _Number
    count: _Count
    run: str
    files: tuple[str, ...]
    sizes: tuple[_Number, ...]
    sha256: tuple[str, ...]
    labels: tuple[int, ...] | None

    def is_of(self, shard: Shard, run: str) -> bool:
        """Whether it is the record of this shard, of this run, and says as much of each file."""
        whole = len(self.files) == len(self.sizes) == len(self.sha256)
        labelled = self.labels is None or len(self.labels) == self.count
        mine = (self.shard, self.first_id, self.count) == (shard.number, shard.first_id, shard.count)
        return mine and self.run == run and whole and labelled

    def to_json(self) -> bytes:
        """As it is written."""
        return to_json(self.to_dict())


def to_json(values: Mapping[str, Any]) -> bytes:
    """An object a line for each name, and the same bytes each time."""
    lines = (f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
