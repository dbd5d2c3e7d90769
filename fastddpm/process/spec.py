"""What a trained network expects and what its output means, apart from its weights and its noise schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["eps", "x_start", "v", "x_prev"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "clipped_eps": ("rederive", "raw"),
    "noise_gate": ("final", "t0"),
    "prev_timestep": ("next", "stride", "chain"),
    "spacing": ("leading", "trailing", "linspace", "linspace_x0", None),
    "lower_order_final": ("never", "short", "always"),
    "to_bytes": ("round", "truncate"),
    "to_unit": ("clamp", "affine", "identity"),
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The conventions that a checkpoint was trained with.

    Args:
        shape: (C, H, W) of one sample.
        prediction: What the output is: the noise ε, the clean sample x_0, v (Salimans & Ho 2022), or the mean of
            x_{t−1} given x_t and x_0 ("x_prev": Ho et al. 2020, sec. 3.2, μ̃_t), t − 1 counted in training steps.
        variance: Which σ ancestral sampling uses: β̃_t ("fixed_small"), β_t ("fixed_large"), or the network's
            second half of channels in between ("learned_range", Nichol & Dhariwal 2021, eq. 15).
        clip: Bound on |x̂_0| in each step; None leaves x̂_0 alone.
        num_classes: Number of classes that a caller may ask for; None for an unconditional network.
        null_class: The label that stands for "no class" in classifier-free guidance; None if there is none.
        class_names: What the classes are called; None if that is not known.
        time_scale: The network is fed t · time_scale (OpenAI's rescale_timesteps: 1000 / T).
        clipped_eps: DDIM with clipping: "rederive" takes ε from the clipped x̂_0, "raw" keeps the network's.
        threshold: (ratio, largest bound) of dynamic thresholding (Saharia et al. 2022), which then replaces `clip`.
        noise_gate: Ancestral sampling adds no noise on the row that leads to x_0 ("final") or at t = 0 ("t0").
        prev_timestep: Where a row leads. "next": to the next timestep, x_0 after the last. "stride": the same, but
            DDIM's row to t − T // S, as in diffusers. "chain": the same, but an ancestral run over timesteps without
            gaps is a piece of the whole chain, whose last row leads to t − 1 (pesser's Diffusion.denoise).
        final_alpha_to_one: DDIM and DPM-Solver++ take ᾱ = 1 for x_0; if not, ᾱ_0.
        spacing: How timesteps are spaced where only their number is given, in the terms of `spaced_timesteps`;
            None leaves it to the sampler.
        steps_offset: Is added to "leading" timesteps.
        respacing: OpenAI's respacing string for runs that say neither steps nor timesteps; "" for none.
        dpmpp_clips: Whether DPM-Solver++ clips x̂_0 like the other solvers; diffusers' does not.
        lower_order_final: Whether DPM-Solver++'s last row is of first order: "short" in runs of less than 15 steps.
            Unless "never", DPM-Solver++(3M)'s row before it is one of (2M) in such runs.
        to_bytes: How [−1, 1] becomes 0 … 255: to the nearest ("round") or the next lower one ("truncate").
        to_unit: What pictures are in terms of the state x: x/2 + ½ within [0, 1] ("clamp"), x/2 + ½ as it is
            ("affine"), or x itself, of a network that was trained on [0, 1] ("identity").
        self_condition: The network takes the previous step's x̂_0 as well, zeros in the first step, as its keyword
            argument x_self_cond (Chen et al. 2023, "Analog bits", sec. 2.3).
        ddim_steps: Steps of DDIM runs that say neither steps nor timesteps; None leaves it to the sampler.
        ddim_eta: η of DDIM runs that do not say it, in [0, 1].
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
    threshold: tuple[float, float] | None = None
    noise_gate: Literal["final", "t0"] = "final"
    prev_timestep: Literal["next", "stride", "chain"] = "next"
    final_alpha_to_one: bool = True
    spacing: Literal["leading", "trailing", "linspace", "linspace_x0"] | None = None
    steps_offset: int = 0
    respacing: str = ""
    dpmpp_clips: bool = True
    lower_order_final: Literal["never", "short", "always"] = "never"
    to_bytes: Literal["round", "truncate"] = "round"
    to_unit: Literal["clamp", "affine", "identity"] = "clamp"
    self_condition: bool = False
    ddim_steps: int | None = None
    ddim_eta: float = 0.0

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"ModelSpec: {name} must be {expected}, got {getattr(self, name)!r}")

        is_shape = isinstance(self.shape, tuple) and len(self.shape) == 3 and all(_integer(n, 1) for n in self.shape)
        require(is_shape, "shape", "three positive integers (C, H, W)")
        require(self.prediction in get_args(Prediction), "prediction", "eps, x_start, v or x_prev")
        require(self.variance in ("fixed_small", "fixed_large", "learned_range"), "variance", "a known kind")
        require(self.clip is None or _number(self.clip), "clip", "a positive number or null")
        require(
            self.num_classes is None or _integer(self.num_classes, 1),
            "num_classes",
            "a positive integer or null",
        )
        require(self.null_class is None or _integer(self.null_class, 0), "null_class", "a label or null")
        require(_are_names(self.class_names, self.num_classes), "class_names", f"{self.num_classes} names or null")
        require(_number(self.time_scale), "time_scale", "a positive number")
        for name, choices in _CHOICES.items():
            require(getattr(self, name) in choices, name, f"one of {choices}")
        require(self.threshold is None or _is_threshold(self.threshold), "threshold", "(ratio ≤ 1, bound ≥ 1) or null")
        require(isinstance(self.final_alpha_to_one, bool), "final_alpha_to_one", "true or false")
        require(isinstance(self.dpmpp_clips, bool), "dpmpp_clips", "true or false")
        require(_integer(self.steps_offset, 0), "steps_offset", "an integer of at least 0")
        require(isinstance(self.respacing, str), "respacing", "a string")
        require(isinstance(self.self_condition, bool), "self_condition", "true or false")
        require(self.ddim_steps is None or _integer(self.ddim_steps, 1), "ddim_steps", "a positive integer or null")
        is_eta = self.ddim_eta == 0 or _number(self.ddim_eta) and self.ddim_eta <= 1
        require(is_eta and not isinstance(self.ddim_eta, bool), "ddim_eta", "a number in [0, 1]")

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output has 2C channels."""
        return self.variance == "learned_range"

    def times_fed(self, t: Tensor) -> Tensor:
        """What the network is fed for training steps t: t · time_scale, and t itself, integers, where that is 1."""
        return t if self.time_scale == 1.0 else t.to(torch.float32) * self.time_scale

    def to_dict(self) -> dict[str, Any]:
        """The conventions as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Build from JSON values.

        Raises:
            ValueError: If a key is unknown or missing, or a value is out of range.
            TypeError: If it is not a mapping.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"ModelSpec: must be an object of named values, got {type(values).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown or "shape" not in values:
            raise ValueError(f"ModelSpec: keys must be among {sorted(names)} with shape, got {sorted(values)}")
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**known)


def _integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_threshold(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2 or not all(_number(number) for number in value):
        return False
    return bool(value[0] <= 1 <= value[1])


def _are_names(names: object, count: int | None) -> bool:
    if names is None:
        return True
    return isinstance(names, tuple) and len(names) == count and all(isinstance(name, str) for name in names)
