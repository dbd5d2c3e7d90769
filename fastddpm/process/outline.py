"""Outline: what a table's rows have in common whatever the solver: their ends, ᾱ there, and how x̂_0 is had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.common.arguments import integers, number, only_options
from fastddpm.kernels.operands import COLUMNS
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction, Variance
from fastddpm.process.table import DynamicThreshold, Solver, StepTable, check_choice
from fastddpm.process.timesteps import check_timesteps

_COLUMN = {name: i for i, name in enumerate(COLUMNS)}


class Estimate(TypedDict, total=False):
    """How x̂_0 is had.

    Attributes:
        prediction: what the network returns; default "eps".
        clip: bound of |x̂_0|, above 0; None for none; a DynamicThreshold for a bound per sample. Default 1.
    """

    prediction: Prediction
    clip: float | DynamicThreshold | None


class RowOptions(Estimate, total=False):
    """What the tables of all solvers take besides the schedule and the timesteps: `Estimate`, and where rows lead.

    Attributes:
        prev_timesteps: int [S], where each row leads: −1 (x_0) or below the row's timestep. Default, and None: the next
            timestep, −1 for the last. diffusers' DDIM takes max(t − T // S, −1).
    """

    prev_timesteps: Tensor | Sequence[int] | None


@dataclass(frozen=True)
class Outline:
    """What rows have in common whatever the solver.

    Attributes:
        function: name that starts the error messages.
        t: int64 [S], where each row starts.
        prev: int64 [S], where it leads; −1 is x_0.
        a_t: float64 [S], ᾱ at t.
        a_prev: float64 [S], ᾱ at prev.
        a_before: float64 [S], ᾱ at t − 1, and 1 before t = 0.
        prediction: what the network returns.
        clip: bound of |x̂_0|, None, or a DynamicThreshold.
    """

    function: str
    t: Tensor
    prev: Tensor
    a_t: Tensor
    a_prev: Tensor
    a_before: Tensor
    prediction: Prediction = "eps"
    clip: float | DynamicThreshold | None = 1.0

    @classmethod
    def of(
        cls,
        function: str,
        schedule: NoiseSchedule,
        timesteps: Tensor | Sequence[int],
        final_alpha_to_one: bool = True,
        /,
        prev_timesteps: Tensor | Sequence[int] | None = None,
        **estimate: Unpack[Estimate],
    ) -> Outline:
        """Validate the timesteps and look up ᾱ.

        Args:
            function: name that starts the error messages.
            schedule: the schedule that the network was trained with.
            timesteps: int [S], strictly descending, in 0 … T−1.
            final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0.
            prev_timesteps: see `RowOptions`.
            estimate: see `Estimate`.

        Raises:
            TypeError: timesteps are not integers, or there is no such option.
            ValueError: a list is of another form.
        """
        only_options(function, estimate, RowOptions)
        t = check_timesteps(function, schedule.T, timesteps)
        if prev_timesteps is None:
            prev = torch.cat([t[1:], t.new_tensor([-1])])
        else:
            try:
                prev = integers(function, "prev_timesteps", prev_timesteps)
            except TypeError as error:  # one kind of error, whatever is wrong with such a list
                raise ValueError(str(error)) from error
            if prev.shape != t.shape or bool(((prev >= t) | (prev < -1)).any()):
                raise ValueError(
                    f"{function}: prev_timesteps must be {t.numel()} integers, each −1 or between 0 and its timestep, "
                    f"got {prev.flatten().tolist()[:8]} for {t.tolist()[:8]}; use −1 for x_0"
                )
        alpha_bar = schedule.alphas_cumprod_exact
        final = 1.0 if final_alpha_to_one else float(alpha_bar[0])
        a_prev = torch.where(prev >= 0, alpha_bar[prev.clamp(min=0)], final)
        before = torch.where(t > 0, alpha_bar[(t - 1).clamp(min=0)], 1.0)
        return cls(function, t, prev, alpha_bar[t], a_prev, before, **estimate)

    def known_columns(self) -> dict[str, Tensor]:
        """k_0 and k_z of what is known of x_0, noised to where a row lands: √ᾱ_prev and √(1−ᾱ_prev), 1 and 0 at x_0.

        Lugmayr et al. 2022, eq. 8a.

        Returns:
            Column → float64 [S].
        """
        level = torch.where(self.prev >= 0, self.a_prev, 1.0)
        return {"k_0": level.sqrt(), "k_z": (1.0 - level).sqrt()}

    def x_start_shift(self) -> Tensor:
        """What a unit of a classifier's gradient adds to x̂_0, float64 [S]: (1−ᾱ_t)/√ᾱ_t, infinite where ᾱ_t = 0.

        With ε − √(1−ᾱ_t) ∇ log p(y|x_t) for ε (Dhariwal & Nichol 2021, Algorithm 2).
        """
        return (1.0 - self.a_t) / self.a_t.sqrt()

    def x_start_columns(self) -> dict[str, Tensor]:
        """a_x and a_o of x̂_0 = a_x x_t + a_o out: Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D.

        Where the network returns the mean of x_{t−1}, Ho et al.'s eq. 7 is solved for x_0.

        Returns:
            Column → float64 [S].

        Raises:
            ValueError: the prediction is unknown, or is ε and ᾱ_t = 0.
        """
        prediction = self.prediction
        check_choice(self.function, "prediction", prediction, get_args(Prediction))
        signal, noise = self.a_t.sqrt(), (1.0 - self.a_t).sqrt()
        if prediction == "x_start":
            return {"a_x": torch.zeros_like(signal), "a_o": torch.ones_like(signal)}
        if prediction == "v":
            return {"a_x": signal, "a_o": -noise}
        if prediction == "x_prev":
            alpha = self.a_t / self.a_before
            weight = self.a_before.sqrt() * (1.0 - alpha)  # of x_0 in the mean, times 1 − ᾱ_t
            return {"a_x": -alpha.sqrt() * (1.0 - self.a_before) / weight, "a_o": (1.0 - self.a_t) / weight}
        if bool((self.a_t == 0).any()):
            raise ValueError(
                f"{self.function}: prediction must be v or x_start where the terminal SNR is zero, got eps at "
                f"t={int(self.t[self.a_t == 0][0])}; ε says nothing about x_0 there: leave that timestep out"
            )
        return {"a_x": 1.0 / signal, "a_o": -noise / signal}

    def table(
        self,
        solver: Solver,
        columns: dict[str, Tensor],
        *,
        variance: Variance = "fixed_small",
        guides: tuple[Tensor, Tensor] | None = None,
    ) -> StepTable:
        """Round float64 columns once to float32, add the identity row, and make the table.

        Args:
            solver: name of the method.
            columns: as in `rounded`.
            variance: kind of variance.
            guides: what a classifier's gradient adds to x_{t−1} and to x̂_0, float64 [S] each; infinite where it could
                not.

        Raises:
            ValueError: as in `rounded`.
        """
        rows = self.rounded(columns)
        rows[-1, _COLUMN["c_x"]] = 1.0

        def uses(name: str) -> bool:
            return bool((rows[:, _COLUMN[name]] != 0).any())

        return StepTable(
            rows=rows,
            timesteps=self.timesteps,
            counters=self.timesteps,
            prediction=self.prediction,
            variance=variance,
            solver=solver,
            history=2 if uses("c_h2") else int(uses("c_h")),
            uses_noise=uses("sigma"),
            threshold=self.threshold,
            guides=None if guides is None else F.pad(torch.stack(guides, dim=1).float(), (0, 0, 0, 1)),
        )

    @property
    def timesteps(self) -> Tensor:
        """int64 [S+1], the timestep of each row and 0 of the last one, where nothing is left to do."""
        return torch.cat([self.t, self.t.new_zeros(1)])

    @property
    def threshold(self) -> DynamicThreshold | None:
        """Dynamic thresholding, if `clip` is that."""
        return self.clip if isinstance(self.clip, DynamicThreshold) else None

    def rounded(self, columns: dict[str, Tensor], names: Sequence[str] = COLUMNS) -> Tensor:
        """Float64 columns rounded once to float32, with the bound of x̂_0 and a last row of zeros, its bound infinite.

        Args:
            columns: some of the names, without bound → float64 [S]; absent columns are 0.
            names: what the columns are called, in their order in memory.

        Returns:
            float32 [S+1, len(COLUMNS)].

        Raises:
            ValueError: clip is out of range, or a coefficient is not finite in float32.
        """
        function, S = self.function, self.t.numel()
        free = self.clip is None or isinstance(self.clip, DynamicThreshold)
        bound = math.inf if free else number(function, "clip", self.clip)
        if not free and not 0.0 < bound < math.inf:
            raise ValueError(
                f"{function}: clip must be above 0 and finite, None or a DynamicThreshold, got {bound}; "
                "use None for no clipping"
            )
        exact = torch.zeros(S + 1, len(COLUMNS), dtype=torch.float64)
        for name, values in columns.items():
            exact[:S, names.index(name)] = values
        rows = exact.float()
        bad = (~rows.isfinite()).nonzero()
        if bad.numel():
            i, j = bad[0].tolist()
            raise ValueError(
                f"{function}: coefficients must be finite in float32, got {names[j]} = {exact[i, j].item()} "
                f"in row {i}; the signal all but vanishes at t={int(self.t[i])}: leave that timestep out"
            )
        rows[:S, _COLUMN["bound"]], rows[S, _COLUMN["bound"]] = bound, math.inf
        return rows
