"""What a caller may ask of a run, besides how many pictures: the method, and all that is per run or per sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastddpm.process.method import Method, MethodOptions
from fastddpm.process.noise import NoiseSource
from fastddpm.step.condition import Condition
from fastddpm.step.guided import ConditionFunction
from fastddpm.step.request import Preview, RunOptions


class SampleOptions(MethodOptions, total=False):
    """The keyword arguments of `Sampler.sample`, for type checkers: those of `Method` and those of `RunOptions`."""

    method: Method | None
    seed: int
    sample_ids: Sequence[int] | Tensor | None
    class_labels: int | Sequence[int] | Tensor | None
    guidance_scale: float | Sequence[float] | Tensor
    batch_size: int | None
    x_T: Tensor | None
    noise: NoiseSource | None
    callback: Callable[[Preview], None] | None
    progress: bool | None
    cond_fn: ConditionFunction | None
    condition: Condition | None


_METHOD = {field.name for field in dataclasses.fields(Method)}
_RUN = {field.name for field in dataclasses.fields(RunOptions)}
_ELSEWHERE = {
    "num_inference_steps": "it is called steps here",
    "generator": "it is called noise here, and seed=N needs none",
    "output_type": "it is called output here",
    "guidance": "it is called guidance_scale here",
    "classes": "they are called class_labels here",
    "low_res": "it is called condition here",
}
"""Options of other projects, and what to say of them."""


def split_options(options: Mapping[str, Any]) -> tuple[Method, RunOptions]:
    """The method and the rest.

    Args:
        options: keyword arguments as in `SampleOptions`.

    Raises:
        TypeError: a name is unknown, or a method and its options are both given.
    """
    rest = {name: value for name, value in options.items() if name in _RUN}
    parts = {name: value for name, value in options.items() if name in _METHOD}
    method = options.get("method")
    for name in options:
        if name not in _RUN and name not in _METHOD and name != "method":
            hint = _ELSEWHERE.get(name, "mend the name")
            raise TypeError(f"sample: options must be those of Sampler.sample, got {name}; {hint}")
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"sample: method must be a fastddpm.Method, got {type(method).__name__}; make one")
    if method is not None and parts:
        raise TypeError(
            f"sample: {', '.join(parts)} must be left out beside a method, got both; put it into the method"
        )
    return method or Method(**parts), RunOptions(**rest)
