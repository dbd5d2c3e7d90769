"""Files that are either whole or absent: everything is written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes if the block fails.

    Missing parent folders are made. The temporary name keeps the suffix, because image writers choose by it, and
    starts with a dot. The file gets the permissions of any new file, whatever wrote it.

    Args:
        path: Where the finished file shall stand.

    Yields:
        The path to write to; an empty file stands there already.

    Raises:
        OSError: If the folder cannot be made or the file cannot be written or renamed.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; give a file name")
    make_folder(target.parent)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(permissions)  # some writers put a file of their own there, which only its owner may read
        os.replace(temporary, target)
    except OSError as error:  # name the file that was asked for, not the temporary one
        if error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """Check that `path`, if there is anything, is a file or a folder: to open a pipe would mean to wait for its writer.

    Raises:
        ValueError: If it is a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} must be a file, got a pipe, a socket or a device; write what it gives to a file")


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, unless they are there.

    Raises:
        NotADirectoryError: If something on the way is a file.
        OSError: If a folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(_not_a_folder(folder)) from error


def check_writable(folder: Path) -> None:
    """Check that files can be written to `folder`, or to the nearest folder above it that exists; leaves no trace.

    Raises:
        NotADirectoryError: If something on the way is a file.
        OSError: If nothing can be written there.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(_not_a_folder(folder))
    probe = there / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot write to {folder}: {reason}; choose another folder") from error
    finally:
        probe.unlink(missing_ok=True)


def _not_a_folder(folder: Path) -> str:
    return f"cannot write to {folder}: it must be a folder, got a file there or above it; choose another place"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that writers left in `folder` when they were killed.

    Only for folders that nobody else is writing to.
    """
    for pattern in (".*.tmp*", ".tmp??????"):  # ours, and those of the safetensors library
        for left in folder.glob(pattern):
            if left.is_file():
                left.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and string metadata as a safetensors file, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                temporary,
                dict(metadata),
            )
        except Exception as error:  # safetensors reports a full disk or a missing permission as its own error type
            raise OSError(f"cannot write {path}: {error}") from error
