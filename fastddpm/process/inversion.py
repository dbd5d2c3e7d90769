"""Inversion: DDIM walked upwards, from a picture to the noise that it is drawn from (Song et al. 2021, sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.process.outline import Outline
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction
from fastddpm.process.table import StepTable
from fastddpm.process.timesteps import check_timesteps


def inversion_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    prediction: Prediction = "eps",
    final_alpha_to_one: bool = True,
) -> StepTable:
    """The rows from x_0 up to the first of a run's timesteps, over the same timesteps (Song et al. 2021, eq. 13).

    x_up = √ᾱ_up x̂_0 + √(1−ᾱ_up) ε with ε = ε(x_t, t) and x̂_0 = (x_t − √(1−ᾱ_t) ε)/√ᾱ_t. DDIM's row from `up` to t takes
    ε at x_up instead: going up and down again differs from nothing by the order of a step. Nothing is clipped.

    A picture is at the level where the downward run ends, ᾱ = 1 or ᾱ_0; there the network is asked at t = 0, the
    lowest timestep that it knows.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], those of the downward run, strictly descending, in 0 … T−1.
        prediction: what the network returns.
        final_alpha_to_one: as in `ddim_table`.

    Returns:
        A table of S rows, whose timesteps are where the network is asked. It adds no noise.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: timesteps are of another form, or the prediction is unknown.
    """
    to = check_timesteps("inversion_table", schedule.T, timesteps).flip(0)
    asked = torch.cat([to.new_zeros(1), to[:-1]])
    alpha_bar = schedule.alphas_cumprod_exact
    a_asked, a_to, a_from = alpha_bar[asked], alpha_bar[to], alpha_bar[asked].clone()
    if final_alpha_to_one:
        a_from[0] = 1.0
    before = torch.where(asked > 0, alpha_bar[(asked - 1).clamp(min=0)], 1.0)
    outline = Outline("inversion_table", asked, to, a_asked, a_to, before, prediction, clip=None)
    columns = outline.x_start_columns()
    # ε = e_x · x + e_o · out, of the timestep at which the network is asked.
    signal, noise = a_asked.sqrt(), (1.0 - a_asked).sqrt()
    e_x, e_o = (1.0 - signal * columns["a_x"]) / noise, -signal * columns["a_o"] / noise
    kept = (a_to / a_from).sqrt()
    direction = (1.0 - a_to).sqrt() - kept * (1.0 - a_from).sqrt()
    columns |= {"c_x": kept + direction * e_x, "c_o": direction * e_o}
    return outline.table("ddim", columns)
