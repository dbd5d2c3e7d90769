"""GuidedStep: a step that a classifier's gradient guides (Dhariwal & Nichol 2021, Algorithms 1 and 2).

Both algorithms come to the same: with g = ∇ log p(y|x_t) a row's x_{t−1} is moved by k · g and its x̂_0 by s · g, the
numbers of `StepTable.guides`. Ancestral sampling moves the mean, so that k is the variance, the network's own where it
is learned, and s is 0. DDIM replaces ε by ε − √(1−ᾱ_t) g, which moves x̂_0 by s = (1−ᾱ_t)/√ᾱ_t g and x_{t−1} by what
the row makes of both; DPM-Solver++ sees the moved x̂_0 alone, in this row and in those that look back at it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastddpm.kernels.operands import COLUMNS, Operands
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable
from fastddpm.step.step import Step, StepForm

ConditionFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [B, C, H, W], t [B] as the network is fed it, y int64 [B] or None) → ∇ log p(y|x), [B, C, H, W]."""


@dataclasses.dataclass(frozen=True)
class Guide:
    """What guides the samples of one batch.

    Attributes:
        cond_fn: the gradient.
        labels: int64 [B], what it is told as y, or None.
        rows: float32 [S+1, 2], the run's `StepTable.guides`, on the samples' device.
        times: [S+1], what the network is fed as t in each row, likewise.
    """

    cond_fn: ConditionFunction
    labels: Tensor | None
    rows: Tensor
    times: Tensor

    @classmethod
    def of(
        cls,
        cond_fn: ConditionFunction,
        labels: Tensor | None,
        table: StepTable,
        spec: ModelSpec,
        device: torch.device,
    ) -> Guide:
        """The guide of a batch of a run.

        Raises:
            ValueError: a classifier cannot guide such rows.
        """
        rows, times = guides_of(table).to(device), spec.times_fed(table.timesteps.to(device))
        return cls(cond_fn, None if labels is None else labels.to(device), rows, times)

    def places(self, row: Tensor, end: Tensor) -> Tensor:
        """Where samples at rows of the book, int64 [B], are in the run: the book's chapter ends where the run does."""
        return (len(self.rows) - 1 - end + row).clamp(min=0)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """The gradient at x [B, C, H, W] and what the network is fed as t [B], float32.

        Raises:
            TypeError: what the function returns is no tensor of floats.
            ValueError: it has another shape.
        """
        found: object = self.cond_fn(x, t, self.labels)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"sample: cond_fn must return a tensor of floats, got {got}; return the gradient")
        if found.shape != x.shape:
            raise ValueError(
                f"sample: cond_fn must return a gradient of x's shape {tuple(x.shape)}, got {tuple(found.shape)}"
            )
        return found.detach().to(x.device, torch.float32)


class GuidedStep(Step):
    """A step after whose update the samples are moved along a gradient; for eager runs of one batch.

    Everything about the update is the plain step's. A classifier may be any code, so that nothing here is compiled.
    """

    eager_because = "a classifier's gradient is made in Python"

    def __init__(self, network: nn.Module, form: StepForm, guide: Guide) -> None:
        """Join a network, a form and what guides the batch.

        Args:
            network: as in `Step`.
            form: as in `Step`.
            guide: of the batch whose samples the step is given.
        """
        super().__init__(network, form)
        self.guide = guide

    def formed(self, form: StepForm) -> GuidedStep:
        """See `Step.formed`."""
        return GuidedStep(self.network, form, self.guide)

    def update(self, given: Operands) -> tuple[Tensor, ...]:
        """See `Step.update`; afterwards x_{t−1} and x̂_0 are moved."""
        # All that is read of x and of the clock is read before the update, which may be in place.
        row = torch.minimum(given.step, given.end)
        place = self.guide.places(row, given.end)
        gradient = self.guide.gradient(given.x, self.guide.times[place])
        gradient = torch.where((row < given.end)[:, None, None, None], gradient, 0.0)
        of_drawn = gradient if given.mask is None else gradient * given.mask  # what is known stays where it is
        of_x, of_x_start = (move[:, None, None, None] for move in self.guide.rows[place].unbind(1))
        if self.form.learned:
            of_x = of_x * _variance(given.out[:, given.x.shape[1] :].float(), given.table[row])
        changed = super().update(given)
        changed[0].addcmul_(of_x, of_drawn)
        if self.form.history:
            changed[2].addcmul_(of_x_start, gradient)
        return changed


def guides_of(table: StepTable) -> Tensor:
    """What a gradient adds in each row of a table, float32 [S+1, 2].

    Raises:
        ValueError: the rows are not of a reverse run, or one starts where there is no signal.
    """
    if table.guides is None:
        raise ValueError("sample: cond_fn must be left out for such steps, got one; no classifier can guide them")
    bad = (~table.guides.isfinite()).any(1).nonzero()
    if bad.numel():
        raise ValueError(
            f"sample: cond_fn needs some signal at every timestep, got none at t={int(table.timesteps[bad[0, 0]])} "
            "(zero terminal SNR); leave that timestep out, or use solver='ddpm'"
        )
    return table.guides


def _variance(v: Tensor, rows: Tensor) -> Tensor:
    """The learned variance exp(f log β + (1−f) log β̃), f = (v+1)/2 (Nichol & Dhariwal 2021, eq. 15), [B, C, H, W]."""
    log_beta, log_beta_tilde = (
        rows[:, COLUMNS.index(name)][:, None, None, None] for name in ("log_beta", "log_beta_tilde")
    )
    fraction = (v + 1.0) / 2.0
    return torch.exp(fraction * log_beta + (1.0 - fraction) * log_beta_tilde)
