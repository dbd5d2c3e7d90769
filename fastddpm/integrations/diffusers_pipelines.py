"""Accelerated pipelines of diffusers: the same call, with our U-Net, step table and loop inside.

    pipe = fastddpm.accelerate(DDPMPipeline.from_pretrained(...))
    images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).images

The pipeline itself is kept and not changed: attributes and methods are its own, and setting one (`pipe.scheduler = …`)
sets its. The network is our U-Net with the UNet2DModel's weights, made anew when those change; a UNet2DModel with
options that ours has not, one in half precision, one with hooks or compiled is called as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.diffusers_unet import network_from
from fastddpm.denoiser import bind
from fastddpm.engine import Engine, EngineName
from fastddpm.integrations.diffusers_schedulers import (
    FastDDIMScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
    Generator,
    draw,
)
from fastddpm.integrations.scheduler_tables import ancestral_table, ddim_table, multistep_tables
from fastddpm.spec import ModelSpec
from fastddpm.state import State
from fastddpm.step_table import StepTable
from fastddpm.unet import UNet

try:
    from diffusers import (
        DDIMPipeline,
        DDIMScheduler,
        DDPMPipeline,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        LDMPipeline,
        UNet2DModel,
    )
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError(f"accelerate: diffusers must be installed, got {error}; install fastddpm[diffusers]") from error

__all__ = ["AcceleratedDDIMPipeline", "AcceleratedDDPMPipeline", "AcceleratedLDMPipeline", "accelerate_pipeline"]

_ANCESTRAL = (DDPMScheduler, FastDDPMScheduler)
_DDIM = (DDIMScheduler, FastDDIMScheduler)
_MULTISTEP = (DPMSolverMultistepScheduler, FastDPMSolverMultistepScheduler)
_FAST = {DDPMScheduler: FastDDPMScheduler, DDIMScheduler: FastDDIMScheduler,
         DPMSolverMultistepScheduler: FastDPMSolverMultistepScheduler}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What a scheduler does in a run.

    Attributes:
        table: its step table, or None where its own `step` must be called.
        draws: whether it draws noise in each step, also where it has no effect.
    """

    table: StepTable | None
    draws: Sequence[bool] = ()


class _AcceleratedPipeline:
    """What the accelerated pipelines share: everything but the call is the wrapped pipeline's own."""

    accelerates_diffusers = True

    def __init__(self, pipe: Any, engine: EngineName = "auto") -> None:  # noqa: ANN401 - diffusers is not typed
        """Wrap a pipeline, which stays as it is."""
        self.__dict__["pipe"] = pipe
        self.__dict__["_network"] = _Network(engine)
        _check_scheduler(pipe.scheduler)
        _check_unet(pipe.unet)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the pipeline has
        if name == "pipe" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # a copy under way has no pipeline yet
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pipe!r})"

    def to(self, *args: Any, **kwargs: Any) -> _AcceleratedPipeline:  # noqa: ANN401 - as the pipeline takes them
        """Move the pipeline, or change its dtype, as `DiffusionPipeline.to` does; returns this object."""
        self.pipe.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def _run(
        self, x_T: Tensor, generator: Generator, num_inference_steps: int, eta: float = 0.0, use_clipped: bool = False
    ) -> Tensor:
        """The final state of a run of the pipeline's own scheduler, in the dtype of x_T."""
        scheduler, unet = self.pipe.scheduler, self.pipe.unet
        _check_scheduler(scheduler)
        _check_unet(unet)
        scheduler.set_timesteps(num_inference_steps)
        model, engine = self.__dict__["_network"].of(unet, x_T.device)
        steps = _steps(scheduler, eta, use_clipped)
        if steps.table is None:
            return self._run_by_steps(model, x_T, generator, eta, use_clipped)
        table = steps.table.to(x_T.device)
        _check_channels(unet, table)
        spec = ModelSpec(shape=cast(tuple[int, int, int], tuple(x_T.shape[1:])))
        denoiser = bind(model, spec, table)
        ids = torch.arange(len(x_T))
        state = State.create(spec.shape, ids, 0, device=x_T.device, x_T=x_T, history=True)
        zeros = torch.zeros_like(state.x)[None] if table.uses_noise else None
        runner = engine.runner(denoiser, table, state, zeros, to_come=table.S)
        for i in self.pipe.progress_bar(range(table.S)):
            noise = zeros
            if steps.draws and steps.draws[i]:
                drawn = draw(x_T.shape, generator, x_T)
                noise = drawn.float().contiguous()[None] if table.uses_noise else None
            runner.run(1, noise)
        final: Tensor = runner.state.x.to(x_T.dtype)
        return final

    def _run_by_steps(
        self, model: Callable[..., Tensor], x: Tensor, generator: Generator, eta: float, use_clipped: bool
    ) -> Tensor:
        """The same where the scheduler has options that no table holds: its own step, with our network."""
        scheduler = self.pipe.scheduler
        options: dict[str, Any] = {"generator": generator}
        if type(scheduler) in _DDIM:
            options.update(eta=eta, use_clipped_model_output=use_clipped)
        for t in self.pipe.progress_bar(scheduler.timesteps):
            out = model(x, t.to(x.device).expand(len(x)))
            x = scheduler.step(out.to(x.dtype), t, x, **options).prev_sample
        return x

    def _shape(self, batch_size: int) -> tuple[int, ...]:
        config = self.pipe.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("accelerate: the network's sample_size must be set, got None; set it in unet.config")
        return (batch_size, config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _finish(self, image: Tensor, output_type: str | None, return_dict: bool, keeps_tensors: bool = True) -> Any:  # noqa: ANN401
        """From [−1, 1] to what the caller asked for."""
        image = (image / 2 + 0.5).clamp(0, 1)
        images: Any = image
        if output_type != "pt" or not keeps_tensors:
            images = image.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.pipe.numpy_to_pil(images)
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
    ) -> Any:  # noqa: ANN401 - an ImagePipelineOutput or a tuple
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
        unet = self.pipe.unet
        x_T = randn_tensor(
            self._shape(batch_size), generator=generator, device=self.pipe._execution_device, dtype=unet.dtype
        )
        x = self._run(x_T, generator, num_inference_steps)
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
    ) -> Any:  # noqa: ANN401 - an ImagePipelineOutput or a tuple
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
        unet = self.pipe.unet
        x_T = randn_tensor(
            self._shape(batch_size), generator=generator, device=self.pipe._execution_device, dtype=unet.dtype
        )
        x = self._run(x_T, generator, num_inference_steps, eta, bool(use_clipped_model_output))
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
    ) -> Any:  # noqa: ANN401 - an ImagePipelineOutput or a tuple
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
        x = self._run(latents, None, num_inference_steps, eta)
        with torch.no_grad():
            vqvae = self.pipe.vqvae
            image = vqvae.decode(x / vqvae.config.scaling_factor).sample
        return self._finish(image, output_type, return_dict, keeps_tensors=False)


class _Network:
    """Our U-Net with a UNet2DModel's weights, kept until those change."""

    def __init__(self, engine: EngineName) -> None:
        self._engine = engine
        self._made_of: tuple[object, ...] | None = None
        self._model: Callable[..., Tensor] | None = None
        self._runs: Engine | None = None

    def of(self, unet: Any, device: torch.device) -> tuple[Callable[..., Tensor], Engine]:  # noqa: ANN401
        """(x, t) → output, t int64 [B]; and what runs it.

        Args:
            unet: the pipeline's network.
            device: where it runs.
        """
        if not _is_plain(unet):
            return _as_it_is(unet), Engine("eager", device)
        made_of = (
            id(unet), device, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in unet.parameters())
        )  # fmt: skip
        if self._model is None or self._runs is None or self._made_of != made_of:
            self._model, self._made_of = _our_network(unet, device), made_of
            self._runs = Engine(self._engine if isinstance(self._model, UNet) else "eager", device)
        return self._model, self._runs


def _our_network(unet: Any, device: torch.device) -> Callable[..., Tensor]:  # noqa: ANN401 - diffusers is not typed
    try:
        network = network_from(dict(unet.config), unet.state_dict(), "accelerate")
    except CheckpointError:  # an option that our U-Net has not: slower, and right
        return _as_it_is(unet)
    # Convolutions run fastest on channels-last weights, on CPUs and GPUs alike.
    return network.requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _as_it_is(unet: Any) -> Callable[..., Tensor]:  # noqa: ANN401 - diffusers is not typed
    """A network of diffusers as a plain function."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = unet(x.to(unet.dtype), t).sample
        return out

    return call


def _is_plain(unet: Any) -> bool:  # noqa: ANN401 - diffusers is not typed
    """Whether the weights say all of a network: no hooks, no half precision, no code of somebody else's."""
    if type(unet) is not UNet2DModel or any(p.dtype != torch.float32 for p in unet.parameters()):
        return False
    if unet.training and unet.config.dropout:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")
    if any(getattr(module, name, None) for module in unet.modules() for name in hooks):
        return False
    if "forward" in unet.__dict__ or getattr(unet, "_compiled_call_impl", None) is not None:
        return False
    known = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")
    processors: dict[str, object] = getattr(unet, "attn_processors", {})
    return all(type(processor).__name__ in known for processor in processors.values())


def _steps(scheduler: Any, eta: float, use_clipped: bool) -> _Steps:  # noqa: ANN401 - diffusers is not typed
    """What a run does, whose timesteps are set; without a table where the options are none of ours."""
    timesteps = scheduler.timesteps.cpu()
    try:
        if type(scheduler) in _ANCESTRAL:
            if scheduler.variance_type != scheduler.config.variance_type:
                return _Steps(None)
            return _Steps(ancestral_table(scheduler, timesteps), (timesteps > 0).tolist())
        if type(scheduler) in _DDIM:
            return _Steps(ddim_table(scheduler, timesteps, eta, use_clipped), [eta > 0] * len(timesteps))
        return _Steps(multistep_tables(scheduler, timesteps)[1])
    except (ValueError, TypeError):
        return _Steps(None)


def _check_scheduler(scheduler: object) -> None:
    known = (*_ANCESTRAL, *_DDIM, *_MULTISTEP)
    if type(scheduler) not in known:
        raise TypeError(
            f"accelerate: the pipeline's scheduler must be {', '.join(kind.__name__ for kind in _FAST)} or one of "
            f"their Fast versions, got {type(scheduler).__name__}; make one with from_config"
        )


def _check_unet(unet: Any) -> None:  # noqa: ANN401 - diffusers is not typed
    if getattr(unet.config, "num_class_embeds", None) or getattr(unet.config, "class_embed_type", None):
        raise ValueError(
            "accelerate: the pipeline's network must be unconditional, got one with classes, which these pipelines "
            "cannot name; use fastddpm.Sampler.from_pretrained and class_labels"
        )


def _check_channels(unet: Any, table: StepTable) -> None:  # noqa: ANN401 - diffusers is not typed
    channels, out = unet.config.in_channels, unet.config.out_channels
    wanted = 2 * channels if table.variance == "learned_range" else channels
    if table.solver == "dpmpp_2m" and out == 2 * channels:
        return
    if out != wanted:
        raise ValueError(
            f"accelerate: the network must return {wanted} channels for this scheduler, got {out}; the scheduler's "
            "variance_type belongs to another network"
        )


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
