"""Solvers: noise schedule × timesteps → StepTable. All arithmetic is float64, rounded once to float32.

Row i leads from timestep t_i to prev_i, which is the next timestep of the list unless the caller says
otherwise; prev = −1 is x_0 itself, with ᾱ = 1. The equations hold for any such pair, adjacent or far
apart: a strided run is a run whose β_t is 1 − ᾱ_t/ᾱ_prev (Nichol & Dhariwal 2021, eq. 19).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastddpm.common.arguments import number
from fastddpm.process.pairs import StepPairs
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction, Variance
from fastddpm.process.table import DynamicThreshold, Solver, StepTable, assemble, check_choice, dynamic_bound
from fastddpm.process.timesteps import respace, spaced_timesteps

__all__ = [
    "ClippedEps",
    "DynamicThreshold",
    "NoiseGate",
    "Solver",
    "StepTable",
    "ddim_table",
    "ddpm_table",
    "dpmpp_2m_table",
    "dynamic_bound",
    "make_table",
    "respace",
    "spaced_timesteps",
]

ClippedEps = Literal["rederive", "raw"]
NoiseGate = Literal["final", "t0"]
# What a peer that adds noise on a row with β̃ = 0 takes for it, so that its logarithm exists.
_SMALLEST_VARIANCE = 1e-20


def ddpm_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_small",
    clip: float | DynamicThreshold | None = 1.0,
    prev_timesteps: Tensor | Sequence[int] | None = None,
    noise_gate: NoiseGate = "final",
) -> StepTable:
    """Ancestral sampling, over all timesteps or any of them (Ho et al. 2020, Algorithm 2, eq. 6–7 and 11).

    x_{t−1} = √ᾱ_prev β_t/(1−ᾱ_t) · x̂_0 + √α_t (1−ᾱ_prev)/(1−ᾱ_t) · x_t + σ_t z, with α_t = ᾱ_t/ᾱ_prev,
    β_t = 1 − α_t; σ_t² = β̃_t = (1−ᾱ_prev)/(1−ᾱ_t) β_t ("fixed_small"), β_t ("fixed_large"), or in
    between, chosen by the network ("learned_range": Nichol & Dhariwal 2021, eq. 15).

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        prediction: what the network returns.
        variance: σ_t²; "learned_range" needs a network with 2C output channels.
        clip: bound of |x̂_0|, above 0; None for none; a DynamicThreshold for a bound per sample.
        prev_timesteps: int [S], where each row leads: −1 (x_0) or below the row's timestep. Default: the
            next timestep, −1 for the last.
        noise_gate: where no noise is added. "final": on rows that lead to x_0, as in the papers. "t0":
            on rows with t = 0, and nowhere else, as diffusers does: timesteps that end above 0 then
            leave noise in x_0 if the variance is not "fixed_small". On lists that end at 0 both are the
            same.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    check_choice("ddpm_table", "variance", variance, get_args(Variance))
    check_choice("ddpm_table", "noise_gate", noise_gate, get_args(NoiseGate))
    pairs = StepPairs.of("ddpm_table", schedule, timesteps, prev_timesteps)
    a_t, a_prev = pairs.a_t, pairs.a_prev
    alpha = a_t / a_prev
    beta = 1.0 - alpha
    beta_tilde = (1.0 - a_prev) / (1.0 - a_t) * beta
    noisy = ((pairs.prev >= 0) if noise_gate == "final" else (pairs.t > 0)).double()
    columns = pairs.x_start_columns("ddpm_table", prediction)
    columns["c_0"] = a_prev.sqrt() * beta / (1.0 - a_t)
    columns["c_x"] = alpha.sqrt() * (1.0 - a_prev) / (1.0 - a_t)
    if variance == "learned_range":
        columns["sigma"] = noisy
        columns["log_beta"] = beta.log()
        columns["log_beta_tilde"] = _clipped_log(beta_tilde, beta, noisy)
    else:
        columns["sigma"] = noisy * (beta if variance == "fixed_large" else beta_tilde).sqrt()
    return assemble("ddpm_table", "ddpm", pairs.t, columns, prediction=prediction, variance=variance, clip=clip)


def ddim_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    prediction: Prediction = "eps",
    eta: float = 0.0,
    clip: float | DynamicThreshold | None = 1.0,
    clipped_eps: ClippedEps = "rederive",
    prev_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_to_one: bool = True,
) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12 and 16).

    x_{t−1} = √ᾱ_prev x̂_0 + √(1−ᾱ_prev−σ²) ε + σ z, σ = η √((1−ᾱ_prev)/(1−ᾱ_t)) √(1 − ᾱ_t/ᾱ_prev).
    η = 0 is deterministic, η = 1 is ancestral sampling with the small variance. A network with 2C output
    channels works too: its variance half does not enter.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        prediction: what the network returns.
        eta: η, in [0, 1].
        clip: bound of |x̂_0|, above 0; None for none; a DynamicThreshold for a bound per sample.
        clipped_eps: ε of a clipped x̂_0: "rederive" takes (x_t − √ᾱ_t x̂_0)/√(1−ᾱ_t) after clipping
            (OpenAI, lucidrains), "raw" what the network says (diffusers).
        prev_timesteps: int [S], where each row leads: −1 (x_0) or below the row's timestep. Default: the
            next timestep, −1 for the last. diffusers takes max(t − T // S, −1).
        final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0 (set_alpha_to_one=False of diffusers).

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
    pairs = StepPairs.of("ddim_table", schedule, timesteps, prev_timesteps, final_alpha_to_one)
    a_t, a_prev = pairs.a_t, pairs.a_prev
    sigma = eta * ((1.0 - a_prev) / (1.0 - a_t) * (1.0 - a_t / a_prev)).sqrt()
    direction = (1.0 - a_prev - sigma**2).clamp(min=0.0).sqrt()  # the factor of ε
    signal, noise = a_t.sqrt(), (1.0 - a_t).sqrt()
    columns = pairs.x_start_columns("ddim_table", prediction)
    columns["c_0"] = a_prev.sqrt()
    columns["sigma"] = sigma
    if clipped_eps == "rederive":
        columns["c_0"] = columns["c_0"] - direction * signal / noise
        columns["c_x"] = direction / noise
    elif prediction == "eps":
        columns["c_o"] = direction
    elif prediction == "v":  # ε = √ᾱ v + √(1−ᾱ) x
        columns["c_o"] = direction * signal
        columns["c_x"] = direction * noise
    else:  # ε = (x − √ᾱ x_0)/√(1−ᾱ), with x_0 = a_x x + a_o out
        columns["c_o"] = -direction * signal / noise * columns["a_o"]
        columns["c_x"] = direction / noise * (1.0 - signal * columns["a_x"])
    return assemble("ddim_table", "ddim", pairs.t, columns, prediction=prediction, variance="fixed_small", clip=clip)


def dpmpp_2m_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    prediction: Prediction = "eps",
    clip: float | DynamicThreshold | None = 1.0,
    prev_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_to_one: bool = True,
    lower_order_final: bool = False,
) -> StepTable:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, "DPM-Solver++", Algorithm 2).

    With λ = ln(√ᾱ/√(1−ᾱ)), h = λ_prev − λ_t, h' the previous row's h and κ = h/(2 h'):
    x_{t−1} = √((1−ᾱ_prev)/(1−ᾱ_t)) x_t + √ᾱ_prev (1 − e^{−h}) ((1 + κ) x̂_0 − κ x̂_0'), where x̂_0' is
    the previous row's estimate. κ = 0 (first order, DDIM's step) in the first row, in a row that leads
    to x_0 (λ = ∞) and in the one after a row with ᾱ_t = 0 (λ = −∞). Deterministic; a network with 2C
    output channels works too.

    diffusers visits `spaced_timesteps(T, S + 1, "leading")[:-1]` by default, does not clip and sets
    lower_order_final where S < 15.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        prediction: what the network returns.
        clip: bound of |x̂_0|, above 0; None for none; a DynamicThreshold for a bound per sample.
        prev_timesteps: int [S], where each row leads. All but the last must be the next timestep,
            because the method looks back along its own path. Default: the next timestep, −1 for the last.
        final_alpha_to_one: at prev = −1 take ᾱ = 1; if not, ᾱ_0 (final_sigmas_type="sigma_min" of
            diffusers).
        lower_order_final: make the last row first order also where its λ is finite.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range, or ε-prediction meets ᾱ_t = 0 (zero terminal SNR).
    """
    pairs = StepPairs.of("dpmpp_2m_table", schedule, timesteps, prev_timesteps, final_alpha_to_one)
    broken = (pairs.prev[:-1] != pairs.t[1:]).nonzero()
    if broken.numel():
        i = int(broken[0, 0])
        raise ValueError(
            f"dpmpp_2m_table: prev_timesteps must continue with the next timestep, got {int(pairs.prev[i])} before "
            f"{int(pairs.t[i + 1])}; leave prev_timesteps out, or choose only its last entry"
        )
    lam_t, lam_prev = (0.5 * (a.log() - (1.0 - a).log()) for a in (pairs.a_t, pairs.a_prev))
    h = lam_prev - lam_t
    kappa = torch.zeros_like(h)
    kappa[1:] = h[1:] / (2.0 * h[:-1])  # an infinite h of the row before gives 0, as it must
    kappa[lam_prev.isposinf()] = 0.0
    if lower_order_final:
        kappa[-1] = 0.0
    gain = -pairs.a_prev.sqrt() * torch.expm1(-h)
    columns = pairs.x_start_columns("dpmpp_2m_table", prediction)
    columns["c_0"] = gain * (1.0 + kappa)
    columns["c_h"] = -gain * kappa
    columns["c_x"] = ((1.0 - pairs.a_prev) / (1.0 - pairs.a_t)).sqrt()
    return assemble(
        "dpmpp_2m_table", "dpmpp_2m", pairs.t, columns, prediction=prediction, variance="fixed_small", clip=clip
    )


def make_table(
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    solver: Solver = "ddpm",
    prediction: Prediction = "eps",
    clip: float | DynamicThreshold | None = 1.0,
    prev_timesteps: Tensor | Sequence[int] | None = None,
    variance: Variance | None = None,
    noise_gate: NoiseGate | None = None,
    eta: float | None = None,
    clipped_eps: ClippedEps | None = None,
    final_alpha_to_one: bool | None = None,
    lower_order_final: bool | None = None,
) -> StepTable:
    """The table of any solver; see `ddpm_table`, `ddim_table`, `dpmpp_2m_table`.

    An option left at None takes the solver's own default.

    Args:
        schedule: the schedule that the network was trained with.
        timesteps: int [S], strictly descending, in 0 … T−1.
        solver: "ddpm", "ddim" or "dpmpp_2m".
        prediction: what the network returns.
        clip: bound of |x̂_0|, None, or a DynamicThreshold.
        prev_timesteps: int [S], where each row leads.
        variance: ddpm only.
        noise_gate: ddpm only.
        eta: ddim only.
        clipped_eps: ddim only.
        final_alpha_to_one: ddim and dpmpp_2m.
        lower_order_final: dpmpp_2m only.

    Returns:
        The table.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an option that the solver does not have, or one of the solver's own errors.
    """
    check_choice("make_table", "solver", solver, get_args(Solver))
    solvers: dict[Solver, tuple[Callable[..., StepTable], set[str]]] = {
        "ddpm": (ddpm_table, {"variance", "noise_gate"}),
        "ddim": (ddim_table, {"eta", "clipped_eps", "final_alpha_to_one"}),
        "dpmpp_2m": (dpmpp_2m_table, {"final_alpha_to_one", "lower_order_final"}),
    }
    table, known = solvers[solver]
    given: dict[str, Any] = {
        "variance": variance, "noise_gate": noise_gate, "eta": eta, "clipped_eps": clipped_eps,
        "final_alpha_to_one": final_alpha_to_one, "lower_order_final": lower_order_final,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if foreign := sorted(options.keys() - known):
        raise ValueError(
            f"make_table: options of {solver} must be among {', '.join(sorted(known))}, got {', '.join(foreign)}; "
            "leave the others out"
        )
    return table(schedule, timesteps, prediction=prediction, clip=clip, prev_timesteps=prev_timesteps, **options)


def _clipped_log(beta_tilde: Tensor, beta: Tensor, noisy: Tensor) -> Tensor:
    """Log β̃, finite on rows that lead to x_0, where β̃ = 0.

    Without noise there the value is never used and follows Nichol & Dhariwal 2021, sec. 3.1: the row
    before lends its own. With noise (noise_gate "t0") it is the floor of the peer that adds it.
    """
    lent = torch.cat([beta[:1], beta_tilde[:-1]])
    floor = torch.where(noisy > 0, torch.full_like(beta, _SMALLEST_VARIANCE), lent)
    return torch.where(beta_tilde > 0, beta_tilde, floor).log()
