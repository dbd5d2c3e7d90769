"""Packages of compiled steps on disk: found by key, made once, whole or absent, removed when they take too much room.

Folders, checksums and who may write what are `fastddpm.kernels.kept`'s; see there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import fastddpm
from fastddpm.kernels import kept as files
from fastddpm.kernels.kept import CacheWarning as CacheWarning
from fastddpm.kernels.kept import cache_folder as cache_folder
from fastddpm.kernels.kept import no_cache as no_cache

CACHE_BYTES = 4 << 30
"""Most that the packages on disk may take; the ones that were used longest ago go first."""
WAIT_S = 300.0
"""How long a process waits for another one that is making the same package, before it makes its own."""
SUFFIX = ".pt2"
"""Of compiled steps; packages with other suffixes lie beside them."""

_SUFFIXES = (SUFFIX, ".onnx")
_UNFINISHED_S = 86400.0
_NO_PART_OF_A_STEP = frozenset(
    {"bench", "cli", "checkpoints", "doctor", "integrations", "train", "data", "pretrained", "__pycache__"}
)
IMPORTED = time.time()


@functools.cache
def source_digest() -> str:
    """A digest of the package's sources, for the keys: other code, other packages.

    Sources that were changed while this process runs are not what it runs. It then shares packages with nobody.
    """
    digest, changed = package_digest(Path(__file__).parents[1])
    return digest if changed < IMPORTED else uuid.uuid4().hex[: len(digest)]


def package_digest(package: Path) -> tuple[str, float]:
    """A digest of a package's .py, .c and .h files, without folders that no step depends on, and the latest change."""
    digest, changed = hashlib.blake2b(digest_size=12), 0.0
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = sorted(set(folders) - _NO_PART_OF_A_STEP)
        for name in sorted(names):
            if name.endswith((".py", ".c", ".h")):
                path = Path(folder, name)
                content = path.read_bytes()
                digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
                digest.update(content)
                changed = max(changed, path.stat().st_ctime)
    return digest.hexdigest(), changed


def key_of(prefix: str, **parts: object) -> str:
    """A key: `prefix`, and a digest of the versions and the sources in use and of all else that a package depends on.

    Args:
        prefix: letters, digits, `-` and `_`.
        parts: what JSON can hold, or `str` makes a text of.
    """
    versions = [fastddpm.__version__, torch.__version__, source_digest()]
    text = json.dumps({"versions": versions, **parts}, sort_keys=True, default=str)
    return f"{prefix}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def packages(suffix: str = SUFFIX) -> dict[str, Path]:
    """The packages in the cache by key, unverified: to count them, or to see whether there is one."""
    return {key: path for folder in reversed(files.folders()) for key, path in reversed(files.entries(folder, suffix))}


def find(key: str, suffix: str = SUFFIX) -> Path | None:
    """The package of this key, if there is one that is as it was written; it counts as used now.

    What is damaged is removed, what somebody else could have written is left alone, and both are said.
    """
    return files.find(key, suffix)


def find_or_make(key: str, make: Callable[[Path], object], *, keep: bool = True, suffix: str = SUFFIX) -> Path:
    """The package of this key; only one process makes it, the others wait for it.

    Args:
        key: letters, digits, `-` and `_`: all that the package depends on.
        make: writes the package, one file, to the path that it is given; not called if there is one.
        keep: whether there may be one, and is one afterwards; else it is made for this caller alone, who may remove it.
        suffix: of the file's name.

    Returns:
        Where the package is. Load it now: it may be gone after a while. What is not in the cache is removed at exit.

    Raises:
        OSError: there is not even a place for temporary files.
    """
    if not keep:
        return _made(key, make, suffix)
    with locked(key, WAIT_S, "another process makes the same package; waiting for it"):
        found = find(key, suffix)
        if found is not None:
            return found
        # Compiling does not depend on the cache: what cannot be kept is used all the same.
        own = files.sealed(_made(key, make, suffix), key, suffix)
        path = files.keep(own)
        if path != own:
            own.unlink()
            with contextlib.suppress(OSError):  # another process may be doing the same
                _prune(path)
    return path


def _made(key: str, make: Callable[[Path], object], suffix: str) -> Path:
    """A new package in this process' own folder."""
    new = files.unsealed(key, suffix)
    try:
        make(new)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def forget(key: str, suffix: str = SUFFIX) -> None:
    """Remove the packages of this key."""
    for folder in files.folders():
        for name, path in files.entries(folder, suffix):
            if name == key:
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def locked(name: str, seconds: float, waiting: str = "") -> Iterator[bool]:
    """Hold the lock of this name, if it is to be had.

    Args:
        name: part of the lock file's name.
        seconds: how long to wait for it.
        waiting: what to say if it is not free.

    Yields:
        Whether this process has it. A process that keeps nothing in the cache needs none.
    """
    lock: FileLock | None = None
    if not no_cache():
        lock = FileLock(cache_folder() / f".{name}.lock")
    had = lock is None or _acquired(lock, seconds, waiting)
    try:
        yield had
    finally:
        if lock is not None and had:
            with contextlib.suppress(OSError):
                lock.release()


def _acquired(lock: FileLock, seconds: float, waiting: str) -> bool:
    try:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return True
        if waiting:
            files.say_once(lock.lock_file, waiting)
        lock.acquire(timeout=seconds)
    except (OSError, NotImplementedError):  # Timeout is an OSError too; not every file system has locks
        return False
    return True


def _prune(keep: Path) -> None:
    """Remove the packages that were used longest ago until all fit, and what processes left that were killed."""
    total = keep.stat().st_size
    for _, path in files.entries(keep.parent, *_SUFFIXES):
        if path != keep:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
                if total > CACHE_BYTES:
                    path.unlink()
    for path in keep.parent.iterdir():
        if files.is_leftover(path.name):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _UNFINISHED_S:
                    path.unlink()
