"""Pictures to train on: idx files, archives and folders, whole and damaged."""

import gzip
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastddpm.data import load_images, read_idx
from tests.helpers import mnist_dir

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 0, 2, 1], dtype=np.uint8)


def idx(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---------------------------------------------------------------------- idx


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_idx_pair(tmp_path, suffix, given):
    images = write(tmp_path / f"train-images-idx3-ubyte{suffix}", idx(PICTURES))
    write(tmp_path / f"train-labels-idx1-ubyte{suffix}", idx(LABELS))
    write(tmp_path / f"t10k-images-idx3-ubyte{suffix}", idx(PICTURES[:2]))
    data = load_images(images if given == "file" else tmp_path)
    assert data.images.shape == (6, 1, 5, 4) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0].numpy(), PICTURES)
    assert data.labels.tolist() == LABELS.tolist() and data.labels.dtype == torch.int64
    assert (data.class_names, data.num_classes) == (("0", "1", "2"), 3)


@pytest.mark.parametrize(("one", "other"), [("", ".gz"), (".gz", "")])
def test_labels_are_found_whether_zipped_or_not(tmp_path, one, other):
    images = write(tmp_path / f"train-images-idx3-ubyte{one}", idx(PICTURES))
    write(tmp_path / f"train-labels-idx1-ubyte{other}", idx(LABELS))
    assert load_images(images).labels.tolist() == LABELS.tolist()


def test_labels_elsewhere_and_no_labels(tmp_path):
    images = write(tmp_path / "pictures", idx(PICTURES))
    labels = write(tmp_path / "other" / "classes", idx(LABELS))
    assert load_images(images, labels=labels).labels.tolist() == LABELS.tolist()
    alone = load_images(images)
    assert (alone.labels, alone.class_names, alone.num_classes) == (None, None, None)


def test_colour_idx(tmp_path):
    colour = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    data = load_images(write(tmp_path / "pictures", idx(colour)))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), colour)


def test_the_real_mnist():
    data = load_images(mnist_dir())
    assert data.images.shape == (60000, 1, 28, 28)
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]


BAD_IDX = {
    "empty": b"",
    "short": b"\0\0",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "floats": idx(PICTURES, kind=0x0D),
    "truncated": idx(PICTURES)[:-1],
    "no data": idx(PICTURES)[:16],
    "half a header": idx(PICTURES)[:9],
    "too long": idx(PICTURES) + b"\0",
    "product wraps to 0": bytes([0, 0, 8, 4]) + struct.pack(">4I", *[2**16] * 4),
    "broken gzip": gzip.compress(idx(PICTURES))[:-9],
    "gzip of nothing": gzip.compress(b""),
    "gzip with a flipped bit": gzip.compress(idx(PICTURES))[:30] + b"\xff" + gzip.compress(idx(PICTURES))[31:],
}


@pytest.mark.parametrize("content", BAD_IDX.values(), ids=BAD_IDX.keys())
def test_damaged_idx(tmp_path, content):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match="images: "):
        load_images(tmp_path / "images")


@given(data=st.binary(max_size=60), header=st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, header):
    path = tmp_path_factory.mktemp("idx") / "images"
    path.write_bytes((b"\0\0\x08" if header else b"") + data)
    try:
        assert isinstance(read_idx(path), np.ndarray)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("labels", [LABELS[:-1], LABELS[None]], ids=["too few", "wrong shape"])
def test_labels_of_other_pictures(tmp_path, labels):
    with pytest.raises(ValueError, match="do not belong together"):
        load_images(write(tmp_path / "a", idx(PICTURES)), labels=write(tmp_path / "b", idx(labels)))


def test_labels_are_no_images(tmp_path):
    with pytest.raises(ValueError, match="is it labels"):
        load_images(write(tmp_path / "a", idx(LABELS)))


# ---------------------------------------------------------------------- npz


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1"), ("x_train", "y_train")])
def test_npz(tmp_path, names):
    np.savez(tmp_path / "a.npz", **dict(zip(names, (PICTURES, LABELS.astype(np.int32)), strict=True)), extra=np.ones(9))
    data = load_images(tmp_path / "a.npz")
    assert np.array_equal(data.images[:, 0].numpy(), PICTURES) and data.labels.tolist() == LABELS.tolist()


def test_npz_colour_with_class_names(tmp_path):
    colour = np.zeros((6, 4, 4, 3), dtype=np.uint8)
    colour[..., 2] = 9
    np.savez(tmp_path / "a.npz", images=colour, labels=LABELS, class_names=np.array(["cat", "dog", "ox"]))
    data = load_images(tmp_path / "a.npz")
    assert data.images.shape == (6, 3, 4, 4) and bool((data.images[:, 2] == 9).all())
    assert data.class_names == ("cat", "dog", "ox")


class Evil:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def bad_npz(kind, trace):
    buffer = io.BytesIO()
    arrays = {
        "floats": {"images": PICTURES / 255.0},
        "nothing": {},
        "other names": {"foo": PICTURES},
        "flat": {"images": PICTURES.reshape(6, -1)},
        "empty": {"images": PICTURES[:0]},
        "channels first": {"images": np.zeros((2, 3, 32, 32), dtype=np.uint8)},
        "float labels": {"images": PICTURES, "labels": LABELS.astype(float)},
        "negative labels": {"images": PICTURES, "labels": LABELS.astype(int) - 1},
        "enormous labels": {"images": PICTURES, "labels": LABELS.astype(np.uint64) + 2**63},
        "too many labels": {"images": PICTURES, "labels": np.arange(7)},
        "too few names": {"images": PICTURES, "labels": LABELS, "class_names": np.array(["a"])},
        "pickle inside": {"images": np.array([Evil(trace)], dtype=object)},
    }
    if kind in arrays:
        np.savez(buffer, **arrays[kind])
    elif kind == "npy":
        np.save(buffer, PICTURES)
    elif kind == "pickle":
        pickle.dump(Evil(trace), buffer)
    elif kind == "zip of text":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("images", "text")
            archive.writestr("arr_0.npy", "text")
    elif kind == "truncated":
        np.savez(buffer, images=PICTURES)
        return buffer.getvalue()[:-40]
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["floats", "nothing", "other names", "flat", "empty", "channels first", "float labels", "negative labels",
     "enormous labels", "too many labels", "too few names", "pickle inside", "npy", "pickle", "zip of text",
     "truncated", "zero bytes"],
)  # fmt: skip
def test_unusable_npz(tmp_path, kind):
    (tmp_path / "a.npz").write_bytes(bad_npz(kind, tmp_path / "trace"))
    with pytest.raises(ValueError, match=r"a\.npz: "):
        load_images(tmp_path / "a.npz")
    assert not (tmp_path / "trace").exists()


# ---------------------------------------------------------------------- folders


def picture(path, size=(8, 6), mode="RGB", colour=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_subfolders_are_classes(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "cat" / "deep" / "2.bmp")
    picture(tmp_path / "ant" / "3.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    picture(tmp_path / "cat" / ".4.tmp.png")  # what a killed writer leaves
    data = load_images(tmp_path)
    assert data.images.shape == (3, 3, 6, 8)
    assert data.class_names == ("ant", "cat") and data.labels.tolist() == [0, 1, 1]
    assert data.images[0, :, 0, 0].tolist() == [200, 10, 10]


def test_a_flat_folder_has_no_classes(tmp_path):
    picture(tmp_path / "1.png", mode="L")
    picture(tmp_path / "2.png", mode="L")
    data = load_images(tmp_path)
    assert data.images.shape == (2, 1, 6, 8) and data.labels is None


def test_resizing_crops_the_centre(tmp_path):
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    Image.new("L", (40, 40), 7).save(tmp_path / "square.png")
    data = load_images(tmp_path, size=5)
    assert data.images.shape == (2, 1, 5, 5)
    assert bool((data.images[0] == 7).all()) and bool((data.images[1] == 255).all())


def test_sizes_must_agree(tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png", size=(9, 6))
    with pytest.raises(ValueError, match=r"2\.png: images must have one size.*--size"):
        load_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(30)], ids=["empty", "text", "half"])
@pytest.mark.parametrize("name", ["0.png", "9.png"])
def test_a_damaged_image_is_named(tmp_path, name, content):
    picture(tmp_path / "5.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: not a readable image"):
        load_images(tmp_path)


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match="no images found"):
        load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; give"):
        load_images(tmp_path / "missing")


@pytest.mark.parametrize("size", [0, -1, 10**9])
def test_size_out_of_range(tmp_path, size):
    picture(tmp_path / "1.png")
    with pytest.raises(ValueError, match="--size must be in 1"):
        load_images(tmp_path, size=size)


def test_options_that_would_be_ignored_are_refused(tmp_path):
    images = write(tmp_path / "idx" / "images", idx(PICTURES))
    with pytest.raises(ValueError, match="--size must be left out"):
        load_images(images, size=8)
    picture(tmp_path / "folder" / "1.png")
    with pytest.raises(ValueError, match="--labels must be left out"):
        load_images(tmp_path / "folder", labels=images)
