"""The noise in ONNX operators: `normals_reference`, bit for bit in its words, in a fifth of the nodes of a traced one.

Between tensors of a few hundred numbers an operator costs ONNX Runtime as much as its start. So both products of a
Philox round are one operator, and two words are one unsigned 64-bit number: with X = c₀·2³² + c₁ and Y = c₂·2³² + c₃ a
round is

    X ← M₁·(Y >> 32) ⊕ (X << 32) ⊕ (k₀ << 32),    Y ← M₀·(X >> 32) ⊕ (Y << 32) ⊕ (k₁ << 32),

where each product's halves lie where the next round wants them. Unsigned numbers wrap: nothing needs a mask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fastddpm.export.graph import Graph
from fastddpm.kernels.philox import MULTIPLIERS, ROUNDS, WEYL, X_T_COUNTER

if TYPE_CHECKING:
    import onnx

_FLOAT, _UINT64 = 1, 13  # onnx.TensorProto's numbers
_WORD = 1 << 32
_TURN = 2.0 * math.pi


def step_noise(counters: np.ndarray, shape: tuple[int, int, int], opset: int) -> onnx.ModelProto:
    """The noise of each sample's row, as a part of a graph: (step, seed, sample_id) → noise.

    Args:
        counters: int64 [S+1], each row's.
        shape: (C, H, W).
        opset: version of ONNX's operators.

    Returns:
        A model without declared inputs: step, seed and sample_id int64 [B], noise float32 [B, C, H, W].
    """
    graph = Graph("noise")
    first, last = graph.constant("first", np.array(0)), graph.constant("last", np.array([len(counters) - 1]))
    graph.op("Max", ["step", first], "step_raised")
    graph.op("Min", ["step_raised", last], "row")
    table = graph.constant("counters", counters.astype(np.int64)[:, None, None] + _WORD)
    graph.op("Gather", [table, "row"], "counter", axis=0)
    return _normals(graph, shape, "noise", opset)


def first_noise(shape: tuple[int, int, int], opset: int) -> onnx.ModelProto:
    """x_T, as a part of a graph: (seed, sample_id) → x_T; otherwise as `step_noise`."""
    graph = Graph("first noise")
    zeros = graph.constant("zeros", np.zeros(1, dtype=np.int64))
    counter = graph.constant("x_T_counter", np.array([[[X_T_COUNTER + _WORD]]]))
    graph.op("Mul", ["sample_id", zeros], "rows")
    graph.op("Gather", [counter, "rows"], "counter", axis=0)
    return _normals(graph, shape, "x_T", opset)


def _normals(graph: Graph, shape: tuple[int, int, int], result: str, opset: int) -> onnx.ModelProto:
    """Append Box-Muller: names seed, sample_id and counter → `result`.

    Of each 64-bit number the high word makes the radius and the low one the angle. The angle is there twice, once a
    quarter turn further on: one operator makes sine and cosine.
    """
    numel = math.prod(shape)
    quads = (numel + 3) // 4
    amounts = _uint64(graph, "amounts", _lanes(32, 0, 0))
    graph.op("BitShift", [add_words(graph, quads), amounts], "shifted_words", direction="RIGHT")  # [3, B, 2, quads]
    graph.op("BitwiseAnd", ["shifted_words", _uint64(graph, "mask", _WORD - 1)], "words")
    graph.op("Cast", ["words"], "numbers", to=_FLOAT)
    scales = _lanes(1 / _WORD, _TURN / _WORD, _TURN / _WORD)
    starts = _lanes(0.5 / _WORD, 0.5 * _TURN / _WORD + _TURN / 4, 0.5 * _TURN / _WORD)
    graph.op("Mul", ["numbers", _float32(graph, "scales", scales)], "scaled")
    graph.op("Add", ["scaled", _float32(graph, "starts", starts)], "started")
    graph.op("Split", ["started", graph.constant("parts", np.array([1, 2]))], "u", "angles", axis=0)
    graph.op("Log", ["u"], "log")
    graph.op("Mul", ["log", _float32(graph, "minus_2", -2.0)], "square")
    graph.op("Sqrt", ["square"], "radius")
    graph.op("Sin", ["angles"], "circle")
    graph.op("Mul", ["radius", "circle"], "lanes")  # [2, B, 2, quads]: cosine and sine, sample, pair
    graph.op("Transpose", ["lanes"], "ordered", perm=[1, 3, 2, 0])
    ordered = "ordered"
    if numel % 4:
        graph.op("Reshape", [ordered, graph.constant("flat", np.array([-1, 4 * quads]))], "padded")
        bounds = [graph.constant(name, np.array([i])) for name, i in (("begin", 0), ("end", numel), ("axis_1", 1))]
        graph.op("Slice", ["padded", *bounds], "cut")
        ordered = "cut"
    graph.op("Reshape", [ordered, graph.constant("shape", np.array([-1, *shape]))], result)
    graph.give(result, np.float32, ("batch", *shape))
    return graph.model(opset)


def add_words(graph: Graph, quads: int) -> str:
    """Append Philox4x32-10, for quads 0 … `quads` − 1 of each sample.

    Args:
        graph: where to append; has seed and sample_id, int64 [B], and counter, int64 [B, 1, 1], which is t + 2³².
        quads: how many.

    Returns:
        Name of uint64 [B, 2, quads]: c₀·2³² + c₁ and c₂·2³² + c₃ of the result.
    """
    keys, terms = _own_terms(graph)
    graph.op("BitwiseXor", [terms[0], keys[0]], "keyed_0")
    graph.op("BitwiseXor", [terms[1], "keyed_0"], "sample")
    # The first round's other product, M₀·c₀, is the same for all samples.
    products = graph.constant("products", _matrix([[0] * quads, [MULTIPLIERS[0] * q for q in range(quads)]]))
    graph.op("BitwiseXor", [products, "sample"], "z_1")
    factors = graph.constant("factors", _matrix([[0, MULTIPLIERS[1]], [MULTIPLIERS[0], 0]]))
    shift = _uint64(graph, "shift", 32)
    for r in range(1, ROUNDS):
        graph.op("BitShift", [f"z_{r}", shift], f"high_{r}", direction="RIGHT")
        graph.op("MatMul", [factors, f"high_{r}"], f"product_{r}")
        graph.op("BitShift", [f"z_{r}", shift], f"low_{r}", direction="LEFT")
        graph.op("BitwiseXor", [f"low_{r}", keys[r]], f"keyed_{r}")
        graph.op("BitwiseXor", [f"product_{r}", f"keyed_{r}"], f"z_{r + 1}")
    return f"z_{ROUNDS}"


def _own_terms(graph: Graph) -> tuple[list[str], list[str]]:
    """What depends on the sample alone: each round's key, and two terms of the first round; all uint64 [B, 2, 1]."""
    inner = graph.constant("inner", np.array([1, 2]))
    for name in ("seed", "sample_id"):
        graph.op("Unsqueeze", [name, inner], f"{name}_column")
    twice = [name for name in ("seed_column", "sample_id_column", "counter") for _ in range(2)]
    graph.op("Concat", twice, "longs", axis=1)  # [B, 6, 1]
    graph.op("Cast", ["longs"], "unsigned", to=_UINT64)
    graph.op("BitShift", ["unsigned", _uint64(graph, "halves", [[0], [32]] * 3)], "vector", direction="RIGHT")
    graph.op("MatMul", [graph.constant("sums", _sums()), "vector"], "own")
    keys, terms = [f"key_{r}" for r in range(ROUNDS)], ["shifted", "product_0"]
    graph.op("Split", ["own"], *keys, *terms, axis=1, num_outputs=ROUNDS + 2)
    return keys, terms


def _sums() -> np.ndarray:
    """uint64 [2·(R+2), 6], modulo 2⁶⁴: a sample's numbers → its keys and terms, two rows each.

    Its numbers are the seed and its high word k₁, the id and its high word c₃, the counter and its high word, which is
    1 and so adds constants. The results are (k₀ + r·W₀, k₁ + r·W₁) << 32 for each round r; (c₁, c₃) << 32; (M₁·c₂, 0).
    """
    rows = []
    for r in range(ROUNDS):
        rows += [[_WORD, 0, 0, 0, 0, r * WEYL[0] << 32], [0, _WORD, 0, 0, 0, r * WEYL[1] << 32]]
    terms = [[0, 0, 0, 0, _WORD, 0], [0, 0, 0, _WORD, 0, 0]]
    low_word_times_m1 = [0, 0, MULTIPLIERS[1], -MULTIPLIERS[1] * _WORD, 0, 0]
    return _matrix([*rows, *terms, low_word_times_m1, [0] * 6])


def _matrix(rows: list[list[int]]) -> np.ndarray:
    return np.array([[number % 2**64 for number in row] for row in rows], dtype=np.uint64)


def _lanes(*values: float) -> list[object]:
    """Values along the first of four dimensions."""
    return [[[[value]]] for value in values]


def _uint64(graph: Graph, name: str, value: object) -> str:
    return graph.constant(name, np.array(value, dtype=np.uint64))


def _float32(graph: Graph, name: str, value: object) -> str:
    return graph.constant(name, np.array(value, dtype=np.float32))
