"""The three levels of a model: the network, one step, and the chain of all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fastddpm.export import graph as graphs
from fastddpm.export.form import Form
from fastddpm.export.model_file import detach, is_large
from fastddpm.export.modules import Ask, Pictures, Update, Whole, example, step_of
from fastddpm.export.normals import first_noise, step_noise
from fastddpm.export.peephole import shorten_update
from fastddpm.export.source import Source
from fastddpm.export.tracing import trace
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable
from fastddpm.step.step import HISTORIES, Step

if TYPE_CHECKING:
    import onnx


def build(source: Source, table: StepTable | None, form: Form) -> tuple[onnx.ModelProto, list[bytes]]:
    """The model of one level, without metadata, and the values of its weights if they are too large for it."""
    network, spec = source.network, source.spec
    labels = ("y",) if spec.num_classes is not None else ()
    past = "x_self_cond" if table is None else "history"
    names = ("x", "t" if table is None else "step", *labels, *((past,) if spec.self_condition else ()))
    names += () if table is None else _conditions(spec)
    step = None if table is None else step_of(network, spec, table)
    module = Whole(network) if step is None or table is None else Ask(step, spec, table)
    traced = _trace(module, names, ("out",), spec, form, many=2 if form.guided else 1)
    if form.precision != "fp32":
        traced = _reduce(traced, source, table, form, names)
    detached = detach(traced) if is_large(traced) else []
    if step is None or table is None:
        return _network_model(traced, names, spec, form), detached
    make = _step_model if form.what == "step" else _chain_model
    return make(traced, names, step, table, spec, form), detached


def _conditions(spec: ModelSpec) -> tuple[str, ...]:
    """The input of steps and chains whose network sees a condition behind x; a network alone has it in x."""
    return ("condition",) if spec.condition_channels else ()


def _reduce(
    traced: onnx.ModelProto, source: Source, table: StepTable | None, form: Form, names: Sequence[str]
) -> onnx.ModelProto:
    if form.precision == "fp16":
        from fastddpm.export.half import to_half

        return to_half(traced)
    from fastddpm.export.int8 import calibration, to_int8

    many = None if form.batch is None else form.batch * (2 if form.guided else 1)
    return to_int8(traced, calibration(source, table, names, many))


def _trace(
    module: nn.Module,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    spec: ModelSpec,
    form: Form,
    *,
    many: int = 1,
    label: str = "the network",
) -> onnx.ModelProto:
    """One part; `many` times the form's batch where that is fixed."""
    arguments = example(spec, inputs, form.examples * many)
    return trace(module, arguments, outputs, dynamic=form.dynamic, opset=form.opset, label=label)


def _network_model(traced: onnx.ModelProto, names: Sequence[str], spec: ModelSpec, form: Form) -> onnx.ModelProto:
    graph = graphs.Graph("network")
    _declare(graph, names, spec, form)
    graph.add(traced, "net/", {name: name for name in (*names, "out")})
    channels = spec.shape[0] * (2 if spec.learned_variance else 1)
    graph.give("out", np.float32, (form.axis, channels, *spec.shape[1:]))
    return graph.model(form.opset)


def step_inputs(step: Step, spec: ModelSpec, form: Form) -> tuple[str, ...]:
    """The inputs of a step, in order."""
    made = form.noise == "philox"
    wanted = {
        "x": True,
        "step": True,
        "sample_id": made,
        "seed": made,
        "y": spec.num_classes is not None,
        "guidance": form.guided,
        **{name: name in step.form.histories for name in HISTORIES},
        "condition": step.form.condition,
        "noise": not made and step.form.noise,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _join_step(
    graph: graphs.Graph,
    traced: onnx.ModelProto,
    names: Sequence[str],
    step: Step,
    table: StepTable,
    spec: ModelSpec,
    form: Form,
) -> None:
    optional = {
        "out_uncond": form.guided,
        "guidance": form.guided,
        **{name: name in step.form.histories for name in HISTORIES},
        "noise": step.form.noise,
    }
    inputs = ("x", "out", "step", *(name for name, is_wanted in optional.items() if is_wanted))
    outputs = ("x_next", "step_next", *(f"{name}_next" for name in step.form.histories))
    update = _trace(Update(step, table), inputs, outputs, spec, form, label="the update")
    shorten_update(update)
    if step.form.noise and form.noise == "philox":
        noise = step_noise(table.timesteps.numpy(), spec.shape, form.opset)
        graph.add(noise, "noise/", {name: name for name in ("step", "seed", "sample_id", "noise")})
    graphs.join_step(
        graph,
        traced,
        update,
        null_class=spec.null_class if form.guided else None,
        batch=form.batch,
        network_inputs=names,
        update_inputs=inputs,
    )


def _step_model(
    traced: onnx.ModelProto, names: Sequence[str], step: Step, table: StepTable, spec: ModelSpec, form: Form
) -> onnx.ModelProto:
    graph = graphs.Graph("step")
    _declare(graph, step_inputs(step, spec, form), spec, form)
    _join_step(graph, traced, names, step, table, spec, form)
    picture = (form.axis, *spec.shape)
    graph.give("x_next", np.float32, picture)
    graph.give("step_next", np.int64, (form.axis,))
    for name in step.form.histories:
        graph.give(f"{name}_next", np.float32, picture)
    return graph.model(form.opset)


def _chain_model(
    traced: onnx.ModelProto, names: Sequence[str], step: Step, table: StepTable, spec: ModelSpec, form: Form
) -> onnx.ModelProto:
    graph = graphs.Graph("chain")
    labels = ("y",) if spec.num_classes is not None else ()
    scales = ("guidance",) if form.guided else ()
    _declare(graph, ("seed", "sample_id", *labels, *scales, *_conditions(spec)), spec, form)
    graph.add(first_noise(spec.shape, form.opset), "first/", {name: name for name in ("seed", "sample_id", "x_T")})
    body = graphs.Graph("step")
    _join_step(body, traced, names, step, table, spec, form)
    graphs.scan_steps(graph, body, (form.axis, *spec.shape), table.S, step.form.histories)
    if form.output == "unit":
        last = _trace(Pictures(spec), ("x",), ("pictures",), spec, form, label="the mapping")
        graph.add(last, "last/", {"x": "x_0", "pictures": "pictures"})
    else:
        graph.op("Identity", ["x_0"], "pictures")
    graph.give("pictures", np.float32, (form.axis, *spec.shape))
    return graph.model(form.opset)


def _declare(graph: graphs.Graph, names: Sequence[str], spec: ModelSpec, form: Form) -> None:
    """Declare inputs by name."""
    for name, value in example(spec, tuple(names), 1).items():
        dtype = np.int64 if value.dtype == torch.int64 else np.float32
        graph.take(name, dtype, (form.axis, *value.shape[1:]))
