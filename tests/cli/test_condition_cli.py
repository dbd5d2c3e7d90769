"""`fastddpm sample --condition`: pictures from a file or a folder, and what cannot be."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import Sampler
from fastddpm.cli import drawing
from tests.command_line import good, refused
from tests.tiny import SIDE, save_checkpoint, unconditional


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose network sees a gray picture behind x."""
    unet, spec = unconditional(condition_channels=1, condition_scale=2)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", dataclasses.replace(unet, in_channels=2), spec)


@pytest.fixture
def seen(place):
    """Three pictures in `seen/`."""
    (place / "seen").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    for name, picture in zip("abc", pixels, strict=True):
        Image.fromarray(picture).save(place / "seen" / f"{name}.png")
    return torch.from_numpy(pixels)[:, None]


def read(folder, ids):
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i:06d}.png"))) for i in ids])[:, None]


def test_pictures_take_turns_by_id(fastddpm, place, model, seen, monkeypatch):
    monkeypatch.setattr(drawing, "CONDITIONS", 4)  # so that the run is in several pieces
    few = ("--steps", 3, "--batch-size", 2)
    good(fastddpm("sample", model, "-n", 7, "--condition", "seen", "--folder", "out", *few))
    sampler = Sampler.from_pretrained(model, device="cpu")
    expected = sampler.sample(
        7, steps=3, condition=seen[torch.arange(7) % 3], output="uint8", batch_size=2, progress=False
    )  # fmt: skip
    assert torch.equal(read(place / "out", range(7)), expected)
    (place / "out" / "000004.png").unlink()
    good(fastddpm("sample", model, "-n", 7, "--condition", "seen", "--folder", "out", *few))
    assert torch.equal(read(place / "out", [4]), expected[4:5])
    assert json.loads((place / "out" / "run.json").read_text())["condition"]
    (place / "seen" / "a.png").unlink()
    refused(fastddpm("sample", model, "-n", 7, "--condition", "seen", "--folder", "out", *few), "condition was")


def test_one_picture_for_all_and_a_small_one(fastddpm, place, model, seen):
    few, sampler = ("-n", 2, "--steps", 3), Sampler.from_pretrained(model, device="cpu")
    Image.fromarray(seen[0, 0, ::2, ::2].numpy()).save(place / "small.png")
    for path, picture in (("seen/a.png", seen[:1]), ("small.png", seen[:1, :, ::2, ::2])):
        good(fastddpm("sample", model, *few, "--condition", path, "--folder", f"out-{picture.shape[2]}"))
        expected = sampler.sample(2, steps=3, condition=picture, output="uint8", progress=False)
        assert torch.equal(read(place / f"out-{picture.shape[2]}", range(2)), expected)


def test_what_cannot_be_is_refused_before_the_work(fastddpm, place, model, seen, tmp_path):
    refused(fastddpm("sample", model), "--condition must be a picture or a folder", "takes 1 channels behind its own")
    refused(fastddpm("sample", model, "--condition", "none.png"), "condition: images must exist, got none.png")
    (place / "empty").mkdir()
    refused(fastddpm("sample", model, "--condition", "empty"), "got empty, which holds none")
    Image.new("L", (5, 5)).save(place / "seen" / "z.png")
    refused(fastddpm("sample", model, "--condition", "seen"), "must be 8×8 pixels, got 5×5")
    plain = save_checkpoint(tmp_path / "plain", *unconditional())
    refused(fastddpm("sample", plain, "--condition", "seen"), "--condition must be left out", "the network takes none")
    assert not (place / "samples").exists()


def test_info_says_what_the_network_takes(fastddpm, model):
    told = json.loads(good(fastddpm("info", model, "--json")))
    assert told["checkpoint"]["conventions"] == {"condition_channels": 1, "condition_scale": 2}
