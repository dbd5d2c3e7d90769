"""`fastddpm train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fastddpm.cli.sample import probe_folder

if TYPE_CHECKING:
    from fastddpm.data import ImageData
    from fastddpm.spec import ModelSpec
    from fastddpm.training import Progress, Trainer
    from fastddpm.unet import UNetConfig

GRID_SAMPLES = 64
GRID_STEPS = 25


def train(
    data: Annotated[
        Path,
        typer.Argument(help="MNIST-style idx file (or the folder with them), .npz, or a folder of images."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run. If it holds one already, that run is resumed.")],
    labels: Annotated[
        Path | None, typer.Option(help="idx file of labels, if it is not found beside the images.")
    ] = None,
    conditional: Annotated[
        bool, typer.Option("--classes/--no-classes", help="Learn the classes, where the data has any.")
    ] = True,
    size: Annotated[int | None, typer.Option(help="Resize a folder's images to this many pixels.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    lr_schedule: Annotated[Literal["cosine", "constant"], typer.Option(help="After the warm-up.")] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 500,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the averaged weights, which are the ones that are sampled.")
    ] = 0.999,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    label_dropout: Annotated[float, typer.Option(help="Share of pictures trained without class, for guidance.")] = 0.1,
    hflip: Annotated[bool, typer.Option(help="Mirror pictures at random (not for digits or letters).")] = False,
    channels: Annotated[str, typer.Option(help="Width of each resolution, finest first.")] = "64,128,128",
    layers: Annotated[int, typer.Option(help="ResBlocks per resolution.")] = 2,
    attention: Annotated[
        str, typer.Option(help="Resolutions with self-attention, in pixels: `16,8`. [default: the lowest]")
    ] = "",
    head_channels: Annotated[int | None, typer.Option(help="Channels per attention head. [default: one head]")] = None,
    norm_groups: Annotated[int, typer.Option(help="Groups of the group norms.")] = 8,
    scale_shift: Annotated[bool, typer.Option(help="Let the time scale and shift the norms (ADM).")] = False,
    dropout: Annotated[float, typer.Option(help="Dropout in the ResBlocks.")] = 0.0,
    T: Annotated[int, typer.Option("--timesteps", help="Training timesteps T.")] = 1000,
    schedule: Annotated[
        Literal["linear", "scaled_linear", "cosine", "sigmoid"], typer.Option(help="β schedule.")
    ] = "linear",
    prediction: Annotated[Literal["eps", "x_start", "v"], typer.Option(help="What the network predicts.")] = "eps",
    variance: Annotated[
        Literal["fixed_small", "fixed_large", "learned_range"],
        typer.Option(help="σ of ancestral sampling; learned_range trains it with the hybrid loss."),
    ] = "fixed_small",
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between saved states: a kill loses at most these.")] = 500,
    bf16: Annotated[bool, typer.Option(help="Run the network in bfloat16 where that is safe.")] = False,
    weights: Annotated[Literal["fp32", "fp16"], typer.Option(help="How the averaged weights are stored.")] = "fp32",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, a third more time.")] = False,
    grids: Annotated[bool, typer.Option(help="Draw a grid of samples after each epoch.")] = True,
    stop_after: Annotated[int | None, typer.Option(help="Stop after this many steps; run again to continue.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the GPU if there is one]")] = None,
) -> None:
    """Train a checkpoint on your own pictures: L_simple of Ho et al., with averaged weights, resumable at any time.

    Example, small enough for two CPU cores:

    - `fastddpm train mnist/ --out runs/mnist --channels 32,64,96 --layers 1 --scale-shift`
    """
    import torch  # late, for --help: see `sample`

    from fastddpm.data import load_images
    from fastddpm.engine import pick_device
    from fastddpm.schedule import NoiseSchedule
    from fastddpm.spec import ModelSpec
    from fastddpm.training import TrainConfig, Trainer
    from fastddpm.unet import UNet, UNetConfig

    config = TrainConfig(
        epochs=epochs, batch_size=batch_size, learning_rate=lr, lr_schedule=lr_schedule, warmup=warmup,
        weight_decay=weight_decay, ema_decay=ema, grad_clip=grad_clip, label_dropout=label_dropout, hflip=hflip,
        seed=seed, save_every=save_every, autocast="bf16" if bf16 else "fp32", weights_dtype=weights,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    target = pick_device(device)
    pictures = load_images(data, labels=labels, size=size)
    shape = (int(pictures.images.shape[1]), int(pictures.images.shape[2]), int(pictures.images.shape[3]))
    classes = pictures.num_classes if conditional else None
    widths = _integers("--channels", channels)
    unet = UNetConfig(
        sample_size=shape[1:], in_channels=shape[0], out_channels=shape[0] * (2 if variance == "learned_range" else 1),
        channels=widths, layers=layers, attention=_attention(attention, shape[1], len(widths)),
        head_channels=head_channels, norm_groups=norm_groups, scale_shift=scale_shift, dropout=dropout,
        num_classes=None if classes is None else classes + 1,
    )  # fmt: skip
    spec = ModelSpec(
        shape=shape, prediction=prediction, variance=variance, num_classes=classes, null_class=classes,
        class_names=pictures.class_names if conditional else None,
    )  # fmt: skip
    probe_folder(out)
    torch.manual_seed(seed)
    trainer = Trainer(out, UNet(unet), NoiseSchedule.by_name(schedule, T), spec, pictures, config, device=target)
    _announce(trainer, unet, spec, pictures)
    _run(trainer, stop_after, grids)


def _announce(trainer: Trainer, unet: UNetConfig, spec: ModelSpec, pictures: ImageData) -> None:
    parameters = sum(p.numel() for p in trainer.network.parameters())
    classes = "no classes" if spec.num_classes is None else f"{spec.num_classes} classes"
    print(
        f"{len(pictures.images):,} pictures {spec.shape} from {pictures.source}, {classes}; {parameters:,} parameters"
    )
    if trainer.resumed:
        print(f"resuming {trainer.folder} at step {trainer.step:,} of {trainer.total:,}")


def _run(trainer: Trainer, stop_after: int | None, grids: bool) -> None:
    console = Console(stderr=True)
    bar = Bar(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps · {task.fields[news]}"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("", total=trainer.total, completed=trainer.step, news="")
    smooth: list[float] = []

    def on_progress(progress: Progress) -> None:
        smooth.append(progress.loss)
        del smooth[:-100]
        news = f"loss {sum(smooth) / len(smooth):.4f} · {progress.images_per_second:.0f} images/s"
        bar.update(task, completed=progress.step, news=news)
        if progress.epoch_ended or progress.step == progress.total:
            bar.console.print(f"epoch {progress.epoch}: {news}", highlight=False)
            if grids:
                bar.console.print(f"wrote {_draw_grid(trainer, progress.epoch)}", highlight=False)

    with bar:
        trainer.run(on_progress, stop_after)
    print(f"wrote {trainer.folder}: fastddpm sample {trainer.folder}")


def _draw_grid(trainer: Trainer, epoch: int) -> Path:
    """Sample from the averaged weights as they stand, the same ids and seed each time."""
    from fastddpm.images import make_grid, save_image
    from fastddpm.sampler import Sampler

    sampler = Sampler.from_pretrained(trainer.folder, device=trainer.device)
    classes = trainer.spec.num_classes
    labels = None if classes is None else [i % classes for i in range(GRID_SAMPLES)]
    steps = min(GRID_STEPS, trainer.schedule.T)
    pictures = sampler.sample(GRID_SAMPLES, steps=steps, class_labels=labels, output="uint8", progress=False)
    path = trainer.folder / "samples" / f"epoch_{epoch:04d}.png"
    save_image(path, make_grid(pictures, min_side=480))
    return path


def _integers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{option} must be whole numbers with commas, got {text!r}; write 32,64,96, say")
    return tuple(int(part) for part in parts)


def _attention(text: str, side: int, levels: int) -> tuple[bool, ...]:
    """Which levels have attention, from the resolutions in pixels."""
    sides = [side // 2**level for level in range(levels)]
    wanted = _integers("--attention", text) if text else (sides[-1],)
    foreign = [pixels for pixels in wanted if pixels not in sides]
    if foreign:
        raise ValueError(f"--attention must be among the resolutions {sides}, got {foreign[0]}; pick some of them")
    return tuple(pixels in wanted for pixels in sides)
