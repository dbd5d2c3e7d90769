"""LikelihoodTable: the terms of the variational bound as numbers, a row each, in float64 and rounded once.

For row i, which leads from timestep t to prev, with x_t = signal · x_0 + spread · ε and the network's output `out`:

    x̂_0       = clip(a_x · x_t + a_o · out, −bound, +bound)
    log σ²    = log_true + excess,   excess = log_excess + log_slope · v
    term      = KL(N(scale · (x̂_0 − x_0), 1) ‖ N(0, exp(excess)))
    (ε̂ − ε)² = snr · (x̂_0 − x_0)²

in which v is the network's second half of channels (Nichol & Dhariwal 2021, eq. 15), and 0 elsewhere. The term is that
of Ho et al. 2020, eq. 5, in units of the posterior's own deviation, in which rounding costs least; of the means (eq. 7)
only x_0's part is left, for that of x_t is the same in both. The row that leads to x_0 `decodes`: its term is the
discretised decoder's of N(x̂_0, σ²) (eq. 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack, get_args

import torch
from torch import Tensor

from fastddpm.common.arguments import only_options
from fastddpm.kernels.philox import LIKELIHOOD
from fastddpm.process.ddpm import clipped_log
from fastddpm.process.outline import Estimate, Outline
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Variance
from fastddpm.process.table import DynamicThreshold, check_choice

LIKELIHOOD_COLUMNS = (
    "a_x", "a_o", "scale", "signal", "spread", "snr", "decodes", "bound", "log_excess", "log_slope", "log_true",
)  # fmt: skip
"""The columns of a row, in their order in memory. A book keeps them beside solvers' rows: they are no more than
`fastddpm.kernels.operands.COLUMNS`, and what is called alike stands in the same place."""


@dataclass(frozen=True, eq=False)
class LikelihoodTable:
    """The rows of a bound over S timesteps.

    Attributes:
        rows: float32 [S+1, len(LIKELIHOOD_COLUMNS)]; row S is where pictures stay that are done: all 0, but for an
            infinite bound.
        timesteps: int64 [S+1], the training timestep of each row; row S holds 0.
        variance: kind of the model's variance.
        threshold: dynamic thresholding, or None.
    """

    rows: Tensor
    timesteps: Tensor
    variance: Variance
    threshold: DynamicThreshold | None

    @property
    def counters(self) -> Tensor:
        """int64 [S+1], each row's noise counter: its timestep, in the domain of likelihoods."""
        return self.timesteps + LIKELIHOOD

    @property
    def S(self) -> int:
        """Number of timesteps."""
        return len(self.timesteps) - 1


def likelihood_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    variance: Variance = "fixed_small",
    **estimate: Unpack[Estimate],
) -> LikelihoodTable:
    """The bound over all timesteps, or over any of them (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, eq. 19).

    Over some of them β_t = 1 − ᾱ_t/ᾱ_prev. Where β̃ is 0, on the row that leads to x_0, the row before lends its own;
    so it does to the large variance, as in Ho et al.'s code: with β_0 the decoder would pay for it.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        variance: the model's σ²; "learned_range" needs a network with 2C output channels.
        estimate: prediction and clip, see `fastddpm.process.outline.Estimate`.

    Returns:
        The table, on the CPU.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    check_choice("likelihood", "variance", variance, get_args(Variance))
    only_options("likelihood_table", estimate, Estimate)
    outline = Outline.of("likelihood", schedule, timesteps, **estimate)
    a_t, a_prev = outline.a_t, outline.a_prev
    beta = 1.0 - a_t / a_prev
    log_true = clipped_log((1.0 - a_prev) / (1.0 - a_t) * beta, beta, torch.zeros_like(beta))
    large = beta.log() - log_true
    learned, decodes = variance == "learned_range", outline.prev < 0
    fixed = torch.where(decodes, 0.0, large) if variance == "fixed_large" else torch.zeros_like(large)
    columns = outline.x_start_columns() | {
        "scale": a_prev.sqrt() * beta / (1.0 - a_t) * (-0.5 * log_true).exp(),
        "signal": a_t.sqrt(),
        "spread": (1.0 - a_t).sqrt(),
        "snr": a_t / (1.0 - a_t),
        "decodes": decodes.double(),
        "log_excess": large / 2 if learned else fixed,
        "log_slope": large / 2 if learned else torch.zeros_like(large),
        "log_true": log_true,
    }
    rows = outline.rounded(columns, LIKELIHOOD_COLUMNS)
    return LikelihoodTable(rows, outline.timesteps, variance, outline.threshold)
