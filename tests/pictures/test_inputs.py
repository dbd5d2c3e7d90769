"""Pictures as callers have them, in the network's form."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.pictures.inputs import from_pictures

BYTES = torch.arange(0, 240, 10, dtype=torch.uint8).reshape(1, 1, 4, 6)
GRAY, COLOUR = (1, 4, 6), (3, 4, 6)


def test_all_forms_of_one_picture_are_one(tmp_path):
    array = BYTES[0, 0].numpy()
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    want = BYTES.float() / 127.5 - 1
    forms = [BYTES, BYTES[0], array, array[..., None], array[None, ..., None], Image.fromarray(array), path, str(path)]
    forms += [BYTES.float() / 255, (array / 255).astype(np.float64), Image.open(path)]
    for form in forms:
        torch.testing.assert_close(from_pictures(form, GRAY), want, rtol=0, atol=1e-6)
    assert from_pictures([*forms, BYTES.repeat(2, 1, 1, 1)], GRAY).shape == (len(forms) + 2, *GRAY)
    torch.testing.assert_close(from_pictures(BYTES, GRAY, unit_range=True), BYTES.float() / 255)


def test_channels_become_those_of_the_network():
    colour = torch.randint(0, 256, (2, *COLOUR), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_pictures(BYTES, COLOUR), from_pictures(BYTES, GRAY).expand(1, *COLOUR))
    gray = from_pictures(colour, GRAY)
    for picture, got in zip(colour, gray, strict=True):
        luma = Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L")
        assert (got - from_pictures(luma, GRAY)[0]).abs().max() <= 2 / 255
    opaque = torch.cat((colour, torch.full((2, 1, 4, 6), 255, dtype=torch.uint8)), 1)
    assert torch.equal(from_pictures(opaque, COLOUR), from_pictures(colour, COLOUR))


@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        ([], ValueError, "at least one"),
        (None, TypeError, "paths, PIL images"),
        ([3], TypeError, "got int"),
        (torch.zeros(4, 6), ValueError, r"\[C, H, W\] or"),
        (np.zeros((1, 1, 1, 4, 6)), ValueError, r"\[H, W\], "),
        (torch.zeros(1, 4, 6, dtype=torch.int64), TypeError, "uint8 or float"),
        (torch.full((1, 4, 6), -1.0), ValueError, r"in \[0, 1\], got -1"),
        (torch.full((1, 4, 6), float("nan")), ValueError, r"in \[0, 1\], got nan"),
        (torch.zeros(1, 6, 4), ValueError, "6×4 pixels, got 4×6"),
        (torch.zeros(2, 4, 6), ValueError, "1 channels, got 2"),
        ("nowhere.png", ValueError, "must exist"),
        (__file__, ValueError, "not a readable image"),
    ],
)
def test_what_is_no_fitting_picture_is_refused_by_name(images, error, said):
    with pytest.raises(error, match=said):
        from_pictures(images, GRAY)
