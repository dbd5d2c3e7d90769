"""Files that are either whole or absent: everything is written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_LEFTOVER = re.compile(r"\.fastddpm\.[0-9a-f]{8}\.tmp(\.\w+)?")
_ANY_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.\w+)?|\.tmp[0-9A-Za-z]{6}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes if the block fails.

    Missing parent folders are made. The temporary name keeps the suffix, because image writers choose by it, and
    starts with a dot. The file gets the permissions of any new file, whatever wrote it. It is locked as long as its
    writer lives, by which `remove_leftovers` tells one that a killed process left.

    Args:
        path: Where the finished file shall stand.

    Yields:
        The path to write to; an empty file stands there already.

    Raises:
        OSError: If the folder cannot be made, something other than a file stands there, or the file cannot be written
            or renamed.
    """
    target = Path(path)
    check_replaceable(target)
    with _temporary(target) as temporary:
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        sync(temporary)
        temporary.chmod(permissions)  # some writers put a file of their own there, which only its owner may read
        os.replace(temporary, target)


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write several files in; whatever is still there when the block ends vanishes.

    Missing parent folders are made. It is locked as the files of `atomic_path` are.

    Args:
        target: What the files, or the folder itself, shall be renamed to.

    Yields:
        The folder, which is empty.

    Raises:
        OSError: If a folder cannot be made, or a file in it not be written; it names `target`.
    """
    with _temporary(target.absolute(), folder=True) as folder:
        yield folder


@contextlib.contextmanager
def _temporary(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside `target` that is locked, and gone when the block ends; errors name `target`.

    Its name is hidden, short whatever the target's own is, and has its suffix if it is a file.
    """
    make_folder(target.parent)
    suffix = "" if folder or len(target.suffix) >= 16 else target.suffix
    temporary, lock = target.with_name(f".fastddpm.{uuid.uuid4().hex[:8]}.tmp{suffix}"), None
    try:
        lock = _make_locked(temporary, folder)
        yield temporary
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if folder else temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _make_locked(path: Path, folder: bool) -> int:
    """Make an empty file or folder and lock it; again, where another's `remove_leftovers` was there in between.

    Returns:
        The descriptor that holds the lock.
    """
    while True:
        if folder:
            path.mkdir()
        try:
            lock = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if folder:
                continue
            raise
        with contextlib.suppress(OSError):  # some file systems know no locks; whoever else has it has it for a moment
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.lexists(path):
            return lock
        os.close(lock)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file is on the disk.

    Raises:
        OSError: If it cannot be written.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_replaceable(target: Path) -> None:
    """Check that nothing but a file stands where one is to be written.

    Raises:
        IsADirectoryError: If it is a folder.
        OSError: If it is a symbolic link, a pipe, a socket or a device.
    """
    if target.is_symlink():
        raise OSError(f"cannot write {target}: it is a symbolic link; give the path that it leads to, or remove it")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; give a file name")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {target}: it is a pipe, a socket or a device; give a file name")


def check_regular(path: Path) -> None:
    """Check that `path`, if there is anything, is a file or a folder: to open a pipe would mean to wait for its writer.

    Raises:
        ValueError: If it is a pipe, a socket or a device.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
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

    What killed runs left in the folder is removed.

    Raises:
        NotADirectoryError: If something on the way is a file, or a link to nothing.
        OSError: If nothing can be written there.
    """
    dangling = next((place for place in (folder, *folder.parents) if place.is_symlink() and not place.exists()), None)
    if dangling is not None:
        raise NotADirectoryError(f"cannot write to {folder}: {dangling} is a link to nothing; mend or remove it")
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
    remove_leftovers(folder)


def _not_a_folder(folder: Path) -> str:
    return f"cannot write to {folder}: it must be a folder, got a file there or above it; choose another place"


def remove_leftovers(folder: Path, *, alone: bool = False) -> None:
    """Remove the temporary files and folders that fastddpm left in `folder` when it was killed; those in use stay.

    Args:
        folder: Where; nothing happens if it is not there.
        alone: Whether the folder is a run's own, which nobody else writes to: then also those that are named after the
            finished file, as older versions did, and those of the safetensors library.
    """
    pattern = _ANY_LEFTOVER if alone else _LEFTOVER
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in list(os.scandir(folder)):
            if pattern.fullmatch(entry.name) and not entry.is_symlink():
                _remove_if_left(entry)


def _remove_if_left(entry: os.DirEntry[str]) -> None:
    is_folder = entry.is_dir()
    with contextlib.suppress(OSError):  # locked, gone, or not ours to open
        handle = os.open(entry.path, os.O_NOFOLLOW | (os.O_RDONLY if is_folder else os.O_RDWR | os.O_NONBLOCK))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True) if is_folder else os.unlink(entry.path)
        finally:
            os.close(handle)


def create_file(path: str | os.PathLike[str], content: bytes) -> bool:
    """Write a file, atomically, unless something stands there; of several processes that try at once one succeeds.

    Returns:
        Whether it was written.

    Raises:
        OSError: If the file cannot be written.
    """
    target = Path(path)
    with _temporary(target) as temporary:
        temporary.write_bytes(content)
        sync(temporary)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: here two may both succeed
            if os.path.lexists(target):
                return False
            os.replace(temporary, target)
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], values: Mapping[str, object]) -> None:
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
