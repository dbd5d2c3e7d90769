"""Half precision: weights and heavy operators in float16, norms, exponents and sums in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastddpm.common.wording import in_a_line
from fastddpm.export.graph import in_order
from fastddpm.export.model_file import infer_types

if TYPE_CHECKING:
    import onnx

FP16_PSNR = 35.0
"""Pictures of a whole run in half precision against single precision: at least so many dB on the shipped model."""

KEPT = (
    "InstanceNormalization",
    "GroupNormalization",
    "LayerNormalization",
    "BatchNormalization",
    "ReduceL2",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceMean",
    "Softmax",
    "LogSoftmax",
    "Exp",
    "Log",
    "Pow",
    "Sqrt",
    "Sin",
    "Cos",
    "Range",
)
"""Operators that stay in float32: squares and exponents leave float16's range, and angles its precision."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float16 weights, and inputs and outputs as before.

    Args:
        model: a traced network; it is consumed.

    Returns:
        A new model.

    Raises:
        ValueError: ONNX Runtime's converter is missing, or cannot do it.
    """
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise ValueError(
            "export: the package onnxruntime must be installed for fp16; run pip install 'fastddpm[onnx]'"
        ) from error
    try:
        # The converter's own inference of types ends at 2 GB.
        model.graph.value_info.extend(infer_types(model))
        half: onnx.ModelProto = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=list(KEPT), disable_shape_infer=True
        )
    except Exception as error:  # whatever a third-party converter raises on a graph that it does not understand
        reason = in_a_line(error)
        raise ValueError(f"export: precision must be fp32 for this network, got fp16, which fails: {reason}") from error
    nodes = in_order(half.graph.node)  # the converter appends its casts at the end
    del half.graph.value_info[:], half.graph.node[:]
    half.graph.node.extend(nodes)
    return half
