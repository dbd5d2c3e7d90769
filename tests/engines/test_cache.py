"""Packages: found by key, as they were written, made by one process at a time, and pruned."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import fastddpm
from fastddpm.engines import cache as store
from fastddpm.engines.cache import find, find_or_make, forget, key_of, locked, packages, source_digest
from fastddpm.kernels.kept import CacheWarning, private_folder
from tests.cache_folders import cache

__all__ = ["cache"]


def writes(content: bytes):
    return lambda path: path.write_bytes(content)


def refuse(path):
    raise AssertionError("made though it is there")


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of sources with a linked folder, as this one's own."""
    package = tmp_path / "package"
    for name in ("a.py", "step/b.py", "bench/c.py", "cli/d.py", "checkpoints/e.py", "step/notes.md", "step/b.pyc"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    (tmp_path / "kernels").mkdir()
    for name in ("k.py", "k.c"):
        (tmp_path / "kernels" / name).write_text("1")
    (package / "kernels").symlink_to("../kernels")
    return package


@pytest.mark.parametrize(
    "name, matters",
    [("a.py", True), ("step/b.py", True), ("kernels/k.py", True), ("kernels/k.c", True), ("step/new.py", True),
     ("bench/c.py", False), ("cli/d.py", False), ("checkpoints/e.py", False), ("step/notes.md", False),
     ("step/b.pyc", False)],
)  # fmt: skip
def test_the_digest_follows_the_sources_of_steps(package, name, matters):
    before, _ = store.package_digest(package)
    (package / name).write_text("2")
    assert (store.package_digest(package)[0] != before) == matters


def test_the_digest_tells_a_file_from_a_part_of_another(tmp_path):
    digests = set()
    for name, texts in {"two": {"a.py": "", "b.py": "x"}, "one": {"a.py": "b.py\nx"}}.items():
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text)
        digests.add(store.package_digest(tmp_path / name)[0])
    assert len(digests) == 2


def test_our_own_digest_is_of_this_package():
    assert source_digest() == store.package_digest(Path(fastddpm.__file__).parent)[0] and len(source_digest()) == 24


def test_sources_that_change_under_a_process_are_not_its_own(monkeypatch):
    before = source_digest()
    monkeypatch.setattr(store, "IMPORTED", 0.0)
    others = {source_digest.__wrapped__() for _ in range(2)}
    assert len(others | {before}) == 3 and {len(other) for other in others} == {24}


def test_a_key_depends_on_all_its_parts(monkeypatch):
    keys = [key_of("a", x=1), key_of("b", x=1), key_of("a", x=2), key_of("a", y=1), key_of("a", x=(1, {"deep": 2}))]
    assert key_of("a", x=1, y=2) == key_of("a", y=2, x=1)
    for target, name in ((fastddpm, "__version__"), (torch, "__version__")):
        monkeypatch.setattr(target, name, "another")
        keys.append(key_of("a", x=1))
    monkeypatch.setattr(store, "source_digest", lambda: "other sources")
    keys.append(key_of("a", x=1))
    assert len(set(keys)) == len(keys) and all(key[0] in "ab" and len(key) == 26 for key in keys)


# --- finding and making ---------------------------------------------------------------------------


def test_a_package_is_made_once(cache):
    assert find("key") is None and packages() == {}
    path = find_or_make("key", writes(b"whole"))
    assert path.read_bytes() == b"whole" and path.parent == cache and path.suffix == ".pt2"
    assert find_or_make("key", refuse) == find("key") == path and packages() == {"key": path}
    assert os.listdir(private_folder()) == []


def test_a_failure_leaves_nothing(cache):
    def fail(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_make("key", fail)
    assert find("key") is None and packages() == {} and os.listdir(private_folder()) == []
    assert find_or_make("key", writes(b"whole")).read_bytes() == b"whole"


def test_a_damaged_package_is_made_anew(cache):
    path = find_or_make("key", writes(b"x" * 1000))
    path.write_bytes(b"x" * 999 + b"y")
    with pytest.warns(CacheWarning, match="was damaged and is removed"):
        assert find_or_make("key", writes(b"x" * 1000)).read_bytes() == b"x" * 1000


def test_a_package_for_one_caller_is_made_for_each(cache):
    kept = find_or_make("key", writes(b"kept"))
    paths = [find_or_make("key", writes(content), keep=False) for content in (b"one", b"other")]
    assert [path.read_bytes() for path in paths] == [b"one", b"other"]
    assert {path.parent for path in paths} == {private_folder()} and find("key") == kept
    forget("key")
    assert find("key") is None and packages() == {} and all(path.exists() for path in paths)


def test_packages_of_other_kinds_lie_beside_them(cache):
    step, network = find_or_make("key", writes(b"1")), find_or_make("key", writes(b"2"), suffix=".onnx")
    assert (find("key"), find("key", ".onnx")) == (step, network) and packages(".onnx") == {"key": network}
    forget("key", ".onnx")
    assert (find("key"), find("key", ".onnx")) == (step, None)


def test_forgetting_is_of_one_key(cache):
    find_or_make("key", writes(b"1"))
    other = find_or_make("key-2", writes(b"2"))
    forget("key")
    assert packages() == {"key-2": other}


def test_without_a_cache_packages_are_this_process_own(cache):
    cache.write_text("a file")
    with pytest.warns(CacheWarning, match="must be a folder, got a file") as said:
        path = find_or_make("key", writes(b"whole"))
        assert find_or_make("key", refuse) == find("key") == path and path.parent == private_folder()
    assert len(said) == 1
    forget("key")
    assert packages() == {}


def test_a_full_disk_does_not_stop_a_run(cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(CacheWarning, match="got no space left on device"):
        path = find_or_make("key", writes(b"whole"))
    assert path.read_bytes() == b"whole" and find("key") == path and packages() == {"key": path}


# --- several processes ----------------------------------------------------------------------------


def test_two_at_once_make_one(cache):
    made, paths, busy = [], [], threading.Event()

    def make(path):
        made.append(path)
        busy.set()
        time.sleep(0.3)
        path.write_bytes(b"whole")

    threads = [threading.Thread(target=lambda: paths.append(find_or_make("key", make))) for _ in range(2)]
    with pytest.warns(CacheWarning, match="another process makes the same package; waiting for it"):
        threads[0].start()
        assert busy.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join(20)
    assert len(made) == 1 and len(paths) == 2 and len(set(paths)) == 1


def test_nobody_waits_for_ever(cache, monkeypatch):
    monkeypatch.setattr(store, "WAIT_S", 0.1)
    cache.mkdir(mode=0o700)
    with FileLock(cache / ".key.lock"), pytest.warns(CacheWarning, match="waiting for it"):
        assert find_or_make("key", writes(b"whole")).read_bytes() == b"whole"


@pytest.mark.parametrize("error", [NotImplementedError, PermissionError, OSError])
def test_file_systems_without_locks_do(cache, monkeypatch, error):
    def fail(lock, timeout):
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    with locked("x", 1.0) as had:
        assert not had
    assert find_or_make("key", writes(b"whole")).read_bytes() == b"whole"


def test_a_lock_is_given_back(cache):
    with pytest.raises(ValueError), locked("x", 1.0) as had:
        assert had
        raise ValueError
    with locked("x", 0.0) as had:
        assert had


# --- room -----------------------------------------------------------------------------------------


def test_the_packages_that_were_used_longest_ago_go_first(cache, monkeypatch):
    now = time.time()
    for age, key in enumerate(("d", "c", "b", "a")):
        os.utime(find_or_make(key, writes(b"x" * 100)), (now - 1000 + age,) * 2)
    find("d")  # used just now
    monkeypatch.setattr(store, "CACHE_BYTES", 300)
    new = find_or_make("new", writes(b"x" * 100))
    assert set(packages()) == {"new", "d", "a"} and packages()["new"] == new


def test_what_was_just_made_stays_however_large(cache, monkeypatch):
    monkeypatch.setattr(store, "CACHE_BYTES", 10)
    find_or_make("old", writes(b"x" * 100))
    find_or_make("old", writes(b"x" * 100), suffix=".onnx")
    find_or_make("new", writes(b"x" * 100))
    assert set(packages()) == {"new"} and packages(".onnx") == {}


def test_nothing_else_is_removed(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    others = ("model.pt2", ".bashrc", "notes-2020.pt2", "measured.json", ".hidden.tmp", "a.onnx")
    for name in others:
        (cache / name).write_bytes(b"x" * 100)
        os.utime(cache / name, (0, 0))
    monkeypatch.setattr(store, "CACHE_BYTES", 10)
    find_or_make("key", writes(b"whole"))
    assert set(others) < set(os.listdir(cache))


def test_leftovers_of_killed_processes_go_after_a_day(cache):
    cache.mkdir(mode=0o700)
    names = {hours: f".key-{hours:024x}.pt2.0123abcd.tmp" for hours in (1, 23, 25)}
    for hours, name in names.items():
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - 3600 * hours,) * 2)
    find_or_make("key", writes(b"whole"))
    assert {hours for hours, name in names.items() if (cache / name).exists()} == {1, 23}
