"""From a scheduler of diffusers to step tables: its options and betas, read once per run instead of once per step."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastddpm.checkpoints.diffusers_scheduler import Conventions, conventions_of
from fastddpm.kernels.operands import COLUMNS
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import make_table
from fastddpm.process.table import DynamicThreshold, StepTable
from fastddpm.process.timesteps import check_timesteps

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

_SHORT = 15  # runs of fewer steps end with a step of lower order, if the scheduler says so


def ancestral_table(scheduler: DDPMScheduler, timesteps: Tensor, prev_timesteps: Tensor | None = None) -> StepTable:
    """DDPMScheduler as a table, where t = 0 alone adds no noise (Ho et al. 2020, eq. 6–7 and 11).

    Args:
        scheduler: the scheduler, whose `config` and `alphas_cumprod` count.
        timesteps: int64 [S] on the CPU, strictly descending.
        prev_timesteps: where each leads; None is to the next, and to x_0 after the last.

    Returns:
        The table, on the CPU.

    Raises:
        ValueError: an option is not supported, or a timestep is out of range.
        TypeError: the timesteps are not integers.
    """
    conventions = conventions_of("DDPMScheduler", scheduler.config)
    schedule = schedule_of(scheduler)
    table = make_table(
        schedule,
        timesteps,
        solver="ddpm",
        prediction=conventions["prediction"],
        variance=conventions["variance"],
        clip=_clip(conventions),
        prev_timesteps=prev_timesteps,
        noise_gate="t0",
    )
    return _with_rounded_beta(table, schedule, timesteps, prev_timesteps)


def ddim_table(
    scheduler: DDIMScheduler,
    timesteps: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> StepTable:
    """DDIMScheduler as a table: t leads to t − T // S, whatever the list says (Song et al. 2021, eq. 12 and 16).

    Args:
        scheduler: the scheduler, whose `config`, `alphas_cumprod` and `num_inference_steps` count.
        timesteps: int64 [S] on the CPU, strictly descending.
        eta: η, in [0, 1].
        use_clipped_model_output: whether ε is taken from the clipped x̂_0.

    Returns:
        The table, on the CPU.

    Raises:
        ValueError: an option is not supported, η or a timestep is out of range, or the number of steps is not set.
        TypeError: the timesteps are not integers.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("ddim_table: the scheduler must have its timesteps set, got none; call set_timesteps")
    conventions = conventions_of("DDIMScheduler", {**scheduler.config, "variance_type": None})
    schedule = schedule_of(scheduler)
    return make_table(
        schedule,
        timesteps,
        solver="ddim",
        prediction=conventions["prediction"],
        eta=eta,
        clip=_clip(conventions),
        clipped_eps="rederive" if use_clipped_model_output else "raw",
        prev_timesteps=(timesteps - schedule.T // scheduler.num_inference_steps).clamp(min=-1),
        final_alpha_to_one=conventions["final_alpha_to_one"],
    )


def multistep_tables(scheduler: DPMSolverMultistepScheduler, timesteps: Tensor) -> tuple[StepTable, ...]:
    """DPMSolverMultistepScheduler as two or three tables, of rows that look back at 0, 1 and, if asked for, 2 others.

    A run starts with a row of the first table, wherever it starts, then takes one of the second, and so on (Lu et al.
    2022). The last rows of the second and third are of the order that the options ask for.

    Args:
        scheduler: the scheduler, whose `config` and `alphas_cumprod` count.
        timesteps: int64 [S] on the CPU, strictly descending.

    Returns:
        As many tables as the solver's order, on the CPU.

    Raises:
        ValueError: an option is not supported, or a timestep is out of range.
        TypeError: the timesteps are not integers.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("multistep_tables: the scheduler must have its timesteps set, got none; call set_timesteps")
    config = scheduler.config
    # DPM-Solver++ is deterministic: its variance_type only says that the network has channels that are left out.
    conventions = conventions_of("DPMSolverMultistepScheduler", {**config, "variance_type": None})
    schedule = schedule_of(scheduler)
    threshold, to_one = _threshold(conventions), conventions["final_alpha_to_one"]
    _check_sigmas(scheduler, schedule, timesteps, to_one)
    short = config["lower_order_final"] and timesteps.numel() < _SHORT
    lower = bool(to_one or config["euler_at_final"] or short)
    make = functools.partial(
        make_table, schedule, timesteps, prediction=conventions["prediction"], clip=threshold, final_alpha_to_one=to_one
    )
    tables = (
        make(solver="ddim", clipped_eps="rederive"),
        make(solver="dpmpp_2m", lower_order_final=lower),
    )
    if config["solver_order"] < 3:
        return tables
    third = make(solver="dpmpp_3m", lower_order_final=lower, lower_order_second=bool(short), second_difference="half")
    return (*tables, third)


def _with_rounded_beta(
    table: StepTable, schedule: NoiseSchedule, timesteps: Tensor, prev_timesteps: Tensor | None
) -> StepTable:
    """The table with β_t = 1 − ᾱ_t/ᾱ_prev as the library has it, a difference of float32 numbers.

    At the first training steps that is off by up to 5e-4 of β_t, which the library's pictures show: they differ from
    those of exact arithmetic by 3e-5 on average, more than anything else here does.
    """
    prev = torch.cat([timesteps[1:], timesteps.new_tensor([-1])]) if prev_timesteps is None else prev_timesteps
    alpha_bar = schedule.alphas_cumprod.float()
    a_t, a_prev = alpha_bar[timesteps], torch.where(prev >= 0, alpha_bar[prev.clamp(min=0)], 1.0)
    exact = 1.0 - a_t.double() / a_prev.double()
    ratio = (1.0 - a_t / a_prev).double() / exact
    ratio = torch.where(ratio > 0, ratio, 1.0)  # a β that float32 cannot tell from 0
    S, rows = table.S, table.rows.double()
    rows[:S, COLUMNS.index("c_0")] *= ratio
    rows[:S, COLUMNS.index("sigma")] *= ratio.sqrt() if table.variance != "learned_range" else 1.0
    if table.variance == "learned_range":
        for name in ("log_beta", "log_beta_tilde"):
            rows[:S, COLUMNS.index(name)] += ratio.log()
    return dataclasses.replace(table, rows=rows.float())


def _check_sigmas(
    scheduler: DPMSolverMultistepScheduler, schedule: NoiseSchedule, timesteps: Tensor, to_one: bool
) -> None:
    """Check that the levels of noise are those of the timesteps, as they are unless somebody chose others."""
    alpha_bar = schedule.alphas_cumprod.double()
    visited = check_timesteps("multistep_tables", schedule.T, timesteps)
    wanted = ((1.0 - alpha_bar) / alpha_bar).sqrt()
    wanted = torch.cat([wanted[visited], wanted[:1] * (0.0 if to_one else 1.0)])
    sigmas: Tensor = scheduler.sigmas.detach().cpu().double()
    if sigmas.shape != wanted.shape or not torch.allclose(sigmas, wanted, rtol=1e-4, atol=1e-7):
        raise ValueError("multistep_tables: sigmas must be those of the timesteps, got others; leave them as they are")


def schedule_of(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule of a scheduler of diffusers."""
    # The library's own ᾱ, which is not always the product: DPM-Solver lifts ᾱ = 0 to 2⁻²⁴.
    return NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod, scheduler.betas.float())


def _threshold(conventions: Conventions) -> DynamicThreshold | None:
    threshold = conventions["threshold"]
    return None if threshold is None else DynamicThreshold(*threshold)


def _clip(conventions: Conventions) -> float | DynamicThreshold | None:
    return _threshold(conventions) or conventions["clip"]
