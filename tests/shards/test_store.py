import errno
import uuid

import pytest

from fastddpm.shards.store import Store


@pytest.fixture(params=["folder", "file", "memory"])
def store(request, tmp_path):
    folder = tmp_path / "deep" / "out"
    name = {"folder": str(folder), "file": f"file://{folder}", "memory": f"memory://{uuid.uuid4().hex}/out"}
    return Store(name[request.param])


def test_what_is_written_is_read(store):
    assert store.read("a.json") is None and store.sizes() == {} and store.sha256("a.json") is None
    store.write("a.json", b"one")
    store.write("a.json", b"other")
    store.write("folder/b.json", b"")
    assert store.read("a.json") == b"other"
    assert store.sizes() == {"a.json": 5} and store.sizes("folder") == {"b.json": 0}
    assert store.sha256("a.json") == "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    store.remove("a.json")
    store.remove("a.json")
    assert store.sizes() == {} and store.sizes("nowhere") == {}


def test_one_creates(store):
    assert store.create("run.json", b"first") and not store.create("run.json", b"second")
    assert store.read("run.json") == b"first"


def test_files_and_folders_are_written_whole(store):
    with store.writing("a.npz") as path:
        path.write_bytes(b"x" * 100)
        assert store.sizes() == {} or set(store.sizes()) != {"a.npz"}
    for content in (b"old", b"new"):
        with store.writing("pictures", folder=True) as path:
            (path / "1.png").write_bytes(content)
            (path / "2.png").write_bytes(b"2")
    assert store.sizes() == {"a.npz": 100} and store.sizes("pictures") == {"1.png": 3, "2.png": 1}
    with store.reading("pictures/1.png") as path:
        assert path.read_bytes() == b"new"


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_nothing(store, folder):
    with pytest.raises(KeyError), store.writing("a", folder=folder) as path:
        (path / "b" if folder else path).write_bytes(b"half")
        raise KeyError("stop")
    assert store.sizes() == {} and store.sizes("a") == {}


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="it must be a folder"):
        Store(str(tmp_path / "file" / "out")).check_writable()


@pytest.mark.parametrize(
    ("address", "phrase"), [("nowhere://x/y", "must be a folder or a URL"), ("dbfs://", "needs a package|must be")]
)
def test_an_address_that_nobody_knows_is_refused(address, phrase):
    with pytest.raises(ValueError, match=phrase):
        Store(address).read("a")


def test_errors_of_a_store_become_one_sentence(monkeypatch):
    store = Store("memory://gone")

    class Unreachable(Exception):
        """An error that is no OSError."""

    def fail(*_, **__):
        raise Unreachable("Could not connect\nto the endpoint")

    monkeypatch.setattr(type(store.files), "cat_file", fail)
    monkeypatch.setattr(type(store.files), "pipe_file", fail)
    for call, word in ((lambda: store.read("a"), "readable"), (lambda: store.write("a", b""), "writable")):
        with pytest.raises(OSError, match=f"memory://gone must be there and {word}, got Could not connect; check"):
            call()


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    with pytest.raises(OSError, match="No space") as told, store.writing("a.npz"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.filename == str(tmp_path / "a.npz") and list(tmp_path.iterdir()) == []
