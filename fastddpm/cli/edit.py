"""`fastddpm edit img2img | inpaint | interpolate | invert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastddpm.cli.edit_options import (
    HOW,
    OUTPUT,
    BatchSizeOption,
    ClassesOption,
    EtaOption,
    FolderOption,
    GifOption,
    GridOption,
    GuidanceOption,
    NpzOption,
    PicturesArgument,
    SeedOption,
    SolverOption,
    StepsOption,
)
from fastddpm.cli.engine_options import (
    DeviceOption,
    EngineOption,
    ModelArgument,
    PrecisionOption,
    QuietOption,
)
from fastddpm.cli.flags import FlagOption

edit = typer.Typer(
    name="edit",
    help="Edit pictures that are there: draw them anew, fill them in, go from one to another, invert them.",
    invoke_without_command=True,
    rich_markup_mode="markdown",
)


@edit.callback()
def help_without_command(context: typer.Context) -> None:
    """Edit pictures that are there: draw them anew, fill them in, go from one to another, invert them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@edit.command()
def img2img(
    model: ModelArgument,
    pictures: PicturesArgument,
    strength: Annotated[
        float,
        typer.Option(
            help="Above 0, at most 1: how much is drawn anew. At 1 hardly anything is left.", rich_help_panel=HOW
        ),
    ] = 0.5,
    classes: ClassesOption = "none",
    guidance: GuidanceOption = 1.0,
    seed: SeedOption = 0,
    grid: GridOption = None,
    folder: FolderOption = None,
    npz: NpzOption = None,
    gif: GifOption = None,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: QuietOption = False,
) -> None:
    """Noise pictures to a part of the way, and draw from there.

    Examples:
    - `fastddpm edit img2img mnist seven.png --strength 0.4`

    - `fastddpm edit img2img mnist seven.png --strength 0.6 --class-labels 2 --guidance-scale 2 --grid two.png`
    """
    from fastddpm.cli.drawing import Outputs  # late, for --help: see `sample`
    from fastddpm.cli.editing import Edit

    asked = Edit(model, flag, solver, steps, eta, classes, guidance, seed, batch_size, device, engine, precision, quiet)
    asked.run(
        len(pictures),
        Outputs(grid, folder, npz, gif),
        lambda options: asked.sampler.img2img([*pictures], strength, output="raw", **options),
    )


@edit.command()
def inpaint(
    model: ModelArgument,
    pictures: PicturesArgument,
    mask: Annotated[
        str,
        typer.Option(
            help="An image of the pictures' size, white where they are to be drawn anew and black where they stay; or "
            "`middle`, `left`, `right`, `top` or `bottom`.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ],
    fill: Annotated[
        Literal["repaint", "replace"],
        typer.Option(
            help="repaint: make steps several times over, until the new part fits the rest. replace: make each once.",
            rich_help_panel=HOW,
        ),
    ] = "repaint",
    resamplings: Annotated[
        int, typer.Option(help="repaint: how often each step is made, 1 … 128.", rich_help_panel=HOW)
    ] = 10,
    jump_length: Annotated[
        int | None,
        typer.Option(
            help="repaint: steps that are made again together. [default: a fifth, at most 10]", rich_help_panel=HOW
        ),
    ] = None,
    each: Annotated[int, typer.Option(help="How many ways to fill in each picture.", rich_help_panel=HOW)] = 1,
    classes: ClassesOption = "none",
    guidance: GuidanceOption = 1.0,
    seed: SeedOption = 0,
    grid: GridOption = None,
    folder: FolderOption = None,
    npz: NpzOption = None,
    gif: GifOption = None,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw a part of pictures anew, so that it fits the rest.

    Examples:
    - `fastddpm edit inpaint mnist seven.png --mask mask.png`

    - `fastddpm edit inpaint mnist seven.png --mask middle --each 6 --seed 3 --grid six.png`
    """
    from fastddpm.cli.drawing import Outputs  # late, for --help: see `sample`
    from fastddpm.cli.editing import Edit

    asked = Edit(model, flag, solver, steps, eta, classes, guidance, seed, batch_size, device, engine, precision, quiet)
    if each < 1:
        raise ValueError(f"--each must be at least 1, got {each}; leave it out for one")
    files = [path for path in pictures for _ in range(each)]
    asked.run(
        len(files),
        Outputs(grid, folder, npz, gif),
        lambda options: asked.sampler.inpaint(
            [*files], mask, fill=fill, jump_length=jump_length, resamplings=resamplings, output="raw", **options
        ),
    )


@edit.command()
def interpolate(
    model: ModelArgument,
    first: Annotated[Path, typer.Argument(help="An image file.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    n: Annotated[
        int, typer.Option("--n", "-n", help="How many pictures, those of both ends included.", rich_help_panel=HOW)
    ] = 10,
    path: Annotated[
        Literal["noise", "slerp"],
        typer.Option(
            help="noise: between the two noised. slerp: between the two inverted, on a circle (ddim only).",
            rich_help_panel=HOW,
        ),
    ] = "noise",
    level: Annotated[
        float | None,
        typer.Option(
            help="Above 0, at most 1: how much noise. [default: 0.5 for noise, 1 for slerp]", rich_help_panel=HOW
        ),
    ] = None,
    classes: ClassesOption = "none",
    guidance: GuidanceOption = 1.0,
    seed: SeedOption = 0,
    grid: GridOption = None,
    folder: FolderOption = None,
    npz: NpzOption = None,
    gif: GifOption = None,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw pictures between two.

    Examples:
    - `fastddpm edit interpolate mnist two.png seven.png`

    - `fastddpm edit interpolate mnist two.png seven.png --path slerp -n 8 --steps 100`
    """
    from fastddpm.cli.drawing import Outputs  # late, for --help: see `sample`
    from fastddpm.cli.editing import Edit

    asked = Edit(model, flag, solver, steps, eta, classes, guidance, seed, batch_size, device, engine, precision, quiet)
    asked.run(
        n,
        Outputs(grid, folder, npz, gif),
        lambda options: asked.sampler.interpolate(first, second, n, path=path, level=level, output="raw", **options),
    )


@edit.command()
def invert(
    model: ModelArgument,
    pictures: PicturesArgument,
    latents: Annotated[
        Path, typer.Option(help="The states: an array x_T, float32 [n, C, H, W] (.npz).", rich_help_panel=OUTPUT)
    ] = Path("samples/latents.npz"),
    grid: Annotated[
        Path | None,
        typer.Option(help="Each picture beside what is drawn again (.png).", rich_help_panel=OUTPUT),
    ] = None,
    classes: ClassesOption = "none",
    guidance: GuidanceOption = 1.0,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: QuietOption = False,
) -> None:
    """Find the noise from which DDIM draws given pictures, and tell how closely it draws them again.

    Examples:
    - `fastddpm edit invert mnist seven.png --steps 100`
    """
    from fastddpm.cli.editing import Edit  # late, for --help: see `sample`

    asked = Edit(
        model, flag, "ddim", steps, None, classes, guidance, seed, batch_size, device, engine, precision, quiet
    )
    asked.invert(pictures, latents, grid)
