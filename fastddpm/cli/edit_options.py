"""The arguments and options that all commands of `fastddpm edit` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastddpm.cli.engine_options import SolverName

HOW, METHOD, OUTPUT, RUN = "How to edit", "How to draw", "Where to write (several may be given)", "Running"

PicturesArgument = Annotated[
    list[Path], typer.Argument(help="Image files of the network's size.", metavar="PICTURE", show_default=False)
]
ClassesOption = Annotated[
    str,
    typer.Option(
        "--class-labels",
        help="`none`; or the pictures' classes, such as `3,1,4`, in turn.",
        rich_help_panel=METHOD,
    ),
]
GuidanceOption = Annotated[
    float,
    typer.Option("--guidance-scale", help="Scale of classifier-free guidance. 1: none.", rich_help_panel=METHOD),
]
SeedOption = Annotated[int, typer.Option(help="Another seed draws another picture.", rich_help_panel=METHOD)]
SolverOption = Annotated[
    SolverName,
    typer.Option(help="As in `fastddpm sample`, and so are the next two.", rich_help_panel=METHOD),
]
StepsOption = Annotated[
    int | None, typer.Option(help="Steps of a whole run. [default: as in `sample`]", rich_help_panel=METHOD)
]
EtaOption = Annotated[float | None, typer.Option(help="DDIM's η, 0 … 1.", rich_help_panel=METHOD)]
GridOption = Annotated[
    Path | None,
    typer.Option(
        help="All pictures in one image (.png). [default: samples/edited.png, if no other output is given]",
        rich_help_panel=OUTPUT,
    ),
]
FolderOption = Annotated[
    Path | None, typer.Option(help="One PNG per picture, numbered; a new or empty folder.", rich_help_panel=OUTPUT)
]
NpzOption = Annotated[Path | None, typer.Option(help="An array, uint8 [n, H, W, C].", rich_help_panel=OUTPUT)]
GifOption = Annotated[Path | None, typer.Option(help="An animation of the steps (.gif).", rich_help_panel=OUTPUT)]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Pictures that run together. [default: all; parts of 64]", rich_help_panel=RUN)
]
