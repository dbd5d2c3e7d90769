"""From states to pictures and files, and back."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.cli.drawing import Outputs
from fastddpm.images import (
    make_grid,
    read_folder,
    save_folder,
    save_gif,
    save_image,
    to_output,
    to_pil,
    to_uint8,
    to_unit,
)


def noise(n, channels=1, height=5, width=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def test_values_are_mapped_and_clamped():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert to_unit(x).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]


def test_every_byte_survives_the_way_through_the_state():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil(channels, mode):
    levels = noise(2, channels)
    images = to_pil(levels.float() / 127.5 - 1)
    assert [image.mode for image in images] == [mode] * 2 and images[0].size == (7, 5)
    assert np.array_equal(np.array(images[1]).reshape(5, 7, channels), levels[1].permute(1, 2, 0).numpy())


def test_pil_refuses_other_channels():
    with pytest.raises(ValueError, match="1, 3 or 4 channels, got 2"):
        to_pil(torch.zeros(1, 2, 4, 4))


def test_output_kinds():
    x = torch.full((2, 1, 4, 4), -3.0)
    assert to_output(x, "raw") is x
    assert to_output(x, "unit").min() == 0.0
    assert to_output(x, "uint8").dtype == torch.uint8
    assert isinstance(to_output(x, "pil")[0], Image.Image)


@pytest.mark.parametrize(
    ("n", "columns", "size"),
    [(1, None, (11, 9)), (4, None, (20, 16)), (5, None, (29, 16)), (5, 2, (20, 23)), (2, 9, (20, 9))],
)
def test_grid_lays_pictures_out_in_rows(n, columns, size):
    pictures = noise(n)
    grid = np.array(make_grid(pictures, columns=columns))
    assert grid.shape == size[::-1]
    across = (size[0] - 2) // 9
    for i in range(n):
        top, left = 2 + i // across * 7, 2 + i % across * 9
        assert np.array_equal(grid[top : top + 5, left : left + 7], pictures[i, 0].numpy())
    assert grid.sum() == pictures.sum()  # all else is black


def test_grid_is_enlarged_by_whole_factors():
    small, large = make_grid(noise(1)), make_grid(noise(1), min_side=30)
    assert large.size == (33, 27)
    assert np.array_equal(np.array(large)[1::3, 1::3], np.array(small))


def test_no_pictures_no_grid():
    with pytest.raises(ValueError, match="at least one"):
        make_grid(noise(0))


@pytest.mark.parametrize("name", ["a", "a.txt", "a.psd"])
def test_a_suffix_must_be_one_that_can_be_written(tmp_path, name):
    with pytest.raises(ValueError, match="must end like an image"):
        save_image(tmp_path / name, make_grid(noise(1)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_comes_back(tmp_path, channels):
    pictures = noise(3, channels)
    save_folder(tmp_path / "new", pictures, [7, 1234567, 0])
    assert sorted(os.listdir(tmp_path / "new")) == ["000000.png", "000007.png", "1234567.png"]
    assert torch.equal(read_folder(tmp_path / "new", [7, 1234567, 0]), pictures)


def test_a_folder_of_mixed_pictures_is_refused(tmp_path):
    save_folder(tmp_path, noise(1), [0])
    save_folder(tmp_path, noise(1, 3), [1])
    with pytest.raises(ValueError, match="one shape"):
        read_folder(tmp_path, [0, 1])


@pytest.mark.parametrize("labels", [None, [2, 0]], ids=["alone", "labels"])
def test_npz_layout(tmp_path, labels):
    pictures = noise(2, 3)
    Outputs(npz=tmp_path / "a.npz").write(2, lambda n: pictures, None, labels)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"] + ([] if labels is None else ["arr_1"])
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (2, 5, 7, 3)
        assert np.array_equal(archive["arr_0"][1, :, :, 2], pictures[1, 2].numpy())
        if labels is not None:
            assert archive["arr_1"].tolist() == [2, 0]


def test_gif_has_every_frame_and_rests_on_the_last(tmp_path):
    frames = [Image.new("L", (12, 10), shade) for shade in (0, 100, 200)]
    save_gif(tmp_path / "a.gif", frames, seconds=1.0)
    with Image.open(tmp_path / "a.gif") as movie:
        assert (movie.n_frames, movie.size, movie.info["loop"]) == (3, (12, 10), 0)
        durations = []
        for i in range(3):
            movie.seek(i)
            durations.append(movie.info["duration"])
            assert movie.convert("L").getpixel((3, 3)) == (0, 100, 200)[i]
    assert durations == [500, 500, 2000]


def test_gif_needs_a_frame(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        save_gif(tmp_path / "a.gif", [])
    assert os.listdir(tmp_path) == []
