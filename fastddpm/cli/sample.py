"""`fastddpm sample`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from fastddpm.sampler import Preview, Sampler

GRID_LIMIT = 400
GIF_LIMIT = 64
GIF_FRAMES = 40
RUN_FILE = "run.json"


def sample(
    model: Annotated[str, typer.Argument(help="A shipped checkpoint (`mnist`) or a checkpoint folder.")],
    n: Annotated[int, typer.Option("--n", "-n", help="How many pictures.")] = 64,
    grid: Annotated[
        Path | None, typer.Option(help="Write one picture of all (.png). [default: samples/grid.png]")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Write one PNG per picture; run again to continue where a run was stopped."),
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(help="Write an .npz for evaluation: uint8 [n, H, W, C] and labels.")
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="Write an animation of the denoising (.gif).")] = None,
    solver: Annotated[
        Literal["ddpm", "ddim", "dpmpp_2m"],
        typer.Option(help="ddpm: ancestral. ddim, dpmpp_2m: few steps, no noise."),
    ] = "ddim",
    steps: Annotated[
        int | None, typer.Option(help="Steps. [default: all for ddpm, 50 for ddim, 20 for dpmpp_2m]")
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(help="Instead of --steps: `250`, `ddim25` or `10,15,20` (OpenAI's respacing)."),
    ] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's η, 0 … 1: how much noise each step adds.")] = None,
    classes: Annotated[
        str, typer.Option(help="`all`: each class in turn; `none`; or a list such as `3,1,4` to repeat.")
    ] = "all",
    guidance: Annotated[
        float,
        typer.Option(help="Scale of classifier-free guidance: 1 is none, more is clearer and less varied."),
    ] = 1.0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Dynamic thresholding at this quantile (0.995, say) instead of clipping."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed. The same seed and id give the same picture anywhere.")] = 0,
    first_id: Annotated[int, typer.Option(help="Id of the first picture; the others follow.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pictures that run together; does not change them. [default: by device]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the GPU if there is one]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no closing line.")] = False,
) -> None:
    """Draw pictures from a trained checkpoint.

    Examples:
    - `fastddpm sample mnist` writes 64 digits to samples/grid.png

    - `fastddpm sample mnist -n 10 --classes 7 --guidance 1.5 --gif seven.gif`

    - `fastddpm sample mnist -n 10000 --folder digits --solver ddpm --steps 250`
    """
    from fastddpm.sampler import Sampler  # PyTorch takes seconds to import, --help should not

    if not any((grid, folder, npz, gif)):
        grid = Path("samples/grid.png")
    sampler = Sampler.from_pretrained(model, device=device)
    job = Job(
        sampler,
        model,
        n,
        solver,
        steps,
        timesteps,
        eta,
        classes,
        guidance,
        threshold,
        seed,
        first_id,
        batch_size,
        quiet,
    )
    job.check_outputs(grid, folder, npz, gif)
    written = job.run_folder(folder) if folder is not None else []
    if grid or npz or gif:
        written += job.run_files(grid, npz, gif)
    if not quiet:
        for line in written:
            Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of one `fastddpm sample`."""

    sampler: Sampler
    model: str
    n: int
    solver: Literal["ddpm", "ddim", "dpmpp_2m"]
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

    def check_outputs(self, grid: Path | None, folder: Path | None, npz: Path | None, gif: Path | None) -> None:
        """Refuse before the work what would fail after it.

        Raises:
            ValueError: a suffix is wrong or the request makes no sense.
            OSError: a place is not writable.
        """
        for path, suffixes in (
            (grid, (".png", ".jpg", ".jpeg", ".webp")),
            (npz, (".npz",)),
            (gif, (".gif",)),
        ):
            if path is None:
                continue
            if path.suffix.lower() not in suffixes:
                raise ValueError(
                    f"{path}: the name must end in {' or '.join(suffixes)}, got {path.suffix or 'no suffix'!r}"
                )
            probe_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder; give a file name")
        if folder is not None:
            probe_folder(folder)
        if self.n < 1:
            raise ValueError(f"--n must be at least 1, got {self.n}; ask for at least one picture")
        if self.first_id < 0 or self.first_id + self.n > 2**63:
            raise ValueError(f"--first-id must be in [0, 2**63 − n), got {self.first_id}; ids are 63-bit numbers here")
        self.labels([0])

    def labels(self, ids: Sequence[int]) -> list[int] | None:
        """The class of each id: a function of the id, so that runs over different ranges agree.

        Raises:
            ValueError: the classes are not understood or the network has none.
        """
        spec = self.sampler.spec
        if self.classes == "none" or (self.classes == "all" and spec.num_classes is None):
            return None
        if spec.num_classes is None:
            raise ValueError(f"--classes must be left out, got {self.classes!r}: the network has no classes")
        cycle = list(range(spec.num_classes)) if self.classes == "all" else self._class_list(spec.class_names)
        return [cycle[i % len(cycle)] for i in ids]

    def _class_list(self, names: tuple[str, ...] | None) -> list[int]:
        chosen = []
        for part in (p.strip() for p in self.classes.split(",")):
            if names is not None and part in names:
                chosen.append(names.index(part))
            elif part.isascii() and part.isdigit():
                chosen.append(int(part))
            else:
                known = f" or names such as {names[0]}" if names else ""
                raise ValueError(f"--classes must be all, none or numbers{known} with commas, got {self.classes!r}")
        return chosen

    def draw(self, ids: Sequence[int], gif_frames: list[Tensor] | None = None) -> Tensor:
        """Bytes of the pictures with these ids, uint8 [n, C, H, W] on the CPU."""
        from fastddpm.solvers import DynamicThreshold

        pictures = self.sampler.sample(
            len(ids),
            seed=self.seed,
            sample_ids=list(ids),
            solver=self.solver,
            steps=self.steps,
            timesteps=self.timesteps,
            eta=self.eta,
            clip="spec" if self.threshold is None else DynamicThreshold(self.threshold),
            class_labels=self.labels(ids),
            guidance_scale=self.guidance,
            batch_size=self.batch_size,
            output="uint8",
            callback=None if gif_frames is None else _Recorder(gif_frames),
            progress=False if self.quiet else None,
        )
        return pictures.cpu()

    def run_files(self, grid: Path | None, npz: Path | None, gif: Path | None) -> list[str]:
        """Write everything that holds all pictures at once; returns a line for each file."""
        import torch

        from fastddpm.images import make_grid, save_gif, save_image, save_npz

        ids = range(self.first_id, self.first_id + self.n)
        animated = list(ids)[: GIF_LIMIT if gif else 0]
        frames: list[Tensor] = []
        parts = [self.draw(animated, frames)] if animated else []
        if len(animated) < self.n and (grid or npz):
            parts.append(self.draw(ids[len(animated) :]))
        pictures = torch.cat(parts)
        lines = []
        if grid is not None:
            shown = pictures[:GRID_LIMIT]
            save_image(grid, make_grid(shown, min_side=480))
            rest = f" (the first {len(shown)} of {self.n})" if len(shown) < self.n else ""
            lines.append(f"wrote {grid}{rest}")
        if npz is not None:
            labels = self.labels(ids)
            save_npz(npz, pictures, None if labels is None else torch.tensor(labels))
            lines.append(f"wrote {npz}: {self.n} pictures")
        if gif is not None:
            save_gif(gif, [make_grid(frame, min_side=240) for frame in _thin(frames)])
            lines.append(f"wrote {gif}")
        return lines

    def run_folder(self, folder: Path) -> list[str]:
        """Write one PNG per picture, batch by batch; pictures that are there already are left alone."""
        from fastddpm.files import write_json
        from fastddpm.images import folder_file, save_folder

        settings = self._settings()
        run_file = folder / RUN_FILE
        if run_file.exists() and json.loads(run_file.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{folder} holds a run with other settings (see {RUN_FILE}); use another folder")
        if not run_file.exists():
            write_json(run_file, settings)
        ids = [i for i in range(self.first_id, self.first_id + self.n) if not folder_file(folder, i).exists()]
        size = self.batch_size or (64 if self.sampler.device.type == "cpu" else 256)
        for first in range(0, len(ids), size):
            batch = ids[first : first + size]
            save_folder(folder, self.draw(batch), batch)
        kept = f" ({self.n - len(ids)} were there already)" if len(ids) < self.n else ""
        return [f"wrote {len(ids)} pictures to {folder}/{kept}"]

    def _settings(self) -> dict[str, object]:
        """What determines a picture besides its id."""
        names = ("model", "solver", "steps", "timesteps", "eta", "classes", "guidance", "threshold", "seed")
        return {name: getattr(self, name) for name in names}


class _Recorder:
    """Keeps a picture of every step's estimate of x_0, as bytes, over all batches."""

    def __init__(self, frames: list[Tensor]) -> None:
        self._frames = frames

    def __call__(self, preview: Preview) -> None:
        import torch

        from fastddpm.images import to_uint8

        picture = to_uint8(preview.x).cpu()
        if len(self._frames) < preview.step:
            self._frames.append(picture)
        else:
            self._frames[preview.step - 1] = torch.cat((self._frames[preview.step - 1], picture))


def _thin(frames: list[Tensor]) -> list[Tensor]:
    """At most GIF_FRAMES frames at even distances, the last one included."""
    count = min(GIF_FRAMES, len(frames))
    return [frames[round((i + 1) * len(frames) / count) - 1] for i in range(count)]


def probe_folder(folder: Path) -> None:
    """Make `folder` and check that files can be written there.

    Raises:
        OSError: it cannot be made or written.
    """
    from fastddpm.files import atomic_path

    probe = folder / ".fastddpm-probe"
    with atomic_path(probe) as temporary:
        temporary.touch()
    probe.unlink(missing_ok=True)
