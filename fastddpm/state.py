"""State and advance: a batch of samples under way, and the one function that moves it a step.

`advance` reads and changes nothing but its arguments, so it can be called eagerly, compiled, captured or exported, and
whoever drives it decides which samples are in the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastddpm.denoiser import Denoiser
from fastddpm.kernels.p_sample import p_sample
from fastddpm.noise import initial_noise, seed_bits
from fastddpm.solvers import dynamic_bound
from fastddpm.step_table import StepTable


@dataclasses.dataclass
class State:
    """A batch of samples under way, each at its own row of the table.

    Attributes:
        x: float32 [B, C, H, W], contiguous: x_t of each sample.
        step: int64 [B], the next row of each sample; S (the number of steps) when it is finished.
        sample_id: int64 [B], 64-bit patterns.
        seed: int64 [B], 64-bit patterns.
        labels: int64 [B], classes, or None for networks without.
        guidance: float32 [B], scales of classifier-free guidance, or None for none.
        history: float32 [B, C, H, W], the previous step's x̂_0, zeros before the first, for multistep solvers,
            self-conditioned networks and previews, or None.
    """

    x: Tensor
    step: Tensor
    sample_id: Tensor
    seed: Tensor
    labels: Tensor | None = None
    guidance: Tensor | None = None
    history: Tensor | None = None

    @classmethod
    def create(
        cls,
        shape: tuple[int, int, int],
        sample_ids: Tensor,
        seed: int,
        *,
        device: torch.device,
        x_T: Tensor | None = None,
        labels: Tensor | None = None,
        guidance: Tensor | None = None,
        history: bool = False,
    ) -> State:
        """Samples at the start of their run: x_T, all clocks at 0.

        Args:
            shape: (C, H, W).
            sample_ids: int64 [B], 64-bit patterns.
            seed: in [0, 2**64).
            device: where the samples live.
            x_T: float [B, C, H, W] to start from instead of Philox noise; it is copied.
            labels: int64 [B].
            guidance: float [B].
            history: whether to keep x̂_0.

        Returns:
            The new state.
        """
        ids = sample_ids.to(device)
        seeds = torch.full_like(ids, seed_bits(seed))
        x = initial_noise(seeds, ids, shape) if x_T is None else x_T.to(device, torch.float32, copy=True).contiguous()
        return cls(
            x,
            torch.zeros_like(ids),
            ids,
            seeds,
            None if labels is None else labels.to(device),
            None if guidance is None else guidance.to(device, torch.float32),
            torch.zeros_like(x) if history else None,
        )

    def copy(self) -> State:
        """The same samples in memory of their own."""
        copies: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            copies[field.name] = None if value is None else value.clone()
        return State(**copies)

    def put(self, slots: Tensor, other: State) -> None:
        """Replace the samples in `slots` (int64 [K]) by those of `other` (K samples), in place.

        This is how a new sample joins a running batch: finished slots are handed to it.

        Raises:
            ValueError: one state has labels, guidance or history and the other has not.
        """
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"State.put: both states must have {field.name} or neither; create them alike")
            if mine is not None:
                mine.index_copy_(0, slots, theirs)


def advance(denoiser: Denoiser, table: StepTable, state: State, *, noise: Tensor | None = None) -> None:
    """One reverse step of every sample of the batch, in place: the network, then the fused update.

    A finished sample (step = S) stays as it is. Called again and again with the same objects, this gives the whole
    trajectory: all that changes lives in `state`'s tensors.

    Args:
        denoiser: the network, bound to the table's timesteps.
        table: the solver's rows, on the state's device.
        state: the samples; x, step and history are changed.
        noise: float32 [N, B, C, H, W] instead of Philox: row min(step, N−1) is used.

    Raises:
        ValueError: the table is for a learned variance and the network returns none, or the network is self-conditioned
            and the state keeps no history.
    """
    if denoiser.self_condition and state.history is None:
        raise ValueError(
            "advance: state must have a history for a self-conditioned network, got None; create it with one"
        )
    out, out_uncond = denoiser.predict(
        state.x, state.step, state.labels, guided=state.guidance is not None, x_self_cond=state.history
    )
    channels = state.x.shape[1]
    if table.variance == "learned_range" and out.shape[1] != 2 * channels:
        raise ValueError(
            f"advance: the network must return {2 * channels} channels for learned_range, got {out.shape[1]}; "
            "use a fixed variance"
        )
    bound = None
    if table.threshold is not None:
        combined = out
        if out_uncond is not None and state.guidance is not None:
            combined = out_uncond + state.guidance[:, None, None, None] * (out - out_uncond)
        bound = dynamic_bound(state.x, combined, table.rows[state.step.clamp(max=table.S)], table.threshold)
    p_sample(
        state.x,
        out,
        table.rows,
        table.timesteps,
        state.step,
        state.step.clamp(table.S, table.S),  # a constant would be folded, which a pretended GPU cannot do
        state.sample_id,
        state.seed,
        noise=noise,
        out_uncond=out_uncond,
        guidance=state.guidance,
        history=state.history,
        bound=bound,
        stochastic=table.uses_noise,
    )
    state.step.add_(1).clamp_(max=table.S)
