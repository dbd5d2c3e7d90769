"""`fastddpm sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastddpm.cli.engine_options import (
    DeviceOption,
    EngineOption,
    ModelArgument,
    PrecisionOption,
    QuietOption,
    SolverName,
    tell_engine,
)
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import say

WHAT, METHOD, OUTPUT, RUN = "What to draw", "How to draw", "Where to write (several may be given)", "Running"
SHARDS = "Many pictures, on any number of machines"


def sample(
    model: ModelArgument,
    n: Annotated[int, typer.Option("--n", "-n", help="How many pictures.", rich_help_panel=WHAT)] = 64,
    classes: Annotated[
        str,
        typer.Option(
            "--class-labels",
            help="`all`: each class in turn; `none`; or classes such as `3,1,4`, in turn.",
            rich_help_panel=WHAT,
        ),
    ] = "all",
    guidance: Annotated[
        float,
        typer.Option(
            "--guidance-scale",
            help="Scale of classifier-free guidance. 1: none; 1.5 to 4: clearer, less varied.",
            rich_help_panel=WHAT,
        ),
    ] = 1.0,
    condition: Annotated[
        Path | None,
        typer.Option(
            help="For networks that enlarge, restore or translate: the picture that they are given, or a folder of "
            "them, which take turns.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="A picture depends on seed and id alone, on any machine.", rich_help_panel=WHAT)
    ] = 0,
    first_id: Annotated[
        int, typer.Option(help="Id of the first picture; the others follow.", rich_help_panel=WHAT)
    ] = 0,
    grid: Annotated[
        Path | None,
        typer.Option(
            help="All pictures in one image (.png). [default: samples/grid.png, if no other output is given]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="One PNG per picture, named by id. The same command continues a stopped run.", rich_help_panel=OUTPUT
        ),
    ] = None,
    npz: Annotated[
        Path | None,
        typer.Option(help="Arrays for evaluation: uint8 [n, H, W, C], and the classes.", rich_help_panel=OUTPUT),
    ] = None,
    gif: Annotated[
        Path | None, typer.Option(help="An animation from noise to picture (.gif).", rich_help_panel=OUTPUT)
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="OUT",
            help="Instead of the above: a folder or URL (s3://bucket/name) for files of --shard-size pictures each. "
            "The same command continues a stopped run, and any number of processes may run it at once.",
            rich_help_panel=SHARDS,
        ),
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Pictures in a shard. [default: 1000]", rich_help_panel=SHARDS)
    ] = None,
    format: Annotated[
        Literal["npz", "tar", "png"] | None,
        typer.Option(
            help="npz: an archive a shard; tar: WebDataset's, ID.png and ID.cls; png: a folder. [default: npz]",
            rich_help_panel=SHARDS,
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Begin with every N-th shard from shard I on, then help with the others. [default: as torchrun, a "
            "Slurm array or a Kubernetes Indexed Job says]",
            rich_help_panel=SHARDS,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Let actors of a Ray cluster draw; `auto` is the one at hand.",
            rich_help_panel=SHARDS,
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            help="With --ray: an actor for so many CPUs. [default: one a GPU, or a CPU]", rich_help_panel=SHARDS
        ),
    ] = None,
    solver: Annotated[
        SolverName,
        typer.Option(
            help="ddpm: the original, with fresh noise in each step. ddim, dpmpp_2m, dpmpp_3m: fewer steps, no noise.",
            rich_help_panel=METHOD,
        ),
    ] = "ddim",
    steps: Annotated[
        int | None,
        typer.Option(
            help="Sampling steps. [default: 50 for ddim, 20 for dpmpp_2m, dpmpp_3m, for ddpm as many as in training]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            help="Instead of --steps: `250`, `ddim25` or `10,15,20` (OpenAI's respacing).", rich_help_panel=METHOD
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="DDIM's η, 0 … 1: how much noise each step adds.", rich_help_panel=METHOD)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Dynamic thresholding at this quantile (0.995, say) instead of clipping.", rich_help_panel=METHOD
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Pictures that run together; short batches are filled up. [default: all; parts of 64, on a GPU 256]",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw pictures from a trained checkpoint.

    Examples:
    - `fastddpm sample mnist` writes 64 digits to samples/grid.png

    - `fastddpm sample mnist -n 10 --class-labels 7 --guidance-scale 1.5 --gif seven.gif`

    - `fastddpm sample mnist -n 10000 --folder digits --solver ddpm --steps 250`

    - `fastddpm sample mnist -n 50000 --shards s3://bucket/digits`
    """
    from fastddpm.cli.condition import ConditionFiles  # late: PyTorch takes seconds to import, --help should not
    from fastddpm.cli.drawing import Drawing, Outputs
    from fastddpm.cli.sharding import Sharding
    from fastddpm.process.method import Method
    from fastddpm.process.table import DynamicThreshold
    from fastddpm.sampler import Sampler

    flags = parse_flags(flag)
    files = {"--grid": grid, "--folder": folder, "--npz": npz, "--gif": gif}
    sharding = Sharding(shards, shard_size, format, part, ray, cpus_per_worker).checked(files)
    if sharding is not None:
        if condition is not None:
            raise ValueError("--condition must be left out with --shards, got both; draw into a --folder")
        device = sharding.device(device)
    elif not any(files.values()):
        grid = Path("samples/grid.png")
    sampler = Sampler.from_pretrained(model, device=device, engine=engine, precision=precision, flags=flags)
    clip: Literal["spec"] | DynamicThreshold = "spec" if threshold is None else DynamicThreshold(threshold)
    method = Method(solver, steps, timesteps, eta=eta, clip=clip)
    drawing = Drawing(
        sampler, model, flags, n, method, classes, guidance, seed, first_id, batch_size, engine, precision, quiet,
        ConditionFiles.of(condition, sampler.spec),
    )  # fmt: skip
    lines = sharding.run(drawing) if sharding else drawing.run(Outputs(grid, folder, npz, gif))
    if not quiet:
        say("\n".join(lines))
        tell_engine(sampler.engine)
