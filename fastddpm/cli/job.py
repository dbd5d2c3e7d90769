"""Job: what `fastddpm sample` was asked for, checked before any work, then drawn batch by batch into files."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.cli.errors import Stopped
from fastddpm.files import check_writable, write_json
from fastddpm.images import (
    ToBytes,
    ToUnit,
    folder_file,
    make_grid,
    read_folder,
    save_folder,
    save_gif,
    save_image,
    save_npz,
    to_uint8,
)
from fastddpm.noise import seed_bits
from fastddpm.progress import StepProgress
from fastddpm.sampler import Preview, Sampler
from fastddpm.solvers import DynamicThreshold, Solver
from fastddpm.step.request import default_batch_size, make_request

MOST_PICTURES = 10**7
MOST_BYTES = 64 << 30
GRID_LIMIT = 400
GIF_LIMIT = 64
GIF_FRAMES = 40
RUN_FILE = "run.json"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the pictures go: any of one grid, a folder of PNGs, an .npz archive, an animation."""

    grid: Path | None
    folder: Path | None
    npz: Path | None
    gif: Path | None

    def check(self) -> None:
        """Refuse before the work what would fail after it.

        Raises:
            ValueError: If a suffix is wrong.
            OSError: If a place is not writable.
        """
        images = (".png", ".jpg", ".jpeg", ".webp")
        for path, suffixes in ((self.grid, images), (self.npz, (".npz",)), (self.gif, (".gif",))):
            if path is None:
                continue
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder; give a file name")
            if path.suffix.lower() not in suffixes:
                got = repr(path.suffix) if path.suffix else "no suffix"
                raise ValueError(f"{path}: the name must end in {' or '.join(suffixes)}, got {got}; rename it")
            check_writable(path.parent)
        if self.folder is not None:
            check_writable(self.folder)

    def wanted(self, n: int) -> int:
        """How many of n pictures any of the outputs shows."""
        if self.folder or self.npz:
            return n
        return min(n, max(GRID_LIMIT if self.grid else 0, GIF_LIMIT if self.gif else 0))


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of one `fastddpm sample`; see there."""

    sampler: Sampler
    model: str
    flags: Mapping[str, object]
    n: int
    solver: Solver
    steps: int | None
    timesteps: str | None
    eta: float | None
    classes: str
    guidance: float
    threshold: float | None
    seed: int
    first_id: int
    batch_size: int | None
    quiet: bool

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
        ids = range(self.first_id, self.first_id + outputs.wanted(self.n))
        animation = Animation(steps, self.sampler.spec.to_bytes, self.sampler.spec.to_unit) if outputs.gif else None
        batches = list(self._batches(ids, outputs))
        drawn = sum(map(len, batches))
        kept = self._room(len(ids)) if outputs.folder is None else None
        try:
            with StepProgress(steps * len(batches), drawn, False if self.quiet else None):
                for batch in batches:
                    animated = animation if batch[0] < self.first_id + GIF_LIMIT else None
                    pictures = self._draw(batch, animated)
                    if outputs.folder is not None:
                        self._begin_folder(outputs.folder)
                        save_folder(outputs.folder, pictures, batch)
                    if kept is not None:
                        kept[batch[0] - ids[0] : batch[-1] + 1 - ids[0]] = pictures
        except KeyboardInterrupt:
            raise Stopped("; the same command continues" if outputs.folder else "") from None
        lines = []
        if outputs.folder is not None:
            there = f" ({len(ids) - drawn} were there already)" if drawn < len(ids) else ""
            lines.append(f"wrote {drawn} pictures to {outputs.folder}/{there}")
        return lines + self._write_files(ids, outputs, kept, animation)

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
        if self.timesteps is not None and not self.timesteps.strip():
            raise ValueError("--timesteps must be like 250, ddim25 or 10,15,20, got nothing; leave it out for all")
        size = self.n * torch.Size(self.sampler.spec.shape).numel()
        if outputs.npz is not None and size > MOST_BYTES:
            raise ValueError(f"--npz must hold at most {MOST_BYTES >> 30} GiB, got {size / 2**30:.0f}; use --folder")
        seed_bits(self.seed)
        steps = self.sampler.table(**self._method()).S
        ids = list(range(self.first_id, self.first_id + min(self.n, len(self._cycle() or [0]))))
        make_request(
            self.sampler.spec, self.sampler.device, len(ids), ids, self.labels(ids), self.guidance, None, None,
            self.batch_size,
        )  # fmt: skip
        outputs.check()
        if outputs.folder is not None:
            self._check_folder(outputs.folder)
        return steps

    def labels(self, ids: Sequence[int]) -> list[int] | None:
        """The class of each id: a function of the id, so that runs over different ranges agree.

        Raises:
            ValueError: If the classes are not understood or the network has none.
        """
        cycle = self._cycle()
        return None if cycle is None else [cycle[i % len(cycle)] for i in ids]

    def _cycle(self) -> list[int] | None:
        """The classes that the ids go through in turn."""
        spec = self.sampler.spec
        if self.classes == "none" or (self.classes == "all" and spec.num_classes is None):
            return None
        if spec.num_classes is None:
            raise ValueError(f"--classes must be left out, got {self.classes!r}: the network has no classes")
        if self.classes == "all":
            return [label for label in range(spec.num_classes) if label != spec.null_class]
        chosen = []
        for part in (p.strip() for p in self.classes.split(",")):
            if part in (spec.class_names or ()):
                chosen.append((spec.class_names or ()).index(part))
            elif part.isascii() and part.isdigit() and len(part) < 10 and int(part) < spec.num_classes:
                chosen.append(int(part))
            else:
                named = f", names such as {spec.class_names[0]}," if spec.class_names else ""
                raise ValueError(
                    f"--classes must be all, none or numbers in 0 … {spec.num_classes - 1}{named} with commas between, "
                    f"got {part!r}; fastddpm info {self.model} lists them"
                )
        return chosen

    def _method(self) -> dict[str, Any]:
        """How to sample: the arguments of `Sampler.table`."""
        clip = "spec" if self.threshold is None else DynamicThreshold(self.threshold)
        return {
            "solver": self.solver, "steps": self.steps, "timesteps": self.timesteps, "eta": self.eta, "clip": clip
        }  # fmt: skip

    def _batches(self, ids: range, outputs: Outputs) -> Iterator[list[int]]:
        """The ids that must be drawn: those that are animated come first, and in batches of their own."""
        size = self.batch_size or default_batch_size(self.sampler.device)
        split = min(len(ids), GIF_LIMIT) if outputs.gif else 0
        for part, animated in ((ids[:split], True), (ids[split:], False)):
            missing = [i for i in part if animated or not outputs.folder or not folder_file(outputs.folder, i).exists()]
            yield from (missing[first : first + size] for first in range(0, len(missing), size))

    def _draw(self, ids: Sequence[int], animation: Animation | None) -> Tensor:
        """The pictures of one batch, uint8 [B, C, H, W] on the CPU."""
        pictures = self.sampler.sample(
            len(ids),
            seed=self.seed,
            sample_ids=list(ids),
            **self._method(),
            class_labels=self.labels(ids),
            guidance_scale=self.guidance,
            batch_size=max(len(ids), self.batch_size or default_batch_size(self.sampler.device)),
            output="uint8",
            callback=animation,
        )
        return pictures.cpu()

    def _room(self, n: int) -> Tensor:
        """Memory for n pictures, laid out as the .npz archive has them."""
        return torch.empty((n, *self.sampler.spec.shape), dtype=torch.uint8, memory_format=torch.channels_last)

    def _write_files(self, ids: range, outputs: Outputs, kept: Tensor | None, animation: Animation | None) -> list[str]:
        """Write everything that holds many pictures at once; returns a line for each file."""
        lines = []

        def note(path: Path, shown: int) -> None:
            lines.append(f"wrote {path}" + (f" (the first {shown} of {self.n})" if shown < self.n else ""))

        def pictures(n: int) -> Tensor:
            return kept[:n] if kept is not None else read_folder(str(outputs.folder), ids[:n])

        if outputs.grid is not None:
            shown = min(len(ids), GRID_LIMIT)
            save_image(outputs.grid, make_grid(pictures(shown), min_side=480))
            note(outputs.grid, shown)
        if outputs.npz is not None:
            labels = self.labels(ids)
            save_npz(outputs.npz, pictures(len(ids)), None if labels is None else torch.tensor(labels))
            note(outputs.npz, len(ids))
        if outputs.gif is not None and animation is not None:
            save_gif(outputs.gif, [make_grid(frame, min_side=240) for frame in animation.frames()])
            note(outputs.gif, min(len(ids), GIF_LIMIT))
        return lines

    def _check_folder(self, folder: Path) -> None:
        """See that a folder's run is the same one: pictures of two settings must not mix."""
        settings = self._settings()
        path = folder / RUN_FILE
        if not path.exists():
            return
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not readable ({error}); remove it or use another folder") from error
        different = [
            f"{name} was {found.get(name)!r}, is {value!r}"
            for name, value in settings.items()
            if name != "model" and found.get(name) != value
        ]
        if different:
            raise ValueError(f"{folder} holds a run with other settings: {'; '.join(different)}; use another folder")

    def _begin_folder(self, folder: Path) -> None:
        if not (folder / RUN_FILE).exists():
            write_json(folder / RUN_FILE, self._settings())

    def _settings(self) -> dict[str, object]:
        """What determines a picture besides its id; the name of the model is for people, its weights count."""
        names = ("model", "flags", "solver", "steps", "timesteps", "eta", "classes", "guidance", "threshold", "seed")
        checksum = 0
        if self.sampler.checkpoint is not None:
            for value in self.sampler.checkpoint.network.state_dict().values():
                checksum = zlib.crc32(value.cpu().flatten().contiguous().view(torch.uint8).numpy(), checksum)
        return {name: getattr(self, name) for name in names} | {"weights": f"{checksum:08x}"}


class Animation:
    """Keeps pictures of some of the states on the way, evenly spread, over all batches that it is shown."""

    def __init__(self, steps: int, to_bytes: ToBytes = "round", to_unit: ToUnit = "clamp") -> None:
        """Choose at most GIF_FRAMES of the steps, the last one included."""
        self._to_bytes, self._to_unit = to_bytes, to_unit
        count = min(GIF_FRAMES, steps)
        self._parts: dict[int, list[Tensor]] = {round((i + 1) * steps / count): [] for i in range(count)}

    def __call__(self, preview: Preview) -> None:
        """Take in the state after a step."""
        if preview.step in self._parts:
            self._parts[preview.step].append(to_uint8(preview.x, self._to_bytes, self._to_unit).cpu())

    def frames(self) -> list[Tensor]:
        """The pictures of each chosen step, uint8 [n, C, H, W]."""
        return [torch.cat(parts) for parts in self._parts.values()]
