"""Formats: what the files of a shard are. Each writes the same bytes for the same pictures, whenever and wherever."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import torch

from fastddpm.images import decode_png, encode_png
from fastddpm.shards.npz import Pictures, read_npz, write_npz
from fastddpm.shards.plan import Shard

FormatName = Literal["npz", "tar", "png"]


class Format(Protocol):
    """How pictures of a shard become files.

    Attributes:
        in_folder: whether a shard is a folder of files instead of one file.
        shows: whether its files can hold pictures of 1, 3 or 4 channels only.
    """

    in_folder: bool
    shows: bool

    def target(self, shard: Shard) -> str:
        """The name of the shard's file or folder."""

    def write(self, path: Path, shard: Shard, pictures: Iterable[Pictures], labels: Sequence[int] | None) -> None:
        """Write a shard.

        Args:
            path: the file, or the folder, which is there and empty.
            shard: which.
            pictures: its pictures in the order of their ids, in pieces uint8 [B, H, W, C].
            labels: their classes, or None.

        Raises:
            ValueError: there are not as many pictures as ids.
            OSError: it cannot be written.
        """

    def read(self, path: Path) -> Iterator[Pictures]:
        """The pictures of one of its files, in pieces uint8 [B, H, W, C].

        Raises:
            ValueError: it is no such file.
            OSError: it cannot be read.
        """


class Npz:
    """An archive a shard: arr_0 with the pictures, arr_1 with the labels."""

    in_folder = False
    shows = False

    def target(self, shard: Shard) -> str:
        """See `Format.target`."""
        return f"{shard.name}.npz"

    def write(self, path: Path, shard: Shard, pictures: Iterable[Pictures], labels: Sequence[int] | None) -> None:
        """See `Format.write`."""
        pieces = iter(pictures)
        first = next(pieces)
        write_npz(path, itertools.chain([first], pieces), (shard.count, *first.shape[1:]), labels)

    def read(self, path: Path) -> Iterator[Pictures]:
        """See `Format.read`."""
        return read_npz(path)


class Tar:
    """WebDataset's layout: a tar of ID.png and, with labels, ID.cls for each picture."""

    in_folder = False
    shows = True

    def target(self, shard: Shard) -> str:
        """See `Format.target`."""
        return f"{shard.name}.tar"

    def write(self, path: Path, shard: Shard, pictures: Iterable[Pictures], labels: Sequence[int] | None) -> None:
        """See `Format.write`."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for i, (sample_id, content) in enumerate(_encoded(shard, pictures)):
                _add(archive, f"{picture_name(sample_id)}.png", content)
                if labels is not None:
                    _add(archive, f"{picture_name(sample_id)}.cls", str(labels[i]).encode())

    def read(self, path: Path) -> Iterator[Pictures]:
        """See `Format.read`."""
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.name.endswith(".png"):
                        yield decode_png(_content(archive.extractfile(member)))[None]
        except tarfile.TarError as error:
            raise ValueError(f"{path.name}: must be a tar of pictures, got another file ({error})") from error


class Png:
    """A folder a shard, with a PNG for each picture, named by its id."""

    in_folder = True
    shows = True

    def target(self, shard: Shard) -> str:
        """See `Format.target`."""
        return shard.name

    def write(self, path: Path, shard: Shard, pictures: Iterable[Pictures], labels: Sequence[int] | None) -> None:
        """See `Format.write`."""
        for sample_id, content in _encoded(shard, pictures):
            (path / f"{picture_name(sample_id)}.png").write_bytes(content)

    def read(self, path: Path) -> Iterator[Pictures]:
        """See `Format.read`."""
        yield decode_png(path.read_bytes())[None]


FORMATS: dict[FormatName, Format] = {"npz": Npz(), "tar": Tar(), "png": Png()}


def picture_name(sample_id: int) -> str:
    """What the files of a picture are called, without a suffix; below 10¹² their order as text is that of the ids."""
    return f"{sample_id:012d}"


def _encoded(shard: Shard, pictures: Iterable[Pictures]) -> Iterator[tuple[int, bytes]]:
    """Each picture's id and PNG.

    Raises:
        ValueError: there are not as many pictures as ids.
    """
    singles = (picture for piece in pictures for picture in piece)
    for sample_id, picture in zip(shard.ids, singles, strict=True):
        yield sample_id, encode_png(torch.from_numpy(picture).permute(2, 0, 1))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner, group and time are 0
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))


def _content(file: IO[bytes] | None) -> bytes:
    return b"" if file is None else file.read()


def to_pieces(pictures: torch.Tensor) -> Pictures:
    """A batch of a sampler, uint8 [B, C, H, W], as the files have it: uint8 [B, H, W, C]."""
    return np.ascontiguousarray(pictures.permute(0, 2, 3, 1).cpu().numpy())
