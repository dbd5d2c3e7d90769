"""`export_onnx`: a checkpoint as one ONNX file, at one of three levels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack, cast

import torch

from fastddpm import __version__
from fastddpm.engines.options import split_options
from fastddpm.export.facts import facts_of
from fastddpm.export.form import Exported, Form, FormOptions
from fastddpm.export.levels import build
from fastddpm.export.model_file import set_metadata, write_model
from fastddpm.export.source import Exportable, Source
from fastddpm.export.tensorrt import check_tensorrt
from fastddpm.export.tracing import require_onnx
from fastddpm.files import check_replaceable, check_writable
from fastddpm.process.method import Method, MethodOptions
from fastddpm.process.repaint import resampled


class ExportOptions(MethodOptions, FormOptions, total=False):
    """The options of `export_onnx`, for type checkers: those of `Method`, and the form of the file."""


def export_onnx(
    model: Source | Exportable | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    method: Method | None = None,
    external: bool | None = None,
    licence: str | None = None,
    **options: Unpack[ExportOptions],
) -> Exported:
    """Write a checkpoint as ONNX, at the level `what`, "chain" unless given.

    - "network": (x, t[, y]) → out. x float32 [B, C, H, W], a condition's channels behind its own; t [B] as the network
      is fed (int64, or float32 where `spec.time_scale` is not 1); y int64 [B].
    - "step": (x, step, sample_id, seed[, y, guidance, history, condition]) → x_next, step_next[, history_next], or with
      `noise="input"` (x, step, noise[, …]); step, sample_id, seed int64 [B] (64-bit patterns), guidance float32 [B],
      condition float32 [B, C', H, W].
    - "chain": (seed, sample_id[, y, guidance, condition]) → pictures float32 [B, C, H, W], all steps in one Scan.

    With `inpaint` a step and a chain take two inputs more, float32 [B, C, H, W]: `known`, pictures in the network's own
    range, and `mask`, 1 where they are to be drawn; a mask of ones is plain sampling.

    Options, besides those of `Method`, which may also be given as one, `method=`:

    - guidance: step and chain: whether the scale of classifier-free guidance is an input; None: where the network was
      trained for it. With an open batch, samples whose scale is 1 cost nothing more.
    - noise: step: "philox" makes the noise in the graph (64-bit integer operators), "input" takes it, float32
      [B, C, H, W], for providers that lack those.
    - batch: a fixed batch; None leaves it open.
    - precision: "fp32"; "fp16": weights and convolutions in half precision, norms and state in single precision;
      "int8": weights and activations of convolutions and matrix products in 8 bits, calibrated on the sampler's own
      trajectories.
    - output: chain: "unit" pictures, as `Sampler.sample` gives them, or the "raw" final state.
    - opset: version of ONNX's operators.
    - tensorrt: write only what TensorRT's parser takes: a network or a step, of a fixed batch (1 unless `batch` says
      otherwise), its noise an input; the operators are checked against TensorRT's published table.
    - inpaint: step and chain: whether known pictures and a mask are inputs.
    - jump_length: with `inpaint`, as in `Sampler.inpaint`: how far RePaint's jumps go back.
    - resamplings: with `inpaint`: how often each row is made; 1, unless given, jumps nowhere.

    Args:
        model: a `Sampler`, or what `load_checkpoint` takes.
        path: the .onnx file.
        method: step and chain: how to sample.
        external: whether weights go to a file of their own, `path`.data; None: where they exceed 2 GB.
        licence: the weights' licence, for the metadata; None takes what the checkpoint's card says.
        options: `what`, and as above.

    Returns:
        The files and their metadata.

    Raises:
        CheckpointError: there is no such checkpoint or it cannot be read.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the network cannot be traced.
        OSError: the file cannot be written.
    """
    require_onnx()
    source = model if isinstance(model, Source) else Source.of(model)
    wishes = {name: value for name, value in options.items() if name in FormOptions.__annotations__}
    form = Form(**cast(FormOptions, wishes)).checked(source.spec)
    _check_path(path)
    how = {name: value for name, value in options.items() if name not in wishes}
    chosen, _ = split_options({"method": method, **how})
    table = None if form.what == "network" else chosen.table(source.schedule, source.spec)
    if table is not None and form.inpaint:
        jumps, times = form.jump_length, form.resamplings
        table = resampled(table, source.schedule, jump_length=jumps, resamplings=times, function="export")
    network = source.network
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        network = network.cpu()
        proto, detached = build(source, table, form)
    finally:
        network.to(device)
    if form.tensorrt:
        check_tensorrt(proto)
    facts = facts_of(source, table, form, licence)
    set_metadata(proto, facts, __version__)
    return Exported(tuple(write_model(path, proto, external=external, detached=detached)), facts)


def _check_path(path: str | os.PathLike[str]) -> None:
    target = Path(path)
    if target.suffix != ".onnx":
        got = repr(target.suffix) if target.suffix else "no suffix"
        raise ValueError(f"{target}: the file name must end in .onnx, got {got}; rename it")
    check_replaceable(target)
    check_writable(target.parent)
