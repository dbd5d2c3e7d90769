"""Masks in every form that callers have them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.editing.masks import PARTS, from_mask

SHAPE = (3, 4, 6)
WANTED = torch.zeros(4, 6)
WANTED[1:, 2:5] = 1


def forms(folder):
    white = (WANTED.numpy() * 255).astype(np.uint8)
    Image.fromarray(white).save(folder / "gray.png")
    Image.fromarray(np.stack([white] * 3, -1)).save(folder / "colour.png")
    Image.fromarray(white).convert("1").save(folder / "bits.png")
    return {
        "file": folder / "gray.png",
        "name of a file": str(folder / "colour.png"),
        "file of bits": folder / "bits.png",
        "image": Image.fromarray(white),
        "bytes": white,
        "booleans": WANTED.numpy() > 0,
        "tensor": WANTED,
        "tensor of booleans": WANTED > 0,
        "channel": WANTED[None],
        "one for each": WANTED.expand(2, 1, 4, 6),
    }


def test_every_form_is_the_same_mask(tmp_path):
    for name, mask in forms(tmp_path).items():
        got = from_mask(mask, 2, SHAPE)
        assert got.dtype == torch.float32 and got.is_contiguous(), name
        torch.testing.assert_close(got, WANTED.expand(2, 3, 4, 6), msg=name, rtol=0, atol=1e-6)


def test_parts_by_name():
    cut = {name: from_mask(name, 1, (1, 4, 6))[0, 0] for name in PARTS}
    assert torch.equal(cut["left"] + cut["right"], torch.ones(4, 6)) and bool(cut["left"][:, :3].all())
    assert torch.equal(cut["top"] + cut["bottom"], torch.ones(4, 6)) and bool(cut["top"][:2].all())
    middle = torch.zeros(4, 6)
    middle[1:3, 1:5] = 1
    assert torch.equal(cut["middle"], middle)


def test_gray_mixes():
    assert from_mask(torch.full((4, 6), 0.25), 1, SHAPE).unique().tolist() == [0.25]


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ("centre", ValueError, r"mask must be an image file or one of middle, left, right, top, bottom, got 'centre'"),
        (torch.zeros(4, 6), ValueError, r"mask must be white where the picture is to be drawn anew, got"),
        (WANTED.byte(), ValueError, r"mask of bytes must be 0 … 255, got 0 and 1; convert it to bool or float"),
        (WANTED * 2, ValueError, r"mask of floats must be in \[0, 1\], got 0 … 2; "),
        (WANTED[:3], ValueError, r"mask must be 6×4 pixels, got 6×3; "),
        (WANTED.expand(3, 1, 4, 6), ValueError, r"mask must be one for all or 2, one for each picture, got 3"),
        (WANTED.long(), TypeError, r"mask must be uint8 or float, got torch.int64; "),
        (7, TypeError, r"mask must be paths, PIL images, arrays or tensors, got int; "),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_is_no_mask_is_refused(mask, error, match):
    with pytest.raises(error, match=f"^inpaint: {match}"):
        from_mask(mask, 2, SHAPE)
