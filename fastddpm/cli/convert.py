"""`fastddpm convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import say


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a file of weights, a name on the Hugging Face Hub.", metavar="SRC"),
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
    flag: FlagOption = None,
    dtype: Annotated[Literal["fp32", "fp16"], typer.Option(help="How the weights are stored.")] = "fp32",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint of fastddpm's own that is there already.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No closing line.")] = False,
) -> None:
    """Write any checkpoint that fastddpm reads in its own format, which needs no flags.

    In fp32 the copy gives the same samples as the original, bit for bit.

    Examples:
    - `fastddpm convert google/ddpm-cifar10-32 cifar10`

    - `fastddpm convert 256x256_diffusion.pt adm --flag preset=256x256_diffusion --dtype fp16`
    """
    from fastddpm.checkpoints.convert import convert_checkpoint  # late, for --help: see `sample`
    from fastddpm.checkpoints.native import WEIGHTS_NAME

    checkpoint = convert_checkpoint(source, destination, dtype=dtype, force=force, flags=parse_flags(flag))
    if not quiet:
        size = (destination / WEIGHTS_NAME).stat().st_size / 1e6
        say(f"wrote {destination}/ from {checkpoint.dialect} ({size:.2f} MB, {dtype})")
