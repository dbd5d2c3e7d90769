"""`fastddpm train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastddpm.cli.engine_options import DeviceOption
from fastddpm.cli.errors import Stopped
from fastddpm.common.progress import progress_bar
from fastddpm.common.terminal import clean, on_terminal, say

if TYPE_CHECKING:
    from fastddpm.pictures.data import ImageData
    from fastddpm.process.spec import ModelSpec
    from fastddpm.train.loop import Progress, Trainer

GRID_SAMPLES = 64
GRID_STEPS = 25
SAMPLES = "samples"
DATA, LEARNING, NETWORK = "Pictures in, checkpoint out", "Learning", "Network"
DIFFUSION, RUN = "Diffusion", "Running"


def train(
    data: Annotated[
        Path,
        typer.Argument(help="MNIST-style idx file (or the folder with them), .npz, or a folder of images."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the run. If it holds one already, that run is resumed.", rich_help_panel=DATA),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(help="idx file of labels, if it is not found beside the images.", rich_help_panel=DATA),
    ] = None,
    conditional: Annotated[
        bool,
        typer.Option("--classes/--no-classes", help="Learn the classes, where the data has any.", rich_help_panel=DATA),
    ] = True,
    size: Annotated[
        int | None, typer.Option(help="Resize a folder's images to this many pixels.", rich_help_panel=DATA)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel=LEARNING)] = 10,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.", rich_help_panel=LEARNING)] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.", rich_help_panel=LEARNING)] = 1e-3,
    lr_schedule: Annotated[
        Literal["cosine", "constant"], typer.Option(help="After the warm-up.", rich_help_panel=LEARNING)
    ] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.", rich_help_panel=LEARNING)] = 500,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=LEARNING)] = 0.0,
    ema: Annotated[
        float,
        typer.Option(
            help="Decay of the averaged weights, which are the ones that are sampled.", rich_help_panel=LEARNING
        ),
    ] = 0.999,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=LEARNING)] = 1.0,
    label_dropout: Annotated[
        float, typer.Option(help="Share of pictures trained without class, for guidance.", rich_help_panel=DIFFUSION)
    ] = 0.1,
    hflip: Annotated[
        bool,
        typer.Option("--hflip", help="Mirror pictures at random (not for digits or letters).", rich_help_panel=DATA),
    ] = False,
    channels: Annotated[
        str, typer.Option(help="Width of each resolution, finest first.", rich_help_panel=NETWORK)
    ] = "64,128,128",
    layers: Annotated[int, typer.Option(help="ResBlocks per resolution.", rich_help_panel=NETWORK)] = 2,
    attention: Annotated[
        str,
        typer.Option(
            help="Resolutions with self-attention, in pixels: `16,8`. [default: the lowest]", rich_help_panel=NETWORK
        ),
    ] = "",
    head_channels: Annotated[
        int | None, typer.Option(help="Channels per attention head. [default: one head]", rich_help_panel=NETWORK)
    ] = None,
    norm_groups: Annotated[int, typer.Option(help="Groups of the group norms.", rich_help_panel=NETWORK)] = 8,
    scale_shift: Annotated[
        bool,
        typer.Option("--scale-shift", help="Let the time scale and shift the norms (ADM).", rich_help_panel=NETWORK),
    ] = False,
    dropout: Annotated[float, typer.Option(help="Dropout in the ResBlocks.", rich_help_panel=NETWORK)] = 0.0,
    T: Annotated[int, typer.Option("--timesteps", help="Training timesteps T.", rich_help_panel=DIFFUSION)] = 1000,
    schedule: Annotated[
        Literal["linear", "scaled_linear", "cosine", "sigmoid"],
        typer.Option(help="How β grows with the timestep: the noise schedule.", rich_help_panel=DIFFUSION),
    ] = "linear",
    prediction: Annotated[
        Literal["eps", "x_start", "v"], typer.Option(help="What the network predicts.", rich_help_panel=DIFFUSION)
    ] = "eps",
    variance: Annotated[
        Literal["fixed_small", "fixed_large", "learned_range"],
        typer.Option(
            help="σ of ancestral sampling; learned_range trains it with the hybrid loss.", rich_help_panel=DIFFUSION
        ),
    ] = "fixed_small",
    seed: Annotated[int, typer.Option(help="Seed of all that is random.", rich_help_panel=LEARNING)] = 0,
    save_every: Annotated[
        int, typer.Option(help="Steps between saved states: a kill loses at most these.", rich_help_panel=RUN)
    ] = 500,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Run the network in bfloat16 where that is safe.", rich_help_panel=RUN)
    ] = False,
    weights: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="How the averaged weights are stored.", rich_help_panel=RUN)
    ] = "fp32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=RUN)
    ] = False,
    no_grids: Annotated[
        bool, typer.Option("--no-grids", help="Draw no grid of samples after each epoch.", rich_help_panel=RUN)
    ] = False,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop after this many steps; run again to continue.", rich_help_panel=RUN)
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Train a checkpoint on your own pictures; run the same command again to continue.

    Examples:
    - `fastddpm train pictures/ --out runs/pictures --size 32` (sub-folders are classes)

    - `fastddpm train mnist/ --out runs/mnist --channels 32,64,96 --layers 1` (MNIST on two CPU cores)
    """
    import torch  # late, for --help: see `sample`

    from fastddpm.engines.devices import pick_device
    from fastddpm.files import check_writable, remove_leftovers
    from fastddpm.images import SHOWN_CHANNELS
    from fastddpm.nets.unet import UNet, UNetConfig
    from fastddpm.pictures.data import load_images
    from fastddpm.process.schedule import NoiseSchedule
    from fastddpm.process.spec import ModelSpec
    from fastddpm.train.loop import TrainConfig, Trainer

    config = TrainConfig(
        epochs=epochs, batch_size=batch_size, learning_rate=lr, lr_schedule=lr_schedule, warmup=warmup,
        weight_decay=weight_decay, ema_decay=ema, grad_clip=grad_clip, label_dropout=label_dropout, hflip=hflip,
        seed=seed, save_every=save_every, autocast="bf16" if bf16 else "fp32", weights_dtype=weights,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    target = pick_device(device)
    pictures = load_images(data, labels=labels, size=size, classes=conditional)
    shape = (int(pictures.images.shape[1]), int(pictures.images.shape[2]), int(pictures.images.shape[3]))
    classes = pictures.num_classes
    widths = _integers("--channels", channels)
    unet = UNetConfig(
        sample_size=shape[1:], in_channels=shape[0], out_channels=shape[0] * (2 if variance == "learned_range" else 1),
        channels=widths, layers=layers, attention=_attention(attention, shape[1], len(widths)),
        head_channels=head_channels, norm_groups=norm_groups, scale_shift=scale_shift, dropout=dropout,
        num_classes=None if classes is None else classes + (label_dropout > 0),
    )  # fmt: skip
    spec = ModelSpec(
        shape=shape, prediction=prediction, variance=variance, num_classes=classes,
        null_class=classes if label_dropout > 0 else None,  # without dropout nothing ever trains that row
        class_names=pictures.class_names,
    )  # fmt: skip
    check_writable(out)
    remove_leftovers(out / SAMPLES)
    torch.manual_seed(seed)
    trainer = Trainer(out, UNet(unet).to(target), NoiseSchedule.by_name(schedule, T), spec, pictures, config)
    _announce(trainer, spec, pictures)
    shown = shape[0] in SHOWN_CHANNELS
    if not (shown or no_grids):
        say(f"no grids of samples: pictures of {shape[0]} channels cannot be shown")
    _run(trainer, stop_after, shown and not no_grids)


def _announce(trainer: Trainer, spec: ModelSpec, pictures: ImageData) -> None:
    parameters = sum(p.numel() for p in trainer.network.parameters())
    classes = {None: "no classes", 1: "1 class"}.get(spec.num_classes, f"{spec.num_classes} classes")
    say(f"{len(pictures.images):,} pictures {spec.shape} from {pictures.source}, {classes}; {parameters:,} parameters")
    if pictures.note:
        say(f"pictures: {pictures.note}")
    if trainer.resumed:
        news = "is trained already:" if trainer.step == trainer.total else "goes on at"
        say(f"{trainer.folder} {news} step {trainer.step:,} of {trainer.total:,}")


def _run(trainer: Trainer, stop_after: int | None, grids: bool) -> None:
    bar = progress_bar("training", " · {task.fields[news]}", visible=on_terminal())
    task = bar.add_task("", total=trainer.total, completed=trainer.step, news="")
    first = trainer.step
    smooth: list[float] = []

    def on_progress(progress: Progress) -> None:
        smooth.append(progress.loss)
        del smooth[:-100]
        news = f"loss {sum(smooth) / len(smooth):.4f} · {progress.images_per_second:.0f} images/s"
        bar.update(task, completed=progress.step, news=news)
        if progress.epoch_ended or progress.step == progress.total:
            bar.console.print(f"epoch {progress.epoch}: {news}")
            if grids:
                bar.console.print(clean(f"wrote {_draw_grid(trainer, progress.epoch)}"))

    try:
        with bar:
            trainer.run(on_progress, stop_after)
    except KeyboardInterrupt:
        raise Stopped(f" at step {trainer.step}; the same command continues from there") from None
    wrote = f"wrote {trainer.folder}; " if trainer.step > first else ""
    say(f"{wrote}sample from it with: fastddpm sample {trainer.folder}")


def _draw_grid(trainer: Trainer, epoch: int) -> Path:
    """Sample from the averaged weights as they stand, the same ids and seed each time."""
    from fastddpm.images import make_grid, save_image
    from fastddpm.sampler import Sampler

    sampler = Sampler.from_pretrained(trainer.folder, device=trainer.device)
    classes = trainer.spec.num_classes
    labels = None if classes is None else [i % classes for i in range(GRID_SAMPLES)]
    steps = min(GRID_STEPS, trainer.schedule.T)
    pictures = sampler.sample(GRID_SAMPLES, steps=steps, class_labels=labels, output="uint8", progress=False)
    path = trainer.folder / SAMPLES / f"epoch_{epoch:04d}.png"
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
