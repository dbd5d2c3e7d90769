"""Store: files under one address, on a disk or in an object store, each whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fastddpm.common.wording import first_line
from fastddpm.files import atomic_path, check_writable, create_file, make_folder, remove_leftovers, temporary_folder

_BLOCK = 8 << 20  # bytes that are read at once
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Store:
    """Files under an address that fsspec understands: a folder, file://, s3://, gs://, memory:// and others.

    On a disk a file is written under another name and renamed. Object stores have no renaming, and show an object when
    all of it is there.
    """

    def __init__(self, address: str) -> None:
        """Name the place; nothing is made yet.

        Args:
            address: a folder or a URL.

        Raises:
            ValueError: nobody knows such URLs, or the package that does is missing.
        """
        self.address = address.rstrip("/") or "/"
        scheme = address.partition("://")[0] if "://" in address else ""
        try:
            # Others write too, so what is there must be asked for anew each time.
            self.files, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES.get(scheme, "what the message names")
            raise ValueError(f"{address}: needs a package ({first_line(error)}); pip install {package}") from error
        except Exception as error:  # each kind of store raises errors of its own
            raise ValueError(f"{address}: must be a folder or a URL, got {first_line(error)}; mend it") from error
        self._root = str(path).rstrip("/")
        self.folder = Path(self._root) if isinstance(self.files, LocalFileSystem) else None

    def __reduce__(self) -> tuple[Any, ...]:
        # A folder's name must mean the same in a process that runs elsewhere.
        return Store, (self.address if self.folder is None else str(self.folder),)

    def check_writable(self) -> None:
        """Refuse early what could not be written later; what killed processes left half-written is removed.

        Raises:
            OSError: a folder cannot be written to. Object stores tell when they are first written to.
        """
        if self.folder is not None:
            check_writable(self.folder)

    def tidy(self) -> None:
        """Remove what killed processes left half-written; in an object store there is nothing of the kind."""
        if self.folder is not None:
            remove_leftovers(self.folder)

    # ---------------------------------------------------------------- reading

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files that lie directly in a folder, with their sizes in bytes; none if there is no such folder.

        Args:
            folder: below the address; "" is the address itself.

        Raises:
            OSError: the store cannot be reached or read.
        """
        try:
            with self._told():
                entries = self.files.ls(self._path(folder), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {e["name"].rsplit("/", 1)[-1]: int(e["size"] or 0) for e in entries if e["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there.

        Raises:
            OSError: the store cannot be reached or read.
        """
        try:
            with self._told():
                return bytes(self.files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str | None:
        """The SHA-256 of a file as hexadecimal digits, read block by block; None if it is not there.

        Raises:
            OSError: the store cannot be reached or read.
        """
        digest = hashlib.sha256()
        try:
            with self._told(), self.files.open(self._path(name), "rb", block_size=_BLOCK) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except (FileNotFoundError, IsADirectoryError):
            return None
        return digest.hexdigest()

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A file of this machine with the content of one in the store, for the length of the block.

        Raises:
            FileNotFoundError: it is not there.
            OSError: the store cannot be reached or read.
        """
        if self.folder is not None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name.rsplit("/", 1)[-1])
            with self._told():
                self.files.get_file(self._path(name), str(path))
            yield path

    # ---------------------------------------------------------------- writing

    def write(self, name: str, content: bytes) -> None:
        """Write a small file.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is not None:
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(content)
            return
        with self._told(writing=True):
            self.files.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file unless it is there; of several processes that try, one succeeds where the store knows how.

        Returns:
            Whether it was written.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is not None:
            return create_file(self.folder / name, content)
        try:
            with self._told(writing=True):
                self.files.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def writing(self, name: str, *, folder: bool = False) -> Iterator[Path]:
        """A place on this machine to write a file, or a folder of files, that is in the store when the block ends.

        Nothing is there if the block fails. What was there before is replaced.

        Args:
            name: of the file or folder.
            folder: whether it is a folder.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is None:
            yield from self._uploaded(name, folder)
        elif folder:
            target = self.folder / name
            with temporary_folder(target) as temporary:
                yield temporary
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
        else:
            with atomic_path(self.folder / name) as temporary:
                yield temporary

    def _uploaded(self, name: str, folder: bool) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, "new")
            if folder:
                path.mkdir()
            yield path
            files = sorted(path.iterdir()) if folder else [path]
            there = [self._path(f"{name}/{file.name}" if folder else name) for file in files]
            with self._told(writing=True):
                self.files.put([str(file) for file in files], there)

    def remove(self, name: str) -> None:
        """Remove a file if it is there.

        Raises:
            OSError: the store cannot be reached or changed.
        """
        with contextlib.suppress(FileNotFoundError), self._told():
            self.files.rm_file(self._path(name))

    def make(self) -> None:
        """Make the folder of an address on a disk; elsewhere there are no folders.

        Raises:
            OSError: it cannot be made.
        """
        if self.folder is not None:
            make_folder(self.folder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _told(self, *, writing: bool = False) -> Iterator[None]:
        """Around what a store does: its errors, of whatever kind, become one sentence that names the address.

        Args:
            writing: whether a place that is not there is an error.
        """
        try:
            yield
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise
        except Exception as error:  # each kind of store raises errors of its own
            if isinstance(error, FileNotFoundError) and not writing:
                raise
            if self.folder is not None and isinstance(error, OSError):
                raise
            wanted = "writable" if writing else "readable"
            raise OSError(
                f"{self.address} must be there and {wanted}, got {first_line(error)}; check address, network and rights"
            ) from error
