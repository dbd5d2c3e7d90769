"""What steps were measured to take, remembered on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

from fastddpm.engines.cache import cache_folder, locked
from fastddpm.files import atomic_path
from fastddpm.kernels._cache import folders

_FILE = "measured.json"
_LOCK_S = 3.0
_MOST = 1000  # measurements; the latest ones stay
_MOST_BYTES = 4 << 20
_MOST_MS = 1e9
_MOST_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a (network, batch, device): times of a step, and what it took to compile.

    Attributes:
        eager_ms: a step without compiling.
        compiled_ms: a compiled step, or None if that was never tried.
        compile_s: seconds that compiling took, or None.
        label: what it is, for people.
    """

    eager_ms: float
    compiled_ms: float | None = None
    compile_s: float | None = None
    label: str = ""


def remembered() -> dict[str, Measured]:
    """All measurements on disk, by package key; what cannot be one, in a file that may hold anything, is left out."""
    values: dict[str, Measured] = {}
    for folder in folders():
        values |= _read(folder / _FILE)
    return values


def remember(key: str, measured: Measured) -> None:
    """Add a measurement to those on disk; where that is not possible within a few seconds, it is forgotten."""
    with contextlib.suppress(OSError), locked("measured", _LOCK_S) as had:
        if had:
            path = cache_folder() / _FILE
            values = _read(path)
            values.pop(key, None)  # to come last
            latest = dict([*values.items(), (key, measured)][-_MOST:])
            with atomic_path(path) as temporary:
                text = json.dumps({name: dataclasses.asdict(value) for name, value in latest.items()}, indent=1)
                temporary.write_text(text, encoding="utf-8")


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


def _measured(value: Any) -> Measured | None:  # noqa: ANN401
    """What was read as a measurement; None if it cannot be one."""
    if not isinstance(value, dict):
        return None
    names = [field.name for field in dataclasses.fields(Measured)]
    made = Measured(**{name: value[name] for name in names if name in value} | {"eager_ms": value.get("eager_ms")})
    times = [time for time in (made.compiled_ms, made.compile_s) if time is not None]
    sound = _is_time(made.eager_ms) and made.eager_ms > 0 and all(map(_is_time, times)) and _is_text(made.label)
    return made if sound else None


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MOST_MS


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS and value.isprintable()
