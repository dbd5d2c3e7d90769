"""What a trained network expects and what its output means, apart from its weights and its noise schedule."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastddpm.common.records import Record, Within

Prediction = Literal["eps", "x_start", "v", "x_prev"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

_Count = Annotated[int, Within(1)]
_Positive = Annotated[float, Within(0, above=True)]


@dataclasses.dataclass(frozen=True)
class ModelSpec(Record):
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
        second_difference: How much of it DPM-Solver++(3M) takes: the "whole", of third order, or "half", as diffusers.
            Unless "never", DPM-Solver++(3M)'s row before it is one of (2M) in such runs.
        to_bytes: How [−1, 1] becomes 0 … 255: to the nearest ("round") or the next lower one ("truncate").
        to_unit: What pictures are in terms of the state x: x/2 + ½ within [0, 1] ("clamp"), x/2 + ½ as it is
            ("affine"), or x itself, of a network that was trained on [0, 1] ("identity").
        self_condition: The network takes the previous step's x̂_0 as well, zeros in the first step, as its keyword
            argument x_self_cond (Chen et al. 2023, "Analog bits", sec. 2.3).
        condition_channels: Channels C' that the network takes behind x's, the same in all steps: a picture to enlarge,
            to restore, to translate; 0 for none.
        condition_scale: Pictures of 1/condition_scale of the size may be given as the condition; they are enlarged
            bilinearly (OpenAI's super-resolution networks).
        ddim_steps: Steps of DDIM runs that say neither steps nor timesteps; None leaves it to the sampler.
        ddim_eta: η of DDIM runs that do not say it, in [0, 1].
    """

    shape: tuple[_Count, _Count, _Count]
    prediction: Prediction = "eps"
    variance: Variance = "fixed_small"
    clip: _Positive | None = 1.0
    num_classes: _Count | None = None
    null_class: Annotated[int, Within(0)] | None = None
    class_names: tuple[str, ...] | None = None
    time_scale: _Positive = 1.0
    clipped_eps: Literal["rederive", "raw"] = "rederive"
    threshold: tuple[Annotated[float, Within(0, 1, above=True)], Annotated[float, Within(1)]] | None = None
    noise_gate: Literal["final", "t0"] = "final"
    prev_timestep: Literal["next", "stride", "chain"] = "next"
    final_alpha_to_one: bool = True
    spacing: Literal["leading", "trailing", "linspace", "linspace_x0"] | None = None
    steps_offset: Annotated[int, Within(0)] = 0
    respacing: str = ""
    dpmpp_clips: bool = True
    lower_order_final: Literal["never", "short", "always"] = "never"
    second_difference: Literal["whole", "half"] = "whole"
    to_bytes: Literal["round", "truncate"] = "round"
    to_unit: Literal["clamp", "affine", "identity"] = "clamp"
    self_condition: bool = False
    condition_channels: Annotated[int, Within(0, 2**20)] = 0
    condition_scale: _Count = 1
    ddim_steps: _Count | None = None
    ddim_eta: Annotated[float, Within(0, 1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"ModelSpec: class_names must be {self.num_classes} names or null, got {self.class_names}")

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output has 2C channels."""
        return self.variance == "learned_range"

    def times_fed(self, t: Tensor) -> Tensor:
        """What the network is fed for training steps t: t · time_scale, and t itself, integers, where that is 1."""
        return t if self.time_scale == 1.0 else t.to(torch.float32) * self.time_scale
