"""What steps were measured to take, remembered on disk."""

from __future__ import annotations

import dataclasses
import json

from fastddpm.files import atomic_path, make_folder
from fastddpm.kernels._native import cache_folder


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
    """All measurements on disk, by package name; an unreadable file counts as none."""
    try:
        values = json.loads((cache_folder() / "measured.json").read_text(encoding="utf-8"))
        return {name: Measured(**fields) for name, fields in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(name: str, measured: Measured) -> None:
    """Add a measurement to those on disk; where that is not possible, it is forgotten."""
    values = remembered() | {name: measured}
    try:
        make_folder(cache_folder())
        with atomic_path(cache_folder() / "measured.json") as temporary:
            temporary.write_text(json.dumps({k: dataclasses.asdict(v) for k, v in values.items()}, indent=1))
    except OSError:
        pass
