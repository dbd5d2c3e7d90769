"""8-bit networks: quantised by ONNX Runtime, calibrated on what the network sees in the sampler's own runs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fastddpm.common.wording import in_a_line
from fastddpm.export.model_file import is_large
from fastddpm.export.source import CPU, Source
from fastddpm.export.tracing import quiet
from fastddpm.process.method import Method, MethodOptions
from fastddpm.process.table import StepTable
from fastddpm.step.request import RunOptions, make_request

if TYPE_CHECKING:
    import onnx

    from fastddpm.export.form import Exported
    from fastddpm.sampler import Sampler

CALIBRATION_STEPS = 20
CALIBRATION_SAMPLES = 8
HEAVY = ("Conv", "MatMul", "Gemm")
"""What is quantised where it has weights: nearly all of the arithmetic; everything between stays in float32."""


def calibration(
    source: Source, table: StepTable | None, names: Sequence[str], many: int | None = None
) -> list[dict[str, np.ndarray]]:
    """What the network is fed along a run of the sampler.

    Args:
        source: whose runs.
        table: the table whose rows the network is asked for; None, for a network that is asked for timesteps.
        names: the network's inputs: x, t or step, and what else it takes.
        many: samples per batch, where that is fixed; runs of at least `CALIBRATION_SAMPLES` are cut to it.

    Returns:
        Arrays by input, about `CALIBRATION_STEPS` entries, from the first step to the last.
    """
    spec, stepper = source.spec, source.stepper()
    rows = None if table is None else _some_first_visits(table)
    if table is None or rows is None:
        method = Method("ddim", min(CALIBRATION_STEPS, source.schedule.T))
    else:  # a short run through some of the table's timesteps
        method = Method("ddim", timesteps=table.timesteps.cpu()[rows])
    short = method.table(source.schedule, spec)
    n = max(CALIBRATION_SAMPLES, many or 0)
    labels = None if spec.num_classes is None else torch.arange(n) % spec.num_classes
    if labels is not None and spec.null_class is not None:
        labels[:: max(2, n // 2)] = spec.null_class
    batch = make_request(spec, CPU, n, RunOptions(class_labels=labels, batch_size=n))
    batch = dataclasses.replace(batch, previews=True)  # the inputs of some networks are estimates of x_0
    times, seen = spec.times_fed(short.timesteps), []
    with stepper.undisturbed(), stepper.begin(short, batch) as runner:
        for i in range(short.S):
            values: dict[str, Tensor | None] = {
                "x": runner.state.x,
                "step": torch.full((n,), i if rows is None else int(rows[i])),
                "t": times[i].expand(n),
                "y": labels,
                "history": runner.state.history,
                "x_self_cond": runner.state.history,
            }
            kept = {name: value.cpu().numpy().copy() for name, value in values.items() if value is not None}
            seen.append({name: kept[name][:many] for name in names})
            runner.run(1)
    return seen


def _some_first_visits(table: StepTable) -> Tensor:
    """Some of the rows at which a run is at a timestep for the first time, which descend."""
    first = (table.counters == table.timesteps)[: table.S].nonzero().flatten()
    return first[_some_rows(len(first))]


def _some_rows(S: int) -> Tensor:
    """About `CALIBRATION_STEPS` of a table's S rows, evenly spread, both ends included."""
    return torch.linspace(0, S - 1, min(CALIBRATION_STEPS, S)).round().to(torch.int64)


def to_int8(model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]) -> onnx.ModelProto:
    """The model with 8-bit weights (a scale for each output channel) and 8-bit inputs of its heavy operators.

    Args:
        model: a traced network.
        feeds: what to calibrate on.

    Returns:
        A new model, with QuantizeLinear and DequantizeLinear around the heavy operators.

    Raises:
        ValueError: ONNX Runtime's quantizer is missing, or cannot do it.
    """
    import onnx

    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise ValueError(
            "export: the package onnxruntime must be installed for int8; run pip install 'fastddpm[onnx]'"
        ) from error

    rest = iter(feeds)

    def get_next(_: object) -> dict[str, np.ndarray] | None:
        return next(rest, None)

    # By `type`, because the base class comes from a package that need not be there.
    reader = type("Reader", (CalibrationDataReader,), {"get_next": get_next})()

    with tempfile.TemporaryDirectory() as folder, quiet(""):  # its root logger has advice on preprocessing
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        large = is_large(model)
        heavy = _heavy(model)
        try:
            onnx.save(model, source, save_as_external_data=large)
            quantize_static(
                source,
                target,
                reader,
                nodes_to_quantize=heavy,
                use_external_data_format=large,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                op_types_to_quantize=list(HEAVY),
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
        except OSError as error:
            raise OSError(error.errno, error.strerror, folder) from error
        except Exception as error:  # whatever a third-party quantizer raises on a graph that it does not understand
            reason = in_a_line(error)
            raise ValueError(
                f"export: precision must be fp32 for this network, got int8, which fails: {reason}"
            ) from error
        quantised = onnx.load(target)
    del quantised.graph.value_info[:], quantised.metadata_props[:]
    return quantised


def _heavy(model: onnx.ModelProto) -> list[str]:
    """The nodes with weights, but for the first and the last convolution, whose errors show most in a picture."""
    constants = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in HEAVY and node.input[1] in constants]
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    return [node.name for node in nodes if node.name not in (convolutions[:1] + convolutions[-1:])]


def psnr(exported: Exported, sampler: Sampler) -> str:
    """A line on how far an exported model's pictures are from the sampler's, for seed 0."""
    n = 16 if int(exported.facts.get("steps", 0)) <= 50 else 4
    decibels = picture_psnr(exported, sampler, n)
    return (
        f"{exported.facts['precision']}: PSNR against fp32 {np.median(decibels):.1f} dB in the median, "
        f"{decibels.min():.1f} dB at worst ({n} pictures, seed 0)"
    )


def picture_psnr(exported: Exported, sampler: Sampler, n: int) -> np.ndarray:
    """PSNR in dB of each of n pictures of an exported model against the sampler's own, for seed 0."""
    from fastddpm.export.onnx_sampler import OnnxSampler

    facts, spec = exported.facts, sampler.spec
    labels = None if spec.num_classes is None else [i % spec.num_classes for i in range(n)]
    method: MethodOptions = {"steps": 20} if facts["what"] == "network" else {}
    output: Literal["raw", "unit"] = "raw" if facts["output"] == "raw" and facts["what"] == "chain" else "unit"
    other = OnnxSampler(exported.files[0], "cpu").sample(
        n, class_labels=labels, output=output, progress=False, **method
    )
    if "timesteps" in facts:
        method = {"solver": facts["solver"], "timesteps": facts["timesteps"]}
    ours = sampler.sample(n, class_labels=labels, output=output, progress=False, **method)
    error = (ours.cpu() - other).flatten(1).square().mean(1).clamp(min=1e-12)
    span = 2.0 if output == "raw" else 1.0
    return np.asarray(10 * torch.log10(span**2 / error))
