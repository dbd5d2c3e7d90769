"""The network of an accelerated pipeline: our U-Net with a UNet2DModel's weights, or the pipeline's own as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.diffusers_unet import network_from
from fastddpm.engine import Engine, EngineName
from fastddpm.unet import UNet


class Network:
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


def check_unet(unet: Any) -> None:  # noqa: ANN401 - diffusers is not typed
    """Raise ValueError if the network needs classes."""
    if getattr(unet.config, "num_class_embeds", None) or getattr(unet.config, "class_embed_type", None):
        raise ValueError(
            "accelerate: the pipeline's network must be unconditional, got one with classes, which these pipelines "
            "cannot name; use fastddpm.Sampler.from_pretrained and class_labels"
        )


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
