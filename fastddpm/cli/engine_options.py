"""`--engine` and `--precision`: how steps run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

_PANEL = "Running"

EngineOption = Annotated[
    Literal["auto", "eager", "compiled", "cuda_graph", "onnx", "openvino"],
    typer.Option(
        help="How steps run. auto: the quickest that is there (`fastddpm compile`) or pays within the run.",
        rich_help_panel=_PANEL,
    ),
]
PrecisionOption = Annotated[
    Literal["fp32", "tf32", "bf16", "fp16"],
    typer.Option(help="The network's arithmetic; tf32 and fp16 are for GPUs.", rich_help_panel=_PANEL),
]
