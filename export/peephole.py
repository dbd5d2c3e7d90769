"""Peepholes: fewer operators for what a traced update writes at length, with the same numbers.

On small pictures an operator costs more to start than to run, and tracing makes three for each column of the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def shorten_update(model: onnx.ModelProto) -> None:
    """Apply all peepholes to a traced update, in place. What is no longer read stays until the graph is put together.

    Args:
        model: (x, out, step, …) → x_next, step_next[, …].
    """
    graph = model.graph
    for gather in [node for node in graph.node if node.op_type == "Gather"]:
        _split_columns(graph, gather)
        _take_whole_noise(graph, gather)


def _split_columns(graph: onnx.GraphProto, gather: onnx.NodeProto) -> None:
    """Rows of a table [S+1, K], cut into columns [B, 1, 1, 1]: one Split for K times Slice, Squeeze and Reshape.

    The table gets two more dimensions of size 1, so that its columns have their shape from the start.
    """
    from onnx import helper, numpy_helper

    table = _constant(graph, gather.input[0])
    columns = [_column(graph, node) for node in _readers(graph, gather.output[0])]
    if table is None or table.ndim != 2 or not columns or not all(columns):
        return
    # Steps are one number per sample: the Reshape to [-1] before the Gather changes nothing.
    index = next((n.input[0] for n in graph.node if n.output[0] == gather.input[1] and n.op_type == "Reshape"), None)
    rows = gather.output[0]
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(table[:, :, None, None]), f"{rows}_table"))
    names = [f"{rows}_{k}" for k in range(table.shape[1])]
    for k, last in (column for column in columns if column):
        names[k] = last.output[0]
        last.output[0] = f"{last.output[0]}_unused"
    place = list(graph.node).index(gather)
    gather.input[:] = [f"{rows}_table", index or gather.input[1]]
    graph.node.insert(
        place + 1, helper.make_node("Split", [rows], names, name=f"{rows}_split", axis=1, num_outputs=len(names))
    )


def _column(graph: onnx.GraphProto, first: onnx.NodeProto) -> tuple[int, onnx.NodeProto] | None:
    """(k, last node) if this is where column k of a matrix is cut out and shaped [-1, 1, 1, 1], or None."""
    chain = [first]
    for _ in range(2):
        readers = _readers(graph, chain[-1].output[0])
        if len(readers) != 1:
            return None
        chain += readers
    if [node.op_type for node in chain] != ["Slice", "Squeeze", "Reshape"]:
        return None
    values = [_constant(graph, name) for node in chain for name in node.input[1:]]
    begin, end, axis, *_, squeezed, shape = [None if value is None else value.tolist() for value in values]
    if axis != [1] or squeezed != [1] or shape != [-1, 1, 1, 1] or not begin or end != [begin[0] + 1]:
        return None
    return begin[0], chain[-1]


def _take_whole_noise(graph: onnx.GraphProto, gather: onnx.NodeProto) -> None:
    """The update is handed the noise of one step as [1, B, …], whose first row is the whole."""
    maker = next((node for node in graph.node if gather.input[0] in node.output), None)
    if maker is not None and maker.op_type == "Unsqueeze" and maker.input[0] == "noise":
        for node in _readers(graph, gather.output[0]):
            node.input[:] = ["noise" if read == gather.output[0] else read for read in node.input]


def _readers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if name in node.input]


def _constant(graph: onnx.GraphProto, name: str) -> np.ndarray | None:
    from onnx import numpy_helper

    found = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    return None if found is None else numpy_helper.to_array(found)
