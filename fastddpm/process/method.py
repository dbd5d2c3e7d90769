"""What a run of a checkpoint visits: its conventions and the caller's wishes → StepTable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastddpm.common.arguments import integers, whole
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import ClippedEps, DynamicThreshold, Solver, make_table, respace, spaced_timesteps
from fastddpm.process.spec import ModelSpec, Variance
from fastddpm.process.table import StepTable, check_choice
from fastddpm.process.timesteps import Spacing, largest_offset

DEFAULT_STEPS: dict[Solver, int | None] = {"ddpm": None, "ddim": 50, "dpmpp_2m": 20}
"""Steps of each solver unless the caller says otherwise; None is all that the network was trained with."""

_SHORT = 15  # diffusers lowers the last row's order in runs of fewer steps


def plan(
    schedule: NoiseSchedule,
    spec: ModelSpec,
    *,
    solver: Solver = "ddim",
    steps: int | None = None,
    timesteps: str | Sequence[int] | Tensor | None = None,
    prev_timesteps: Sequence[int] | Tensor | None = None,
    eta: float | None = None,
    clip: float | DynamicThreshold | Literal["spec"] | None = "spec",
    clipped_eps: ClippedEps | Literal["spec"] = "spec",
    variance: Variance | Literal["spec"] = "spec",
) -> StepTable:
    """The coefficients of a run; `Sampler.sample` explains the arguments.

    Args:
        schedule: the noise schedule of training.
        spec: the checkpoint's conventions, which fill in what the caller leaves open.
        solver: as in `Sampler.sample`, and so are the rest.
        steps: S.
        timesteps: instead of `steps`.
        prev_timesteps: where each row leads.
        eta: η.
        clip: bound of |x̂_0|.
        clipped_eps: DDIM's ε of a clipped x̂_0.
        variance: ancestral sampling's σ.

    Returns:
        The table, on the CPU.

    Raises:
        TypeError: timesteps are not integers.
        ValueError: an argument is out of range.
    """
    check_choice("sample", "solver", solver, tuple(DEFAULT_STEPS))
    chosen = integers("sample", "timesteps", _timesteps(schedule.T, spec, solver, steps, timesteps))
    sigma = _variance(spec, solver, variance)
    if clipped_eps != "spec" and solver != "ddim":
        raise ValueError(f"sample: clipped_eps must be left out for {solver}, got {clipped_eps!r}; it is ddim's")
    order = spec.lower_order_final
    return make_table(
        schedule,
        chosen,
        solver=solver,
        prediction=spec.prediction,
        clip=_bound(spec, solver) if isinstance(clip, str) and clip == "spec" else clip,
        prev_timesteps=_previous(schedule.T, spec, solver, chosen) if prev_timesteps is None else prev_timesteps,
        variance=sigma,
        noise_gate=spec.noise_gate if solver == "ddpm" else None,
        eta=spec.ddim_eta if eta is None and solver == "ddim" else eta,
        clipped_eps=(spec.clipped_eps if clipped_eps == "spec" else clipped_eps) if solver == "ddim" else None,
        final_alpha_to_one=None if solver == "ddpm" else spec.final_alpha_to_one,
        lower_order_final=order == "always" or (order == "short" and chosen.numel() < _SHORT)
        if solver == "dpmpp_2m"
        else None,
    )


def _timesteps(
    T: int, spec: ModelSpec, solver: Solver, steps: int | None, timesteps: str | Sequence[int] | Tensor | None
) -> Tensor | Sequence[int]:
    if steps is not None and timesteps is not None:
        raise ValueError("sample: steps and timesteps must not both be given, got both; leave one out")
    if steps is None and timesteps is None and spec.respacing:
        timesteps = spec.respacing
    if isinstance(timesteps, str):
        return respace(T, timesteps)
    if timesteps is not None:
        return timesteps
    default = spec.ddim_steps if solver == "ddim" and spec.ddim_steps is not None else DEFAULT_STEPS[solver]
    if steps is None:
        steps = T if default is None else min(default, T)
    steps = whole("sample", "steps", steps)
    if not 1 <= steps <= T:
        raise ValueError(f"sample: steps must be in 1 … {T} (the steps of training), got {steps}; ask for fewer")
    if spec.spacing is None:
        return respace(T, steps) if solver == "ddpm" else spaced_timesteps(T, steps, "trailing")
    # diffusers' DPM-Solver spaces one point more than it visits.
    more = 1 if solver == "dpmpp_2m" and spec.spacing in ("leading", "linspace") and steps < T else 0
    offset = _offset(T, spec, steps, more)
    return spaced_timesteps(T, steps + more, spec.spacing, steps_offset=offset)[:steps]


def _offset(T: int, spec: ModelSpec, steps: int, more: int) -> int:
    """The checkpoint's steps_offset, which cannot apply where all T timesteps are spaced."""
    if spec.spacing != "leading" or steps + more == T:
        return 0
    if spec.steps_offset > largest_offset(T, steps + more):
        fitting = (S for S in range(steps - 1, 0, -1) if spec.steps_offset <= largest_offset(T, S + more))
        near = next(fitting, None)
        remedy = f"ask for {T} or {near}" if near else "give timesteps"
        raise ValueError(
            f"sample: steps must leave room for the checkpoint's steps_offset of {spec.steps_offset} within {T}, got "
            f"{steps}; {remedy}"
        )
    return spec.steps_offset


def _variance(spec: ModelSpec, solver: Solver, variance: Variance | Literal["spec"]) -> Variance | None:
    if solver != "ddpm":
        if variance != "spec":
            raise ValueError(f"sample: variance must be left out for {solver}, got {variance!r}; it is ddpm's")
        return None
    if variance == "learned_range" and not spec.learned_variance:
        raise ValueError("sample: variance must be fixed for this network, got learned_range, which it did not learn")
    return spec.variance if variance == "spec" else variance


def _bound(spec: ModelSpec, solver: Solver) -> float | DynamicThreshold | None:
    if spec.threshold is not None:
        return DynamicThreshold(*spec.threshold)
    return None if solver == "dpmpp_2m" and not spec.dpmpp_clips else spec.clip


def _previous(T: int, spec: ModelSpec, solver: Solver, t: Tensor) -> Tensor | None:
    """Where each row leads by the checkpoint's own rule, or None for the usual one."""
    if t.ndim != 1 or t.numel() == 0:
        return None  # the solver says what is wrong with it
    if spec.prev_timestep == "stride" and solver == "ddim" and _is_evenly_spaced(T, t):
        return (t - T // t.numel()).clamp(min=-1)
    if spec.prev_timestep == "chain" and solver == "ddpm" and t.numel() > 1 and bool((t[:-1] - t[1:] == 1).all()):
        return t - 1
    return None


def _is_evenly_spaced(T: int, t: Tensor) -> bool:
    """Whether a list is one that a spacing rule makes; only there does a fixed stride lead to where the next row is."""
    S = t.numel()
    if bool((t[:-1] - t[1:] == T // S).all()):
        return True
    rules: tuple[Spacing, ...] = ("trailing", "linspace")
    return S <= T and any(torch.equal(t, spaced_timesteps(T, S, rule)) for rule in rules)
