"""LikelihoodFolder: what was found of each batch of a data set, and how the same command goes on with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from fastddpm.cli.picture_folder import RUN_FILE, SettingsFolder, check_settings, read_settings
from fastddpm.files import check_regular, check_writable, remove_leftovers, write_tensors
from fastddpm.process.rate_distortion import LikelihoodSums

_PART = re.compile(r"(\d{6,})-(\d{6,})\.safetensors")
_PARTS = "parts"


class LikelihoodFolder(SettingsFolder):
    """A folder with one small file for each batch."""

    def check(self) -> None:
        """See that the folder can be written to, and that its run is the same one.

        Raises:
            ValueError: If the run has other settings, or what is there is of no run at all.
            OSError: If nothing can be written there.
        """
        file = self.run_file
        check_regular(file)
        check_writable(self.path)
        if file.exists():
            check_settings(self.path, read_settings(file), self.settings)
            remove_leftovers(self.path / _PARTS, alone=True)
        elif (self.path / _PARTS).exists():
            raise ValueError(f"{self.path} must be a run's, got {_PARTS} without {RUN_FILE}; use another folder")

    def file(self, first: int, end: int) -> Path:
        """Where pictures first … end − 1 are kept."""
        return self.path / _PARTS / f"{first:06d}-{end:06d}.safetensors"

    def keep(self, first: int, sums: LikelihoodSums) -> None:
        """Keep what was found of a batch that begins with picture `first`."""
        write_tensors(self.file(first, first + sums.n), vars(sums), {})

    def read(self, first: int, end: int) -> LikelihoodSums:
        """What was kept of pictures first … end − 1.

        Raises:
            ValueError: If the file is damaged.
        """
        file = self.file(first, end)
        try:
            return LikelihoodSums(**load_file(file))
        except Exception as error:  # the library's own kinds, and whatever a foreign file holds
            raise ValueError(
                f"{file}: not readable ({error}); remove it, and the same command makes it anew"
            ) from error

    def kept(self) -> Iterator[tuple[int, int]]:
        """First and end of each batch that was kept, in order."""
        names = (self.path / _PARTS).iterdir() if (self.path / _PARTS).is_dir() else ()
        for name in sorted(path.name for path in names):
            if found := _PART.fullmatch(name):
                yield int(found[1]), int(found[2])
