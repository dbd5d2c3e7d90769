"""Edit: what a command of `fastddpm edit` was asked for, checked before any work, and where its pictures go."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fastddpm.cli.classes import class_cycle
from fastddpm.cli.drawing import GIF_LIMIT, GRID_LIMIT, Animation, Outputs
from fastddpm.cli.engine_options import tell_engine
from fastddpm.common.terminal import say
from fastddpm.engines.options import SampleOptions
from fastddpm.files import atomic_path, check_replaceable, check_writable
from fastddpm.images import make_grid, save_folder, save_gif, save_image, save_npz, to_uint8
from fastddpm.process.method import Method
from fastddpm.sampler import Preview, Sampler


@dataclasses.dataclass(frozen=True)
class Edit:
    """The options that all edits have; `fastddpm edit … --help` explains them."""

    sampler: Sampler
    model: str
    method: Method
    classes: str
    guidance: float
    seed: int
    batch_size: int | None
    quiet: bool

    def options(self, n: int) -> SampleOptions:
        """What `Sampler`'s edits are given for n pictures.

        Raises:
            ValueError: the classes are not understood.
        """
        cycle = class_cycle(self.sampler.spec, self.classes, self.model)
        labels = None if cycle is None else [cycle[i % len(cycle)] for i in range(n)]
        return {
            "method": self.method, "class_labels": labels, "guidance_scale": self.guidance, "seed": self.seed,
            "batch_size": self.batch_size, "progress": False if self.quiet else None,
        }  # fmt: skip

    def run(self, n: int, outputs: Outputs, draw: Callable[[SampleOptions], object]) -> None:
        """Draw n pictures and write them.

        Args:
            n: how many there will be.
            outputs: where they go.
            draw: takes the options, returns the raw states, float32 [n, C, H, W].

        Raises:
            ValueError: an option is out of range.
            OSError: a place is not writable.
        """
        outputs.check(self.sampler.spec.shape, n)
        if outputs.folder is not None and outputs.folder.is_dir() and os.listdir(outputs.folder):
            raise ValueError(f"{outputs.folder} must be a new or empty folder, got one with files; use another folder")
        options = self.options(n)
        film = Film(self.sampler) if outputs.gif is not None else None
        if film is not None:
            options["callback"] = film
        states = cast(Tensor, draw(options))
        pictures = to_uint8(states, self.sampler.spec.to_bytes, self.sampler.spec.to_unit).cpu()
        self.close(_written(pictures, outputs, film))

    def close(self, lines: list[str]) -> None:
        """Say what was done, and how steps ran."""
        if self.quiet:
            return
        say("\n".join(lines))
        tell_engine(self.sampler.engine)

    def invert(self, pictures: list[Path], latents: Path, grid: Path | None) -> None:
        """Invert pictures, write their states, and draw them again to tell how close they come.

        Raises:
            ValueError: an option is out of range.
            OSError: a place is not writable.
        """
        if latents.suffix.lower() != ".npz":
            raise ValueError(f"{latents}: the name must end in .npz, got {latents.suffix or 'no suffix'!r}; rename it")
        check_replaceable(latents)
        check_writable(latents.parent)
        spec, n = self.sampler.spec, len(pictures)
        Outputs(grid, None, None, None).check(spec.shape, 2 * n)
        options = self.options(n)
        states = self.sampler.invert([*pictures], **options)
        options["x_T"] = states
        again = self.sampler.sample(n, **options).cpu()
        originals = self.sampler.pictures([*pictures])
        with atomic_path(latents) as temporary, open(temporary, "wb") as file:
            np.savez(file, x_T=states.cpu().numpy())
        lines = [f"wrote {latents}"]
        for path, off in zip(pictures, (again - originals).square().flatten(1).mean(1).tolist(), strict=True):
            lines.append(f"{path}: drawn again with a PSNR of {-10 * math.log10(max(off, 1e-12)):.1f} dB")
        if grid is not None:
            both = torch.stack((originals, again), 1).flatten(0, 1)
            save_image(grid, make_grid((both * 255).round().clamp(0, 255).to(torch.uint8), columns=2, min_side=480))
            lines.append(f"wrote {grid}")
        self.close(lines)


def _written(pictures: Tensor, outputs: Outputs, film: Film | None) -> list[str]:
    """Write all outputs; returns a line for each."""
    lines = []

    def note(path: Path, shown: int) -> None:
        lines.append(f"wrote {path}" + (f" (the first {shown} of {len(pictures)})" if shown < len(pictures) else ""))

    if outputs.folder is not None:
        save_folder(outputs.folder, pictures, range(len(pictures)))
        lines.append(f"wrote {len(pictures)} picture{'s' if len(pictures) > 1 else ''} to {outputs.folder}")
    if outputs.grid is not None:
        save_image(outputs.grid, make_grid(pictures[:GRID_LIMIT], min_side=480))
        note(outputs.grid, GRID_LIMIT)
    if outputs.npz is not None:
        save_npz(outputs.npz, pictures)
        note(outputs.npz, len(pictures))
    if outputs.gif is not None and film is not None:
        save_gif(outputs.gif, [make_grid(frame[:GIF_LIMIT], min_side=240) for frame in film.frames()])
        note(outputs.gif, GIF_LIMIT)
    return lines


class Film:
    """An `Animation` that learns how many steps there are when it sees the first."""

    def __init__(self, sampler: Sampler) -> None:
        """Nothing is seen yet."""
        self._sampler = sampler
        self._animation: Animation | None = None

    def __call__(self, preview: Preview) -> None:
        """Take in the state after a step."""
        if self._animation is None:
            self._animation = Animation(preview.steps, self._sampler.spec.to_bytes, self._sampler.spec.to_unit)
        self._animation(preview)

    def frames(self) -> list[Tensor]:
        """The pictures of each chosen step, uint8 [n, C, H, W]."""
        return [] if self._animation is None else self._animation.frames()
