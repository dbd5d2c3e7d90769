"""Arrays in files of others: idx (MNIST's format) and .npz, measured by their headers before anything is unpacked."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastddpm.files import check_regular

MAX_BYTES = min(64 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
"""What may be unpacked: no more than the machine's memory."""
_SUSPECT, _RATIO = (
    1 << 30,
    200,
)  # pictures do not shrink to 1/200; what claims to is a decompression bomb, if it is large
_PIECE = 1 << 24
_READ_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped or not (format: LeCun et al., the MNIST page).

    Args:
        path: The file.

    Returns:
        uint8 array of the shape that the header states.

    Raises:
        ValueError: If the file is not idx, not of bytes, its length does not match its header, or it is too large.
        OSError: If it cannot be read.
    """
    path = Path(path)
    with open_idx(path) as (shape, stream):
        size = math.prod(shape)
        check_bytes(str(path), shape, size, path.stat().st_size)
        content = read_bytes(stream, size + 1)
    if len(content) != size:
        got = "more" if len(content) > size else f"{len(content)}"
        raise ValueError(f"{path}: header states shape {shape}, but {got} bytes follow; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


@contextlib.contextmanager
def open_idx(path: Path) -> Iterator[tuple[tuple[int, ...], IO[bytes] | gzip.GzipFile]]:
    """An idx file of unsigned bytes, gzipped or not, opened where its entries begin.

    Yields:
        The shape that the header states, and the stream.

    Raises:
        ValueError: If the file is not idx, not of bytes, or its gzip stream is damaged.
        OSError: If it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            yield _idx_shape(path, stream), stream
        except _READ_ERRORS as error:
            raise ValueError(f"{path}: gzip stream is damaged ({error}); fetch the file again") from error


def _idx_shape(path: Path, stream: IO[bytes] | gzip.GzipFile) -> tuple[int, ...]:
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] != 8 or not 1 <= start[3] <= 4:
        raise ValueError(f"{path}: not an idx file of unsigned bytes (starts with {start.hex() or 'nothing'})")
    header = stream.read(4 * start[3])
    if len(header) < 4 * start[3]:
        raise ValueError(f"{path}: header states shape (), but 0 bytes follow; fetch it again")
    return tuple(int(n) for n in np.frombuffer(header, dtype=">u4"))


def read_bytes(stream: IO[bytes] | gzip.GzipFile, most: int) -> bytearray:
    """At most so many bytes, in pieces: memory is taken only for what is there."""
    content = bytearray()
    while len(content) < most and (piece := stream.read(min(_PIECE, most - len(content)))):
        content += piece
    return content


class _Unusable(ValueError):
    """Says what is wrong with an array; numpy's own words would advise to unpickle it."""


def check_bytes(source: str, shape: tuple[int, ...], unpacked: int, stored: int | None = None) -> None:
    """Check what a header states against the machine's memory and the file's own size.

    Raises:
        ValueError: If it is too much.
    """
    if unpacked > MAX_BYTES:
        raise _Unusable(
            f"{source}: must fit into {MAX_BYTES / 2**30:.1f} GiB of memory, got {unpacked / 2**30:,.1f} GiB "
            f"for shape {shape}; take fewer or smaller pictures"
        )
    if stored is not None and unpacked > max(_SUSPECT, _RATIO * stored):
        raise _Unusable(
            f"{source}: {stored:,} bytes must not unpack to {unpacked / 2**30:.1f} GiB, which no pictures do; "
            "if it is right all the same, store it uncompressed"
        )


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Read those of the named arrays that an .npz archive holds.

    Nothing is unpickled, and no array is read whose header does not fit.

    Args:
        path: The file.
        names: The arrays that are wanted.

    Returns:
        Array by name.

    Raises:
        ValueError: If the file is no such archive, is damaged, or an array is too large or of Python objects.
    """
    with _archive(path) as archive:
        members = {name: f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()}
        return {name: _read_member(path, name, archive, member) for name, member in members.items()}


def _read_member(path: Path, name: str, archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    info = archive.getinfo(member)
    with archive.open(info) as file:
        shape, _, dtype = _header(path, name, file)
    unpacked = math.prod(shape) * max(1, dtype.itemsize)
    check_bytes(f"{path}, {name}", shape, unpacked, info.compress_size)
    if not 0 <= unpacked <= info.file_size:
        raise _Unusable(f"{path}: {name} must hold {shape}, as its header states, but is shorter; write it again")
    with archive.open(info) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return array


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the axes run the other way, and dtype of an array in an archive; the file stands behind them."""
    try:
        version = npy.read_magic(file)
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    except zipfile.BadZipFile:  # its checksum is wrong: the archive is damaged, whatever the header says
        raise
    except Exception as error:
        raise _Unusable(f"{path}: {name} is not an array; write it with numpy.savez") from error
    if version != (1, 0) or dtype.hasobject:
        got = "Python objects" if dtype.hasobject else f"version {version[0]} of the format"
        raise _Unusable(f"{path}: {name} must hold plain numbers or text, got {got}; save it with another dtype")
    return shape, fortran, dtype


def npz_names(path: Path) -> frozenset[str]:
    """The names of the arrays in an .npz archive.

    Raises:
        ValueError: If the file is no such archive.
        OSError: If it cannot be read.
    """
    with _archive(path) as archive:
        return frozenset(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))


@contextlib.contextmanager
def open_npz(path: Path, name: str) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """A uint8 array of an .npz archive, opened where its entries begin, for arrays that need not fit into memory.

    Yields:
        Its shape, and the stream.

    Raises:
        ValueError: If the file is no such archive or is damaged, or the array is of another dtype or has its axes the
            other way round (Fortran order).
        OSError: If it cannot be read.
    """
    with _archive(path) as archive, archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _header(path, name, file)
        if dtype != np.uint8 or fortran:
            got = f"{dtype}, in Fortran order" if fortran else str(dtype)
            raise _Unusable(f"{path}: {name} must be uint8 in C order, got {got}; convert it and save it anew")
        yield shape, file


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz archive; whatever goes wrong in reading it is one kind of error."""
    check_regular(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (_Unusable, MemoryError):
            raise
        except Exception as error:  # a foreign file surfaces as errors of many types: zip, zlib, encoding …
            raise ValueError(f"{path}: not a whole .npz archive ({error}); write it with numpy.savez") from error
