"""Method: how to sample. With a schedule and a checkpoint's conventions it makes a StepTable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from fastddpm.common.arguments import integers, whole
from fastddpm.process.ddim import ClippedEps
from fastddpm.process.likelihood_table import LikelihoodTable, likelihood_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import make_table
from fastddpm.process.spec import ModelSpec, Variance
from fastddpm.process.table import MULTISTEP, DynamicThreshold, Solver, StepTable, check_choice
from fastddpm.process.timesteps import Spacing, largest_offset, respace, spaced_timesteps

DEFAULT_STEPS: dict[Solver, int | None] = {"ddpm": None, "ddim": 50, "dpmpp_2m": 20, "dpmpp_3m": 20}
"""Steps of each solver unless the caller says otherwise; None is all that the network was trained with."""

_SHORT = 15  # diffusers lowers the last rows' order in runs of fewer steps


class MethodOptions(TypedDict, total=False):
    """The fields of `Method` as keyword arguments, for type checkers."""

    solver: Solver
    steps: int | None
    timesteps: str | Sequence[int] | Tensor | None
    prev_timesteps: Sequence[int] | Tensor | None
    eta: float | None
    clip: float | DynamicThreshold | Literal["spec"] | None
    clipped_eps: ClippedEps | Literal["spec"]
    variance: Variance | Literal["spec"]


@dataclasses.dataclass(frozen=True)
class Method:
    """How to sample: all that makes a table, whatever the network.

    Attributes:
        solver: "ddpm" (ancestral, Ho et al. 2020), "ddim" (Song et al. 2021), "dpmpp_2m" or "dpmpp_3m" (Lu et
            al. 2022).
        steps: S, at most T; None is T for ddpm, 50 for ddim, 20 for dpmpp_2m and dpmpp_3m, or what the checkpoint says.
        timesteps: instead of `steps`, the training timesteps to visit, descending, or OpenAI's respacing string:
            "250", "ddim25", "10,15,20".
        prev_timesteps: where the steps lead, each to a lower timestep or to −1, which is x_0. None is what the
            checkpoint's own project does: mostly the next timestep, and x_0 after the last.
        eta: DDIM's η in [0, 1]; 0 draws no noise, 1 is ancestral sampling. None is 0, or what the checkpoint says.
        clip: bound of |x̂_0|, None for none, a DynamicThreshold; "spec" is what the checkpoint says.
        clipped_eps: DDIM: take ε from the clipped x̂_0 ("rederive") or as the network has it ("raw").
        variance: ddpm: "fixed_small" or "fixed_large" instead of what the checkpoint says.
    """

    solver: Solver = "ddim"
    steps: int | None = None
    timesteps: str | Sequence[int] | Tensor | None = None
    prev_timesteps: Sequence[int] | Tensor | None = None
    eta: float | None = None
    clip: float | DynamicThreshold | Literal["spec"] | None = "spec"
    clipped_eps: ClippedEps | Literal["spec"] = "spec"
    variance: Variance | Literal["spec"] = "spec"

    def table(self, schedule: NoiseSchedule, spec: ModelSpec) -> StepTable:
        """The coefficients of a run.

        Args:
            schedule: the noise schedule of training.
            spec: the checkpoint's conventions, which fill in what the method leaves open.

        Returns:
            The table, on the CPU.

        Raises:
            TypeError: timesteps are not integers.
            ValueError: an option is out of range, or is not the solver's.
        """
        chosen, variance = self._visited(schedule, spec), _variance(spec, self.solver, self.variance)
        if self.clipped_eps != "spec" and self.solver != "ddim":
            raise ValueError(
                f"sample: clipped_eps must be left out for {self.solver}, got {self.clipped_eps!r}; it is ddim's"
            )
        prev = self.prev_timesteps
        return make_table(
            schedule,
            chosen,
            solver=self.solver,
            prediction=spec.prediction,
            clip=self._clip(spec),
            prev_timesteps=_previous(schedule.T, spec, self.solver, chosen) if prev is None else prev,
            variance=variance,
            **self._conventions(spec, chosen.numel()),
        )

    def likelihood_table(self, schedule: NoiseSchedule, spec: ModelSpec) -> LikelihoodTable:
        """The rows of the bound on the likelihood of which this method, "ddpm", samples.

        Args:
            schedule: the noise schedule of training.
            spec: the checkpoint's conventions, which fill in what the method leaves open.

        Returns:
            The table, on the CPU.

        Raises:
            TypeError: timesteps are not integers.
            ValueError: an option is out of range.
        """
        return likelihood_table(
            schedule,
            self._visited(schedule, spec),
            prediction=spec.prediction,
            variance=_variance(spec, "ddpm", self.variance) or spec.variance,
            clip=self._clip(spec),
        )

    def _visited(self, schedule: NoiseSchedule, spec: ModelSpec) -> Tensor:
        """The timesteps of the run, as they are given or by the checkpoint's rule."""
        check_choice("sample", "solver", self.solver, tuple(DEFAULT_STEPS))
        return integers("sample", "timesteps", _timesteps(schedule.T, spec, self.solver, self.steps, self.timesteps))

    def _clip(self, spec: ModelSpec) -> float | DynamicThreshold | None:
        return _bound(spec, self.solver) if isinstance(self.clip, str) and self.clip == "spec" else self.clip

    def _conventions(self, spec: ModelSpec, steps: int) -> dict[str, Any]:
        """The options that only some solvers have."""
        if self.solver == "ddpm":
            return {"noise_gate": spec.noise_gate, "eta": self.eta}  # an η is refused by name
        final = {"final_alpha_to_one": spec.final_alpha_to_one}
        if self.solver == "ddim":
            clipped = spec.clipped_eps if self.clipped_eps == "spec" else self.clipped_eps
            return {**final, "eta": spec.ddim_eta if self.eta is None else self.eta, "clipped_eps": clipped}
        order, short = spec.lower_order_final, steps < _SHORT
        lower: dict[str, Any] = {"lower_order_final": order == "always" or (order == "short" and short)}
        if self.solver == "dpmpp_3m":
            lower |= {"lower_order_second": order != "never" and short, "second_difference": spec.second_difference}
        return {**final, "eta": self.eta, **lower}


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
    more = 1 if solver in MULTISTEP and spec.spacing in ("leading", "linspace") and steps < T else 0
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
    return None if solver in MULTISTEP and not spec.dpmpp_clips else spec.clip


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
