"""Drawing: what `fastddpm sample` was asked for, checked before any work, then drawn batch by batch into files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fastddpm.cli.classes import class_cycle
from fastddpm.cli.condition import ConditionFiles
from fastddpm.cli.errors import Stopped
from fastddpm.cli.picture_folder import PictureFolder, checksums
from fastddpm.common.progress import StepProgress
from fastddpm.common.wording import counted
from fastddpm.files import atomic_path, check_replaceable, check_writable
from fastddpm.images import (
    SHOWN_CHANNELS,
    folder_file,
    grid_size,
    make_grid,
    read_folder,
    save_folder,
    save_gif,
    save_image,
    to_uint8,
)
from fastddpm.process.method import Method
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import DynamicThreshold
from fastddpm.sampler import Batch, Preview, Sampler
from fastddpm.shards.formats import to_pieces
from fastddpm.shards.npz import write_npz
from fastddpm.step.request import RunOptions, default_batch_size, in_turn, make_request

MOST_PICTURES = 10**7
MOST_BYTES = 64 << 30
GRID_LIMIT = 400
GIF_LIMIT = 64
GIF_FRAMES = 40
CONDITIONS = 256
"""Conditions that are in memory at once, in whole batches."""
_LARGEST = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}  # pixels a side


class Animation:
    """Keeps pictures of some of the states on the way, evenly spread, over all batches that it is shown."""

    def __init__(self, spec: ModelSpec, *, frames: int = GIF_FRAMES, estimates: bool = False) -> None:
        """Choose at most so many of the steps, the last one included; of each the state, or its estimate of x_0."""
        self._spec, self._frames, self._estimates = spec, frames, estimates
        self._shown: dict[int, list[Tensor]] = {}

    def __call__(self, preview: Preview) -> None:
        """Take in the state after a step."""
        if not self._shown:
            self._shown = {step: [] for step in evenly(preview.steps, self._frames)}
        if preview.step in self._shown:
            x = preview.x_start if self._estimates else preview.x
            self._shown[preview.step].append(to_uint8(x, self._spec.to_bytes, self._spec.to_unit).cpu())

    def frames(self) -> list[Tensor]:
        """The pictures of each chosen step, uint8 [n, C, H, W]."""
        return [torch.cat(parts) for parts in self._shown.values()]


def evenly(steps: int, most: int) -> list[int]:
    """At most so many of the steps 1 … steps, the last one included."""
    count = min(most, steps)
    return [round((i + 1) * steps / count) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the pictures go: any of one grid, a folder of PNGs, an .npz archive, an animation."""

    grid: Path | None = None
    folder: Path | None = None
    npz: Path | None = None
    gif: Path | None = None

    def check(self, shape: tuple[int, int, int], n: int) -> None:
        """Refuse before the work what would fail after it.

        Args:
            shape: (C, H, W) of a picture.
            n: How many there will be.

        Raises:
            ValueError: If a suffix is wrong, or cannot hold such pictures.
            OSError: If a place is not writable.
        """
        if shape[0] not in SHOWN_CHANNELS and (self.grid or self.folder or self.gif):
            raise ValueError(
                f"pictures must have 1, 3 or 4 channels to be shown, got {shape[0]}; write them with --npz"
            )
        for path, suffixes, most in (
            (self.grid, (".png", ".jpg", ".jpeg", ".webp"), GRID_LIMIT),
            (self.npz, (".npz",), 0),
            (self.gif, (".gif",), GIF_LIMIT),
        ):
            if path is None:
                continue
            check_replaceable(path)
            if path.suffix.lower() not in suffixes:
                got = repr(path.suffix) if path.suffix else "no suffix"
                raise ValueError(f"{path}: the name must end in {' or '.join(suffixes)}, got {got}; rename it")
            _check_fits(path, shape, min(n, most))
            check_writable(path.parent)
        if self.folder is not None:
            check_writable(self.folder)

    def wanted(self, n: int) -> int:
        """How many of n pictures any of the outputs shows."""
        if self.folder or self.npz:
            return n
        return min(n, max(GRID_LIMIT if self.grid else 0, GIF_LIMIT if self.gif else 0))

    def write(
        self,
        n: int,
        first: Callable[[int], Tensor],
        animation: Animation | None,
        labels: Sequence[int] | None = None,
    ) -> list[str]:
        """Write everything that holds many pictures at once.

        Args:
            n: how many there are.
            first: gives the first so many of them, uint8 [k, C, H, W].
            animation: has seen them come about, where there is to be a GIF.
            labels: the class of each, where they have any.

        Returns:
            A line for each file.

        Raises:
            OSError: If one cannot be written.
        """
        lines = []

        def note(path: Path, shown: int) -> None:
            lines.append(f"wrote {path}" + (f" (the first {shown} of {n})" if shown < n else ""))

        if self.grid is not None:
            shown = min(n, GRID_LIMIT)
            save_image(self.grid, make_grid(first(shown), min_side=480))
            note(self.grid, shown)
        if self.npz is not None:
            arrays = to_pieces(first(n))
            with atomic_path(self.npz) as temporary:
                write_npz(temporary, [arrays], (n, *arrays.shape[1:]), labels)
            note(self.npz, n)
        if self.gif is not None and animation is not None:
            shown = min(n, GIF_LIMIT)
            save_gif(self.gif, [make_grid(frame[:shown], min_side=240) for frame in animation.frames()])
            note(self.gif, shown)
        return lines


def _check_fits(path: Path, shape: tuple[int, int, int], shown: int) -> None:
    """See that the format of a grid's file can hold it."""
    kind = path.suffix.lower()
    if shape[0] == 4 and kind in (".jpg", ".jpeg"):
        raise ValueError(f"{path}: pictures with an alpha must be written as .png or .webp, got {kind}; rename it")
    side = max(grid_size(shown, shape[1], shape[2])) if shown else 0
    if side > _LARGEST.get(kind, side):
        raise ValueError(
            f"{path}: {kind} must have at most {_LARGEST[kind]:,} pixels a side, got {side:,}; ask for fewer pictures"
        )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The options of one `fastddpm sample`; see there."""

    sampler: Sampler
    model: str
    flags: Mapping[str, object]
    n: int
    method: Method
    classes: str
    guidance: float
    seed: int
    first_id: int
    batch_size: int | None
    engine: str
    precision: str
    quiet: bool
    condition: ConditionFiles | None = None

    def run(self, outputs: Outputs) -> list[str]:
        """Draw the pictures and write them.

        Returns:
            A line to tell for each output.

        Raises:
            ValueError: If an option is out of range, or the folder holds a run with other settings.
            OSError: If a place is not writable.
            Stopped: On Ctrl-C; says how to go on where that is possible.
        """
        steps = self.check(outputs)
        folder = self._folder(outputs)
        lines = [note for note in (folder and folder.check(),) if note]
        ids = range(self.first_id, self.first_id + outputs.wanted(self.n))
        animation = Animation(self.sampler.spec) if outputs.gif else None
        parts = self._parts(ids, folder, outputs.gif is not None)
        drawn = sum(map(len, parts))
        kept = self._room(len(ids)) if folder is None else None
        try:
            with StepProgress(steps * sum(map(self._batches, parts)), drawn, False if self.quiet else None):
                for missing, watcher in zip(parts, (animation, None), strict=True):
                    for batch in self._stream(missing, watcher):
                        numbers, pictures = batch.ids.tolist(), cast(Tensor, batch.pictures).cpu()
                        if folder is not None:
                            folder.begin()
                            save_folder(folder.path, pictures, numbers)
                        if kept is not None:
                            kept[numbers[0] - ids[0] : numbers[-1] + 1 - ids[0]] = pictures
        except KeyboardInterrupt:
            raise Stopped("; the same command continues" if outputs.folder else "") from None
        if folder is not None:
            lines.append(_told(folder.path, drawn, len(ids) - drawn))

        def first(k: int) -> Tensor:
            return kept[:k] if kept is not None else read_folder(str(outputs.folder), ids[:k])

        return lines + outputs.write(self.n, first, animation, self.labels(ids))

    def check(self, outputs: Outputs) -> int:
        """Refuse before the work, and before anything is written, what would fail after it.

        Returns:
            The steps of each batch.

        Raises:
            ValueError: If an option is out of range, or the folder holds a run with other settings.
            OSError: If a place is not writable.
        """
        if not 1 <= self.n <= MOST_PICTURES:
            hint = "split the run with --first-id" if self.n > 1 else "ask for at least one picture"
            raise ValueError(f"--n must be in 1 … {MOST_PICTURES:,}, got {self.n}; {hint}")
        if not 0 <= self.first_id <= 2**63 - self.n:
            raise ValueError(f"--first-id must be in 0 … 2**63 − n, got {self.first_id}; choose smaller ids")
        if isinstance(self.method.timesteps, str) and not self.method.timesteps.strip():
            raise ValueError("--timesteps must be like 250, ddim25 or 10,15,20, got nothing; leave it out for all")
        size = self.n * torch.Size(self.sampler.spec.shape).numel()
        if outputs.npz is not None and size > MOST_BYTES:
            raise ValueError(f"--npz must hold at most {MOST_BYTES >> 30} GiB, got {size / 2**30:.0f}; use --folder")
        steps = self.sampler.table(self.method).S
        ids = list(range(self.first_id, self.first_id + min(self.n, len(self.cycle() or [0]))))
        pictures = None if self.condition is None else self.condition.files[0]  # all fit, or they would not be here
        run = RunOptions(
            self.seed, ids, self.labels(ids), self.guidance, self.batch_size, condition=pictures
        )  # fmt: skip
        make_request(self.sampler.spec, self.sampler.device, len(ids), run)
        outputs.check(self.sampler.spec.shape, self.n)
        return steps

    def labels(self, ids: Sequence[int]) -> list[int] | None:
        """The class of each id.

        Raises:
            ValueError: If the classes are not understood or the network has none.
        """
        return in_turn(self.cycle(), ids)

    def cycle(self) -> list[int] | None:
        """The classes that the ids go through in turn, or None for no labels.

        Raises:
            ValueError: If the classes are not understood or the network has none.
        """
        return class_cycle(self.sampler.spec, self.classes, self.model)

    def _parts(self, ids: range, folder: PictureFolder | None, with_gif: bool) -> tuple[list[int], list[int]]:
        """The ids that must be drawn: those that are animated, and the rest."""
        there = set() if folder is None else folder.names()
        split = min(len(ids), GIF_LIMIT) if with_gif else 0
        return list(ids[:split]), [i for i in ids[split:] if folder_file("", i).name not in there]

    def _batches(self, ids: Sequence[int]) -> int:
        """In how many batches these ids are drawn."""
        return -(-len(ids) // (self._batch_size() or max(1, len(ids))))

    def _batch_size(self) -> int | None:
        """Pictures that run together, short batches filled up; None where a run that was not cut up is one batch."""
        usual = default_batch_size(self.sampler.device)
        return self.batch_size or (usual if self.n > usual else None)

    def _stream(self, ids: Sequence[int], animation: Animation | None) -> Iterator[Batch]:
        """The pictures of these ids, batch by batch, uint8 [B, C, H, W]."""
        size = self._batch_size() or max(1, len(ids))
        # Conditions are read for so many samples at a time, all batches of which but the last are full.
        most = max(1, len(ids)) if self.condition is None else size * max(1, CONDITIONS // size)
        for first in range(0, len(ids), most):
            yield from self._streamed(ids[first : first + most], animation)

    def _streamed(self, ids: Sequence[int], animation: Animation | None) -> Iterator[Batch]:
        """The same for ids whose conditions are read at once."""
        return self.sampler.stream(
            len(ids),
            method=self.method,
            seed=self.seed,
            sample_ids=ids,
            class_labels=self.labels(ids),
            guidance_scale=self.guidance,
            batch_size=self._batch_size(),
            output="uint8",
            callback=animation,
            condition=None if self.condition is None else self.condition.of_ids(ids),
        )

    def _room(self, n: int) -> Tensor:
        """Memory for n pictures, laid out as the .npz archive has them."""
        return torch.empty((n, *self.sampler.spec.shape), dtype=torch.uint8, memory_format=torch.channels_last)

    def _folder(self, outputs: Outputs) -> PictureFolder | None:
        """The folder of pictures with what determines a picture besides its id, if one is asked for."""
        if outputs.folder is None:
            return None
        mine = ("model", "flags", "classes", "guidance", "seed", "precision", "engine")
        settings = {name: getattr(self, name) for name in mine}
        settings |= {name: getattr(self.method, name) for name in ("solver", "steps", "timesteps", "eta")}
        clip = self.method.clip
        settings["condition"] = None if self.condition is None else self.condition.checksum
        settings["threshold"] = clip.ratio if isinstance(clip, DynamicThreshold) else None
        return PictureFolder(outputs.folder, settings | checksums(self.sampler))


def _told(folder: Path, drawn: int, found: int) -> str:
    """What to say about a folder of pictures."""
    if not drawn:
        return f"{folder}/ holds all {found} already" if found > 1 else f"{folder}/ holds the picture already"
    there = f" ({found} were there already)" if found else ""
    return f"wrote {counted(drawn, 'picture')} to {folder}/{there}"
