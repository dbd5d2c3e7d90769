"""Archives in the layout that OpenAI's evaluation code reads, written and read piece by piece."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

Pictures = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [B, H, W, C]."""

PICTURES, LABELS = "arr_0", "arr_1"
_PIECE = 8 << 20  # bytes of pictures that are read at once


def write_npz(
    path: Path, pictures: Iterable[Pictures], shape: tuple[int, int, int, int], labels: Sequence[int] | None
) -> None:
    """Write pictures as they come: arr_0 uint8 [n, H, W, C], arr_1 int64 [n] with the labels.

    The bytes are the same each time: nothing of the clock is in them.

    Args:
        path: the file.
        pictures: n in all, in pieces uint8 [B, H, W, C].
        shape: (n, H, W, C).
        labels: n classes, or None.

    Raises:
        ValueError: the pieces are not n pictures of that shape.
        OSError: the file cannot be written.
    """
    written = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with _member(archive, PICTURES) as file:
            _write_header(file, "|u1", shape)
            for piece in pictures:
                if piece.dtype != np.uint8 or piece.shape[1:] != shape[1:]:
                    got = f"{piece.dtype} {piece.shape[1:]}"
                    raise ValueError(f"{path.name}: pictures must be uint8 {shape[1:]}, got {got}; mend them")
                file.write(np.ascontiguousarray(piece).data)
                written += len(piece)
        if written != shape[0]:
            raise ValueError(f"{path.name}: there must be {shape[0]} pictures, got {written}; make the two agree")
        if labels is not None:
            with _member(archive, LABELS) as file:
                _write_header(file, "<i8", (len(labels),))
                file.write(np.asarray(labels, dtype="<i8").data)


def read_npz(path: Path) -> Iterator[Pictures]:
    """The pictures of an archive, piece by piece, uint8 [B, H, W, C].

    Raises:
        ValueError: it is no such archive.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
            n, *shape = _read_header(file, path.name)
            size = int(np.prod(shape))
            most = max(1, _PIECE // max(1, size))
            for first in range(0, n, most):
                count = min(most, n - first)
                content = file.read(count * size)
                yield np.frombuffer(content, np.uint8).reshape(count, *shape)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{path.name}: must be an .npz archive with {PICTURES}, got another file ({error})") from error


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    # A ZipInfo of one's own has the first day that zip knows; one that is made by name has today.
    info = zipfile.ZipInfo(f"{name}.npy")
    info.external_attr = 0o644 << 16
    with archive.open(info, "w", force_zip64=True) as file:
        yield file


def _write_header(file: IO[bytes], kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})


def _read_header(file: IO[bytes], name: str) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(file)
    if kind != np.uint8 or fortran or len(shape) != 4:
        raise ValueError(f"{name}: {PICTURES} must be uint8 [n, H, W, C], got {kind} {list(shape)}; convert it")
    return tuple(int(side) for side in shape)
