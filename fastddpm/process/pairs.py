"""StepPairs: which timestep each row of a table comes from and leads to, with ᾱ at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from fastddpm.common.arguments import integers
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction
from fastddpm.process.table import check_choice
from fastddpm.process.timesteps import check_timesteps


@dataclass(frozen=True)
class StepPairs:
    """The ends of a run's rows.

    Attributes:
        t: int64 [S], where each row starts.
        prev: int64 [S], where it leads; −1 is x_0.
        a_t: float64 [S], ᾱ at t.
        a_prev: float64 [S], ᾱ at prev.
        a_before: float64 [S], ᾱ at t − 1, and 1 before t = 0.
    """

    t: Tensor
    prev: Tensor
    a_t: Tensor
    a_prev: Tensor
    a_before: Tensor

    @classmethod
    def of(
        cls,
        function: str,
        schedule: NoiseSchedule,
        timesteps: Tensor | Sequence[int],
        prev_timesteps: Tensor | Sequence[int] | None,
        final_alpha_to_one: bool = True,
    ) -> StepPairs:
        """Validate both lists and look up ᾱ.

        Args:
            function: name that starts the error messages.
            schedule: the schedule that the network was trained with.
            timesteps: int [S], strictly descending, in 0 … T−1.
            prev_timesteps: int [S], each −1 or below its timestep; None for the next timestep, −1 for the last.
            final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0.

        Raises:
            TypeError: timesteps are not integers.
            ValueError: a list is of another form.
        """
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
        return cls(t, prev, alpha_bar[t], a_prev, torch.where(t > 0, alpha_bar[(t - 1).clamp(min=0)], 1.0))

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

    def x_start_columns(self, function: str, prediction: Prediction) -> dict[str, Tensor]:
        """a_x and a_o of x̂_0 = a_x x_t + a_o out: Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D.

        Where the network returns the mean of x_{t−1}, Ho et al.'s eq. 7 is solved for x_0.

        Args:
            function: name that starts the error messages.
            prediction: what the network returns.

        Returns:
            Column → float64 [S].

        Raises:
            ValueError: the prediction is unknown, or is ε and ᾱ_t = 0.
        """
        check_choice(function, "prediction", prediction, get_args(Prediction))
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
                f"{function}: prediction must be v or x_start where the terminal SNR is zero, got eps at "
                f"t={int(self.t[self.a_t == 0][0])}; ε says nothing about x_0 there: leave that timestep out"
            )
        return {"a_x": 1.0 / signal, "a_o": -noise / signal}
