"""`fastddpm likelihood`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastddpm.cli.engine_options import (
    DeviceOption,
    EngineOption,
    ModelArgument,
    PrecisionOption,
    QuietOption,
    tell_engine,
)
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import say

WHAT, HOW, RUN = "What to measure", "How to measure", "Running"


def likelihood(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(help="A folder of images, an .npz, or an idx file, of the network's size.")],
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="How many pictures. [default: all]", rich_help_panel=WHAT)
    ] = None,
    classes: Annotated[
        bool,
        typer.Option(
            "--classes/--no-classes",
            help="Tell the network the pictures' classes, where it and the data have any.",
            rich_help_panel=WHAT,
        ),
    ] = True,
    rate_distortion: Annotated[
        bool,
        typer.Option(
            "--rate-distortion",
            help="Also the rate and the distortion of progressive coding, and progressive samples. Needs --out.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for numbers (JSON), plots and what is found of each batch: the same command continues.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Timesteps of the bound. [default: as many as in training]", rich_help_panel=HOW),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            help="Instead of --steps: `250`, `ddim25` or `10,15,20` (OpenAI's respacing).", rich_help_panel=HOW
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="A picture's noise depends on seed and place alone.", rich_help_panel=HOW)
    ] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pictures that run together. [default: 64, on a GPU 256]", rich_help_panel=RUN),
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure how likely a trained checkpoint finds pictures: bits per dimension, timestep by timestep.

    Fewer steps make the bound looser: to compare with published figures leave --steps out.

    Examples:
    - `fastddpm likelihood mnist t10k-images-idx3-ubyte.gz -n 500 --out bits`

    - `fastddpm likelihood mnist digits/ --steps 100`

    - `fastddpm likelihood mnist digits/ --rate-distortion --out curve`
    """
    from fastddpm.cli.likelihood_report import LikelihoodReport, draw_progressive  # late, for --help: see `sample`
    from fastddpm.cli.likelihood_run import LikelihoodRun
    from fastddpm.pictures.labelled import open_labelled
    from fastddpm.process.method import Method
    from fastddpm.sampler import Sampler

    if rate_distortion and out is None:
        raise ValueError("--rate-distortion must come with --out, got no folder to write to; add --out FOLDER")
    flags = parse_flags(flag)
    pictures = open_labelled(data, classes=classes)
    sampler = Sampler.from_pretrained(model, device=device, engine=engine, precision=precision, flags=flags)
    run = LikelihoodRun(
        sampler, model, flags, pictures, n, steps, timesteps, classes, seed, batch_size, engine, precision, quiet
    )
    sums = run.run(out)
    written = []
    if out is not None:
        about = {"model": model, "data": pictures.source, "seed": seed, "classes_told": run.check() is not None}
        report = LikelihoodReport(out, sums, about, 255.0 if sampler.spec.to_unit == "identity" else 127.5)
        written = report.write(rate_distortion=rate_distortion)
    if out is not None and rate_distortion:
        written += draw_progressive(sampler, Method("ddpm", steps, timesteps), out, seed=seed, quiet=quiet)
    error = "" if sums.standard_error is None else f" ± {sums.standard_error:.4f}"
    of = f"the mean of {sums.n:,} over {len(sums.timesteps)} timesteps"
    say(f"{sums.bits_per_dim:.4f}{error} bits per dimension, {of}")
    if not quiet:
        for path in written:
            say(f"wrote {path}")
        tell_engine(sampler.engine)
