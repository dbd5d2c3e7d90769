"""What U-Nets of denoising-diffusion-pytorch 0.32 to 1.11 compute otherwise than today's.

Until 2.0 the blocks had group norms, and until 1.9 attention had no memory; that shows in the weights. Until 1.8
attention was wrapped twice, which shows in the names, and there the arithmetic changed without a trace in the weights:

- until 1.7.4 linear attention divided the values by H · W;
- until 1.7.2 the 3×3 convolutions of the blocks standardised their weights, until 1.7.1 with another epsilon;
- until 1.7.0 attention had layer norms where it has RMS norms.

The module guided_diffusion kept the wrapping, and has another RMS norm: of 1.7 its files look like the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.flags import Flags
from fastddpm.nets.lucidrains_config import Arguments

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


def older_options(weights: Mapping[str, Tensor], flags: Flags, version: Version | None) -> Arguments:
    """In what the network differs from today's, as fields of `LucidrainsConfig`; empty for today's.

    Args:
        weights: The U-Net's own.
        flags: May hold `resnet_block_groups`.
        version: From `read_version`.
    """
    options: Arguments = {}
    if is_grouped(weights):
        options["groups"] = groups = flags.integer("resnet_block_groups", 8)
        width = len(weights["downs.0.0.block1.norm.weight"])
        if width % groups:
            raise flags.wrong("resnet_block_groups", f"a divisor of {width}")
    if not any(name.endswith(".mem_kv") for name in weights):
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
