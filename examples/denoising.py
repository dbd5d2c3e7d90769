"""From noise to digits: the shipped checkpoint's x_t at a few of DDIM's steps, one picture under another.

    python examples/denoising.py docs/images/denoising.png

Each column is a digit, each row a state: the first after one step of fifty, the last is x_0.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from fastddpm import Preview, Sampler
from fastddpm.images import make_grid, to_uint8

STEPS, STATES, SCALE = 50, 8, 2


def main(path: Path) -> None:
    """Draw the ten digits and write the picture."""
    sampler = Sampler.from_pretrained("mnist", engine="eager")
    states: list[torch.Tensor] = []

    def keep(preview: Preview) -> None:
        states.append(preview.x)

    sampler.sample(10, seed=7, steps=STEPS, class_labels=range(10), guidance_scale=1.5, callback=keep)
    shown = [round(i * (STEPS - 1) / (STATES - 1)) for i in range(STATES)]
    grid = make_grid(to_uint8(torch.cat([states[i] for i in shown])), columns=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((SCALE * grid.width, SCALE * grid.height), Image.Resampling.NEAREST).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "denoising.png"))
