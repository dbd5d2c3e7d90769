"""Edit: what a command of `fastddpm edit` was asked for, checked before any work, and where its pictures go."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fastddpm.cli.classes import class_cycle
from fastddpm.cli.drawing import Animation, Outputs
from fastddpm.cli.engine_options import tell_engine
from fastddpm.cli.flags import parse_flags
from fastddpm.common.terminal import say
from fastddpm.common.wording import counted
from fastddpm.engines.choose import EngineName
from fastddpm.engines.options import SampleOptions
from fastddpm.engines.precision import Precision
from fastddpm.files import atomic_path, check_replaceable, check_writable
from fastddpm.images import make_grid, save_folder, save_image, to_uint8
from fastddpm.process.method import Method
from fastddpm.process.table import Solver
from fastddpm.sampler import Sampler
from fastddpm.step.request import in_turn


@dataclasses.dataclass(frozen=True)
class Edit:
    """The options that all edits have; `fastddpm edit … --help` explains them."""

    model: str
    flag: list[str] | None
    solver: Solver
    steps: int | None
    eta: float | None
    classes: str
    guidance: float
    seed: int
    batch_size: int | None
    device: str | None
    engine: EngineName
    precision: Precision
    quiet: bool

    @functools.cached_property
    def sampler(self) -> Sampler:
        """What edits.

        Raises:
            ValueError: the flags are not understood, or the device is not available.
            CheckpointError: there is no such checkpoint.
        """
        flags = parse_flags(self.flag)
        return Sampler.from_pretrained(
            self.model, device=self.device, engine=self.engine, precision=self.precision, flags=flags
        )

    def options(self, n: int) -> SampleOptions:
        """What `Sampler`'s edits are given for n pictures.

        Raises:
            ValueError: the classes are not understood.
        """
        labels = in_turn(class_cycle(self.sampler.spec, self.classes, self.model), range(n))
        return {
            "method": Method(self.solver, self.steps, eta=self.eta),
            "class_labels": labels,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "progress": False if self.quiet else None,
        }

    def run(self, n: int, outputs: Outputs, draw: Callable[[SampleOptions], object]) -> None:
        """Draw n pictures and write them.

        Args:
            n: how many there will be.
            outputs: where they go; samples/edited.png, if no place is given.
            draw: takes the options, returns the raw states, float32 [n, C, H, W].

        Raises:
            ValueError: an option is out of range.
            OSError: a place is not writable.
        """
        outputs = Outputs(Path("samples/edited.png")) if outputs == Outputs() else outputs
        spec = self.sampler.spec
        outputs.check(spec.shape, n)
        if outputs.folder is not None and outputs.folder.is_dir() and os.listdir(outputs.folder):
            raise ValueError(f"{outputs.folder} must be a new or empty folder, got one with files; use another folder")
        options = self.options(n)
        animation = Animation(spec) if outputs.gif is not None else None
        if animation is not None:
            options["callback"] = animation
        pictures = to_uint8(cast(Tensor, draw(options)), spec.to_bytes, spec.to_unit).cpu()
        lines = []
        if outputs.folder is not None:
            save_folder(outputs.folder, pictures, range(n))
            lines.append(f"wrote {counted(n, 'picture')} to {outputs.folder}")
        self.close(lines + outputs.write(n, lambda k: pictures[:k], animation))

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
        Outputs(grid).check(spec.shape, 2 * n)
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
