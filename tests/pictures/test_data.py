"""Pictures to train on: idx files, archives and folders, whole and damaged."""

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastddpm.pictures.data import load_images, read_idx
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
    "more than there is memory": bytes([0, 0, 8, 4]) + struct.pack(">4I", *[2**16] * 4),
    "broken gzip": gzip.compress(idx(PICTURES))[:-9],
    "gzip of nothing": gzip.compress(b""),
    "gzip with a flipped bit": gzip.compress(idx(PICTURES))[:30] + b"\xff" + gzip.compress(idx(PICTURES))[31:],
}


@pytest.mark.parametrize("content", BAD_IDX.values(), ids=BAD_IDX.keys())
def test_damaged_idx(tmp_path, content):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match="images: "):
        load_images(tmp_path / "images")


@pytest.mark.parametrize(
    ("shape", "phrase"),
    [
        ((2, 5, 4), r"header states shape \(2, 5, 4\), but more bytes follow"),
        ((2**20, 2**20, 2**20), "must fit into .* GiB of memory"),
        ((2, 2**15, 2**15), "bytes must not unpack to 2.0 GiB, which no pictures do"),
    ],
    ids=["longer than its header", "larger than memory", "too well compressed"],
)
def test_a_gzip_bomb_is_refused_by_its_header(tmp_path, shape, phrase):
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
    path = write(tmp_path / "images.gz", header + bytes(1 << 25))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"images\.gz: .*{phrase}"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


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


HEADERS = {
    "too large": "{'descr': '|u1', 'fortran_order': False, 'shape': (1048576, 1048576, 1048576)}",
    "large text": "{'descr': '<U2000000000', 'fortran_order': False, 'shape': (99, 99)}",
    "shorter than its header": "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 5, 5)}",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 5, 5)}",
    "nonsense": "(" * 5000,
    "long header": "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 5, 4)}" + " " * 20000,
}


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
        "pickled labels": {"images": PICTURES, "labels": np.array([Evil(trace)] * 6, dtype=object)},
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
    elif kind in HEADERS:
        with zipfile.ZipFile(buffer, "w") as archive:
            header = HEADERS[kind]
            archive.writestr(
                "images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(99)
            )
    elif kind == "truncated":
        np.savez(buffer, images=PICTURES)
        return buffer.getvalue()[:-40]
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["floats", "nothing", "other names", "flat", "empty", "channels first", "float labels", "negative labels",
     "enormous labels", "too many labels", "too few names", "pickle inside", "pickled labels", "npy", "pickle",
     "zip of text", "truncated", "zero bytes", *HEADERS],
)  # fmt: skip
def test_unusable_npz(tmp_path, kind):
    (tmp_path / "a.npz").write_bytes(bad_npz(kind, tmp_path / "trace"))
    with pytest.raises(ValueError, match=r"a\.npz(: |, images: )") as refused:
        load_images(tmp_path / "a.npz")
    assert not (tmp_path / "trace").exists()
    assert "allow_pickle" not in str(refused.value) and "trust" not in str(refused.value)


def test_an_array_that_nobody_asked_for_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, values in (("images", PICTURES), ("extra", np.array([{}], dtype=object))):
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, values)
    assert load_images(tmp_path / "a.npz").images.shape == (6, 1, 5, 4)


def test_npz_in_fortran_order(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=np.asfortranarray(PICTURES))
    assert np.array_equal(load_images(tmp_path / "a.npz").images[:, 0].numpy(), PICTURES)


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_npz_of_many_channels(tmp_path, channels):
    values = np.random.default_rng(1).integers(0, 256, (3, 16, 12, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=values)
    assert np.array_equal(load_images(tmp_path / "a.npz").images.numpy(), values.transpose(0, 3, 1, 2))


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


def mixed(folder, *modes):
    """A picture of each mode, with shades that differ and, where the mode has an alpha, one that is not opaque."""
    shades = np.random.default_rng(2).integers(0, 256, (len(modes), 6, 8, 4), dtype=np.uint8)
    for i, (mode, values) in enumerate(zip(modes, shades, strict=True)):
        channels = values[..., {"L": 0, "LA": [0, 3], "RGB": [0, 1, 2], "RGBA": [0, 1, 2, 3]}[mode]]
        Image.fromarray(channels, mode).save(folder / f"{i}.png")
    return shades.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("modes", [("L", "RGB", "L"), ("RGB", "L", "L"), ("L", "L", "RGB")], ids="-".join)
def test_one_picture_in_colour_makes_all_of_them_colour(tmp_path, modes):
    shades = mixed(tmp_path, *modes)
    data = load_images(tmp_path)
    for mode, image, values in zip(modes, data.images.numpy(), shades, strict=True):
        assert np.array_equal(image, values[:3] if mode == "RGB" else np.stack([values[0]] * 3))
    assert data.note == "2 gray, 1 in colour: all become in colour"


@pytest.mark.parametrize("modes", [("L", "RGBA", "RGB", "LA"), ("LA", "RGB", "RGBA", "L")], ids="-".join)
def test_one_alpha_gives_all_of_them_an_alpha(tmp_path, modes):
    shades = mixed(tmp_path, *modes)
    data = load_images(tmp_path)
    for mode, image, values in zip(modes, data.images.numpy(), shades, strict=True):
        colour = values[:3] if mode.startswith("RGB") else np.stack([values[0]] * 3)
        assert np.array_equal(image, [*colour, values[3] if mode.endswith("A") else np.full((6, 8), 255)])
    assert data.note == (
        "1 gray, 1 gray with alpha, 1 in colour, 1 in colour with alpha: all become in colour with alpha"
    )


def test_what_was_decided_is_said(tmp_path):
    ramp = (np.arange(48, dtype=np.uint16) * 1000).reshape(6, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    picture(tmp_path / "b.png", mode="LA")
    (tmp_path / "labels.txt").write_text("of other kinds")
    (tmp_path / "c.avif").write_text("of other kinds")
    data = load_images(tmp_path)
    assert np.array_equal(data.images[0, 0].numpy(), np.round(ramp / 257))
    assert data.note == (
        "1 of more than 8 bits (rounded to 8); 1 with an alpha that is opaque everywhere (left out); "
        "2 other files left out (.avif, .txt)"
    )


def test_pictures_beside_class_folders_are_refused_unless_no_classes_are_wanted(tmp_path):
    for name in ("cat/1.png", "dog/2.png", "3.png"):
        picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"got 3\.png beside cat/; move it, or use --no-classes"):
        load_images(tmp_path)
    data = load_images(tmp_path, classes=False)
    assert data.images.shape == (3, 3, 6, 8) and data.num_classes is None


def test_links_to_class_folders_are_followed_and_circles_are_not(tmp_path):
    picture(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    data = load_images(tmp_path / "data")
    assert data.class_names == ("cat",) and data.images.shape[0] == 1


def test_a_link_to_nothing_is_named(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"2\.png: the link must lead to an image"):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["pipe", "pipe.npz", "folder/pipe.png"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} must be a file, got a pipe"):
        load_images(tmp_path / (name.partition("/")[0] if "/" in name else name))


def test_classes_can_be_left_out(tmp_path):
    images = write(tmp_path / "train-images-idx3-ubyte", idx(PICTURES))
    labels = write(tmp_path / "train-labels-idx1-ubyte", idx(LABELS))
    np.savez(tmp_path / "a.npz", images=PICTURES, labels=LABELS)
    assert load_images(images, classes=False).labels is None
    assert load_images(tmp_path / "a.npz", classes=False).class_names is None
    with pytest.raises(ValueError, match="no classes are wanted"):
        load_images(images, labels=labels, classes=False)


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
    with pytest.raises(FileNotFoundError, match="do not exist; give"):
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
