"""The folder of compiled code: made for its owner alone, left alone where others could have written, never needed."""

import os
import pwd
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastddpm.kernels import kept as store
from fastddpm.kernels.kept import CacheWarning, cache_folder, find, keep, no_cache, private_folder, sealed
from tests.cache_folders import cache, give_away, users_cache

__all__ = ["cache", "users_cache"]


def kept(content: bytes = b"code", key: str = "key") -> Path:
    """A file that was kept under a key, as another process finds it."""
    made = private_folder() / "made"
    made.write_bytes(content)
    own = sealed(made, key, ".so")
    path = keep(own)
    if path != own:
        own.unlink()
    return path


def is_private(path: Path) -> bool:
    return path.parent == private_folder()


# --- places ---------------------------------------------------------------------------------------


def test_places(cache, monkeypatch, tmp_path):
    assert cache_folder() == cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTDDPM_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "fastddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "fastddpm"


def test_looking_makes_nothing(cache):
    assert find("key", ".so") is None and no_cache() == "" and not cache.exists()


def test_it_is_its_owners_alone_whatever_the_umask(cache):
    before = os.umask(0)
    try:
        path = kept()
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o022 == 0
    assert find("key", ".so") == path


def a_file(folder, monkeypatch):
    folder.write_text("a file")


def below_a_file(folder, monkeypatch):
    folder.write_text("a file")
    monkeypatch.setenv("FASTDDPM_CACHE", str(folder / "below"))


def a_link_to_nowhere(folder, monkeypatch):
    folder.symlink_to("nowhere/at/all")


def too_long(folder, monkeypatch):
    monkeypatch.setenv("FASTDDPM_CACHE", str(folder.with_name("x" * 300)))


def no_home(folder, monkeypatch):
    def unknown(user):
        raise KeyError(user)

    for name in ("FASTDDPM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def another_users(folder, monkeypatch):
    folder.mkdir()
    give_away(folder, monkeypatch)


def a_link_to_another_users(folder, monkeypatch):
    another_users(folder.with_name("theirs"), monkeypatch)
    folder.symlink_to("theirs")


def writable_for_a_group(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o770)


def writable_for_all(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o1777)


FAULTS = {
    a_file: "must be a folder, got a file; set FASTDDPM_CACHE",
    below_a_file: "must be a folder, got",
    a_link_to_nowhere: "must be a folder, got no such file",
    too_long: "must be a folder, got file name too long",
    no_home: "must be a folder, got none",
    another_users: "must be yours alone, got one that belongs to user",
    a_link_to_another_users: "must be yours alone, got one that belongs to user",
    writable_for_a_group: r"must be yours alone, got one that others may write to \(drwxrwx---\); make it so",
    writable_for_all: r"must be yours alone, got one that others may write to \(drwxrwxrwt\)",
}


@pytest.mark.parametrize("fault, message", FAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_without_a_usable_folder_there_is_a_private_one_and_one_line(cache, monkeypatch, fault, message):
    fault(cache, monkeypatch)
    before = sorted(os.walk(cache))
    with pytest.warns(CacheWarning, match=message) as said:
        assert find("key", ".so") is None
        path = kept()
        assert find("key", ".so") == path and is_private(path) and cache_folder() == private_folder()
    assert [str(w.message) for w in said] == [f"cache: {no_cache()}"] and "\n" not in no_cache()
    assert sorted(os.walk(cache)) == before


def test_whoever_asks_for_the_place_is_told(cache, monkeypatch):
    a_file(cache, monkeypatch)
    with pytest.warns(CacheWarning, match="must be a folder, got a file") as said:
        assert [cache_folder() for _ in range(2)] == [private_folder()] * 2
    assert len(said) == 1


def unwritable(folder):
    folder.mkdir(mode=0o500)


def not_to_be_entered(folder):
    folder.mkdir(mode=0o600)


def not_to_be_made(folder):
    folder.parent.chmod(0o500)


def not_to_be_reached(folder):
    folder.parent.chmod(0o000)


@pytest.mark.parametrize("fault", [unwritable, not_to_be_entered, not_to_be_made, not_to_be_reached])
def test_without_permission_there_is_a_private_one_and_one_line(users_cache, monkeypatch, fault):
    folder = users_cache.parent / "below" / "cache"
    folder.parent.mkdir()
    monkeypatch.setenv("FASTDDPM_CACHE", str(folder))
    fault(folder)
    try:
        with pytest.warns(CacheWarning, match="must be a folder") as said:
            assert find("key", ".so") is None
            path = kept()
            assert find("key", ".so") == path and is_private(path)
        assert [str(w.message) for w in said] == [f"cache: {no_cache()}"]
    finally:
        folder.parent.chmod(0o700)


def test_a_read_only_cache_is_read_without_a_word(users_cache):
    path = kept()
    users_cache.chmod(0o500)
    assert find("key", ".so") == path and not is_private(path)
    assert "must be a folder to write to" in no_cache()


def test_a_link_to_a_folder_of_ones_own_is_fine(cache, tmp_path):
    (tmp_path / "large disk").mkdir(mode=0o700)
    cache.symlink_to("large disk")
    assert find("key", ".so") is None and kept().parent == cache and find("key", ".so") is not None


def test_a_full_disk_costs_nothing_but_the_keeping(cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(CacheWarning, match="got no space left on device; make room") as said:
        paths = [kept(), kept(b"more", "other")]
    assert len(said) == 1 and all(is_private(path) for path in paths) and find("key", ".so") == paths[0]
    assert os.listdir(cache) == []


# --- files ----------------------------------------------------------------------------------------


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, empty])
def test_damaged_files_are_removed_with_one_line(cache, damage):
    path = kept(b"x" * 5000)
    assert find("key", ".so") == path
    damage(path)
    with pytest.warns(CacheWarning, match="was damaged and is removed") as said:
        assert find("key", ".so") is None
    assert len(said) == 1 and not path.exists()


def test_a_file_that_others_could_have_written_is_left_alone(cache, monkeypatch):
    path = kept()
    path.chmod(0o664)
    with pytest.warns(CacheWarning, match=r"must be a file of yours alone, got one that others may write to"):
        assert find("key", ".so") is None
    path.chmod(0o644)
    assert find("key", ".so") == path
    monkeypatch.setattr(store, "SAID", set())
    give_away(path, monkeypatch)
    with pytest.warns(CacheWarning, match="must be a file of yours alone, got one that belongs to user"):
        assert find("key", ".so") is None
    assert path.exists()


def test_a_file_that_cannot_be_read_is_no_damaged_one(users_cache):
    path = kept()
    path.chmod(0)
    with pytest.warns(CacheWarning, match="must be readable.*permission denied"):
        assert find("key", ".so") is None
    assert path.exists()


def a_pipe(path):
    os.mkfifo(path)


def a_link_to_nothing(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [a_pipe, Path.mkdir, a_link_to_nothing])
def test_what_is_no_file_is_not_waited_for(cache, make):
    path = kept()
    path.unlink()
    make(path)
    assert find("key", ".so") is None


def test_keys_are_told_apart(cache):
    paths = {key: kept(key.encode(), key) for key in ("a", "a-b", "a-" + "0" * 24, "b")}
    assert {key: find(key, ".so") for key in paths} == paths
    assert find("a", ".pt2") is None and find("0" * 24, ".so") is None


def test_use_is_noted(cache):
    path = kept()
    os.utime(path, (1, 1))
    find("key", ".so")
    assert path.stat().st_mtime > 1


# --- the private folder ---------------------------------------------------------------------------


def test_a_private_folder_that_was_cleaned_away_is_made_anew(cache):
    first = private_folder()
    assert first.stat().st_mode & 0o777 == 0o700 and private_folder() == first
    first.rmdir()
    second = private_folder()
    assert second != first and second.is_dir()
    second.chmod(0o777)  # as one may be that somebody else put in its place
    assert private_folder() not in (first, second)


def test_without_any_place_there_is_an_error(cache, monkeypatch, tmp_path):
    a_file(cache, monkeypatch)
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.warns(CacheWarning):
        assert find("key", ".so") is None
    with pytest.raises(OSError):
        cache_folder()


ENDS = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
folder = cache.private_folder()
print(folder, flush=True)
if os.fork():
    os.wait()
    assert folder.is_dir()  # the end of a fork is not the end of its parent
"""


def test_it_is_removed_at_exit(tmp_path):
    command = [sys.executable, "-c", ENDS, store.__file__]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and os.listdir(tmp_path) == []


def test_warnings_as_errors_stay_errors(cache, monkeypatch):
    a_file(cache, monkeypatch)
    with warnings.catch_warnings(), pytest.raises(CacheWarning):
        warnings.simplefilter("error")
        find("key", ".so")
