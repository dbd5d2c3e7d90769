"""A run of a pipeline's scheduler around its network: by a step table, or by the scheduler's own steps."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from fastddpm.engines.loop import Course, Loop
from fastddpm.integrations.diffusers_noise import Generator, draw
from fastddpm.integrations.diffusers_schedulers import (
    FastDDIMScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
)
from fastddpm.integrations.pipeline_network import PipelineNetwork, check_unet
from fastddpm.integrations.scheduler_tables import ancestral_table, ddim_table, multistep_tables
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import MULTISTEP, StepTable
from fastddpm.step.request import Request

_ANCESTRAL = (DDPMScheduler, FastDDPMScheduler)
_DDIM = (DDIMScheduler, FastDDIMScheduler)
_MULTISTEP = (DPMSolverMultistepScheduler, FastDPMSolverMultistepScheduler)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a pipeline's call asks for.

    Attributes:
        num_inference_steps: S.
        generator: of the steps' noise, or one per picture.
        eta: η of DDIM; other schedulers have none and ignore it.
        use_clipped_model_output: DDIM: whether ε is taken from the clipped x̂_0.
    """

    num_inference_steps: int
    generator: Generator = None
    eta: float = 0.0
    use_clipped_model_output: bool = False


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What a scheduler does in a run.

    Attributes:
        table: its step table, or None where its own `step` must be called.
        draws: whether it draws noise in each step, also where it has no effect.
    """

    table: StepTable | None
    draws: Sequence[bool] = ()


@torch.no_grad()
def sample(pipe: DiffusionPipeline, network: PipelineNetwork, x_T: Tensor, run: Run) -> Tensor:
    """Sample with the scheduler that the pipeline has now.

    Args:
        pipe: a pipeline of diffusers.
        network: what stands for its U-Net.
        x_T: float [B, C, H, W], the start.
        run: what is asked for.

    Returns:
        float [B, C, H, W], the final state, in the dtype of x_T.

    Raises:
        TypeError: the scheduler is of another kind.
        ValueError: the network needs classes, or does not fit the scheduler.
    """
    check_scheduler(pipe.scheduler)
    check_unet(pipe.unet)
    pipe.scheduler.set_timesteps(run.num_inference_steps)
    # Another thread may call the same pipeline with other settings: from here on this call has a scheduler of its own.
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(run.num_inference_steps)
    steps = _steps(scheduler, run)
    spec = ModelSpec(shape=cast(tuple[int, int, int], tuple(x_T.shape[1:])))
    stepper = network.of(pipe.unet, spec, scheduler.config.num_train_timesteps, x_T.device)
    if steps.table is None:
        return _sample_by_steps(pipe, scheduler, stepper.network, x_T, run)
    table = steps.table
    _check_channels(pipe.unet, table)
    batch = Request(torch.arange(len(x_T)), None, None, x_T, None, len(x_T))

    def noise(i: int, t: int, ids: Tensor) -> Tensor:
        return draw(x_T.shape, run.generator, x_T)

    loop = Loop(
        functools.partial(stepper.begin, table), Course.of(table, steps.draws or None), spec.shape,
        x_T.device, noise, undisturbed=stepper.undisturbed,
    )  # fmt: skip
    ((_, x, _),) = loop.batches(batch, _Watch(pipe.progress_bar(range(table.S))))
    return x.to(x_T.dtype)


class _Watch:
    """Goes through the pipeline's own bar, which is an iterable."""

    def __init__(self, steps: Iterable[int]) -> None:
        self._steps, self._begun = iter(steps), 0

    def advance_to(self, step: int) -> None:
        """So many steps are done, and the next one is under way."""
        while self._begun <= step:
            next(self._steps, None)
            self._begun += 1

    def batch_done(self) -> None:
        """There is one batch."""

    def compiling(self, under_way: bool) -> None:
        """The pipeline's bar has no room to say so."""


def _sample_by_steps(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, model: Callable[..., Tensor], x: Tensor, run: Run
) -> Tensor:
    """The same where the scheduler has options that no table holds: its own step, with our network."""
    options: dict[str, object] = {"generator": run.generator}
    if type(scheduler) in _DDIM:
        options.update(eta=run.eta, use_clipped_model_output=run.use_clipped_model_output)
    for t in pipe.progress_bar(scheduler.timesteps):
        out = model(x, t.to(x.device).expand(len(x)))
        x = scheduler.step(out.to(x.dtype), t, x, **options).prev_sample
    return x


def check_scheduler(scheduler: object) -> None:
    """Raise TypeError unless a run can take the scheduler's place."""
    if type(scheduler) not in (*_ANCESTRAL, *_DDIM, *_MULTISTEP):
        raise TypeError(
            "accelerate: the pipeline's scheduler must be DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or "
            f"one of their Fast versions, got {type(scheduler).__name__}; make one with from_config"
        )


def _steps(scheduler: SchedulerMixin, run: Run) -> _Steps:
    """What a scheduler does whose timesteps are set; without a table where the options are none of ours."""
    timesteps = scheduler.timesteps.cpu()
    try:
        if type(scheduler) in _ANCESTRAL:
            if scheduler.variance_type != scheduler.config.variance_type:
                return _Steps(None)
            return _Steps(ancestral_table(scheduler, timesteps), (timesteps > 0).tolist())
        if type(scheduler) in _DDIM:
            table = ddim_table(scheduler, timesteps, run.eta, run.use_clipped_model_output)
            return _Steps(table, [run.eta > 0] * len(timesteps))
        return _Steps(multistep_tables(scheduler, timesteps)[-1])
    except (ValueError, TypeError):
        return _Steps(None)


def _check_channels(unet: UNet2DModel, table: StepTable) -> None:
    channels, out = unet.config.in_channels, unet.config.out_channels
    wanted = 2 * channels if table.variance == "learned_range" else channels
    if table.solver in MULTISTEP and out == 2 * channels:
        return
    if out != wanted:
        raise ValueError(
            f"accelerate: the network must return {wanted} channels for this scheduler, got {out}; the scheduler's "
            "variance_type belongs to another network"
        )
