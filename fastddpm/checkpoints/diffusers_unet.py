"""diffusers' UNet2DModel: its configuration, its names for the parts, and the way of both into our U-Net."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from torch import Tensor

from fastddpm.checkpoints.base import blamed_on
from fastddpm.checkpoints.renaming import Kind, Names, Part, load_renamed
from fastddpm.common.records import Record, Within, read_record
from fastddpm.nets.unet import UNet, UNetConfig

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_DOWN = {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)}
_UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}
_Side = Annotated[int, Within(1)]


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(Record):
    """What UNet2DModel's configuration holds, in the library's names and with its defaults; None is null."""

    REMEDY = "nothing else is supported"

    sample_size: _Side | tuple[_Side, _Side] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] | None = "conv"
    upsample_type: Literal["conv", "resnet"] | None = "conv"
    dropout: float = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: None = None
    num_class_embeds: int | None = None

    def structure(self, sample_size: int | None = None) -> UNetConfig:
        """Our configuration.

        Args:
            sample_size: Height and width of a picture, where there is none.

        Raises:
            ValueError: An option is out of range, there is not one of each for every level, or a block is unknown.
        """
        size, channels = self.sample_size or sample_size, self.block_out_channels
        if size is None:
            raise ValueError("sample_size must be an integer or two, got null; give the pictures' height and width")
        down = _levels("down_block_types", self.down_block_types, _DOWN, self.downsample_type)
        up = list(reversed(_levels("up_block_types", self.up_block_types, _UP, self.upsample_type)))
        if not len(down) == len(up) == len(channels):
            raise ValueError(
                "block_out_channels, down_block_types and up_block_types must have one entry per level, got "
                f"{len(channels)}, {len(down)} and {len(up)}; mend the file"
            )
        default_norm, groups = self.resnet_time_scale_shift == "default", self.attn_norm_num_groups
        return UNetConfig(
            sample_size=size if isinstance(size, tuple) else (size, size),
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            channels=channels,
            time_channels=self.time_embedding_dim or None,
            layers=self.layers_per_block,
            attention=tuple(attends for attends, _ in down),
            up_attention=tuple(attends for attends, _ in up),
            resblock_down=tuple(in_block for _, in_block in down),
            resblock_up=tuple(in_block for _, in_block in up),
            mid_attention=self.add_attention,
            mid_attention_norm=default_norm or groups is not None,
            mid_attention_groups=groups,
            mid_scale=self.mid_block_scale_factor,
            head_channels=self.attention_head_dim,  # null is one head at each width, which is our default
            norm_groups=self.norm_num_groups,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            scale_shift=not default_norm,
            downsample_padding="asymmetric" if self.downsample_padding == 0 else "symmetric",
            num_classes=self.num_class_embeds,
            center_input=self.center_input_sample,
            embedding="cos_sin" if self.flip_sin_to_cos else "sin_cos",
            embedding_shift=self.freq_shift,
        )


def _levels(
    name: str, blocks: Sequence[str], known: Mapping[str, tuple[bool, bool | None]], kind: str | None
) -> list[tuple[bool, bool]]:
    """For each level whether it has attention, and whether its change of resolution is a ResBlock."""
    levels = []
    for block in blocks:
        block = block.removeprefix("UNetRes")  # the oldest files' names
        if block not in known:
            raise ValueError(f"{name} must be among {', '.join(known)}, got {block!r}, which is not supported")
        attends, in_block = known[block]
        levels.append((attends, kind == "resnet" if in_block is None else in_block))
    return levels


def network_from(
    config: Mapping[str, object],
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
    return load_renamed(config, names_of(config), _renamed_attention(weights), source, _option)


def unet_config(given: Mapping[str, object], source: str, sample_size: int | None = None) -> UNetConfig:
    """The structure that a UNet2DModel's configuration stands for.

    Args:
        given: The configuration.
        source: What messages start with.
        sample_size: Height and width of a picture, where the configuration has none.

    Raises:
        CheckpointError: If an option is missing, wrong or not supported; it is named.
    """
    with blamed_on(source):
        structure = read_record(UNet2DConfig, given, more=True).structure(sample_size)
    return structure


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


def names_of(config: UNetConfig) -> Names:
    """What this dialect calls the parts of a network."""
    levels = len(config.channels)

    def place(part: Part, level: int, i: int, kind: Kind) -> str:
        if part == "mid":
            return f"mid_block.{'attentions' if kind == 'attention' else 'resnets'}.{i}"
        block = f"down_blocks.{level}" if part == "down" else f"up_blocks.{levels - 1 - level}"
        if kind == "resample":
            return f"{block}.{part}samplers.0"
        return f"{block}.{'attentions' if kind == 'attention' else 'resnets'}.{i}"

    return Names(
        fixed={"time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2",
               "label_embedding": "class_embedding", "stem": "conv_in", "norm_out": "conv_norm_out",
               "conv_out": "conv_out"},
        block={"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
               "skip": "conv_shortcut"},
        norm="group_norm", qkv=("to_q", "to_k", "to_v"), out="to_out.0", down_conv="conv", up_conv="conv", place=place,
    )  # fmt: skip
