"""Streams of pictures: whole data sets, one batch in memory at a time; idx files, .npz archives, folders."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastddpm.pictures.arrays import npz_names, open_idx, open_npz, read_bytes
from fastddpm.pictures.data import IMAGE_SUFFIXES, PICTURE_ARRAYS, check_layout, image_files
from fastddpm.pictures.picture_file import read_picture


class PictureStream(Protocol):
    """Pictures that are read again each time they are asked for."""

    @property
    def source(self) -> str:
        """What they are read from, for messages."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first picture; the others have its height and width."""

    def __len__(self) -> int:
        """How many there are."""

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """The pictures in order.

        Args:
            batch_size: the most that are in memory at a time.
            channels: of the pictures that are yielded; gray ones become colour by repetition.

        Yields:
            uint8 [B, channels, H, W].

        Raises:
            ValueError: a picture is damaged, has other channels or another size.
            OSError: a file cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class ArrayStream:
    """The pictures of an idx file or of an .npz archive.

    Attributes:
        path: the file.
        array: the name of the array in the archive; None for an idx file.
        dims: N, H, W, C.
    """

    path: Path
    array: str | None
    dims: tuple[int, int, int, int]

    @classmethod
    def open(cls, path: Path) -> ArrayStream:
        """Read the header.

        Raises:
            ValueError: the file is damaged, foreign or holds no pictures.
            OSError: it cannot be read.
        """
        array = None
        if path.suffix == ".npz":
            names = npz_names(path)
            array = next((name for name in PICTURE_ARRAYS if name in names), None)
            if array is None:
                found = ", ".join(sorted(names)) or "nothing"
                raise ValueError(f"{path}: needs an array images or arr_0, uint8 [N, H, W, C], got {found}")
        with _opened(path, array) as (shape, _):
            dims = (*shape, 1) if len(shape) == 3 else shape
        if len(dims) != 4:
            raise ValueError(f"{path}: pictures must be [N, H, W] or [N, H, W, C], got {shape}; are they labels?")
        check_layout(str(path), dims)
        return cls(path, array, dims)

    @property
    def source(self) -> str:
        """The file."""
        return str(self.path)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, H, W, C = self.dims
        return C, H, W

    def __len__(self) -> int:
        """How many pictures the header states."""
        return self.dims[0]

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """See `PictureStream.batches`."""
        size = math.prod(self.dims[1:])
        with _opened(self.path, self.array) as (_, stream):
            for first in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - first)
                content = read_bytes(stream, count * size)
                if len(content) < count * size:
                    break
                pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *self.dims[1:])
                yield _batch(pixels, channels, self.source)
            else:
                if not stream.read(1):  # which is also where checksums are looked at
                    return
        raise ValueError(f"{self.path}: header states {self.dims}, but more or fewer bytes follow; fetch it again")


def _opened(
    path: Path, array: str | None
) -> contextlib.AbstractContextManager[tuple[tuple[int, ...], IO[bytes] | gzip.GzipFile]]:
    return open_idx(path) if array is None else open_npz(path, array)


@dataclasses.dataclass(frozen=True)
class FolderStream:
    """The image files below a folder.

    Attributes:
        folder: where they are.
        files: the images, sorted.
        size: pixels a side to which the centre square of each is resized (Lanczos); None leaves them as they are.
        shape: (C, H, W) of the first.
    """

    folder: Path
    files: tuple[Path, ...]
    size: int | None
    shape: tuple[int, int, int]

    @classmethod
    def open(cls, folder: Path, size: int | None = None) -> FolderStream:
        """Find the images, and read the first.

        Raises:
            ValueError: there are none, or the first cannot be read.
            OSError: the folder cannot be read.
        """
        files, _ = image_files(folder)
        H, W, C = read_picture(files[0], size).pixels.shape
        return cls(folder, tuple(files), size, (C, H, W))

    @property
    def source(self) -> str:
        """The folder."""
        return str(self.folder)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.files)

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """See `PictureStream.batches`."""
        pictures = (self._read(file, channels)[None] for file in self.files)
        return in_batches(pictures, batch_size, channels, self.source)

    def _read(self, file: Path, channels: int) -> NDArray[np.uint8]:
        pixels = read_picture(file, self.size).pixels
        if pixels.shape[:2] != self.shape[1:]:
            raise ValueError(
                f"{file}: pictures must have one size, got {pixels.shape[:2]} and {self.shape[1:]}; resize them (size)"
            )
        return _in_channels(pixels, channels, str(file))


@dataclasses.dataclass(frozen=True)
class JoinedStream:
    """Several streams of one shape, one after the other.

    Attributes:
        source: what they are together.
        parts: at least one.
    """

    source: str
    parts: Sequence[PictureStream]

    def __post_init__(self) -> None:
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1:
            raise ValueError(f"{self.source}: parts must have pictures of one shape, got {sorted(shapes) or 'none'}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.parts[0].shape

    def __len__(self) -> int:
        """How many pictures there are in all parts."""
        return sum(map(len, self.parts))

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """See `PictureStream.batches`; no batch spans two parts."""
        for part in self.parts:
            yield from part.batches(batch_size, channels)


def open_pictures(path: str | os.PathLike[str], *, size: int | None = None) -> PictureStream:
    """Open pictures without reading more of them than the first.

    Args:
        path: an idx file, an .npz archive in OpenAI's layout, a folder of images, one with MNIST's idx files (the
            training pictures are taken), or one of .npz archives, which are joined.
        size: resize the images of a folder to this many pixels (centre crop, then Lanczos); arrays must have it.

    Returns:
        The stream.

    Raises:
        FileNotFoundError: there is nothing of that path.
        ValueError: it holds no pictures, or of another size.
        OSError: it cannot be read.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"pictures {source} do not exist; give an idx file, an .npz or a folder of images")
    stream = _open_folder(source, size) if source.is_dir() else ArrayStream.open(source)
    if size is not None and stream.shape[1:] != (size, size):
        got = f"{stream.shape[2]}×{stream.shape[1]}"
        raise ValueError(f"{source}: pictures of arrays must be {size}×{size} pixels, got {got}; they are not resized")
    return stream


def _open_folder(folder: Path, size: int | None) -> PictureStream:
    idx = sorted(folder.glob("train-images*idx3-ubyte*"))
    if idx:
        return ArrayStream.open(idx[0])
    archives = sorted(folder.glob("*.npz"))
    if archives and any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*")):
        raise ValueError(f"{folder}: must hold images or .npz archives, got both; name the archive itself")
    if archives:
        return JoinedStream(str(folder), tuple(map(ArrayStream.open, archives)))
    return FolderStream.open(folder, size)


def in_batches(pieces: Iterable[NDArray[np.uint8]], batch_size: int, channels: int, source: str) -> Iterator[Tensor]:
    """Cut pieces of any length into batches, as `PictureStream.batches` yields them.

    Args:
        pieces: uint8 [n, H, W, C], each of its own n.
        batch_size: pictures of a batch; the last may be shorter.
        channels: of the pictures that are yielded.
        source: what they are read from, for messages.

    Yields:
        uint8 [B, channels, H, W].

    Raises:
        ValueError: a picture has other channels.
    """
    waiting: list[NDArray[np.uint8]] = []
    for piece in pieces:
        for picture in piece:
            waiting.append(picture)
            if len(waiting) == batch_size:
                yield _batch(np.stack(waiting), channels, source)
                waiting = []
    if waiting:
        yield _batch(np.stack(waiting), channels, source)


def _batch(pixels: NDArray[np.uint8], channels: int, source: str) -> Tensor:
    """[B, H, W, C] as a tensor uint8 [B, channels, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(_in_channels(pixels, channels, source), -1, 1)))


def _in_channels(pixels: NDArray[np.uint8], channels: int, source: str) -> NDArray[np.uint8]:
    """The same pictures, gray ones as colour where that is wanted."""
    found = pixels.shape[-1]
    if found == channels:
        return pixels
    if found == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    hint = "ask for 3 channels" if (found, channels) == (3, 1) else "save them with the channels that are wanted"
    raise ValueError(f"{source}: pictures must have {channels} channels, got {found}; {hint}")
