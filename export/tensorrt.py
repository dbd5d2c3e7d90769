"""TensorRT: whether its parser takes a model, by NVIDIA's published table, and the command that builds an engine.

The table is docs/operators.md of onnx/onnx-tensorrt for TensorRT 10.15 (opset 9 to 24). It says nothing about whether a
whole network builds: no model of this package has been through TensorRT itself yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastddpm.export.model_file import infer_types

if TYPE_CHECKING:
    import onnx

    from fastddpm.export.form import Exported

VERSION = "10.15"
_FLOATS = frozenset(("float32", "float16", "bfloat16"))
_NUMBERS = _FLOATS | {"int32", "int64"}
_ALL = _NUMBERS | {"bool"}
_BOOL = frozenset(("bool",))

SUPPORTED: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        "AveragePool BatchNormalization Ceil Clip Conv Cos Erf Exp Floor Gelu Gemm GlobalAveragePool "
        "GroupNormalization HardSigmoid InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax "
        "LpNormalization MatMul Reciprocal Resize RMSNormalization Round Scan Sigmoid Sin Softmax Softplus Sqrt Tan "
        "Tanh".split(),
        _FLOATS,
    ),
    **dict.fromkeys(
        "Abs Add Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Neg Pad Pow Range ReduceL1 "
        "ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND "
        "Sign Sub Sum TopK".split(),
        _NUMBERS,
    ),
    **dict.fromkeys(
        "Cast Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where".split(),
        _ALL,
    ),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), _BOOL),
    "NonZero": frozenset(("float32", "float16")),
    "QuantizeLinear": _FLOATS,
    "DequantizeLinear": frozenset(("int8",)),
}
"""Operator → the types of its data that TensorRT takes; only operators that exported networks may hold are listed."""

_LARGEST_K = 3839


def check_tensorrt(model: onnx.ModelProto) -> None:
    """Check a model's operators, their types and its shapes against TensorRT's table.

    Raises:
        ValueError: an operator or type is not supported, or a shape is open; names the first few.
    """
    import onnx

    problems = []
    for value in model.graph.input:
        if any(not size.dim_value for size in value.type.tensor_type.shape.dim):
            problems.append(f"the open shape of {value.name}")
    graph = model.graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *infer_types(model), *graph.output)}
    known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    small = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == 7 and len(t.dims) < 2}
    for node in graph.node:
        types = SUPPORTED.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        # Where chooses by a bool and moves what it chooses.
        data = node.input[1] if node.op_type == "Where" else node.input[0] if node.input else node.output[0]
        kind = _name(known.get(data, 0))
        if types is None:
            problems.append(node.op_type)
        elif kind not in types and known.get(data):
            problems.append(f"{node.op_type} of {kind}")
        elif node.op_type == "TopK" and node.input[1] in small and int(small[node.input[1]].max()) > _LARGEST_K:
            problems.append(f"TopK of more than {_LARGEST_K}")
    if problems:
        found = ", ".join(sorted(set(problems))[:4])
        raise ValueError(
            f"export: the model must hold only what TensorRT {VERSION} takes, got {found}; export it without tensorrt"
        )


def _name(kind: int) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(kind)) if kind else ""


def trtexec(exported: Exported) -> str:
    """The command that builds an engine; the shapes are the file's own, so it needs none."""
    path = Path(exported.files[0])
    precision = {"fp16": " --fp16", "int8": " --int8"}.get(str(exported.facts["precision"]), "")
    engine = path.with_suffix(".engine")
    return f"trtexec --onnx={path} --saveEngine={engine} --timingCacheFile={path.with_suffix('.timing')}{precision}"
