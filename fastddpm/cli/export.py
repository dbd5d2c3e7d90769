"""`fastddpm export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastddpm.cli.engine_options import SolverName
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import patience, say

if TYPE_CHECKING:
    from fastddpm.export.form import Exported
    from fastddpm.sampler import Sampler

WHAT, METHOD, FORM = "What to export", "How to sample (step and chain)", "The file"


def export(
    model: Annotated[
        str, typer.Argument(help="A shipped checkpoint (`mnist`), a checkpoint folder, or a file of weights.")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write (.onnx).")],
    what: Annotated[
        Literal["network", "step", "chain"],
        typer.Option(
            help="network: (x, t) to output. step: one step of sampling. chain: seed and ids in, pictures out.",
            rich_help_panel=WHAT,
        ),
    ] = "chain",
    guidance: Annotated[
        bool | None,
        typer.Option(
            "--guidance/--no-guidance",
            help="Whether the scale of classifier-free guidance is an input. [default: where the network can do it]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    noise: Annotated[
        Literal["philox", "input"],
        typer.Option(
            help="step: make the noise in the graph, or take it as an input, for lack of 64-bit integers.",
            rich_help_panel=WHAT,
        ),
    ] = "philox",
    output: Annotated[
        Literal["unit", "raw"],
        typer.Option(help="chain: pictures in 0 … 1, or the final state as it is.", rich_help_panel=WHAT),
    ] = "unit",
    solver: Annotated[
        SolverName,
        typer.Option(help="As in `fastddpm sample`, and so are the next four.", rich_help_panel=METHOD),
    ] = "ddim",
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", rich_help_panel=METHOD)] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Instead of --steps: `250`, `ddim25` or `10,15,20`.", rich_help_panel=METHOD)
    ] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's η, 0 … 1.", rich_help_panel=METHOD)] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Dynamic thresholding at this quantile.", rich_help_panel=METHOD)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="A fixed batch. [default: any batch]", rich_help_panel=FORM)] = None,
    fp16: Annotated[
        bool,
        typer.Option("--fp16", help="Weights in half precision; norms and state stay single.", rich_help_panel=FORM),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="8-bit weights and activations, calibrated on trajectories; prints the PSNR.",
            rich_help_panel=FORM,
        ),
    ] = False,
    tensorrt: Annotated[
        bool,
        typer.Option(
            "--tensorrt",
            help="Only what TensorRT's parser takes: a network or step of fixed batch, noise from outside.",
            rich_help_panel=FORM,
        ),
    ] = False,
    server: Annotated[
        Path | None,
        typer.Option(
            help="Also lay out a model repository for Triton Inference Server in this folder.", rich_help_panel=FORM
        ),
    ] = None,
    external: Annotated[
        bool | None,
        typer.Option(
            "--external/--no-external",
            help="Weights in a file of their own. [default: where they exceed 2 GB]",
            rich_help_panel=FORM,
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.", rich_help_panel=FORM)] = None,
    licence: Annotated[
        str | None,
        typer.Option(help="The weights' licence, for the metadata. [default: the card's]", rich_help_panel=FORM),
    ] = None,
    flag: FlagOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No closing lines.")] = False,
) -> None:
    """Write a checkpoint as one ONNX file.

    Examples:
    - `fastddpm export mnist digits.onnx` writes the whole chain of DDIM: seeds and ids in, pictures out

    - `fastddpm export mnist step.onnx --what step --solver ddpm --steps 250`

    - `fastddpm export mnist step.onnx --what step --tensorrt --batch 8`
    """
    from fastddpm.export.exporter import export_onnx
    from fastddpm.export.tracing import DEFAULT_OPSET  # late: PyTorch takes seconds to import, --help should not
    from fastddpm.files import check_replaceable
    from fastddpm.process.table import DynamicThreshold
    from fastddpm.sampler import Sampler

    if fp16 and int8:
        raise ValueError("export: --fp16 and --int8 must not both be given, got both; leave one out")
    clip: DynamicThreshold | Literal["spec"] = "spec" if threshold is None else DynamicThreshold(threshold)
    check_replaceable(out)
    sampler = Sampler.from_pretrained(model, device="cpu", engine="eager", flags=parse_flags(flag))
    if server is not None:
        from fastddpm.export.server import check_repository, write_repository

        check_repository(server)
    with patience(f"exporting the {what}, which takes up to a few minutes"):
        exported = export_onnx(
            sampler, out, what=what, solver=solver, steps=steps, timesteps=timesteps, eta=eta, clip=clip,
            guidance=guidance, noise=noise, batch=batch, output=output, opset=opset or DEFAULT_OPSET, external=external,
            licence=licence, precision="int8" if int8 else "fp16" if fp16 else "fp32", tensorrt=tensorrt,
        )  # fmt: skip
    lines = [f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)" for file in exported.files]
    if server is not None:
        lines.append(f"wrote {write_repository(server, exported)}")
    if not quiet:
        say("\n".join(lines + _advice(exported, sampler if int8 else None)))


def _advice(exported: Exported, int8_of: Sampler | None) -> list[str]:
    """What to tell after the files' names."""
    from fastddpm.export.tensorrt import trtexec

    lines = []
    if exported.facts["tensorrt"]:
        lines.append(f"build its engine with: {trtexec(exported)}")
    if int8_of is not None:
        from fastddpm.export.int8 import psnr

        lines.append(psnr(exported, int8_of))
    return lines
