"""What a trained network expects and what its output means, apart from its weights and its noise schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

Prediction = Literal["eps", "x_start", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The conventions that a checkpoint was trained with.

    Args:
        shape: (C, H, W) of one sample.
        prediction: What the output is: the noise ε, the clean sample x_0, or v (Salimans & Ho 2022).
        variance: Which σ ancestral sampling uses: β̃_t ("fixed_small"), β_t ("fixed_large"), or the network's
            second half of channels in between ("learned_range", Nichol & Dhariwal 2021, eq. 15).
        clip: Bound on |x̂_0| in each step; None leaves x̂_0 alone.
        num_classes: Number of classes that a caller may ask for; None for an unconditional network.
        null_class: The label that stands for "no class" in classifier-free guidance; None if there is none.
        class_names: What the classes are called; None if that is not known.
        time_scale: The network is fed t · time_scale (OpenAI's rescale_timesteps: 1000 / T).
        clipped_eps: DDIM with clipping: "rederive" takes ε from the clipped x̂_0, "raw" keeps the network's.
    """

    shape: tuple[int, int, int]
    prediction: Prediction = "eps"
    variance: Variance = "fixed_small"
    clip: float | None = 1.0
    num_classes: int | None = None
    null_class: int | None = None
    class_names: tuple[str, ...] | None = None
    time_scale: float = 1.0
    clipped_eps: Literal["rederive", "raw"] = "rederive"

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"ModelSpec: {name} must be {expected}, got {getattr(self, name)!r}")

        is_shape = isinstance(self.shape, tuple) and len(self.shape) == 3 and all(_positive(n) for n in self.shape)
        require(is_shape, "shape", "three positive integers (C, H, W)")
        require(self.prediction in ("eps", "x_start", "v"), "prediction", "eps, x_start or v")
        require(self.variance in ("fixed_small", "fixed_large", "learned_range"), "variance", "a known kind")
        require(self.clip is None or _number(self.clip), "clip", "a positive number or null")
        require(
            self.num_classes is None or _positive(self.num_classes),
            "num_classes",
            "a positive integer or null",
        )
        null_ok = self.null_class is None or (isinstance(self.null_class, int) and self.null_class >= 0)
        require(null_ok, "null_class", "a label or null")
        names_ok = self.class_names is None or len(self.class_names) == self.num_classes
        require(names_ok, "class_names", f"{self.num_classes} names or null")
        require(_number(self.time_scale), "time_scale", "a positive number")
        require(self.clipped_eps in ("rederive", "raw"), "clipped_eps", "rederive or raw")

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output has 2C channels."""
        return self.variance == "learned_range"

    def to_dict(self) -> dict[str, Any]:
        """The conventions as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Build from JSON values.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown or "shape" not in values:
            raise ValueError(f"ModelSpec: keys must be among {sorted(names)} with shape, got {sorted(values)}")
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**known)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
