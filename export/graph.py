"""Graphs put together: a step from the network and the update, a chain from steps in a Scan.

Parts are traced apart and joined by names: a part's inputs and outputs are renamed to what the whole calls them, and
all its other names get a prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

IR_VERSION = 10


@dataclasses.dataclass
class Graph:
    """A graph under construction.

    Attributes:
        name: the graph's name.
        inputs: its arguments, in order.
        outputs: its results, in order.
        nodes: its operators, in an order that can be run.
        initializers: its constants.
    """

    name: str
    inputs: list[onnx.ValueInfoProto] = dataclasses.field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = dataclasses.field(default_factory=list)
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    initializers: list[onnx.TensorProto] = dataclasses.field(default_factory=list)

    def add(self, part: onnx.ModelProto, prefix: str, names: Mapping[str, str]) -> None:
        """Append a part.

        Args:
            part: the model to append; it is consumed.
            prefix: what its inner names start with.
            names: its inputs and outputs → what they are called here.
        """
        graph = part.graph
        _rename(graph, prefix, names)
        self.nodes.extend(graph.node)
        self.initializers.extend(graph.initializer)

    def op(self, kind: str, inputs: Sequence[str], *outputs: str, **attributes: object) -> None:
        """Append one operator."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=f"node_{outputs[0]}", **attributes))

    def constant(self, name: str, value: np.ndarray) -> str:
        """Append a constant; returns its name."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def take(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        """Append an input."""
        self.inputs.append(_value(name, dtype, shape))

    def give(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        """Append an output."""
        self.outputs.append(_value(name, dtype, shape))

    def proto(self) -> onnx.GraphProto:
        """The graph without what no output needs, and without operators that repeat another one's work."""
        from onnx import helper

        outputs = {value.name for value in self.outputs}
        nodes = _needed(_without_repeats(self.nodes, self.initializers, outputs), outputs)
        used = {name for node in nodes for name in _reads(node)} | {value.name for value in self.outputs}
        kept = [tensor for tensor in self.initializers if tensor.name in used]
        return helper.make_graph(nodes, self.name, self.inputs, self.outputs, kept)

    def model(self, opset: int) -> onnx.ModelProto:
        """The graph as a model."""
        from onnx import helper

        imports = [helper.make_opsetid("", opset)]
        foreign = {node.domain for node in _all_nodes(self.nodes) if node.domain not in ("", "ai.onnx")}
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(foreign)]
        return helper.make_model(self.proto(), opset_imports=imports, ir_version=IR_VERSION)


def _value(name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, list(shape))


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _all_nodes(graph.node)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every name that a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (value.name for value in graph.output)


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted names depend on, in their order."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    return kept[::-1]


_SMALL = 256


def _without_repeats(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto], outputs: set[str]
) -> list[onnx.NodeProto]:
    """The nodes without those that compute again what one before computed: parts are traced apart, and each clamps.

    Changes the inputs of `nodes`. Nodes with subgraphs, and what they read from outside, stay as they are.
    """
    from onnx import numpy_helper

    same: dict[str, str] = {}
    fixed = outputs | {name for node in nodes for graph in _subgraphs(node) for n in graph.node for name in _reads(n)}
    seen: dict[object, tuple[str, ...]] = {}
    for tensor in constants:
        if tensor.ByteSize() <= _SMALL and not tensor.external_data:
            value = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
            same[tensor.name] = seen.setdefault(value, (tensor.name,))[0]
    kept = []
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        key = (node.op_type, node.domain, tuple(node.input), tuple(str(a) for a in node.attribute), len(node.output))
        first = seen.setdefault(key, tuple(node.output))
        if first != tuple(node.output) and not any(_subgraphs(node)) and not fixed.intersection(node.output):
            same.update(zip(node.output, first, strict=True))
            continue
        kept.append(node)
    return kept


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes so that each comes after those that it reads from; otherwise in their order."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    placed: dict[int, onnx.NodeProto] = {}
    for first in range(len(nodes)):
        stack = [first]
        while stack:
            i = stack[-1]
            before = [maker[name] for name in _reads(nodes[i]) if name in maker and maker[name] not in placed]
            if i in placed or not before:
                placed.setdefault(stack.pop(), nodes[i])
            else:
                stack.extend(reversed(before))
    return list(placed.values())


def _rename(graph: onnx.GraphProto, prefix: str, names: Mapping[str, str]) -> None:
    """Give every name of a graph its new form, in place."""

    def new(name: str) -> str:
        return names.get(name, prefix + name) if name else ""

    for node in graph.node:
        node.name = prefix + node.name
        for field in (node.input, node.output):
            field[:] = [new(name) for name in field]
        for inner in _subgraphs(node):
            _rename(inner, prefix, names)
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name = new(item.name)


def ask(
    graph: Graph, network: onnx.ModelProto, inputs: Sequence[str], null_class: int | None, batch: int | None
) -> None:
    """Append a step's network: names x, step[, y, guidance, history, condition] → out[, out_uncond].

    Args:
        graph: where to append.
        network: (x, step[, y][, history][, condition]) → out.
        inputs: what the network takes.
        null_class: the label of "no class" of a guided step, which gets `out_uncond`; or None.
        batch: None: only the samples whose scale is not 1 are asked for twice, because for the others the output
            without class has no weight. A fixed batch: all are, and no shape depends on data.
    """
    fed = {name: name for name in (*inputs, "out")}
    if null_class is not None:
        _ask_twice(graph, null_class, batch, [name for name in inputs if name != "y"])
        fed = {name: f"both_{name}" for name in fed}
    graph.add(network, "net/", fed)
    if null_class is not None:
        _tell_apart(graph, batch)


def _ask_twice(graph: Graph, null_class: int, batch: int | None, names: Sequence[str]) -> None:
    """both_x, both_step, both_y …: the batch, and after it the samples that are asked for without class too."""
    again = {name: name for name in names}
    if batch is None:
        null = graph.constant("null_class", np.array([null_class], dtype=np.int64))
        graph.op("Equal", ["guidance", graph.constant("one", np.array(1, dtype=np.float32))], "is_plain")
        graph.op("Not", ["is_plain"], "is_guided")
        graph.op("NonZero", ["is_guided"], "guided_rows")  # [1, G]
        graph.op("Squeeze", ["guided_rows", graph.constant("axis_0", np.array([0], dtype=np.int64))], "guided_index")
        graph.op("Shape", ["guided_index"], "guided_count")
        for name in again:
            graph.op("Gather", [name, "guided_index"], f"guided_{name}", axis=0)
        graph.op("Expand", [null, "guided_count"], "guided_y")
        again = {name: f"guided_{name}" for name in again}
    else:
        graph.constant("guided_y", np.full(batch, null_class, dtype=np.int64))
    for name, other in (*again.items(), ("y", "guided_y")):
        graph.op("Concat", [name, other], f"both_{name}", axis=0)


def _tell_apart(graph: Graph, batch: int | None) -> None:
    """both_out → out, out_uncond, each of the whole batch."""
    if batch is not None:
        graph.op("Split", ["both_out"], "out", "out_uncond", axis=0, num_outputs=2)
        return
    graph.op("Shape", ["y"], "batch_count")
    graph.op("Concat", ["batch_count", "guided_count"], "both_counts", axis=0)
    graph.op("Split", ["both_out", "both_counts"], "out", "out_guided", axis=0)
    column = graph.constant("axis_1", np.array([1], dtype=np.int64))
    graph.op("Unsqueeze", ["guided_index", column], "guided_column")
    graph.op("ScatterND", ["out", "guided_column", "out_guided"], "out_uncond")


def scan_steps(graph: Graph, step: Graph, shape: Sequence[int | str], S: int, histories: Sequence[str]) -> None:
    """Append a Scan over rows 0 … S−1: names x_T, sample_id, … → x_0.

    Args:
        graph: where to append; has inputs sample_id, seed[, y, guidance, condition] and a value x_T.
        step: the body's operators, those of a whole step; it is consumed.
        shape: of x, with the batch's name.
        S: steps.
        histories: those that the step has.
    """
    from onnx import helper

    states = ["x", *histories]
    for name in states:
        step.take(name, np.float32, shape)
    step.take("row", np.int64, [])
    body = Graph("step", step.inputs)
    body.op("Shape", ["sample_id"], "batch_shape")
    body.op("Expand", ["row", "batch_shape"], "step")
    body.nodes += step.nodes
    body.initializers = step.initializers
    for name in states:
        body.give(f"{name}_next", np.float32, shape)
    starts = ["x_T"]
    if histories:
        graph.op("Shape", ["x_T"], "state_shape")
        graph.op("ConstantOfShape", ["state_shape"], "no_history")
        starts += ["no_history"] * len(histories)
    rows = graph.constant("rows", np.arange(S, dtype=np.int64))
    ends = ["x_0", *(f"last_{name}" for name in histories)]
    graph.nodes.append(
        helper.make_node("Scan", [*starts, rows], ends, name="steps", num_scan_inputs=1, body=body.proto())
    )
