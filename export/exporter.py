"""`export_onnx`: a checkpoint as one ONNX file, at one of three levels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastddpm import __version__
from fastddpm.export.convert import DEFAULT_OPSET, require_onnx
from fastddpm.export.facts import facts_of
from fastddpm.export.form import NoisePlace, Precision, Range, What, make_form
from fastddpm.export.levels import build
from fastddpm.export.model_file import set_metadata, write_model
from fastddpm.export.modules import as_module
from fastddpm.export.tensorrt import check_tensorrt
from fastddpm.files import check_writable
from fastddpm.process.solvers import ClippedEps, DynamicThreshold, Solver
from fastddpm.process.spec import Variance
from fastddpm.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        files: the model, and its weights where those lie in a file of their own.
        facts: the model's metadata.
    """

    files: tuple[Path, ...]
    facts: Mapping[str, Any]


def export_onnx(
    model: Sampler | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    what: What = "chain",
    solver: Solver = "ddim",
    steps: int | None = None,
    timesteps: str | Sequence[int] | Tensor | None = None,
    prev_timesteps: Sequence[int] | Tensor | None = None,
    eta: float | None = None,
    clip: float | DynamicThreshold | Literal["spec"] | None = "spec",
    clipped_eps: ClippedEps | Literal["spec"] = "spec",
    variance: Variance | Literal["spec"] = "spec",
    guidance: bool | None = None,
    noise: NoisePlace = "philox",
    batch: int | None = None,
    precision: Precision = "fp32",
    output: Range = "unit",
    opset: int = DEFAULT_OPSET,
    external: bool | None = None,
    licence: str | None = None,
    tensorrt: bool = False,
) -> Exported:
    """Write a checkpoint as ONNX.

    - "network": (x, t[, y]) → out. x float32 [B, C, H, W]; t [B] as the network is fed (int64, or float32 where
      `spec.time_scale` is not 1); y int64 [B].
    - "step": `advance`: (x, step, sample_id, seed[, y, guidance, history]) → x_next, step_next[, history_next], or with
      `noise="input"` (x, step, noise[, …]); step, sample_id, seed int64 [B] (64-bit patterns), guidance float32 [B].
    - "chain": (seed, sample_id[, y, guidance]) → pictures float32 [B, C, H, W], all steps in one Scan.

    Args:
        model: a sampler, or what `Sampler.from_pretrained` takes.
        path: the .onnx file.
        what: the level.
        solver: step and chain: the method, as in `Sampler.sample`, and so are the next seven.
        steps: S.
        timesteps: instead of `steps`.
        prev_timesteps: where each row leads.
        eta: η.
        clip: bound of |x̂_0|.
        clipped_eps: DDIM's ε of a clipped x̂_0.
        variance: ancestral sampling's σ.
        guidance: step and chain: whether the scale of classifier-free guidance is an input; None: where the network
            was trained for it. With an open batch, samples whose scale is 1 cost nothing more.
        noise: step: "philox" makes the noise in the graph (64-bit integer operators), "input" takes it, float32
            [B, C, H, W], for providers that lack those.
        batch: a fixed batch; None leaves it open.
        precision: "fp32"; "fp16": weights and convolutions in half precision, norms and state in single precision;
            "int8": weights and activations of convolutions and matrix products in 8 bits, calibrated on the sampler's
            own trajectories.
        output: chain: "unit" pictures, as `Sampler.sample` gives them, or the "raw" final state.
        opset: version of ONNX's operators.
        external: whether weights go to a file of their own, `path`.data; None: where they exceed 2 GB.
        licence: the weights' licence, for the metadata; None takes what the checkpoint's card says.
        tensorrt: write only what TensorRT's parser takes: a network or a step, of a fixed batch (1 unless `batch` says
            otherwise), its noise an input; the operators are checked against TensorRT's published table.

    Returns:
        The files and their metadata.

    Raises:
        CheckpointError: there is no such checkpoint or it cannot be read.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the network cannot be traced.
        OSError: the file cannot be written.
    """
    require_onnx()
    sampler = model if isinstance(model, Sampler) else Sampler.from_pretrained(model, device="cpu", engine="eager")
    form = make_form(sampler.spec, what, precision, opset, batch, noise, guidance, output, tensorrt)
    _check_path(path)
    options: dict[str, Any] = {
        "solver": solver, "steps": steps, "timesteps": timesteps, "prev_timesteps": prev_timesteps, "eta": eta,
        "clip": clip, "clipped_eps": clipped_eps, "variance": variance,
    }  # fmt: skip
    if sampler.precision != "fp32":
        raise ValueError(f"export: the sampler's precision must be fp32, got {sampler.precision}; make it anew")
    network = as_module(sampler.model)
    table = None if what == "network" else sampler.table(**options).to("cpu")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        network = network.cpu()
        proto, detached = build(network, sampler, table, form)
    finally:
        network.to(device)
    if tensorrt:
        check_tensorrt(proto)
    facts = facts_of(sampler, network, table, form, licence)
    set_metadata(proto, facts, __version__)
    return Exported(tuple(write_model(path, proto, external=external, detached=detached)), facts)


def _check_path(path: str | os.PathLike[str]) -> None:
    target = Path(path)
    if target.suffix != ".onnx":
        got = repr(target.suffix) if target.suffix else "no suffix"
        raise ValueError(f"{target}: the file name must end in .onnx, got {got}; rename it")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; give a file name")
    check_writable(target.parent)
