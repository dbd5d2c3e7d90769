"""`fastddpm edit`: what it writes, says and refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.sampler import Sampler
from tests import tiny
from tests.command_line import files, good, refused


@pytest.fixture
def model(place):
    """A tiny checkpoint, two pictures, and a mask of the right half."""
    tiny.save_checkpoint(place / "model")
    pixels = tiny.pictures(2).images
    for name, picture in zip(("a", "b"), pixels, strict=True):
        Image.fromarray(picture[0].numpy()).save(place / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(place / "mask.png")
    return place / "model"


def read(path):
    return torch.from_numpy(np.array(Image.open(path)))


def test_inpaint_keeps_what_is_black_and_draws_what_is_white(model, place, fastddpm):
    quick = ("--steps", 4, "--resamplings", 2, "--jump-length", 1)
    out = good(fastddpm("edit", "inpaint", "model", "a.png", "b.png", "--mask", "mask.png", *quick, "--folder", "out"))
    assert out.strip() == "wrote 2 pictures to out" and files(place / "out") == ["000000.png", "000001.png"]
    for name, given in (("000000", "a"), ("000001", "b")):
        got, was = read(place / "out" / f"{name}.png"), read(place / f"{given}.png")
        assert torch.equal(got[:, :4], was[:, :4]) and not torch.equal(got[:, 4:], was[:, 4:])


def test_several_ways_go_into_the_usual_grid(model, place, fastddpm):
    words = ("edit", "inpaint", "model", "a.png", "--mask", "right", "--fill", "replace", "--each", 3, "--steps", 3)
    assert good(fastddpm(*words)).strip() == "wrote samples/edited.png"
    good(fastddpm(*words, "--npz", "three.npz"))
    three = np.load(place / "three.npz")["arr_0"]
    assert three.shape == (3, 8, 8, 1) and not np.array_equal(three[0], three[1])
    assert np.array_equal(three[0, :, :4], three[1, :, :4])


def test_img2img_is_the_sampler_s(model, place, fastddpm):
    good(fastddpm("edit", "img2img", "model", "a.png", "--strength", 0.6, "--steps", 5, "--seed", 3, "--npz", "x.npz",
                  "--class-labels", "dot", "--gif", "x.gif"))  # fmt: skip
    sampler = Sampler.from_pretrained(place / "model", engine="eager")
    expected = sampler.img2img(place / "a.png", 0.6, steps=5, seed=3, class_labels=[1], output="uint8")
    assert np.array_equal(np.load(place / "x.npz")["arr_0"][0, :, :, 0], expected[0, 0].numpy())
    assert (place / "x.gif").exists()


def test_without_a_command_it_explains_itself(place, fastddpm):
    out = good(fastddpm("edit"))
    assert all(name in out for name in ("img2img", "inpaint", "interpolate", "invert"))


@pytest.mark.parametrize("path", ["noise", "slerp"])
def test_interpolate(model, place, fastddpm, path):
    good(
        fastddpm(
            "edit", "interpolate", "model", "a.png", "b.png", "-n", 3, "--path", path, "--steps", 4, "--npz", "x.npz"
        )
    )
    assert np.load(place / "x.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_invert_writes_states_and_says_how_close_they_come(model, place, fastddpm):
    out = good(
        fastddpm("edit", "invert", "model", "a.png", "b.png", "--steps", 10, "--latents", "x.npz", "--grid", "g.png")
    )
    lines = out.splitlines()
    assert lines[0] == "wrote x.npz" and lines[3] == "wrote g.png"
    assert all(
        line.startswith(f"{name}.png: drawn again with a PSNR of ") for line, name in zip(lines[1:3], "ab", strict=True)
    )
    states = np.load(place / "x.npz")["x_T"]
    expected = Sampler.from_pretrained(place / "model", engine="eager").invert(
        [place / "a.png", place / "b.png"], steps=10
    )
    np.testing.assert_allclose(states, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (("inpaint", "model", "a.png", "--mask", "no.png"), ("mask must be an image file or one of middle", "no.png")),
        (("inpaint", "model", "a.png", "--mask", "wide.png"), ("inpaint: mask must be 8×8 pixels, got 9×8",)),
        (("inpaint", "model", "a.png", "--mask", "black.png"), ("mask must be white where",)),
        (("inpaint", "model", "wide.png", "--mask", "mask.png"), ("images must be 8×8 pixels",)),
        (("inpaint", "model", "no.png", "--mask", "mask.png"), ("inpaint: images must exist, got no.png",)),
        (("inpaint", "model", "a.png"), ("Missing option '--mask'",)),
        (("inpaint", "model", "a.png", "--mask", "top", "--resamplings", "0"), ("resamplings must be in 1",)),
        (("inpaint", "model", "a.png", "--mask", "top", "--each", "0"), ("--each must be at least 1, got 0",)),
        (("inpaint", "model", "a.png", "--mask", "top", "--solver", "dpmpp_2m"), ("solver must be ddpm or ddim",)),
        (("img2img", "model", "a.png", "--strength", "1.5"), ("strength must be above 0 and at most 1, got 1.5",)),
        (("img2img", "model", "a.png", "--folder", "model"), ("model must be a new or empty folder",)),
        (("img2img", "model", "a.png", "--grid", "x.txt"), ("must end in .png",)),
        (("img2img", "model"), ("Missing argument 'PICTURE",)),
        (("interpolate", "model", "a.png", "b.png", "-n", "1"), ("interpolate: n must be at least 2, got 1",)),
        (("invert", "model", "a.png", "--latents", "x.png"), ("must end in .npz",)),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) and value[0] in ("inpaint", "img2img") else "",
)  # fmt: skip
def test_what_is_wrong_is_one_line(model, place, fastddpm, words, phrases):
    Image.new("L", (9, 8), 255).save(place / "wide.png")
    Image.new("L", (8, 8), 0).save(place / "black.png")
    before = files(place)
    assert refused(fastddpm("edit", *words), *phrases)
    assert files(place) == before
