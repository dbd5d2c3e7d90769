"""What commands that run a network have in common: the checkpoint, where and how steps run, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastddpm.common.terminal import tell

if TYPE_CHECKING:
    from fastddpm.engines.choose import Engine

_PANEL = "Running"

ModelArgument = Annotated[
    str, typer.Argument(help="A shipped checkpoint (`mnist`), a folder, a file of weights, or a name on the Hub.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the GPU if there is one]", rich_help_panel=_PANEL)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar, no closing lines.", rich_help_panel=_PANEL)
]

SolverName = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"]
"""`fastddpm.process.table.Solver`, which takes PyTorch's seconds to import."""
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


def tell_engine(engine: Engine) -> None:
    """Say which engine ran, if one did, and why that one."""
    if engine.used:
        tell(f"engine: {engine.used} ({engine.why})")
