"""Other libraries as their users run them: diffusers, with the same weights, and denoising-diffusion-pytorch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.bench.job import Half, Job
from fastddpm.bench.lucidrains_package import package_module
from fastddpm.bench.peers import MissingError, Peer, count_flops, outside_ms
from fastddpm.bench.twins import import_diffusers
from fastddpm.kernels.philox import X_T_COUNTER

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

_DRAWS = ("diffusers.schedulers.scheduling_ddpm", "diffusers.pipelines.ddpm.pipeline_ddpm")


@contextlib.contextmanager
def common_noise(job: Job, batch: int, steps: int) -> Iterator[None]:
    """Let diffusers' pipeline and scheduler draw the noise that all peers share, in the order in which they draw."""
    times = [X_T_COUNTER, *(t for t in job.timesteps(steps) if t > 0)]
    noises = iter([job.noise(batch, t) for t in times])

    def draw(
        shape: object,
        *_: object,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **__: object,
    ) -> Tensor:
        return next(noises).to(device=device, dtype=dtype or torch.float32)

    with contextlib.ExitStack() as stack:
        for module in _DRAWS:
            stack.enter_context(patch(f"{module}.randn_tensor", draw))
        yield


class DiffusersPeer(Peer):
    """DDPMPipeline, its U-Net under `torch.compile` if asked for."""

    def load(self, job: Job) -> None:
        """Load the pipeline; labels, which it does not know, are handed to its network directly."""
        super().load(job)
        diffusers = import_diffusers()
        if job.model and not job.folder:
            raise MissingError(job.why_no_folder)
        self.scheduler = diffusers.DDPMScheduler(num_train_timesteps=job.T)
        if not job.model:
            self.network = Half()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pipe = diffusers.DDPMPipeline.from_pretrained(job.folder).to(job.device, self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.scheduler = self.pipe.scheduler
        if job.classes is not None:
            self._labelled(diffusers.UNet2DModel)
        self.plain = self.pipe.unet
        if self.mode is not None:
            backend, mode = ("eager", None) if job.dry else ("inductor", self.mode)
            torch._dynamo.config.recompile_limit = 64  # each batch size is compiled for itself, as for who has one
            self.pipe.unet = torch.compile(self.pipe.unet, dynamic=False, backend=backend, mode=mode)

    def _labelled(self, unet: type[nn.Module]) -> None:
        class Labelled(unet):  # type: ignore[valid-type, misc]
            """The network with labels that were set before."""

            def forward(
                self,
                sample: Tensor,
                timestep: Tensor,
                class_labels: Tensor | None = None,
                return_dict: bool = True,
            ) -> object:
                return super().forward(sample, timestep, self.labels, return_dict)

        self.pipe.unet.__class__ = Labelled

    def prepare(self, batch: int, steps: int) -> None:
        """Set the labels."""
        super().prepare(batch, steps)
        if self.job.classes is not None:
            labels = self._labels()
            self.plain.labels = None if labels is None else labels.to(self.job.device)

    def _steps(self) -> Tensor:
        """The loop around its network, which alone is timed where `steps_only` says so."""
        network = self._evaluated if self.job.model else self.network
        return scheduler_loop(self.scheduler, network, self.job, self.batch, self.steps)

    def _evaluated(self, x: Tensor, t: Tensor) -> Tensor:
        if self.mode == "reduce-overhead" and not self.job.dry:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # A time on the host would keep a compiled network from being captured.
        out: Tensor = self.pipe.unet(x.to(self.dtype), t.to(x.device)).sample
        return out.float()

    def _call(self) -> Tensor:
        plain = self.precision != "bf16" and not self.job.steps_only  # the pipeline hands out no bfloat16 pictures
        if not self.job.model or not plain:
            return to_pictures(self._steps())
        drawn = self.pipe(batch_size=self.batch, num_inference_steps=self.steps, output_type="np").images
        return torch.from_numpy(np.ascontiguousarray(drawn.transpose(0, 3, 1, 2))).float()

    def pictures(self) -> Tensor:
        """The pipeline's call, with the common noise."""
        with common_noise(self.job, self.batch, self.steps), self._arithmetic():
            return self._call()

    def run(self) -> None:
        """The pipeline's call, or its steps alone."""
        with self._arithmetic():
            self._steps() if self.job.steps_only else self._call()

    def flops(self) -> float:
        """Counted on its network."""
        if not self.job.model:
            return 0.0
        one = torch.zeros(self.batch, dtype=torch.int64)
        return count_flops(self.plain, torch.zeros(self.batch, *self.job.shape, dtype=self.dtype), one) / self.batch

    def outside(self) -> float | None:
        """Of a loop with its scheduler."""
        return None if self.mode else outside_ms(DiffusersPeer(self.precision), self.job, self.batch)


@torch.no_grad()
def scheduler_loop(
    scheduler: DDPMScheduler,
    network: Callable[[Tensor, Tensor], Tensor],
    job: Job,
    batch: int,
    steps: int,
) -> Tensor:
    """The loop of DDPMPipeline around any network, as its documentation shows it; x_0."""
    from diffusers.schedulers import scheduling_ddpm

    scheduler.set_timesteps(steps)
    x: Tensor = scheduling_ddpm.randn_tensor((batch, *job.shape), device=torch.device(job.device), dtype=torch.float32)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def to_pictures(x: Tensor) -> Tensor:
    """x_0 as pictures in [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1).cpu()


class LucidrainsPeer(Peer):
    """GaussianDiffusion of denoising-diffusion-pytorch with its own U-Net, of similar size: not the same pictures."""

    equality = False

    def load(self, job: Job) -> None:
        """Make its U-Net, with random weights."""
        super().load(job)
        if not job.lucidrains:
            raise MissingError("no network of similar size is set for it here")
        self.module = package_module("denoising_diffusion_pytorch")
        torch.manual_seed(0)
        arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in job.lucidrains.items()}
        self.network = self.module.Unet(**arguments).eval().to(job.device)

    def prepare(self, batch: int, steps: int) -> None:
        """Make a diffusion of that many timesteps, so that its own loop runs them all."""
        super().prepare(batch, steps)
        size = self.job.shape[1]
        self.diffusion = self.module.GaussianDiffusion(self.network, image_size=size, timesteps=steps).eval()
        self.diffusion.to(self.job.device)

    def pictures(self) -> Tensor:
        """Of its own."""
        drawn: Tensor = self.diffusion.sample(batch_size=self.batch)
        return drawn.float().cpu()

    def run(self) -> None:
        """Its own loop."""
        self.diffusion.sample(batch_size=self.batch)

    def flops(self) -> float:
        """Counted on its network."""
        return count_flops(self.network, torch.zeros(1, *self.job.shape), torch.zeros(1, dtype=torch.int64))
