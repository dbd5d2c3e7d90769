"""The three levels of a model: the network, one step, and the chain of all steps."""

from __future__ import annotations

import dataclasses
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
from fastddpm.step.step import HISTORIES, KNOWN, Step

if TYPE_CHECKING:
    import onnx


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a file is to hold.

    Attributes:
        spec: the network's conventions.
        form: what was asked for.
        names: what the network takes, in order.
    """

    spec: ModelSpec
    form: Form
    names: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The input that holds classes, where the network has any."""
        return ("y",) if self.spec.num_classes is not None else ()

    @property
    def picture(self) -> tuple[int | str, ...]:
        """The shape of a batch of states."""
        return (self.form.axis, *self.spec.shape)

    def trace(
        self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], label: str, many: int = 1
    ) -> onnx.ModelProto:
        """One part; `many` times the form's batch where that is fixed."""
        arguments = example(self.spec, inputs, self.form.examples * many)
        return trace(module, arguments, outputs, dynamic=self.form.dynamic, opset=self.form.opset, label=label)

    def declare(self, graph: graphs.Graph, names: tuple[str, ...]) -> None:
        """Declare inputs by name."""
        for name, value in example(self.spec, names, 1).items():
            dtype = np.int64 if value.dtype == torch.int64 else np.float32
            graph.take(name, dtype, (self.form.axis, *value.shape[1:]))


def build(source: Source, table: StepTable | None, form: Form) -> tuple[onnx.ModelProto, list[bytes]]:
    """The model of one level, without metadata, and the values of its weights if they are too large for it."""
    network, spec = source.network, source.spec
    past = "x_self_cond" if table is None else "history"
    wanted = {"x": True, "t": table is None, "step": table is not None, "y": spec.num_classes is not None}
    wanted |= {past: spec.self_condition, "condition": table is not None and spec.condition_channels > 0}
    plan = _Plan(spec, form, tuple(name for name, is_wanted in wanted.items() if is_wanted))
    step = None if table is None else step_of(network, spec, table, masked=form.inpaint)
    module = Whole(network) if step is None or table is None else Ask(step, spec, table)
    traced = plan.trace(module, plan.names, ("out",), "the network", many=2 if form.guided else 1)
    if form.precision != "fp32":
        traced = _reduce(traced, source, table, plan)
    detached = detach(traced) if is_large(traced) else []
    if step is None or table is None:
        return _network_model(traced, plan), detached
    make = _step_model if form.what == "step" else _chain_model
    return make(traced, step, table, plan), detached


def _reduce(traced: onnx.ModelProto, source: Source, table: StepTable | None, plan: _Plan) -> onnx.ModelProto:
    form = plan.form
    if form.precision == "fp16":
        from fastddpm.export.half import to_half

        return to_half(traced)
    from fastddpm.export.int8 import calibration, to_int8

    many = None if form.batch is None else form.batch * (2 if form.guided else 1)
    return to_int8(traced, calibration(source, table, plan.names, many))


def _network_model(traced: onnx.ModelProto, plan: _Plan) -> onnx.ModelProto:
    graph, spec = graphs.Graph("network"), plan.spec
    plan.declare(graph, plan.names)
    graph.add(traced, "net/", {name: name for name in (*plan.names, "out")})
    channels = spec.shape[0] * (2 if spec.learned_variance else 1)
    graph.give("out", np.float32, (plan.form.axis, channels, *spec.shape[1:]))
    return graph.model(plan.form.opset)


def _step_inputs(step: Step, plan: _Plan) -> tuple[str, ...]:
    """The inputs of a step, in order."""
    made = plan.form.noise == "philox"
    wanted = {
        "x": True,
        "step": True,
        "sample_id": made,
        "seed": made,
        "y": bool(plan.labels),
        "guidance": plan.form.guided,
        **{name: name in step.form.histories for name in HISTORIES},
        **dict.fromkeys(KNOWN, plan.form.inpaint),
        "condition": step.form.condition,
        "noise": not made and step.form.noise,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _join_step(graph: graphs.Graph, traced: onnx.ModelProto, step: Step, table: StepTable, plan: _Plan) -> None:
    form, spec = plan.form, plan.spec
    optional = {
        "out_uncond": form.guided,
        "guidance": form.guided,
        **{name: name in step.form.histories for name in HISTORIES},
        **dict.fromkeys(KNOWN, form.inpaint),
        "noise": step.form.noise,
    }
    inputs = ("x", "out", "step", *(name for name, is_wanted in optional.items() if is_wanted))
    outputs = ("x_next", "step_next", *(f"{name}_next" for name in step.form.histories))
    update = plan.trace(Update(step, table), inputs, outputs, "the update")
    shorten_update(update)
    if step.form.noise and form.noise == "philox":
        noise = step_noise(table.counters.numpy(), spec.shape, form.opset)
        graph.add(noise, "noise/", {name: name for name in ("step", "seed", "sample_id", "noise")})
    null_class = spec.null_class if form.guided else None
    graphs.ask(graph, traced, plan.names, null_class, form.batch)
    graph.add(update, "update/", {name: name for name in (*inputs, *outputs)})


def _step_model(traced: onnx.ModelProto, step: Step, table: StepTable, plan: _Plan) -> onnx.ModelProto:
    graph = graphs.Graph("step")
    plan.declare(graph, _step_inputs(step, plan))
    _join_step(graph, traced, step, table, plan)
    graph.give("x_next", np.float32, plan.picture)
    graph.give("step_next", np.int64, (plan.form.axis,))
    for name in step.form.histories:
        graph.give(f"{name}_next", np.float32, plan.picture)
    return graph.model(plan.form.opset)


def _chain_model(traced: onnx.ModelProto, step: Step, table: StepTable, plan: _Plan) -> onnx.ModelProto:
    graph, form, spec = graphs.Graph("chain"), plan.form, plan.spec
    wanted = {"guidance": form.guided, "condition": step.form.condition, **dict.fromkeys(KNOWN, form.inpaint)}
    optional = (name for name, is_wanted in wanted.items() if is_wanted)
    plan.declare(graph, ("seed", "sample_id", *plan.labels, *optional))
    graph.add(first_noise(spec.shape, form.opset), "first/", {name: name for name in ("seed", "sample_id", "x_T")})
    body = graphs.Graph("step")
    _join_step(body, traced, step, table, plan)
    graphs.scan_steps(graph, body, plan.picture, table.S, step.form.histories)
    if form.output == "unit":
        last = plan.trace(Pictures(spec), ("x",), ("pictures",), "the mapping")
        graph.add(last, "last/", {"x": "x_0", "pictures": "pictures"})
    else:
        graph.op("Identity", ["x_0"], "pictures")
    graph.give("pictures", np.float32, plan.picture)
    return graph.model(form.opset)
