"""RowNetwork: what U-Nets have in common whose dependence on time and class is one row of numbers for all blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastddpm.nets.config import UNetConfig
from fastddpm.nets.lucidrains_config import LucidrainsConfig


class RowNetwork(nn.Module):
    """Half of a `fastddpm.step.network.Network`: what is asked before a run; a subclass has `body` and `cast`."""

    config: UNetConfig | LucidrainsConfig
    kind: Literal["unet", "lucidrains"]
    """What its structure is called in a checkpoint of fastddpm's own."""

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """All blocks' projections of timesteps t and classes y.

        Args:
            t: Timesteps as the network was trained to be fed, [B], integer or float.
            y: int64 [B], classes; required if and only if the network has them. Where there is a row for "no class", it
                is the last.

        Returns:
            [B, D], the input of `body`.

        Raises:
            ValueError: If y is missing or superfluous.
        """
        if (y is None) != (self.config.num_classes is None):
            wanted, got = ("no labels", "labels") if y is not None else ("labels y", "none")
            raise ValueError(f"{type(self).__name__}: y must be {wanted} here, got {got}")
        return self._projected(self._embedded(t), y)

    @torch.no_grad()
    def tabulate(self, times: Tensor, label: int | None = None) -> Tensor:
        """What `body` has to know of each row of a step table.

        Args:
            times: the value of t that is fed at each row, [R], integer or float.
            label: the class that all rows are for; None for networks without classes, or where `body` is told.

        Returns:
            [R, D], the projections; without label, for networks with classes, [R, E], the embeddings of the times.
        """
        if self.config.num_classes is None:
            return self.embed(times)
        if label is None:
            return self._embedded(times)
        return self.embed(times, torch.full((len(times),), label, dtype=torch.int64, device=times.device))

    def identity(self) -> str:
        """All that tells networks of the same weights apart."""
        return repr(self.config)

    def _embedded(self, t: Tensor) -> Tensor:
        """The embeddings [B, E] of timesteps [B], without class."""
        raise NotImplementedError

    def _projected(self, embedding: Tensor, y: Tensor | None) -> Tensor:
        """All blocks' projections [B, D] of embeddings [B, E] and classes [B]."""
        raise NotImplementedError
