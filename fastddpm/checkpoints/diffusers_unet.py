"""diffusers' UNet2DModel: its configuration, its names for the parts, and the way of both into our U-Net."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.renaming import Kind, Names, Part, load_renamed
from fastddpm.nets.unet import UNet, UNetConfig

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_DOWN = {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)}
_UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}
# UNet2DModel's own defaults, for configurations that leave an entry out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, True),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}


def network_from(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str = "UNet2DModel",
    *,
    sample_size: int | None = None,
) -> UNet:
    """Our U-Net with the weights of a UNet2DModel, in memory.

    Args:
        config: What its `config` holds (or its config.json); what is left out is the library's default.
        weights: Its state dict, of any floating-point type; of today's or the old names for attention.
        source: What messages start with.
        sample_size: Height and width of a picture, where the configuration has none.

    Returns:
        The network in float32 on the CPU, in evaluation mode. It computes what the UNet2DModel computes.

    Raises:
        CheckpointError: If an option is not supported, or the weights do not fit the configuration.
    """
    return load_network(unet_config(config, source, sample_size), weights, source)


def load_network(config: UNetConfig, weights: Mapping[str, Tensor], source: str) -> UNet:
    """Fill a U-Net of this structure with a UNet2DModel's weights.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    return load_renamed(config, _names(config), _renamed_attention(weights), source, _option)


def unet_config(given: Mapping[str, Any], source: str, sample_size: int | None = None) -> UNetConfig:
    """The structure that a UNet2DModel's configuration stands for.

    Args:
        given: The configuration.
        source: What messages start with.
        sample_size: Height and width of a picture, where the configuration has none.

    Raises:
        CheckpointError: If an option is missing, wrong or not supported; it is named.
    """
    values = {**DEFAULTS, **given}
    for name, allowed in _ONLY.items():
        if values[name] not in allowed:
            raise CheckpointError(
                f"{source}: {name} must be {' or '.join(map(repr, allowed))}, got {values[name]!r}: not supported"
            )
    if values["sample_size"] is None:
        values["sample_size"] = sample_size
    try:
        return UNetConfig(**_structure(values, source))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{source}: {error}") from error


def _structure(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The arguments of our configuration."""
    size, channels = values["sample_size"], _list(values, "block_out_channels", source)
    down = _levels(values, "down_block_types", _DOWN, values["downsample_type"], source)
    up = list(reversed(_levels(values, "up_block_types", _UP, values["upsample_type"], source)))
    if not len(down) == len(up) == len(channels):
        raise CheckpointError(
            f"{source}: block_out_channels, down_block_types and up_block_types must have one entry per level, got "
            f"{len(channels)}, {len(down)} and {len(up)}; mend the file"
        )
    default_norm = values["resnet_time_scale_shift"] == "default"
    groups = values["attn_norm_num_groups"]
    return {
        "sample_size": tuple(size) if isinstance(size, (list, tuple)) else (size, size),
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "channels": tuple(channels),
        "time_channels": values["time_embedding_dim"] or None,
        "layers": values["layers_per_block"],
        "attention": tuple(attends for attends, _ in down),
        "up_attention": tuple(attends for attends, _ in up),
        "resblock_down": tuple(in_block for _, in_block in down),
        "resblock_up": tuple(in_block for _, in_block in up),
        "mid_attention": values["add_attention"],
        "mid_attention_norm": default_norm or groups is not None,
        "mid_attention_groups": groups,
        "mid_scale": values["mid_block_scale_factor"],
        "head_channels": values["attention_head_dim"],  # null is one head at each width, which is our default
        "norm_groups": values["norm_num_groups"],
        "norm_eps": values["norm_eps"],
        "dropout": values["dropout"],
        "scale_shift": not default_norm,
        "downsample_padding": "asymmetric" if values["downsample_padding"] == 0 else "symmetric",
        "num_classes": values["num_class_embeds"],
        "center_input": values["center_input_sample"],
        "embedding": "cos_sin" if values["flip_sin_to_cos"] else "sin_cos",
        "embedding_shift": values["freq_shift"],
    }


def _levels(
    values: Mapping[str, Any], name: str, known: Mapping[str, tuple[bool, bool | None]], kind: str | None, source: str
) -> list[tuple[bool, bool]]:
    """For each level whether it has attention, and whether its change of resolution is a ResBlock."""
    levels = []
    for block in _list(values, name, source):
        block = block.removeprefix("UNetRes") if isinstance(block, str) else block  # the oldest files' names
        if not isinstance(block, str) or block not in known:
            raise CheckpointError(
                f"{source}: {name} must be among {', '.join(known)}, got {block!r}, which is not supported"
            )
        attends, in_block = known[block]
        levels.append((attends, kind == "resnet" if in_block is None else in_block))
    return levels


def _list(values: Mapping[str, Any], name: str, source: str) -> list[Any]:
    if not isinstance(values[name], (list, tuple)) or not values[name]:
        raise CheckpointError(
            f"{source}: {name} must be a list with one entry per level, got {values[name]!r}; mend it"
        )
    return list(values[name])


def _renamed_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the attention layers' names of today, whichever the file has."""
    renamed = {}
    for name, value in state.items():
        if ".attentions." in name:
            for old, new in _OLD_ATTENTION.items():
                name = name.replace(old, new)
        renamed[name] = value
    return renamed


_OPTIONS = {
    r"conv_in\.": "in_channels or block_out_channels",
    r"conv_(norm_)?out\.": "out_channels or block_out_channels",
    r"class_embedding\.": "num_class_embeds",
    r"time_embedding\.": "time_embedding_dim or block_out_channels",
    r"mid_block\.attentions\.0\.group_norm": "attn_norm_num_groups or resnet_time_scale_shift",
    r"mid_block\.attentions": "add_attention",
    r".*\.time_emb_proj": "resnet_time_scale_shift or block_out_channels",
    r"down_blocks\.\d+\.attentions": "down_block_types",
    r"up_blocks\.\d+\.attentions": "up_block_types",
    r"down_blocks\.\d+\.downsamplers": "downsample_type or down_block_types",
    r"up_blocks\.\d+\.upsamplers": "upsample_type or up_block_types",
    r"(down|up)_blocks\.\d+\.resnets": "layers_per_block or block_out_channels",
    r"(down|up)_blocks|mid_block": "block_out_channels",
}


def _option(name: str) -> str | None:
    """The entry of config.json that decides on a tensor's presence and shape."""
    return next((option for pattern, option in _OPTIONS.items() if re.match(pattern, name)), None)


def _names(config: UNetConfig) -> Names:
    levels = len(config.channels)

    def place(part: Part, level: int, i: int, kind: Kind) -> str:
        if part == "mid":
            return f"mid_block.{'attentions' if kind == 'attention' else 'resnets'}.{i}"
        block = f"down_blocks.{level}" if part == "down" else f"up_blocks.{levels - 1 - level}"
        if kind == "resample":
            return f"{block}.{part}samplers.0"
        return f"{block}.{'attentions' if kind == 'attention' else 'resnets'}.{i}"

    return Names(
        fixed={
            "time_mlp.0": "time_embedding.linear_1",
            "time_mlp.2": "time_embedding.linear_2",
            "label_embedding": "class_embedding",
            "stem": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        block={
            "norm1": "norm1",
            "conv1": "conv1",
            "time": "time_emb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "skip": "conv_shortcut",
        },
        norm="group_norm",
        qkv=("to_q", "to_k", "to_v"),
        out="to_out.0",
        down_conv="conv",
        up_conv="conv",
        place=place,
    )
