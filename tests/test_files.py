"""Files appear whole or not at all, with ordinary permissions, and leave nothing behind when writing fails."""

import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastddpm.files import (
    atomic_path,
    check_writable,
    create_file,
    make_folder,
    remove_leftovers,
    temporary_folder,
    write_json,
    write_tensors,
    write_text,
)


@pytest.fixture
def plain_umask():
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".txt" and temporary.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("write", [lambda p: write_text(p, "x"), lambda p: write_tensors(p, {"a": torch.zeros(3)}, {})])
def test_permissions_are_those_of_any_new_file(tmp_path, plain_umask, write):
    write(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="give a file name"), atomic_path(tmp_path):
        pass


@pytest.mark.parametrize("below", ["f/a.txt", "f/deeper/a.txt"])
def test_below_a_file_there_is_no_place(tmp_path, below):
    (tmp_path / "f").write_text("a file")
    for attempt in (lambda: write_text(tmp_path / below, "x"), lambda: check_writable((tmp_path / below).parent)):
        with pytest.raises(NotADirectoryError, match="must be a folder, got a file"):
            attempt()
    assert (tmp_path / "f").read_text() == "a file"


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / ("x" * 300), "text")
    assert caught.value.filename.endswith("x" * 300)


def test_checking_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "not" / "there" / "yet")
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_make_folder_accepts_one_that_is_there(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    ours = {".fastddpm.12345678.tmp.png", ".fastddpm.0abcdef0.tmp"}
    in_runs = {".a.12345678.tmp.png", ".tmpAb12Cd"}
    others = {"a.png", ".hidden", "b.tmp", ".tmp_cache", ".fastddpm.lock", ".fastddpm.1.tmp", ".fastddpm.99999999.tmp"}
    for name in ours | in_runs | others:
        (tmp_path / name).mkdir() if "cache" in name else (tmp_path / name).touch()
    (tmp_path / ".fastddpm.99999999.tmp").unlink()
    (tmp_path / ".fastddpm.99999999.tmp").symlink_to(tmp_path / "a.png")
    (tmp_path / ".fastddpm.aaaaaaaa.tmp").mkdir()
    (tmp_path / ".fastddpm.aaaaaaaa.tmp" / "model.safetensors").touch()
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == in_runs | others
    remove_leftovers(tmp_path, alone=True)
    assert set(os.listdir(tmp_path)) == others
    remove_leftovers(tmp_path / "nowhere")


def test_what_is_being_written_is_no_leftover(tmp_path):
    with atomic_path(tmp_path / "a.txt") as file, temporary_folder(tmp_path / "b") as folder:
        file.write_text("half")
        (folder / "part").touch()
        check_writable(tmp_path)
        remove_leftovers(tmp_path, alone=True)
        assert file.read_text() == "half" and os.listdir(folder) == ["part"]
    assert os.listdir(tmp_path) == ["a.txt"]


KILLED = """
import os, pathlib, signal, sys
from fastddpm.files import atomic_path, temporary_folder
with atomic_path(sys.argv[1] + "/a.png") as file, temporary_folder(pathlib.Path(sys.argv[1], "b")) as folder:
    file.write_text("half")
    (folder / "part").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_gone_before_the_next_run_writes(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert len(os.listdir(tmp_path)) == 2
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length", [240, 251, 255])
def test_names_may_be_as_long_as_the_file_system_has_them(tmp_path, length):
    name = "é" * 20 + "x" * (length - 44) + ".txt"
    write_text(tmp_path / name, "whole")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "whole"


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_is_neither_followed_nor_replaced(tmp_path, there):
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    if there:
        (tmp_path / "target.txt").write_text("precious")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match=r"link\.txt: it is a symbolic link"):
        write_text(tmp_path / "link.txt", "new")
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "link.txt").is_symlink()
    assert not there or (tmp_path / "target.txt").read_text() == "precious"


def test_a_folder_may_be_a_link_but_not_one_to_nothing(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    check_writable(tmp_path / "link")
    write_text(tmp_path / "link" / "a.txt", "whole")
    assert os.listdir(tmp_path / "real") == ["a.txt"]
    for folder in ("dangling", "dangling/deeper"):
        with pytest.raises(NotADirectoryError, match="dangling is a link to nothing"):
            check_writable(tmp_path / folder)


def test_a_pipe_is_neither_written_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe, a socket or a device"):
        write_text(tmp_path / "pipe", "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_json_and_tensors_come_back(tmp_path):
    write_json(tmp_path / "a.json", {"π": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"π": [1, None]}
    values = {"strided": torch.arange(12.0).reshape(3, 4).t(), "half": torch.ones(2, dtype=torch.float16)}
    write_tensors(tmp_path / "a.safetensors", values, {"key": "value"})
    back = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in values.items())


FULL_DISK = """
import os, resource, sys
from pathlib import Path
import torch
from fastddpm import files
from fastddpm.cli.drawing import Outputs
from fastddpm.images import save_gif, save_image, make_grid
folder = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
noise = torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8)
grid = make_grid(noise)
writers = {
    "text": lambda p: files.write_text(p, "x" * 5000),
    "tensors": lambda p: files.write_tensors(p, {"a": torch.zeros(5000)}, {}),
    "image.png": lambda p: save_image(p, grid),
    "image.jpg": lambda p: save_image(p, grid),
    "movie.gif": lambda p: save_gif(p, [grid, grid.rotate(90)]),
    "arrays.npz": lambda p: Outputs(npz=Path(p)).write(20, lambda n: noise, None),
}
for name, write in writers.items():
    try:
        write(os.path.join(folder, name))
    except OSError as error:
        print(name, "OSError")
    else:
        print(name, "written")
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """The largest size of a file stands in for a full disk: the writers see the same kind of failing write."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    names = ["text", "tensors", "image.png", "image.jpg", "movie.gif", "arrays.npz"]
    assert done.stdout.splitlines() == [f"{name} OSError" for name in names], done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_is_created_once(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert create_file(tmp_path / "a.json", b"first") and not create_file(tmp_path / "a.json", b"second")
    assert (tmp_path / "a.json").read_bytes() == b"first" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_temporary_file_that_another_cleared_away_before_it_was_locked_is_made_again(tmp_path, monkeypatch, folder):
    lock, cleared = fcntl.flock, []

    def first_cleared(handle, how):
        if not cleared and how == fcntl.LOCK_EX:
            cleared.append(handle)
            remove_leftovers(tmp_path)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", first_cleared)
    with temporary_folder(tmp_path / "a") if folder else atomic_path(tmp_path / "a") as temporary:
        assert temporary.exists()
    assert len(cleared) == 1
