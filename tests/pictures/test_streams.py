"""Pictures batch by batch: the same as all at once, in memory that does not grow with the set."""

import gzip
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.pictures.data import load_images
from fastddpm.pictures.streams import ArrayStream, FolderStream, JoinedStream, in_batches, open_pictures
from tests.pictures.test_data import idx

GRAY = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def save_folder(folder, pictures, nested=False):
    for i, picture in enumerate(pictures):
        path = folder / (str(i % 2) if nested else "") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


def save(path, pictures):
    """The pictures in the layout that the path's name asks for."""
    if path.suffix == ".npz":
        np.savez_compressed(path, arr_0=pictures) if "zipped" in path.name else np.savez(path, arr_0=pictures)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(idx(pictures)))
    elif path.suffix == ".idx":
        path.write_bytes(idx(pictures))
    else:
        save_folder(path, pictures)
    return path


@pytest.mark.parametrize("name", ["a.npz", "zipped.npz", "a.idx", "a.gz", "folder"])
@pytest.mark.parametrize("pictures", [GRAY, COLOUR], ids=["gray", "colour"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_are_the_pictures(tmp_path, name, pictures, batch_size):
    stream = open_pictures(save(tmp_path / name, pictures))
    whole = load_images(tmp_path / name, classes=False).images
    channels = whole.shape[1]
    assert (len(stream), stream.shape) == (7, (channels, 5, 4))
    for _ in range(2):  # a stream can be read again
        batches = list(stream.batches(batch_size, channels))
        assert [len(batch) for batch in batches] == [batch_size] * (7 // batch_size) + [7 % batch_size] * (
            7 % batch_size > 0
        )
        assert torch.equal(torch.cat(batches), whole)


@pytest.mark.parametrize("lengths", [(7,), (1, 1, 1, 1, 1, 1, 1), (2, 5), (0, 6, 1)], ids=str)
def test_pieces_of_any_length_are_cut_into_batches(lengths):
    pieces = np.split(COLOUR, np.cumsum(lengths)[:-1])
    batches = list(in_batches(pieces, 3, 3, "pieces"))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), torch.from_numpy(COLOUR).permute(0, 3, 1, 2))


def test_gray_becomes_colour_and_colour_never_gray(tmp_path):
    gray, colour = (open_pictures(save(tmp_path / name, p)) for name, p in (("g.npz", GRAY), ("c", COLOUR)))
    assert torch.equal(next(iter(gray.batches(7, 3))), torch.from_numpy(GRAY)[:, None].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"000.png: pictures must have 1 channels, got 3; ask for 3"):
        list(colour.batches(7, 1))


def test_a_folder_of_archives_is_joined(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"shard-{i:05d}.npz", arr_0=COLOUR + np.uint8(i))
    (tmp_path / "run.json").write_text("{}")
    stream = open_pictures(tmp_path)
    assert isinstance(stream, JoinedStream) and len(stream) == 21
    joined = torch.cat(list(stream.batches(4, 3)))
    expected = np.concatenate([COLOUR + np.uint8(i) for i in range(3)])
    assert torch.equal(joined, torch.from_numpy(expected).permute(0, 3, 1, 2))
    save_folder(tmp_path / "inner", COLOUR)
    with pytest.raises(ValueError, match=r"images or \.npz archives, got both"):
        open_pictures(tmp_path)


def test_the_images_of_a_folder_are_resized_and_arrays_are_not(tmp_path):
    folder = save_folder(tmp_path / "folder", np.tile(COLOUR, (1, 3, 4, 1)), nested=True)
    stream = open_pictures(folder, size=6)
    assert isinstance(stream, FolderStream) and stream.shape == (3, 6, 6)
    assert torch.equal(torch.cat(list(stream.batches(2, 3))), load_images(folder, size=6).images)
    with pytest.raises(ValueError, match=r"must be 6×6 pixels, got 4×5"):
        open_pictures(save(tmp_path / "a.npz", COLOUR), size=6)


DAMAGED = {
    "short.idx": (lambda p: p.write_bytes(idx(GRAY)[:-1]), "more or fewer bytes follow"),
    "long.idx": (lambda p: p.write_bytes(idx(GRAY) + b"x"), "more or fewer bytes follow"),
    "short.gz": (lambda p: p.write_bytes(gzip.compress(idx(GRAY))[:-20]), "gzip stream is damaged"),
    "labels.idx": (lambda p: p.write_bytes(idx(GRAY[:, 0, 0])), r"\[N, H, W\].*got \(7,\); are they labels"),
    "other.npz": (lambda p: np.savez(p, y=GRAY), "needs an array images or arr_0.*got y"),
    "floats.npz": (lambda p: np.savez(p, arr_0=GRAY / 255), "must be uint8 in C order, got float64"),
    "turned.npz": (lambda p: np.savez(p, arr_0=np.asfortranarray(GRAY)), "in Fortran order"),
    "empty.npz": (lambda p: np.savez(p, arr_0=GRAY[:0]), "needs at least 1 picture"),
    "axes.npz": (lambda p: np.savez(p, arr_0=np.zeros((2, 3, 8, 8), np.uint8)), r"got \[N, C, H, W\] by its looks"),
    "text.npz": (lambda p: p.write_text("no archive"), "not a whole .npz archive"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(tmp_path, name):
    make, message = DAMAGED[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        list(open_pictures(tmp_path / name).batches(3, 1))


def test_a_flipped_byte_in_an_archive_is_noticed(tmp_path):
    path = save(tmp_path / "a.npz", COLOUR)
    content = bytearray(path.read_bytes())
    content[content.index(COLOUR.tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole .npz archive.*CRC"):
        list(open_pictures(path).batches(3, 3))


def test_pictures_of_two_sizes_are_refused(tmp_path):
    save_folder(tmp_path, [*COLOUR, COLOUR[0, :4]])
    with pytest.raises(ValueError, match=r"007.png: pictures must have one size, got \(4, 4\) and \(5, 4\)"):
        list(open_pictures(tmp_path).batches(3, 3))
    with pytest.raises(FileNotFoundError, match="do not exist; give"):
        open_pictures(tmp_path / "nothing")


def test_memory_is_that_of_a_batch(tmp_path):
    path = tmp_path / "many.npz"
    np.savez(path, arr_0=np.zeros((4096, 32, 32, 3), dtype=np.uint8))  # 12.6 MB
    stream = ArrayStream.open(path)
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in stream.batches(64, 3)) == 4096
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6  # a batch takes 0.2 MB
