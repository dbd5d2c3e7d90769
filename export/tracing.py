"""PyTorch module → ONNX graph, through PyTorch's own exporter, cleaned of everything that is not the model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

OPSETS = range(18, 24)
DEFAULT_OPSET = 20
"""From 21 on the exporter writes GroupNormalization, which fewer tools fuse and run than InstanceNormalization."""
MISSING = "export: the packages onnx and onnxscript must be installed; run pip install 'fastddpm[onnx]'"


def require_onnx() -> None:
    """Import what exporting needs.

    Raises:
        ValueError: a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(MISSING) from error


def check_opset(opset: int) -> None:
    """Check an opset number.

    Raises:
        ValueError: the exporter does not write it.
    """
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ValueError(
            f"export: opset must be in {OPSETS[0]} … {OPSETS[-1]}, got {opset!r}; leave it out for {DEFAULT_OPSET}"
        )


def trace(
    module: nn.Module,
    arguments: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    dynamic: bool,
    opset: int = DEFAULT_OPSET,
    label: str = "the network",
) -> onnx.ModelProto:
    """Trace a module.

    Args:
        module: called with `arguments` by name.
        arguments: examples, each with the batch in its first dimension; their names become the graph's inputs.
        outputs: names of the results.
        dynamic: whether the batch stays open; it is called "batch" then.
        opset: version of ONNX's operators.
        label: what error messages call the module.

    Returns:
        The model: one graph without functions, comments or traces of where it was made.

    Raises:
        ValueError: the module cannot be traced, because its control flow depends on values, say.
    """
    require_onnx()
    axis = torch.export.Dim("batch", min=1, max=65536)
    shapes = {name: {0: axis} for name in arguments} if dynamic else None
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module.eval(),
                kwargs=dict(arguments),
                dynamo=True,
                opset_version=opset,
                input_names=list(arguments),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                external_data=False,
                optimize=True,
                verbose=False,
            )
            model = program.model_proto if program is not None else None
        except Exception as error:  # the exporter's own types are private, and a traced module may raise anything
            raise ValueError(
                f"export: {label} must be traceable with {'an open' if dynamic else 'a fixed'} batch, got "
                f"{_reason(error)}; {'fix the batch size (batch=1), or ' if dynamic else ''}"
                "remove control flow that depends on values"
            ) from error
    if model is None:
        raise ValueError(f"export: {label} must be traceable, got nothing from PyTorch's exporter; renew PyTorch")
    return clean(model, list(arguments), opset)


def clean(model: onnx.ModelProto, inputs: Sequence[str], opset: int) -> onnx.ModelProto:
    """The model with inputs in the given order and without metadata, comments, shapes of inner values or functions.

    Raises:
        ValueError: the exporter wrote another opset or domain than asked for.
    """
    import onnx
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("") != opset:
        raise ValueError(f"export: opset must be one that PyTorch's exporter writes here, got {opset}; leave it out")
    graph = model.graph
    given = {value.name: value for value in graph.input}
    del graph.input[:]
    graph.input.extend(given[name] for name in inputs)
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    graph.doc_string = model.doc_string = ""
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        if not isinstance(item, onnx.TensorProto):
            del item.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    _replace_integer_clips(graph)
    return model


def _replace_integer_clips(graph: onnx.GraphProto) -> None:
    """Clip of int64 → Max and Min: the same, and TensorRT takes these of integers."""
    from onnx import TensorProto, helper

    integers = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT64}
    nodes = []
    for node in graph.node:
        bounds = [*node.input[1:], "", ""][:2]
        if node.op_type != "Clip" or not any(bounds) or not all(name in integers for name in bounds if name):
            nodes.append(node)
            continue
        steps = [(kind, name) for kind, name in zip(("Max", "Min"), bounds, strict=True) if name]
        value = node.input[0]
        for i, (kind, name) in enumerate(steps):
            result = node.output[0] if i + 1 == len(steps) else f"{node.output[0]}_raised"
            nodes.append(helper.make_node(kind, [value, name], [result], name=f"{node.name}_{kind.lower()}"))
            value = result
    del graph.node[:]
    graph.node.extend(nodes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's chatter (missing optional packages, unused axis names) to itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first telling line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}…"
