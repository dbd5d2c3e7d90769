"""Accelerated pipelines of diffusers: the same call, with our U-Net, step table and loop inside.

    pipe = fastddpm.accelerate(DDPMPipeline.from_pretrained(...))
    images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).images

The pipeline itself is kept and not changed: attributes and methods are its own, and setting one (`pipe.scheduler = …`)
sets its. The network is our U-Net with the UNet2DModel's weights, made anew when those change; a UNet2DModel with
options that ours has not, one in half precision, one with hooks or compiled is called as it is.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, LDMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddpm.engines.choose import EngineName
from fastddpm.integrations.diffusers_noise import Generator
from fastddpm.integrations.pipeline_network import PipelineNetwork, check_unet
from fastddpm.integrations.pipeline_run import Run, check_scheduler, sample

__all__ = ["AcceleratedDDIMPipeline", "AcceleratedDDPMPipeline", "AcceleratedLDMPipeline", "accelerate_pipeline"]

Output: TypeAlias = ImagePipelineOutput | tuple[object]


class _AcceleratedPipeline:
    """What the accelerated pipelines share: everything but the call is the wrapped pipeline's own."""

    accelerates_diffusers = True

    def __init__(self, pipe: DiffusionPipeline, engine: EngineName = "auto") -> None:
        """Wrap a pipeline, which stays as it is."""
        self.__dict__["pipe"] = pipe
        self.__dict__["network"] = PipelineNetwork(engine)
        check_scheduler(pipe.scheduler)
        check_unet(pipe.unet)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the pipeline has
        if name == "pipe" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # a copy under way has no pipeline yet
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pipe!r})"

    def to(self, *args: object, **kwargs: object) -> _AcceleratedPipeline:
        """Move the pipeline, or change its dtype, as `DiffusionPipeline.to` does; returns this object."""
        self.pipe.to(*args, **kwargs)
        return self

    def _x_T(self, batch_size: int, generator: Generator) -> Tensor:
        """A start as DDPMPipeline and DDIMPipeline draw it."""
        device, dtype = self.pipe._execution_device, self.pipe.unet.dtype
        x_T: Tensor = randn_tensor(self._shape(batch_size), generator=generator, device=device, dtype=dtype)
        return x_T

    def _sample(self, x_T: Tensor, run: Run) -> Tensor:
        return sample(self.pipe, self.network, x_T, run)

    def _shape(self, batch_size: int) -> tuple[int, ...]:
        config = self.pipe.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("accelerate: the network's sample_size must be set, got None; set it in unet.config")
        return (batch_size, config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _finish(self, x: Tensor, output_type: str | None, return_dict: bool) -> Output:
        """From [−1, 1] to what the caller asked for."""
        unit = (x / 2 + 0.5).clamp(0, 1)
        images: object = unit
        if output_type != "pt":
            images = array = unit.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.pipe.numpy_to_pil(array)
        self.pipe.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class AcceleratedDDPMPipeline(_AcceleratedPipeline):
    """diffusers' DDPMPipeline, accelerated."""

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Output:
        """Draw pictures; the arguments are those of DDPMPipeline.

        Args:
            batch_size: how many.
            generator: of x_T and of the noise, or one per picture.
            num_inference_steps: S.
            output_type: "pil", "pt" (a tensor), or anything else for an array.
            return_dict: whether to return an ImagePipelineOutput or a tuple.

        Returns:
            The pictures, in `images` or as the tuple's only entry.

        Raises:
            TypeError: the scheduler was replaced by one of another kind.
            ValueError: the network needs classes, or does not fit the scheduler.
        """
        x = self._sample(self._x_T(batch_size, generator), Run(num_inference_steps, generator))
        return self._finish(x, output_type, return_dict)


class AcceleratedDDIMPipeline(_AcceleratedPipeline):
    """diffusers' DDIMPipeline, accelerated."""

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Output:
        """Draw pictures; the arguments are those of DDIMPipeline.

        Args:
            batch_size: how many.
            generator: of x_T and of the noise, or one per picture.
            eta: η of DDIM; other schedulers have none and ignore it.
            num_inference_steps: S.
            use_clipped_model_output: DDIM: whether ε is taken from the clipped x̂_0.
            output_type: "pil", "pt" (a tensor), or anything else for an array.
            return_dict: whether to return an ImagePipelineOutput or a tuple.

        Returns:
            The pictures, in `images` or as the tuple's only entry.

        Raises:
            TypeError: the scheduler was replaced by one of another kind.
            ValueError: the generators are not one per picture, or the network needs classes or does not fit.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"accelerate: generator must be one, or one for each of {batch_size} pictures, got a list of "
                f"{len(generator)}; make the two agree"
            )
        run = Run(num_inference_steps, generator, eta, bool(use_clipped_model_output))
        x = self._sample(self._x_T(batch_size, generator), run)
        return self._finish(x, output_type, return_dict)


class AcceleratedLDMPipeline(_AcceleratedPipeline):
    """diffusers' unconditional LDMPipeline, accelerated; its VQ decoder is kept."""

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        **kwargs: object,
    ) -> Output:
        """Draw pictures; the arguments are those of LDMPipeline.

        Args:
            batch_size: how many.
            generator: of x_T, or one per picture. As in LDMPipeline, the steps' noise (η > 0) is the global
                generator's.
            eta: η of DDIM; other schedulers have none and ignore it.
            num_inference_steps: S.
            output_type: "pil", or anything else for an array.
            return_dict: whether to return an ImagePipelineOutput or a tuple.
            kwargs: ignored, as in LDMPipeline.

        Returns:
            The pictures, in `images` or as the tuple's only entry.

        Raises:
            TypeError: the scheduler was replaced by one of another kind.
            ValueError: the network needs classes, or does not fit the scheduler.
        """
        latents = randn_tensor(self._shape(batch_size), generator=generator).to(self.pipe.device)
        latents = latents * self.pipe.scheduler.init_noise_sigma
        x = self._sample(latents, Run(num_inference_steps, eta=eta))
        with torch.no_grad():
            vqvae = self.pipe.vqvae
            image = vqvae.decode(x / vqvae.config.scaling_factor).sample
        return self._finish(image, "np" if output_type == "pt" else output_type, return_dict)


_PIPELINES = {
    DDPMPipeline: AcceleratedDDPMPipeline,
    DDIMPipeline: AcceleratedDDIMPipeline,
    LDMPipeline: AcceleratedLDMPipeline,
}


def accelerate_pipeline(pipe: object, engine: EngineName = "auto") -> _AcceleratedPipeline:
    """A pipeline that is called like `pipe` and draws the same pictures, faster; see `fastddpm.accelerate`.

    Args:
        pipe: a DDPMPipeline, DDIMPipeline or LDMPipeline with a DDPMScheduler, DDIMScheduler or
            DPMSolverMultistepScheduler. It is kept, and not changed.
        engine: how steps run, as in `fastddpm.Sampler`.

    Returns:
        The accelerated pipeline.

    Raises:
        TypeError: the pipeline is of another kind or has a call of its own, or its scheduler is of another kind.
        ValueError: its network has classes.
    """
    if isinstance(pipe, _AcceleratedPipeline):
        return pipe
    for kind, accelerated in _PIPELINES.items():
        if isinstance(pipe, kind) and type(pipe).__call__ is kind.__call__:
            return accelerated(pipe, engine)
    raise TypeError(
        f"accelerate: the pipeline must be {', '.join(kind.__name__ for kind in _PIPELINES)}, with its own call, got "
        f"{type(pipe).__name__}; set its scheduler to a fastddpm.FastDDIMScheduler, or make a fastddpm.Sampler"
    )
