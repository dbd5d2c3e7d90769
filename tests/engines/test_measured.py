"""Measurements on disk: they come back, and a file that holds anything else does no harm."""

import json
import os
import threading
import time

import pytest
from filelock import FileLock

from fastddpm.engines import measured as module
from fastddpm.engines.measured import Measured, remember, remembered
from fastddpm.kernels.kept import CacheWarning, private_folder
from tests.cache_folders import cache

__all__ = ["cache"]

GOOD = {"eager_ms": 2.0, "compiled_ms": 1.0, "compile_s": 30.0, "label": "batch 3 of 3 × 32 × 32 on cpu"}


def test_they_come_back(cache):
    values = {"a": Measured(2.0, 1.0, 30.0, "x × y"), "b": Measured(0.5), "c": Measured(1, 2, 0)}
    assert remembered() == {} and not cache.exists()
    for key, value in values.items():
        remember(key, value)
    assert remembered() == values
    remember("a", Measured(3.0))
    assert remembered()["a"] == Measured(3.0) and list(remembered()) == ["b", "c", "a"]


BAD = {
    "a list": [1], "a number": 1, "null": None, "a string": "x", "nothing": {}, "no eager_ms": {"compiled_ms": 1.0},
    **{f"eager_ms {value!r:.20}": GOOD | {"eager_ms": value}
       for value in ("1", None, True, 0, -1.0, float("nan"), float("inf"), 10**400, [], {}, [[1.0]])},
    **{f"compiled_ms {value!r:.20}": GOOD | {"compiled_ms": value}
       for value in ("1", False, -1.0, float("nan"), float("inf"), 10**400, [1.0])},
    **{f"compile_s {value!r:.20}": GOOD | {"compile_s": value} for value in ("1", True, -1, float("nan"), {"a": 1})},
    **{f"label {value!r:.20}": GOOD | {"label": value}
       for value in (None, 1, ["x"], "two\nlines", "\x1b[31mred", "\ud800", "x" * 1000)},
}  # fmt: skip


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_entry_is_left_out_and_the_others_count(cache, value):
    cache.mkdir(mode=0o700)
    (cache / "measured.json").write_text(json.dumps({"first": GOOD, "bad": value, "last": GOOD}))
    assert remembered() == {"first": Measured(**GOOD), "last": Measured(**GOOD)}
    remember("new", Measured(1.0))
    assert list(remembered()) == list(json.loads((cache / "measured.json").read_text())) == ["first", "last", "new"]


def test_what_a_later_version_adds_is_passed_over(cache):
    cache.mkdir(mode=0o700)
    (cache / "measured.json").write_text(json.dumps({"a": GOOD | {"power_w": 3}, "b": {"eager_ms": 1}, "\x1b": GOOD}))
    assert remembered() == {"a": Measured(**GOOD), "b": Measured(1)}


FILES = {
    "empty": b"", "cut short": json.dumps({"a": GOOD}).encode()[:-5], "a list": b"[1, 2]", "a number": b"NaN",
    "binary": bytes(range(256)), "UTF-16": json.dumps({"a": GOOD}).encode("utf-16"), "NULs": b"\0" * 100,
    "deep": b"[" * 100_000, "deep and whole": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "digits": b"9" * 10_000,
    "huge": json.dumps({"a": GOOD, "b": "x" * (5 << 20)}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_holds_anything_counts_as_none(cache, content):
    cache.mkdir(mode=0o700)
    (cache / "measured.json").write_bytes(content)
    values = {"a": Measured(**GOOD)} if content.startswith(b"\xff\xfe") else {}  # Python reads JSON as UTF-16 too
    assert remembered() == values
    remember("b", Measured(1.0))
    assert remembered() == values | {"b": Measured(1.0)}


def test_a_pipe_is_not_waited_for(cache):
    cache.mkdir(mode=0o700)
    os.mkfifo(cache / "measured.json")
    thread = threading.Thread(target=remember, args=("a", Measured(1.0)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and remembered() == {}  # it costs the measurement


@pytest.mark.parametrize("name", ["measured.json", ".measured.lock"])
def test_a_folder_in_a_files_place_costs_the_measurement(cache, name):
    (cache / name).mkdir(mode=0o700, parents=True)
    cache.chmod(0o700)
    remember("a", Measured(1.0))
    assert remembered() == {}


def test_writers_at_once_lose_nothing(cache):
    threads = [threading.Thread(target=remember, args=(f"{i}", Measured(i + 1.0))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert remembered() == {f"{i}": Measured(i + 1.0) for i in range(12)}


def test_a_lock_that_is_not_to_be_had_costs_only_the_measurement(cache, monkeypatch):
    monkeypatch.setattr(module, "LOCK_S", 0.1)
    cache.mkdir(mode=0o700)
    with FileLock(cache / ".measured.lock"):
        began = time.perf_counter()
        remember("a", Measured(1.0))
        assert time.perf_counter() - began < 3 and remembered() == {}
    remember("a", Measured(1.0))
    assert remembered() == {"a": Measured(1.0)}


def test_the_latest_stay(cache, monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    for i in range(5):
        remember(f"{i}", Measured(1.0))
    assert list(remembered()) == ["2", "3", "4"]


def test_without_a_cache_they_last_as_long_as_the_process(cache):
    cache.write_text("a file")
    with pytest.warns(CacheWarning):
        assert remembered() == {}
        remember("a", Measured(1.0))
    assert remembered() == {"a": Measured(1.0)} and (private_folder() / "measured.json").exists()


def test_without_any_place_they_are_forgotten(cache, monkeypatch, tmp_path):
    cache.write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.warns(CacheWarning):
        assert remembered() == {}
    remember("a", Measured(1.0))
    assert remembered() == {}


def test_a_full_disk_leaves_what_was_there(cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    remember("a", Measured(1.0))
    monkeypatch.setattr(os, "fsync", full)
    remember("b", Measured(1.0))
    assert remembered() == {"a": Measured(1.0)}
