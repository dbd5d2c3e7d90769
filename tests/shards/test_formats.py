import io
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from fastddpm.shards.formats import FORMATS
from fastddpm.shards.npz import read_npz, write_npz
from fastddpm.shards.plan import Shard

SHARD = Shard(2, 40, 7)


def pictures(channels=3, count=7):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 5, channels), dtype=np.uint8)


def written(form, tmp_path, name, made, labels, pieces=(3, 3, 1)):
    path = tmp_path / name
    if form.in_folder:
        path.mkdir()
    form.write(path, SHARD, iter(np.split(made, np.cumsum(pieces)[:-1])), labels)
    return path


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3, 4, 5, 6]], ids=["plain", "labels"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_and_nothing_depends_on_the_clock(tmp_path, monkeypatch, name, labels, channels):
    form, made = FORMATS[name], pictures(channels)
    first = written(form, tmp_path, "a", made, labels)
    later = time.time() + 10**8
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(later))
    again = written(form, tmp_path, "b", made, labels, pieces=(1, 2, 4))
    assert content(first) == content(again)
    files = sorted(first.iterdir()) if form.in_folder else [first]
    assert np.array_equal(np.concatenate([piece for file in files for piece in form.read(file)]), made)


@pytest.mark.parametrize("count", [6, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_too_few_and_too_many_pictures_are_refused(tmp_path, name, count):
    with pytest.raises(ValueError, match=r"argument 2|there must be 7 pictures"):
        written(FORMATS[name], tmp_path, "a", pictures(count=count), None, (count,))


def test_an_archive_is_openais(tmp_path):
    made = pictures()
    with np.load(written(FORMATS["npz"], tmp_path, "a.npz", made, list(range(7))), allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert np.array_equal(archive["arr_0"], made) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == list(range(7)) and archive["arr_1"].dtype == np.int64


def test_a_tar_is_webdatasets(tmp_path):
    made = pictures()
    with tarfile.open(written(FORMATS["tar"], tmp_path, "a.tar", made, [5] * 7)) as archive:
        names = archive.getnames()
        assert names[:2] == ["000000000040.png", "000000000040.cls"] and len(names) == 14
        assert {name.split(".")[0] for name in names} == {f"{i:012d}" for i in SHARD.ids}
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {(0, 0, "", 0o644)}
        assert archive.extractfile(names[1]).read() == b"5"
        image = Image.open(io.BytesIO(archive.extractfile(names[0]).read()))
        assert np.array_equal(np.array(image), made[0])


def test_archives_of_numpy_are_read(tmp_path):
    made = pictures()
    np.savez(tmp_path / "a.npz", made)
    assert np.array_equal(np.concatenate(list(read_npz(tmp_path / "a.npz"))), made)


@pytest.mark.parametrize("kind", ["text", "no zip of ours", "floats"])
def test_other_files_are_refused(tmp_path, kind):
    path = tmp_path / "a.npz"
    if kind == "text":
        path.write_text("x" * 100)
    else:
        np.savez(path, **{"other": np.zeros(3)} if kind.startswith("no") else {"arr_0": np.zeros((1, 2, 2, 1))})
    with pytest.raises(ValueError, match=r"a\.npz: (arr_0 )?must be"):
        list(read_npz(path))


def test_pieces_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pictures must be uint8 \(6, 5, 3\), got uint8 \(6, 5, 1\)"):
        write_npz(tmp_path / "a.npz", [pictures(1)], (7, 6, 5, 3), None)
