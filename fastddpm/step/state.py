"""State: a batch of samples under way, each at its own row of the book."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm.process.noise import initial_noise, seed_bits


@dataclasses.dataclass
class State:
    """A batch of samples under way.

    Attributes:
        x: float32 [B, C, H, W], contiguous: x_t of each sample.
        step: int64 [B], each sample's clock: the book's row that it makes next.
        end: int64 [B], the identity row of each sample's chapter; a sample whose clock is there is finished and stays.
        sample_id: int64 [B], 64-bit patterns.
        seed: int64 [B], 64-bit patterns.
        labels: int64 [B], classes, where the network is told of them in each step; None where the rows hold them.
        uncond: int64 [B], what to add to `step` for the row of the same timestep without class, where the rows hold
            the classes and the run is guided; or None.
        guidance: float32 [B], scales of classifier-free guidance, or None for none.
        history: float32 [B, C, H, W], the previous step's x̂_0, zeros before the first, or None where nobody reads it.
        history2: float32 [B, C, H, W], that of the step before it, likewise.
        terms: float32 [B, 3], what the last step found out of each picture, in the order of
            `fastddpm.step.likelihood.TERMS`, where x is pictures whose likelihood is asked for; or None.
        known: float32 [B, C, H, W], pictures of which a part is known, in the network's range, or None.
        mask: float32 [B, C, H, W], with `known`: 1 where they are to be drawn, 0 where they are known.
        condition: float32 [B, C', H, W], contiguous: what a network with more input than output channels sees behind x,
            the same in all steps; or None.
    """

    x: Tensor
    step: Tensor
    end: Tensor
    sample_id: Tensor
    seed: Tensor
    labels: Tensor | None = None
    uncond: Tensor | None = None
    guidance: Tensor | None = None
    history: Tensor | None = None
    history2: Tensor | None = None
    terms: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    condition: Tensor | None = None

    @classmethod
    def create(
        cls,
        shape: tuple[int, int, int],
        sample_ids: Tensor,
        seed: int,
        places: Places,
        *,
        x_T: Tensor | None = None,
        history: bool = False,
    ) -> State:
        """Samples at the start of their run: x_T, each clock at its chapter's first row; `replace` adds what is told.

        Args:
            shape: (C, H, W).
            sample_ids: int64 [B], 64-bit patterns.
            seed: in [0, 2**64).
            places: where in the book the samples begin and end; their device is the state's.
            x_T: float [B, C, H, W] to start from instead of Philox noise; it is copied.
            history: whether to keep x̂_0.

        Returns:
            The new state.
        """
        device = places.step.device
        ids = sample_ids.to(device)
        seeds = torch.full_like(ids, seed_bits(seed))
        x = initial_noise(seeds, ids, shape) if x_T is None else x_T.to(device, torch.float32, copy=True)
        x = x.contiguous()
        return cls(
            x,
            places.step.clone(),
            places.end.clone(),
            ids,
            seeds,
            uncond=None if places.uncond is None else places.uncond.clone(),
            history=torch.zeros_like(x) if history else None,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what there is, in the order of the attributes."""
        for name, value in vars(self).items():
            if value is not None:
                yield name, value

    def copy(self) -> State:
        """The same samples in memory of their own."""
        return State(**{name: value.clone() for name, value in self.tensors()})

    def put(self, slots: Tensor | slice, other: State) -> None:
        """Replace the samples in `slots` (int64 [K], or a slice) by those of `other` (K samples), in place.

        This is how a new sample joins a running batch: finished slots are handed to it.

        Raises:
            ValueError: one state has labels, guidance, history or a condition and the other has not.
        """
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"State.put: both states must have {name} or neither; create them alike")
            if mine is not None:
                mine[slots] = theirs


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the samples of a batch begin and end in the book.

    Attributes:
        step: int64 [B], the first row of each sample's chapter.
        end: int64 [B], its identity row.
        uncond: int64 [B], from there to the same row of the chapter without class, or None.
    """

    step: Tensor
    end: Tensor
    uncond: Tensor | None = None
