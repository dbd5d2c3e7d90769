"""Caches that are fine, and caches that are not: what the tests of compiled code's folder share."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastddpm.kernels import kept

NOBODY = 65534


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is to be, in a process that has not said anything yet and whose temporary files lie beside it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(kept, "SAID", set())
    monkeypatch.setattr(kept, "PRIVATE", None)
    monkeypatch.setenv("FASTDDPM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def users_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same for a user whom permissions hold back, as they do not root."""
    if os.geteuid() != 0:
        yield cache
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, contextlib.ExitStack() as root_again:
        os.chown(folder, NOBODY, NOBODY)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("FASTDDPM_CACHE", f"{folder}/cache")
        try:
            os.seteuid(NOBODY)
        except OSError:
            pytest.skip("root cannot become another user here")
        root_again.callback(os.seteuid, 0)
        yield Path(folder, "cache")


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file or folder belong to somebody else; where only root could do that, it looks as if it did."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        return
    given = os.stat(path)

    def as_if(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looked(*arguments: Any, **options: Any) -> os.stat_result:  # noqa: ANN401
            found = look(*arguments, **options)
            if not os.path.samestat(found, given):
                return found
            return os.stat_result((*found[:4], os.geteuid() + 1, *found[5:]))

        return looked

    monkeypatch.setattr(os, "stat", as_if(os.stat))
    monkeypatch.setattr(os, "fstat", as_if(os.fstat))
