"""The cache: a folder for what was compiled, between processes. It saves time, and nothing else depends on it.

Compiled code is run, so nothing is taken from a folder or a file that somebody else could have written. A file is
called KEY-SUM.SUFFIX, where SUM is a digest of its content: it appears together with its checksum or not at all. One
whose content does not fit its name is damaged, and is removed before a loader opens it. Without a cache, what is
compiled goes to a folder of this process alone, which is removed at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import uuid
import warnings
from pathlib import Path

CACHE_VARIABLE = "FASTDDPM_CACHE"
_NAME = re.compile(r"(?P<key>[\w-]+)-(?P<sum>[0-9a-f]{24})(?P<suffix>\.\w+)")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_ELSEWHERE = f"set {CACHE_VARIABLE} to a folder of yours"

SAID: set[str] = set()
PRIVATE: Path | None = None


class CacheWarning(UserWarning):
    """Something about the cache is not as it should be; that costs time and nothing else."""


def say_once(about: object, text: str) -> None:
    """Warn in one line, once per process and thing that it is about."""
    if str(about) not in SAID:
        SAID.add(str(about))
        warnings.warn(f"cache: {text}", CacheWarning, stacklevel=2)


# --- folders --------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where what is compiled is kept: $FASTDDPM_CACHE, or `fastddpm` in the user's cache folder; made if not there.

    Where that is no folder in which this user, and no other, can write, it is one of this process alone.

    Raises:
        OSError: nor is there a place for temporary files.
    """
    folder, problem = _examined(make=True)
    if folder is not None and not problem:
        return folder
    say_once(CACHE_VARIABLE, problem)
    return private_folder()


def no_cache() -> str:
    """Why nothing can be kept in the cache, in one line; "" if it can, or could once its folder is made."""
    return _examined(make=False)[1]


def private_folder() -> Path:
    """A folder of this process alone, removed at exit.

    Raises:
        OSError: there is no place for temporary files.
    """
    global PRIVATE
    if PRIVATE is None or not os.access(PRIVATE, os.W_OK | os.X_OK) or _refusal(PRIVATE):
        # Never made, or taken away: there are services that clean up among temporary files.
        PRIVATE = Path(tempfile.mkdtemp(prefix="fastddpm-"))
        atexit.register(_remove, PRIVATE, os.getpid())
    return PRIVATE


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of the one that made it
        shutil.rmtree(folder, ignore_errors=True)


def folders() -> list[Path]:
    """The folders to look in: the cache, though it be a read-only one, and what this process has of its own."""
    folder, problem = _examined(make=False)
    if folder is None and problem:
        say_once(CACHE_VARIABLE, problem)
    return [place for place in (folder, PRIVATE) if place is not None]


def _examined(*, make: bool) -> tuple[Path | None, str]:
    """The cache's folder, None where there is none to trust; and why nothing can be kept in it, "" if it can."""
    chosen = os.environ.get(CACHE_VARIABLE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastddpm")
    try:
        folder = Path(chosen).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no home, no working directory
        return None, f"{chosen} must be a folder, got none ({error}); {_ELSEWHERE}"
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refusal = _refusal(folder)
    except OSError as error:
        if not make and isinstance(error, FileNotFoundError) and not folder.is_symlink():
            above = next(place for place in folder.parents if place.exists())
            if above.is_dir() and os.access(above, os.W_OK | os.X_OK, effective_ids=True):
                return None, ""  # not made yet
        return None, f"{folder} must be a folder, got {_reason(error)}; {_ELSEWHERE}"
    if refusal:
        return None, refusal
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return folder, f"{folder} must be a folder to write to, got one to read from; {_ELSEWHERE}"
    return folder, ""


def _refusal(folder: Path) -> str:
    """Why nothing that stands in a folder may be run, in one line; "" if it may.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    found = os.stat(folder)
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} must be a folder, got a file; {_ELSEWHERE}"
    others = _others(found)
    return f"{folder} must be yours alone, got {others}; make it so, or {_ELSEWHERE}" if others else ""


def _others(found: os.stat_result) -> str:
    """Who else could have written what stands there; "" if nobody but root."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"one that belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"one that others may write to ({stat.filemode(found.st_mode)})"
    return ""


def _reason(error: OSError) -> str:
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a file there or above it"
    return (error.strerror or str(error)).lower()


# --- files ----------------------------------------------------------------------------------------


def entries(folder: Path, *suffixes: str) -> list[tuple[str, Path]]:
    """What was kept in a folder: keys and files, the ones that were used last coming first."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            name = _NAME.fullmatch(file.name)
            with contextlib.suppress(OSError):  # another process may have removed it
                if name and name["suffix"] in suffixes and file.is_file():
                    found.append((file.stat().st_mtime, name["key"], Path(file.path)))
    return [(key, path) for _, key, path in sorted(found, reverse=True)]


def find(key: str, suffix: str) -> Path | None:
    """A file that was kept under this key, and is as it was written; it counts as used now."""
    for folder in folders():
        for name, path in entries(folder, suffix):
            if name == key and _is_sound(path):
                with contextlib.suppress(OSError):
                    os.utime(path)
                return path
    return None


def unsealed(key: str, suffix: str) -> Path:
    """A new name in this process' own folder, for what two threads may be making at once."""
    return private_folder() / f"{key}.{uuid.uuid4().hex[:8]}{suffix}"


def sealed(file: Path, key: str, suffix: str) -> Path:
    """A file in this process' own folder, renamed to what it is called in the cache.

    Args:
        file: is complete.
        key: letters, digits, `-` and `_`: all that the content depends on.
        suffix: of the name, with its dot.
    """
    with open(file, "rb") as content:
        return file.rename(file.with_name(f"{key}-{_checksum(content)}{suffix}"))


def keep(file: Path) -> Path:
    """Copy a sealed file to the cache; returns the copy, or the file itself where nothing can be kept."""
    folder, problem = _examined(make=True)
    if folder is not None and not problem:
        try:
            _copy(file, folder / file.name)
            return folder / file.name
        except OSError as error:
            problem = f"{folder} must take what was compiled, got {_reason(error)}; make room, or {_ELSEWHERE}"
    say_once(CACHE_VARIABLE, problem)
    return file


def _copy(file: Path, target: Path) -> None:
    """Copy a file that then is there as a whole or not at all, and that nobody else may write to."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with open(descriptor, "wb") as copy, open(file, "rb") as source:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file has the name of one that was being copied."""
    return _TEMPORARY.fullmatch(name) is not None


def _is_sound(path: Path) -> bool:
    """Whether a file may be run and is as it was written; a damaged one is removed."""
    name = _NAME.fullmatch(path.name)
    try:
        with open(path, "rb") as file:
            others = _others(os.fstat(file.fileno()))
            if others:
                say_once(path, f"{path} must be a file of yours alone, got {others}; remove it")
                return False
            if name and name["sum"] == _checksum(file):
                return True
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        say_once(path, f"{path} must be readable, and removable if it is damaged, got {_reason(error)}; remove it")
        return False
    say_once(path, f"{path} was damaged and is removed")
    return False


def is_damaged(path: Path) -> bool:
    """Whether a kept file is not as it was written, or cannot be read; it stays where it is."""
    name = _NAME.fullmatch(path.name)
    try:
        with open(path, "rb") as file:
            return name is None or name["sum"] != _checksum(file)
    except OSError:
        return True


def _checksum(file: io.BufferedReader) -> str:
    # Of those in the standard library, SHA-256 is the quickest on processors that have instructions for it.
    return hashlib.file_digest(file, "sha256").hexdigest()[:24]
