"""StepTable: a sampling run as numbers, one row of coefficients per step and a last row that changes nothing.

For row i at timestep t, with the network's output `out`, the previous row's estimate `history` and that of the row
before it, `history2`:

    x̂_0     = clip(a_x · x_t + a_o · out, −bound, +bound)
    x_{t−1} = c_0 · x̂_0 + c_x · x_t + c_o · out + c_h · history + c_h2 · history2 + sd · z

and where a part of the picture is known (inpainting), that part is k_0 · known + k_z · z instead, of the level where
the row lands.

`sd` is sigma, times exp(½ (f · log_beta + (1 − f) · log_beta_tilde)) with f = (v + 1)/2 if the network
also returns a variance v (Nichol & Dhariwal 2021, eq. 15). Rows whose variance is not learned hold 0 in
both logs, so that the factor is 1: such tables drive networks with C and with 2C output channels alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fastddpm.common.arguments import number
from fastddpm.kernels.operands import COLUMNS
from fastddpm.process.spec import Prediction, Variance

Solver = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"]
MULTISTEP: tuple[Solver, ...] = ("dpmpp_2m", "dpmpp_3m")
"""Solvers whose rows read the estimates of x_0 of the rows before; all are deterministic."""

_COLUMN = {name: i for i, name in enumerate(COLUMNS)}


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of x̂_0 (Saharia et al. 2022, sec. 2.3).

    s = the ratio-quantile of |x̂_0| within a sample, limited to [1, max_value]; x̂_0 ← clip(x̂_0, −s, s)/s.

    Attributes:
        ratio: the quantile, in (0, 1].
        max_value: upper limit of s, at least 1.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is out of range.
    """

    ratio: float = 0.995
    max_value: float = math.inf

    def __post_init__(self) -> None:
        """Validate both numbers."""
        for name in ("ratio", "max_value"):
            object.__setattr__(self, name, number("DynamicThreshold", name, getattr(self, name)))
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"DynamicThreshold: ratio must be in (0, 1], got {self.ratio}; the usual is 0.995")
        if not self.max_value >= 1.0:
            raise ValueError(
                f"DynamicThreshold: max_value must be at least 1, got {self.max_value}; 1 is plain clipping"
            )


def dynamic_bound(x: Tensor, out: Tensor, rows: Tensor, threshold: DynamicThreshold) -> Tensor:
    """The bound s of dynamic thresholding for each sample (Saharia et al. 2022, sec. 2.3).

    s = min(max(quantile_ratio |a_x · x + a_o · out|, 1), max_value), the quantile interpolated linearly.

    Uses only operations that export to ONNX: no `quantile`, no branch on data.

    Args:
        x: float [B, C, H, W], the state x_t.
        out: float [B, C or 2C, H, W], the network's output after guidance; a variance half is ignored.
        rows: float32 [B, len(COLUMNS)], the table's row of each sample.
        threshold: ratio and upper limit.

    Returns:
        float32 [B], at least 1.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    B, C = x.shape[:2]
    if rows.shape != (B, len(COLUMNS)) or out.shape[0] != B or out.shape[2:] != x.shape[2:] or out.shape[1] < C:
        raise ValueError(
            f"dynamic_bound: out and rows must fit x {tuple(x.shape)}, got {tuple(out.shape)} and "
            f"{tuple(rows.shape)}; pass the network's output and one table row per sample"
        )
    a_x, a_o = (rows[:, _COLUMN[name]].reshape(-1, 1) for name in ("a_x", "a_o"))
    x_start = a_x * x.float().flatten(1) + a_o * out[:, :C].float().flatten(1)
    n = x_start.shape[1]
    rank = threshold.ratio * (n - 1)
    low = min(int(rank), n - 1)
    # The n − low largest values in descending order end with the order statistics low+1 and low.
    top = x_start.abs().topk(n - low, dim=1).values
    below, above = top[:, n - low - 1], top[:, max(n - low - 2, 0)]
    quantile = below + (rank - low) * (above - below)
    limit = threshold.max_value
    return quantile.clamp(min=1.0) if math.isinf(limit) else quantile.clamp(min=1.0, max=limit)


@dataclass(frozen=True, eq=False)
class StepTable:
    """The S steps of a run as coefficients.

    Attributes:
        rows: float32 [S+1, len(COLUMNS)], columns in the order of `fastddpm.kernels.operands.COLUMNS`;
            row S is the identity (c_x = 1, bound = ∞, all else 0).
        timesteps: int64 [S+1]; the training timestep of each row; row S holds 0.
        counters: int64 [S+1]; the counter t of each row's noise: its timestep, and more where the run comes back to one
            (`fastddpm.kernels.philox.VISIT`).
        prediction: what the network returns: "eps", "x_start" or "v".
        variance: "learned_range" needs a network with 2C output channels; the others work with C or 2C.
        solver: the method that made the rows.
        history: how many of the previous estimates of x_0 some row reads, 0, 1 or 2.
        uses_noise: some row adds noise.
        threshold: dynamic thresholding, whose bound per sample replaces the column `bound`; or None.
        guides: float32 [S+1, 2]: what a unit of a classifier's gradient ∇ log p(y|x_t) adds to x_{t−1} and to x̂_0 in
            each row, where the variance is learned times that variance; or None for rows that no classifier can guide.

    Raises:
        TypeError: rows, timesteps or counters have the wrong dtype.
        ValueError: a shape is wrong, a coefficient is not finite, or a name is unknown.
    """

    rows: Tensor
    timesteps: Tensor
    counters: Tensor
    prediction: Prediction
    variance: Variance
    solver: Solver
    history: int
    uses_noise: bool
    threshold: DynamicThreshold | None = None
    guides: Tensor | None = None

    def __post_init__(self) -> None:
        """Validate: a table that exists can be run."""
        whole = {self.timesteps.dtype, self.counters.dtype}
        if self.rows.dtype != torch.float32 or whole != {torch.int64}:
            raise TypeError(
                "StepTable: rows must be float32, timesteps and counters int64, got "
                f"{self.rows.dtype}, {self.timesteps.dtype} and {self.counters.dtype}; use make_table"
            )
        S1 = self.timesteps.numel()
        if S1 < 2 or self.timesteps.ndim != 1 or self.rows.shape != (S1, len(COLUMNS)):
            raise ValueError(
                f"StepTable: rows must be [S+1, {len(COLUMNS)}] and timesteps [S+1] with S ≥ 1, got "
                f"{tuple(self.rows.shape)} and {tuple(self.timesteps.shape)}; use make_table"
            )
        if self.counters.shape != self.timesteps.shape:
            raise ValueError(
                f"StepTable: counters must be one for each of the {S1} timesteps, got {tuple(self.counters.shape)}; "
                "use make_table"
            )
        if self.guides is not None and self.guides.shape != (S1, 2):
            raise ValueError(
                f"StepTable: guides must be [S+1, 2] or None, got {tuple(self.guides.shape)}; use make_table"
            )
        for name, value, kind in (
            ("prediction", self.prediction, Prediction),
            ("variance", self.variance, Variance),
            ("solver", self.solver, Solver),
        ):
            check_choice("StepTable", name, value, get_args(kind))

    @property
    def S(self) -> int:
        """Number of sampling steps."""
        return self.timesteps.numel() - 1

    def to(self, device: torch.device | str) -> StepTable:
        """The same table with its tensors on `device`."""
        guides = None if self.guides is None else self.guides.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("rows", "timesteps", "counters")}
        return replace(self, **moved, guides=guides)

    def row(self, i: int) -> dict[str, float]:
        """Row i, 0 … S, as column → number, for reading and for tests.

        Raises:
            IndexError: i is not in 0 … S.
        """
        if not 0 <= i <= self.S:
            raise IndexError(f"StepTable.row: i must be in 0 … {self.S}, got {i}; row {self.S} is the identity")
        return dict(zip(COLUMNS, self.rows[i].tolist(), strict=True))


def check_choice(function: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}, got {value!r}; pick one of them")
