"""`--condition`: pictures that a network with more input than output channels sees, from a file or a folder."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

from fastddpm.pictures.data import IMAGE_SUFFIXES
from fastddpm.pictures.inputs import Picture
from fastddpm.process.spec import ModelSpec
from fastddpm.step.condition import condition_of


@dataclasses.dataclass(frozen=True)
class ConditionFiles:
    """The pictures that condition a run.

    Args:
        path: What was given.
        files: The picture itself, or those of the folder by name.
    """

    path: Path
    files: tuple[Path, ...]

    @classmethod
    def of(cls, path: Path | None, spec: ModelSpec) -> ConditionFiles | None:
        """Find the pictures and look at each.

        Args:
            path: A picture or a folder; None for none.
            spec: The network's conventions.

        Raises:
            ValueError: If there must be one and is none, or the other way round, or a picture does not fit.
            OSError: If a picture cannot be read.
        """
        if path is None:
            if spec.condition_channels:
                raise ValueError(
                    f"--condition must be a picture or a folder of them, got none; the network takes "
                    f"{spec.condition_channels} channels behind its own"
                )
            return None
        if not spec.condition_channels:
            raise ValueError(f"--condition must be left out, got {path}: the network takes none")
        files = _pictures_in(path) if path.is_dir() else (path,)
        for file in files:
            condition_of(spec, 1, file)
        return cls(path, files)

    def of_ids(self, ids: Sequence[int]) -> list[Picture]:
        """The picture of each id, the pictures taking turns; one alone if there is no other."""
        if len(self.files) == 1:
            return list(self.files)
        return [self.files[i % len(self.files)] for i in ids]

    @property
    def checksum(self) -> str:
        """What tells these pictures from others."""
        value = 0
        for file in self.files:
            value = zlib.crc32(file.read_bytes(), value)
        return f"{value:08x}"


def _pictures_in(folder: Path) -> tuple[Path, ...]:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"--condition must be a picture or a folder of them, got {folder}, which holds none")
    return tuple(found)
