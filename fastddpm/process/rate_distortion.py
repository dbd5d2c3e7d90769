"""What a model says of a whole data set: its mean bound, and the rates and distortions of progressive coding."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastddpm.process.likelihood import Likelihood


@dataclasses.dataclass(frozen=True, eq=False)
class LikelihoodSums:
    """Sums over pictures, to which others may be added: memory does not grow with their number, but for `total_bpd`.

    Attributes:
        timesteps: int64 [S], descending.
        total_bpd: float32 [N], each picture's bound.
        prior_bpd: float64 [], summed over the pictures.
        vlb: float64 [S], likewise; and so are the others.
        x_start_mse: float64 [S].
        eps_mse: float64 [S].
    """

    timesteps: Tensor
    total_bpd: Tensor
    prior_bpd: Tensor
    vlb: Tensor
    x_start_mse: Tensor
    eps_mse: Tensor

    @classmethod
    def of(cls, found: Likelihood) -> LikelihoodSums:
        """The sums over one batch, on the CPU."""
        prior, vlb, x_start_mse, eps_mse = (
            values.cpu().double().sum(0) for values in (found.prior_bpd, found.vlb, found.x_start_mse, found.eps_mse)
        )
        return cls(found.timesteps.cpu(), found.total_bpd.cpu(), prior, vlb, x_start_mse, eps_mse)

    def __add__(self, other: LikelihoodSums) -> LikelihoodSums:
        """The sums over the pictures of both, in this order."""
        return LikelihoodSums(
            self.timesteps,
            torch.cat((self.total_bpd, other.total_bpd)),
            self.prior_bpd + other.prior_bpd,
            self.vlb + other.vlb,
            self.x_start_mse + other.x_start_mse,
            self.eps_mse + other.eps_mse,
        )

    @property
    def n(self) -> int:
        """How many pictures."""
        return len(self.total_bpd)

    @property
    def bits_per_dim(self) -> float:
        """The mean bound."""
        return float((self.prior_bpd + self.vlb.sum()) / self.n)

    @property
    def standard_error(self) -> float | None:
        """Of the mean bound, from the spread of the pictures; None of a single one."""
        return None if self.n < 2 else float(self.total_bpd.double().std()) / math.sqrt(self.n)

    def rates(self) -> Tensor:
        """What has been sent when the receiver has x_t, for each timestep: float64 [S], bits per dimension.

        L_T + Σ_{s > t} L_{s−1}: progressive coding sends x_T, and then each x_{t−1} given x_t (Ho et al. 2020,
        sec. 4.3, Algorithms 3 and 4). The last row's own term, the decoder's, buys the rest, without loss.
        """
        return (self.prior_bpd + self.vlb.cumsum(0) - self.vlb) / self.n

    def distortions(self, levels: float = 127.5) -> Tensor:
        """What the receiver's estimate x̂_0 of that x_t is off, float64 [S]: the root of the mean square, of 255 levels.

        Args:
            levels: in one unit of the network's range: 127.5 where it is [−1, 1], 255 where it is [0, 1].
        """
        return levels * (self.x_start_mse / self.n).sqrt()
