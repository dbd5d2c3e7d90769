"""The facts that an exported model states about itself, as its metadata."""

from __future__ import annotations

import math
from typing import cast

from fastddpm.engines.loop import Course
from fastddpm.engines.weights import weights_hash
from fastddpm.export.form import Form
from fastddpm.export.model_file import FORMAT, Facts, licence_of
from fastddpm.export.source import Source
from fastddpm.process.table import StepTable

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
    "history2": "x̂_0 of the step before that one; anything at first",
    "condition": "what the network sees behind x, {condition}",
    "noise": "standard normals z of this step",
    "known": "pictures of which a part is known, in the network's own range",
    "mask": "1 where an element is to be drawn, 0 where it is known",
    "out": "the network's output, {prediction}",
    "x_next": "state x_{{t-1}}",
    "step_next": "next row",
    "history_next": "x̂_0 of this step",
    "history2_next": "x̂_0 of the step before",
    "pictures": "{range}",
}


def facts_of(source: Source, table: StepTable | None, form: Form, licence: str | None) -> Facts:
    """The metadata: everything that a user of the file must know, and what `OnnxSampler` needs to run it."""
    spec, checkpoint = source.spec, source.checkpoint
    facts: Facts = {
        "format": FORMAT,
        "what": form.what,
        "precision": form.precision,
        "opset": form.opset,
        "batch": form.batch,
        "noise": form.noise,
        "guidance": form.guided,
        "output": form.output,
        "tensorrt": form.tensorrt,
        "inpaint": form.inpaint,
        "weights_sha256": weights_hash(source.network),
        "source": checkpoint.dialect if checkpoint else type(source.network).__name__,
        "licence": licence or licence_of(checkpoint.path if checkpoint else None) or "not stated",
        "schedule": source.schedule.to_config(),
        "spec": spec.to_dict(),
        "value_range": "pictures in [0, 1]" if form.what == "chain" and form.output == "unit" else "states in [-1, 1]",
    }
    if table is not None:
        course = Course.of(table, masked=form.inpaint)
        facts |= {
            "solver": table.solver,
            "steps": table.S,
            "timesteps": table.timesteps[:-1].tolist(),
            "counters": list(course.counters),
            "noisy_rows": [i for i, draws in enumerate(course.draws) if draws],
            "uses_noise": course.takes_noise,
            "keeps_history": table.history > 0 or spec.self_condition,
        }
    words = {
        "S": "" if table is None else table.S,
        "fed": "0 … T-1" if spec.time_scale == 1 else f"0 … T-1 times {spec.time_scale:g}",
        "classes": f"0 … {(spec.num_classes or 1) - 1}"
        + (f"; {spec.null_class} is no class" if spec.null_class is not None else ""),
        "condition": "in its own range"
        + (f", or a picture enlarged {spec.condition_scale} times" if spec.condition_scale > 1 else ""),
        "prediction": {"eps": "the noise", "x_start": "x_0", "v": "v", "x_prev": "the mean of x_{t-1}"}[
            spec.prediction
        ],
        "range": "pictures in [0, 1]" if form.output == "unit" else "final states, in the network's own range",
    }
    unused = () if spec.condition_channels else ("condition",)
    facts["meaning"] = {name: text.format(**words) for name, text in _MEANING.items() if name not in unused}
    return cast(Facts, {name: _finite(value) for name, value in facts.items() if value is not None})


def _finite(value: object) -> object:
    """JSON has no infinity: such numbers become words."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
