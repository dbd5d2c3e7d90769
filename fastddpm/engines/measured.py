"""What steps were measured to take, remembered on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import stat
from pathlib import Path
from typing import Annotated

from fastddpm.common.records import RecordError, Within, read_record
from fastddpm.engines.cache import cache_folder, locked
from fastddpm.files import write_json
from fastddpm.kernels.kept import folders

_FILE = "measured.json"
LOCK_S = 3.0
MOST = 1000  # measurements; the latest ones stay
_MOST_BYTES = 4 << 20
_MOST_CHARACTERS = 200
_Time = Annotated[float, Within(0, 1e9)]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a (network, batch, device): times of a step, and what it took to compile.

    Attributes:
        eager_ms: a step without compiling.
        compiled_ms: a step of `engine`, or None if that was never tried.
        compile_s: seconds that preparing it took, or None.
        label: what it is, for people.
        engine: which engine's step `compiled_ms` is of.
    """

    eager_ms: Annotated[float, Within(0, 1e9, above=True)]
    compiled_ms: _Time | None = None
    compile_s: _Time | None = None
    label: str = ""
    engine: str = "compiled"


def remembered() -> dict[str, Measured]:
    """All measurements on disk, by package key; what cannot be one, in a file that may hold anything, is left out."""
    values: dict[str, Measured] = {}
    for folder in folders():
        values |= _read(folder / _FILE)
    return values


def remember(key: str, measured: Measured) -> None:
    """Add a measurement to those on disk; where that is not possible within a few seconds, it is forgotten."""
    with contextlib.suppress(OSError), locked("measured", LOCK_S) as had:
        if had:
            path = cache_folder() / _FILE
            values = _read(path)
            values.pop(key, None)  # to come last
            latest = dict([*values.items(), (key, measured)][-MOST:])
            write_json(path, {name: dataclasses.asdict(value) for name, value in latest.items()})


def _read(path: Path) -> dict[str, Measured]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            return {}
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = values.items() if isinstance(values, dict) else ()
    return {key: measured for key, value in entries if _is_text(key) and (measured := _measured(value)) is not None}


def _measured(value: object) -> Measured | None:
    """What was read as a measurement; None if it cannot be one."""
    with contextlib.suppress(RecordError):
        made = read_record(Measured, value, more=True)
        return made if _is_text(made.label) and _is_text(made.engine) else None
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS and value.isprintable()
