"""`export_onnx`: a checkpoint as one ONNX file, at one of three levels."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm import __version__
from fastddpm.export import graph as graphs
from fastddpm.export.convert import DEFAULT_OPSET, check_opset, convert, require_onnx
from fastddpm.export.model_file import FORMAT, licence_of, set_metadata, weights_hash, write_model
from fastddpm.export.modules import (
    EXAMPLE_BATCH,
    FirstNoise,
    Network,
    Pictures,
    Update,
    as_module,
    example,
    keeps_history,
    row_network,
)
from fastddpm.export.tensorrt import check_tensorrt
from fastddpm.sampler import Sampler
from fastddpm.solvers import ClippedEps, DynamicThreshold, Solver
from fastddpm.spec import ModelSpec, Variance
from fastddpm.step_table import StepTable

if TYPE_CHECKING:
    import onnx

What = Literal["network", "step", "chain"]
Precision = Literal["fp32", "fp16", "int8"]
NoisePlace = Literal["philox", "input"]
Range = Literal["unit", "raw"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        files: the model, and its weights where those lie in a file of their own.
        facts: the model's metadata.
    """

    files: tuple[Path, ...]
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The checked wishes of one export."""

    what: What
    precision: Precision
    opset: int
    batch: int | None
    noise: NoisePlace
    guided: bool
    output: Range
    tensorrt: bool

    @property
    def dynamic(self) -> bool:
        return self.batch is None

    @property
    def axis(self) -> int | str:
        return "batch" if self.batch is None else self.batch

    @property
    def examples(self) -> int:
        return self.batch or EXAMPLE_BATCH


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
    check_opset(opset)
    sampler = model if isinstance(model, Sampler) else Sampler.from_pretrained(model, device="cpu", engine="eager")
    plan = _plan(sampler.spec, what, precision, opset, batch, noise, guidance, output, tensorrt)
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
        proto = build(network, sampler, table, plan)
    finally:
        network.to(device)
    if tensorrt:
        check_tensorrt(proto)
    facts = _facts(sampler, network, table, plan, licence)
    set_metadata(proto, facts, __version__)
    return Exported(tuple(write_model(path, proto, external=external)), facts)


def _plan(
    spec: ModelSpec,
    what: What,
    precision: Precision,
    opset: int,
    batch: int | None,
    noise: NoisePlace,
    guidance: bool | None,
    output: Range,
    tensorrt: bool,
) -> _Plan:
    """Check the wishes that no other function checks.

    Raises:
        ValueError: one is out of range or does not fit the network.
    """
    for name, value, kind in (
        ("what", what, What),
        ("precision", precision, Precision),
        ("noise", noise, NoisePlace),
        ("output", output, Range),
    ):
        if value not in get_args(kind):
            raise ValueError(f"export: {name} must be one of {', '.join(get_args(kind))}, got {value!r}; pick one")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"export: batch must be a positive int or None, got {batch!r}; None leaves it open")
    if tensorrt and what == "chain":
        raise ValueError("export: what must be network or step for TensorRT, got chain; its loops go one step too far")
    if tensorrt:
        noise, batch = "input" if what == "step" else "philox", batch or 1
    if noise == "input" and what != "step":
        raise ValueError(f"export: noise must be philox for {what}, got 'input'; only a step can take its noise")
    possible = spec.num_classes is not None and spec.null_class is not None and what != "network"
    if guidance and not possible:
        why = "a network alone is asked once" if what == "network" else "the network has no label for no class"
        raise ValueError(f"export: guidance must be False here, got True: {why}")
    guided = possible if guidance is None else guidance
    return _Plan(what, precision, opset, batch, noise, guided, output, tensorrt)


def _check_path(path: str | os.PathLike[str]) -> None:
    target = Path(path)
    if target.suffix != ".onnx":
        got = repr(target.suffix) if target.suffix else "no suffix"
        raise ValueError(f"{target}: the file name must end in .onnx, got {got}; rename it")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; give a file name")


def build(network: nn.Module, sampler: Sampler, table: StepTable | None, plan: _Plan) -> onnx.ModelProto:
    """The model of one level, without metadata."""
    spec = sampler.spec
    labels = ("y",) if spec.num_classes is not None else ()
    past = "x_self_cond" if table is None else "history"
    names = ("x", "t" if table is None else "step", *labels, *((past,) if spec.self_condition else ()))
    module = Network(network) if table is None else row_network(network, spec, table)
    traced = _trace(module, names, ("out",), spec, plan, many=2 if plan.guided else 1)
    if plan.precision != "fp32":
        traced = _reduce(traced, sampler, table, plan, names)
    if table is None:
        return _network_model(traced, names, spec, plan)
    make = _step_model if plan.what == "step" else _chain_model
    return make(traced, names, table, spec, plan)


def _reduce(
    traced: onnx.ModelProto, sampler: Sampler, table: StepTable | None, plan: _Plan, names: Sequence[str]
) -> onnx.ModelProto:
    if plan.precision == "fp16":
        from fastddpm.export.half import to_half

        return to_half(traced)
    from fastddpm.export.int8 import calibration, to_int8

    many = None if plan.batch is None else plan.batch * (2 if plan.guided else 1)
    return to_int8(traced, calibration(sampler, table, names, many))


def _trace(
    module: nn.Module,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    spec: ModelSpec,
    plan: _Plan,
    *,
    many: int = 1,
    label: str = "the network",
    low_shifts: bool = False,
) -> onnx.ModelProto:
    """One part; `many` times the plan's batch where that is fixed."""
    arguments = example(spec, inputs, plan.examples * many)
    return convert(
        module, arguments, outputs, dynamic=plan.dynamic, opset=plan.opset, label=label, low_shifts=low_shifts
    )


def _network_model(traced: onnx.ModelProto, names: Sequence[str], spec: ModelSpec, plan: _Plan) -> onnx.ModelProto:
    graph = graphs.Graph("network")
    _declare(graph, names, spec, plan)
    graph.add(traced, "net/", {name: name for name in (*names, "out")})
    channels = spec.shape[0] * (2 if spec.learned_variance else 1)
    graph.give("out", np.float32, (plan.axis, channels, *spec.shape[1:]))
    return graph.model(plan.opset)


def step_inputs(table: StepTable, spec: ModelSpec, plan: _Plan) -> tuple[str, ...]:
    """The inputs of a step, in order."""
    made = plan.noise == "philox"
    wanted = {
        "x": True,
        "step": True,
        "sample_id": made,
        "seed": made,
        "y": spec.num_classes is not None,
        "guidance": plan.guided,
        "history": keeps_history(table, spec),
        "noise": not made and table.uses_noise,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _join_step(
    graph: graphs.Graph,
    traced: onnx.ModelProto,
    names: Sequence[str],
    table: StepTable,
    spec: ModelSpec,
    plan: _Plan,
) -> None:
    history = keeps_history(table, spec)
    optional = {
        "out_uncond": plan.guided,
        "guidance": plan.guided,
        "history": history,
        "noise": plan.noise == "input" and table.uses_noise,
    }
    inputs = ("x", "out", "step", "sample_id", "seed", *(name for name, is_wanted in optional.items() if is_wanted))
    outputs = ("x_next", "step_next", *(("history_next",) if history else ()))
    update = _trace(Update(table), inputs, outputs, spec, plan, label="the update", low_shifts=True)
    graphs.join_step(
        graph,
        traced,
        update,
        null_class=spec.null_class if plan.guided else None,
        batch=plan.batch,
        network_inputs=names,
        update_inputs=inputs,
    )


def _step_model(
    traced: onnx.ModelProto, names: Sequence[str], table: StepTable, spec: ModelSpec, plan: _Plan
) -> onnx.ModelProto:
    graph = graphs.Graph("step")
    _declare(graph, step_inputs(table, spec, plan), spec, plan)
    _join_step(graph, traced, names, table, spec, plan)
    picture = (plan.axis, *spec.shape)
    graph.give("x_next", np.float32, picture)
    graph.give("step_next", np.int64, (plan.axis,))
    if keeps_history(table, spec):
        graph.give("history_next", np.float32, picture)
    return graph.model(plan.opset)


def _chain_model(
    traced: onnx.ModelProto, names: Sequence[str], table: StepTable, spec: ModelSpec, plan: _Plan
) -> onnx.ModelProto:
    graph = graphs.Graph("chain")
    labels = ("y",) if spec.num_classes is not None else ()
    _declare(graph, ("seed", "sample_id", *labels, *(("guidance",) if plan.guided else ())), spec, plan)
    first = _trace(
        FirstNoise(spec.shape), ("seed", "sample_id"), ("x_T",), spec, plan, label="the noise", low_shifts=True
    )
    graph.add(first, "first/", {name: name for name in ("seed", "sample_id", "x_T")})
    step = graphs.Graph("step")
    _join_step(step, traced, names, table, spec, plan)
    graphs.scan_steps(graph, step, (plan.axis, *spec.shape), table.S, keeps_history(table, spec))
    if plan.output == "unit":
        last = _trace(Pictures(spec), ("x",), ("pictures",), spec, plan, label="the mapping")
        graph.add(last, "last/", {"x": "x_0", "pictures": "pictures"})
    else:
        graph.op("Identity", ["x_0"], "pictures")
    graph.give("pictures", np.float32, (plan.axis, *spec.shape))
    return graph.model(plan.opset)


def _declare(graph: graphs.Graph, names: Sequence[str], spec: ModelSpec, plan: _Plan) -> None:
    """Declare inputs by name."""
    for name, value in example(spec, tuple(names), 1).items():
        dtype = np.int64 if value.dtype == torch.int64 else np.float32
        graph.take(name, dtype, (plan.axis, *value.shape[1:]))


_MEANING = {
    "x": "state x_t, in the network's own range; it starts as standard normals",
    "x_self_cond": "an estimate of x_0, or zeros",
    "t": "training timestep as the network is fed, {fed}",
    "step": "row of the table, 0 … {S}; {S} is a finished sample, which stays as it is",
    "sample_id": "which sample, a 64-bit pattern",
    "seed": "seed of the run, a 64-bit pattern",
    "y": "class, {classes}",
    "guidance": "scale w of classifier-free guidance, out_u + w (out_c - out_u); 1 is none",
    "history": "x̂_0 of the step before; anything at first",
    "noise": "standard normals z of this step",
    "out": "the network's output, {prediction}",
    "x_next": "state x_{{t-1}}",
    "step_next": "next row",
    "history_next": "x̂_0 of this step",
    "pictures": "{range}",
}


def _facts(
    sampler: Sampler, network: nn.Module, table: StepTable | None, plan: _Plan, licence: str | None
) -> dict[str, Any]:
    """The metadata: everything that a user of the file must know, and what `OnnxSampler` needs to run it."""
    spec, checkpoint = sampler.spec, sampler.checkpoint
    facts: dict[str, Any] = {
        "format": FORMAT,
        "what": plan.what,
        "precision": plan.precision,
        "opset": plan.opset,
        "batch": plan.batch,
        "noise": plan.noise,
        "guidance": plan.guided,
        "output": plan.output,
        "tensorrt": plan.tensorrt,
        "weights_sha256": weights_hash(network),
        "source": checkpoint.dialect if checkpoint else type(sampler.model).__name__,
        "licence": licence or licence_of(checkpoint.path if checkpoint else None) or "not stated",
        "schedule": sampler.schedule.to_config(),
        "spec": spec.to_dict(),
        "value_range": "pictures in [0, 1]" if plan.what == "chain" and plan.output == "unit" else "states in [-1, 1]",
    }
    if table is not None:
        facts |= {
            "solver": table.solver,
            "steps": table.S,
            "timesteps": table.timesteps[:-1].tolist(),
            "noisy_rows": [i for i, sigma in enumerate(table.rows[:-1, 6].tolist()) if sigma != 0],
            "uses_noise": table.uses_noise,
            "keeps_history": keeps_history(table, spec),
        }
    words = {
        "S": "" if table is None else table.S,
        "fed": "0 … T-1" if spec.time_scale == 1 else f"0 … T-1 times {spec.time_scale:g}",
        "classes": f"0 … {(spec.num_classes or 1) - 1}"
        + (f"; {spec.null_class} is no class" if spec.null_class is not None else ""),
        "prediction": {"eps": "the noise", "x_start": "x_0", "v": "v", "x_prev": "the mean of x_{t-1}"}[
            spec.prediction
        ],
        "range": "pictures in [0, 1]" if plan.output == "unit" else "final states, in the network's own range",
    }
    facts["meaning"] = {name: text.format(**words) for name, text in _MEANING.items()}
    return {name: value for name, value in _finite(facts).items() if value is not None}


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """JSON has no infinity: such numbers become words."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
