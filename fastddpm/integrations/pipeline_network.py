"""The network of an accelerated pipeline: our U-Net with a UNet2DModel's weights, or the pipeline's own as it is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.diffusers_unet import network_from
from fastddpm.engines.choose import EngineName
from fastddpm.engines.stepper import Stepper
from fastddpm.engines.weights import Weights
from fastddpm.export.library import engine_of
from fastddpm.nets.unet import UNet
from fastddpm.process.spec import ModelSpec


class PipelineNetwork:
    """Our U-Net with a UNet2DModel's weights, kept until those change."""

    def __init__(self, engine: EngineName) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._key: tuple[object, ...] | None = None
        self._weights: Weights | None = None
        self.stepper: Stepper | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are empty; what was made is made anew."""
        return PipelineNetwork, (self._engine,)

    def of(self, unet: UNet2DModel, spec: ModelSpec, T: int, device: torch.device) -> Stepper:
        """What makes the network's steps.

        Args:
            unet: the pipeline's network.
            spec: its conventions.
            T: training steps.
            device: where it runs.
        """
        if not _is_plain(unet):
            return self._made(_as_it_is(unet), "eager", spec, T, device)
        with self._lock:  # calls from several threads share what is made
            key = (id(unet), spec, T, device)
            is_stale = self._weights is not None and self._weights.have_changed()
            if self.stepper is None or self._key != key or is_stale:
                ours = _our_network(unet, device)
                if ours is None:
                    self.stepper = self._made(_as_it_is(unet), "eager", spec, T, device)
                else:
                    self.stepper = self._made(ours, self._engine, spec, T, device)
                self._key = key
                self._weights = Weights(unet)
            return self.stepper

    def _made(
        self, model: Callable[..., Tensor], engine: EngineName, spec: ModelSpec, T: int, device: torch.device
    ) -> Stepper:
        return Stepper(model, spec, T, device, "fp32", functools.partial(engine_of, engine, device, "fp32"))


def check_unet(unet: UNet2DModel) -> None:
    """Raise ValueError if the network needs classes."""
    if getattr(unet.config, "num_class_embeds", None) or getattr(unet.config, "class_embed_type", None):
        raise ValueError(
            "accelerate: the pipeline's network must be unconditional, got one with classes, which these pipelines "
            "cannot name; use fastddpm.Sampler.from_pretrained and class_labels"
        )


def _our_network(unet: UNet2DModel, device: torch.device) -> UNet | None:
    """Our U-Net with its weights; None where it has an option that ours has not."""
    try:
        network = network_from(dict(unet.config), unet.state_dict(), "accelerate")
    except CheckpointError:
        return None
    # Convolutions run fastest on channels-last weights, on CPUs and GPUs alike.
    return network.requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _as_it_is(unet: UNet2DModel) -> Callable[..., Tensor]:
    """A network of diffusers as a plain function."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = unet(x.to(unet.dtype), t).sample
        return out

    return call


def _is_plain(unet: UNet2DModel) -> bool:
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
