"""Draws the pictures of docs/editing.md with the checkpoint that ships with the package.

    python examples/editing.py docs/images/editing

The folder holds two.png and seven.png, test digits of MNIST, and mask.png; the results are written beside them.
"""

import sys
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fastddpm import Sampler
from fastddpm.editing.masks import from_mask
from fastddpm.images import make_grid, save_image


def row(*pictures: Tensor) -> Tensor:
    """Pictures in [0, 1], one after the other, as bytes."""
    return (torch.cat([picture.cpu() for picture in pictures]) * 255).round().to(torch.uint8)


def main(folder: Path) -> None:
    """Draw and write all pictures."""
    sampler = Sampler.from_pretrained("mnist")
    two, seven, mask = (folder / f"{name}.png" for name in ("two", "seven", "mask"))
    first, last = sampler.pictures(two), sampler.pictures(seven)
    given = torch.where(from_mask(mask, 1, (1, 28, 28)) > 0, torch.full_like(last, 0.5), last)

    def write(name: str, *pictures: Tensor) -> None:
        shown = row(*pictures)
        save_image(folder / f"{name}.png", make_grid(shown, columns=len(shown), min_side=640))
        print(f"wrote {folder / name}.png", flush=True)

    strengths = [
        cast(Tensor, sampler.img2img(seven, strength / 10, steps=25)) for strength in range(1, 10)
    ]  # fmt: skip
    write("strengths", last, *strengths)
    write("between", cast(Tensor, sampler.interpolate(two, seven, 10, steps=25)))
    write("circle", cast(Tensor, sampler.interpolate(two, seven, 8, path="slerp", steps=20)))
    filled = sampler.inpaint([seven] * 6, mask, steps=25, resamplings=5)
    write("filled", last, given, cast(Tensor, filled))
    for steps in (25, 50, 100):
        states = sampler.invert([two, seven], steps=steps)
        for clip in (sampler.spec.clip, None):
            again = sampler.sample(2, x_T=states, steps=steps, clip=clip).cpu()
            off = (again - torch.cat((first, last))).square().flatten(1).mean(1)
            decibels = " and ".join(f"{value:.1f}" for value in (-10 * off.log10()).tolist())
            print(f"inverted and drawn again in {steps} steps, clip={clip}: PSNR {decibels} dB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/editing.py FOLDER")
    main(Path(sys.argv[1]))
