"""What U-Nets of denoising-diffusion-pytorch 0.32 to 1.11 compute otherwise than today's, which is made one of them.

Until 2.0 the blocks had group norms, and until 1.9 attention had no memory; that shows in the weights. Until 1.8
attention was wrapped twice, which shows in the names, and there the arithmetic changed without a trace in the weights:

- until 1.7.4 linear attention divided the values by H · W;
- until 1.7.2 the 3×3 convolutions of the blocks standardised their weights, until 1.7.1 with another epsilon;
- until 1.7.0 attention had layer norms where it has RMS norms.

The module guided_diffusion kept the wrapping, and has another RMS norm: of 1.7 its files look like the others.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.flags import Flags

Version = tuple[int, int, int]
_OLDEST: Version = (0, 32, 0)
_EPS = 1e-5
_WRAPPED = re.compile(r"\.fn\.(?:fn\.)?")


def is_grouped(weights: Mapping[str, Tensor]) -> bool:
    """Whether the blocks have group norms, as they had before 2.0."""
    return "downs.0.0.block1.norm.weight" in weights


def is_wrapped(weights: Mapping[str, Tensor]) -> bool:
    """Whether attention has its names from before 1.8, which the class-conditional U-Net has kept."""
    return any(name.startswith("downs.0.2.fn.") for name in weights)


def guided_diffusion(source: str) -> CheckpointError:
    """The error for a network of the package's module of that name."""
    return CheckpointError(
        f"{source}: the U-Net is that of the module guided_diffusion, for classifier guidance (cond_fn), which is not "
        "supported; give another"
    )


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that attention has since 1.8."""
    return {_WRAPPED.sub(".", name): value for name, value in weights.items()}


def read_version(weights: Mapping[str, Tensor], flags: Flags, by_file: object) -> Version | None:
    """The version of the package that the weights are of.

    Args:
        weights: The U-Net's own, under the file's names.
        flags: May hold `version`.
        by_file: What the file says of it, if anything.

    Returns:
        Its numbers; None where nobody says it and all that matters shows in the weights.

    Raises:
        CheckpointError: If it is not known, too old, or not the one that the names show.
    """
    if isinstance(by_file, str):
        flags.agree(version=by_file)
    elif is_grouped(weights) and is_wrapped(weights):
        flags.require("version (of denoising-diffusion-pytorch, with which it was trained)")
    elif "version" not in flags:
        return None
    text = by_file if isinstance(by_file, str) else flags.text("version", "")
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", text)
    version = cast(Version, tuple(map(int, found.groups()))) if found else None
    if version is None or version < _OLDEST:
        raise CheckpointError(
            f"{flags.source}: version must be 0.32.0 or later, got {text}; older networks are not supported"
        )
    by_classes = "classes_emb.weight" in weights
    grouped, wrapped = is_grouped(weights), is_wrapped(weights) and not by_classes
    if wrapped and version >= (1, 8, 0):
        raise guided_diffusion(flags.source)
    if grouped != (version < (2, 0, 0)) or wrapped != (version < (1, 8, 0) and not by_classes):
        raise CheckpointError(
            f"{flags.source}: version must be one that has such names and norms, got {text}; correct it, or give the "
            "file unchanged"
        )
    return version


def older_options(weights: Mapping[str, Tensor], flags: Flags, version: Version | None) -> dict[str, Any]:
    """In what the network differs from today's, as plain JSON data; empty for today's.

    Args:
        weights: The U-Net's own.
        flags: May hold `resnet_block_groups`.
        version: From `read_version`.
    """
    options: dict[str, Any] = {}
    if is_grouped(weights):
        options["groups"] = flags.integer("resnet_block_groups", 8)
        width = len(weights["downs.0.0.block1.norm.weight"])
        if width % options["groups"]:
            raise flags.wrong("resnet_block_groups", f"a divisor of {width}")
    if "classes_emb.weight" not in weights and not any(name.endswith(".mem_kv") for name in weights):
        options["memory"] = False
    if version is not None and version < (1, 7, 4):
        options["mean_value"] = True
    if version is not None and version < (1, 7, 0):
        options["layer_norm"] = True
    return options


def standardised(weights: Mapping[str, Tensor], version: Version | None) -> dict[str, Tensor]:
    """The weights with those of the blocks' 3×3 convolutions standardised, if that version did so in each call."""
    if version is None or version >= (1, 7, 2):
        return dict(weights)

    def standard(w: Tensor) -> Tensor:
        w = w.float()
        var, mean = torch.var_mean(w, dim=(1, 2, 3), unbiased=False, keepdim=True)
        return (w - mean) * (var.clamp(min=_EPS) if version == (1, 7, 1) else var + _EPS).rsqrt()

    is_block = re.compile(r"\.block[12]\.proj\.weight$")
    return {name: standard(value) if is_block.search(name) and value.ndim == 4 else value
            for name, value in weights.items()}  # fmt: skip


class _LayerNorm(nn.Module):
    """g (x − mean) / √(var + ε) over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W]."""
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (var + _EPS).rsqrt() * self.g


class _PerPixel(nn.Module):
    """x / (H · W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W]."""
        return x / (x.shape[2] * x.shape[3])


def make_older(
    network: nn.Module,
    *,
    groups: int | None = None,
    memory: bool = True,
    mean_value: bool = False,
    layer_norm: bool = False,
) -> None:
    """Turn today's U-Net of the package, without weights, into an older one, in place.

    Args:
        network: The package's.
        groups: Of the blocks' group norms; None leaves them RMS norms.
        memory: Whether attention has memory.
        mean_value: Whether linear attention divides the values by H · W.
        layer_norm: Whether attention has layer norms.
    """
    for module in list(network.modules()):
        kind, part = type(module).__name__, cast(Any, module)
        if kind == "Block" and groups is not None:
            part.norm = nn.GroupNorm(groups, part.proj.out_channels)
        if kind == "PreNorm" and layer_norm:
            part.norm = _LayerNorm(part.norm.g.shape[1])
        if kind not in ("Attention", "LinearAttention"):
            continue
        if not memory:
            two, heads, *rest = part.mem_kv.shape
            size = [rest[0], 0] if kind == "LinearAttention" else [0, rest[1]]
            del part.mem_kv
            part.register_buffer("mem_kv", torch.zeros(two, heads, *size, device="cpu"), persistent=False)
        if layer_norm and hasattr(part, "norm"):
            part.norm = _LayerNorm(part.norm.g.shape[1])
        if kind == "LinearAttention":
            convolution, norm = part.to_out
            norm = _LayerNorm(norm.g.shape[1]) if layer_norm else norm
            steps = [("mean", _PerPixel())] if mean_value else []
            part.to_out = nn.Sequential(OrderedDict([*steps, ("0", convolution), ("1", norm)]))
