"""TrainConfig: how to train."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

LearningRateSchedule = Literal["cosine", "constant"]
Autocast = Literal["bf16", "fp32"]
WeightsDtype = Literal["fp32", "fp16"]

_MAY_CHANGE = ("save_every", "weights_dtype", "autocast", "gradient_checkpointing")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the network, the schedule and the conventions are given apart.

    Args:
        epochs: Passes over the data.
        batch_size: Pictures per step.
        learning_rate: AdamW's peak rate.
        lr_schedule: What follows the warm-up: "cosine" falls to zero at the last step, "constant" stays.
        warmup: Steps over which the rate rises linearly from zero.
        weight_decay: AdamW's decoupled decay.
        ema_decay: Decay of the exponential moving average of the weights, reached gradually: min(decay, (1+n)/(10+n)).
        grad_clip: Largest norm of the gradient.
        label_dropout: Probability that a picture's class is replaced by "no class" (Ho & Salimans 2022).
        hflip: Whether pictures are mirrored with probability one half.
        vlb_weight: λ in L_simple + λ·L_vlb where the variance is learned (Nichol & Dhariwal 2021, eq. 16).
        seed: Of everything random, in [0, 2**63).
        save_every: Steps between saved states; a kill loses at most these.
        autocast: "bf16" runs the network in bfloat16 where that is safe, "fp32" does not.
        weights_dtype: How the sampled (averaged) weights are stored.
        gradient_checkpointing: Trade a second forward pass for memory.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    lr_schedule: LearningRateSchedule = "cosine"
    warmup: int = 500
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    label_dropout: float = 0.1
    hflip: bool = False
    vlb_weight: float = 1e-3
    seed: int = 0
    save_every: int = 500
    autocast: Autocast = "fp32"
    weights_dtype: WeightsDtype = "fp32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "epochs": (1, 10**9), "batch_size": (1, 2**20), "learning_rate": (0, 10), "warmup": (0, 10**9),
            "weight_decay": (0, 10), "ema_decay": (0, 1), "grad_clip": (1e-12, 1e12), "label_dropout": (0, 1),
            "vlb_weight": (0, 1e6), "seed": (0, 2**63 - 1), "save_every": (1, 10**9),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            wanted = "an integer" if isinstance(getattr(type(self), name), int) else "a number"
            if isinstance(value, bool) or not isinstance(value, int if wanted == "an integer" else (int, float)):
                raise TypeError(f"TrainConfig: {name} must be {wanted}, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"TrainConfig: {name} must be in [{low:g}, {high:g}], got {value!r}")
        choices = {"lr_schedule": LearningRateSchedule, "autocast": Autocast, "weights_dtype": WeightsDtype}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"TrainConfig: {name} must be one of {get_args(kind)}, got {getattr(self, name)!r}")

    def lasting(self) -> dict[str, Any]:
        """The settings that must not change between the sessions of one run."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _MAY_CHANGE}
