"""DDIM as a table (Song et al. 2021), in float64, rounded once to float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack, get_args

from torch import Tensor

from fastddpm.common.arguments import number
from fastddpm.process.outline import Outline, RowOptions
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.table import StepTable, check_choice

ClippedEps = Literal["rederive", "raw"]


def ddim_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    eta: float = 0.0,
    clipped_eps: ClippedEps = "rederive",
    final_alpha_to_one: bool = True,
    **rows: Unpack[RowOptions],
) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12 and 16).

    x_{t−1} = √ᾱ_prev x̂_0 + √(1−ᾱ_prev−σ²) ε + σ z, σ = η √((1−ᾱ_prev)/(1−ᾱ_t)) √(1 − ᾱ_t/ᾱ_prev).
    η = 0 is deterministic, η = 1 is ancestral sampling with the small variance. A network with 2C output
    channels works too: its variance half does not enter.

    A classifier's gradient g makes ε into ε − √(1−ᾱ_t) g (Dhariwal & Nichol 2021, Algorithm 2), after clipping, so that
    x̂_0 moves by (1−ᾱ_t)/√ᾱ_t g, and x_{t−1} by √ᾱ_prev times that less √(1−ᾱ_prev−σ²) √(1−ᾱ_t) g.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        eta: η, in [0, 1].
        clipped_eps: ε of a clipped x̂_0: "rederive" takes (x_t − √ᾱ_t x̂_0)/√(1−ᾱ_t) after clipping
            (OpenAI, lucidrains), "raw" what the network says (diffusers).
        final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0 (set_alpha_to_one=False of diffusers).
        rows: prediction, clip and prev_timesteps, see `fastddpm.process.outline.RowOptions`.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    check_choice("ddim_table", "clipped_eps", clipped_eps, get_args(ClippedEps))
    eta = number("ddim_table", "eta", eta)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"ddim_table: eta must be in [0, 1], got {eta}; 0 is deterministic, 1 is ancestral")
    outline = Outline.of("ddim_table", schedule, timesteps, final_alpha_to_one, **rows)
    a_t, a_prev = outline.a_t, outline.a_prev
    sigma = eta * ((1.0 - a_prev) / (1.0 - a_t) * (1.0 - a_t / a_prev)).sqrt()
    direction = (1.0 - a_prev - sigma**2).clamp(min=0.0).sqrt()  # the factor of ε
    signal, noise = a_t.sqrt(), (1.0 - a_t).sqrt()
    columns = outline.x_start_columns() | outline.known_columns()
    columns["c_0"] = a_prev.sqrt()
    columns["sigma"] = sigma
    if clipped_eps == "rederive":
        columns["c_0"] = columns["c_0"] - direction * signal / noise
        columns["c_x"] = direction / noise
    elif outline.prediction == "eps":
        columns["c_o"] = direction
    elif outline.prediction == "v":  # ε = √ᾱ v + √(1−ᾱ) x
        columns["c_o"] = direction * signal
        columns["c_x"] = direction * noise
    else:  # ε = (x − √ᾱ x_0)/√(1−ᾱ), with x_0 = a_x x + a_o out
        columns["c_o"] = -direction * signal / noise * columns["a_o"]
        columns["c_x"] = direction / noise * (1.0 - signal * columns["a_x"])
    shift = outline.x_start_shift()
    return outline.table("ddim", columns, guides=(a_prev.sqrt() * shift - direction * noise, shift))
