"""TrainConfig: how to train."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from fastddpm.common.records import Record, Within

LearningRateSchedule = Literal["cosine", "constant"]
Autocast = Literal["bf16", "fp32"]
WeightsDtype = Literal["fp32", "fp16"]

_Share = Annotated[float, Within(0, 1)]
_Steps = Annotated[int, Within(1, 10**9)]

_MAY_CHANGE = ("save_every", "weights_dtype", "autocast", "gradient_checkpointing")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Record):
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

    epochs: _Steps = 10
    batch_size: Annotated[int, Within(1, 2**20)] = 64
    learning_rate: Annotated[float, Within(0, 10)] = 1e-3
    lr_schedule: LearningRateSchedule = "cosine"
    warmup: Annotated[int, Within(0, 10**9)] = 500
    weight_decay: Annotated[float, Within(0, 10)] = 0.0
    ema_decay: _Share = 0.999
    grad_clip: Annotated[float, Within(1e-12, 1e12)] = 1.0
    label_dropout: _Share = 0.1
    hflip: bool = False
    vlb_weight: Annotated[float, Within(0, 1e6)] = 1e-3
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    save_every: _Steps = 500
    autocast: Autocast = "fp32"
    weights_dtype: WeightsDtype = "fp32"
    gradient_checkpointing: bool = False

    def lasting(self) -> dict[str, object]:
        """The settings that must not change between the sessions of one run."""
        return {name: value for name, value in self.to_dict().items() if name not in _MAY_CHANGE}
