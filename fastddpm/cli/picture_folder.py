"""PictureFolder: pictures of one run, named by their ids, and how the same command goes on with it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastddpm.files import check_regular, remove_leftovers, write_json
from fastddpm.process.conventions import conventions_checksum
from fastddpm.sampler import Sampler

RUN_FILE = "run.json"
_PICTURE = re.compile(r"\d{6,}\.png")
_FOR_PEOPLE = ("model", "engine")  # the weights count, and engines differ by rounding


@dataclasses.dataclass(frozen=True)
class SettingsFolder:
    """A folder with its run's settings in run.json.

    Args:
        path: The folder.
        settings: What determines what is in it, as JSON-ready values.
    """

    path: Path
    settings: Mapping[str, object]

    @property
    def run_file(self) -> Path:
        """Where the settings are."""
        return self.path / RUN_FILE

    def begin(self) -> None:
        """Write down the settings, before anything else."""
        if not self.run_file.exists():
            write_json(self.run_file, self.settings)


class PictureFolder(SettingsFolder):
    """A folder of PNGs, named by their ids."""

    def check(self) -> str:
        """See that the folder's run is the same one, as pictures of two settings must not mix.

        Returns:
            What to tell about it; mostly nothing.

        Raises:
            ValueError: If the run has other settings, is not readable, or the pictures are of no run at all.
        """
        file = self.run_file
        check_regular(file)
        # In this order: another process of the same run writes its settings before its first picture.
        foreign = min((name for name in self.names() if _PICTURE.fullmatch(name)), default=None)
        if not file.exists():
            if foreign is not None:
                raise ValueError(f"{self.path} must be a run's, got {foreign} without {RUN_FILE}; use another folder")
            return ""
        unrecorded = {"precision": "fp32", "engine": "auto", "conventions": self.settings["conventions"]}
        found = {**unrecorded, **read_settings(file)}  # older folders do not say these
        check_settings(self.path, found, self.settings)
        remove_leftovers(self.path, alone=True)
        was, is_now = found["engine"], self.settings["engine"]
        return "" if was == is_now else f"engine was {was}, is {is_now}: pictures differ by rounding"

    def names(self) -> set[str]:
        """The names of all files that are there."""
        return set(os.listdir(self.path)) if self.path.is_dir() else set()


def read_settings(file: Path) -> dict[str, Any]:
    """The settings that a run wrote down.

    Raises:
        ValueError: If the file is not readable.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not readable ({error}); remove it or use another folder") from error


def check_settings(folder: Path, found: Mapping[str, Any], settings: Mapping[str, object]) -> None:
    """See that a folder's run has these settings, but for those that are only for people.

    Raises:
        ValueError: If it has not; says which.
    """
    different = [
        f"{name} was {found.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if name not in _FOR_PEOPLE and found.get(name) != value
    ]
    if different:
        raise ValueError(f"{folder} holds a run with other settings: {'; '.join(different)}; use another folder")


def checksums(sampler: Sampler) -> dict[str, str]:
    """What tells one network from another: of its weights, and of its schedule and conventions."""
    weights = 0
    if sampler.checkpoint is not None:
        for value in sampler.checkpoint.network.state_dict().values():
            weights = zlib.crc32(value.cpu().flatten().contiguous().view(torch.uint8).numpy(), weights)
    return {"weights": f"{weights:08x}", "conventions": conventions_checksum(sampler.schedule, sampler.spec)}
