"""UNetConfig: all that determines the U-Net's structure."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from fastddpm.common.records import Record, Within

_Side = Annotated[int, Within(1, 2**16)]
_Count = Annotated[int, Within(1, 2**20)]
_Layers = Annotated[int, Within(1, 64)]  # far above any network's; building a million blocks would look like hanging


@dataclasses.dataclass(frozen=True)
class UNetConfig(Record):
    """Everything that determines the network's structure and its parameters' shapes.

    Args:
        sample_size: Height and width of x, each divisible by 2**(levels - 1).
        in_channels: Channels C of x.
        out_channels: Channels of the output: C, or 2C where the variance is learned.
        channels: Width of each level, finest first.
        stem_channels: Width of the first convolution; None is `channels[0]`.
        embedding_channels: Width of the sinusoidal embedding; None is the first convolution's width.
        time_channels: Width of the time embedding after its two linear layers; None is 4 × the sinusoids' width.
        layers: ResBlocks per level on the way down; the way up has one more.
        attention: For each level, whether its blocks on the way down are followed by self-attention.
        up_attention: The same for the way up; None repeats `attention`.
        mid_attention: Whether the bottom has self-attention between its two blocks.
        mid_attention_norm: Whether that attention normalises its input.
        mid_attention_groups: Groups of that norm; None repeats `norm_groups`.
        mid_scale: What each sum of a residual branch and its skip path at the bottom is divided by.
        num_heads: Attention heads, unless `head_channels` is given.
        up_num_heads: Heads on the way up; None repeats `num_heads`.
        head_channels: Channels per head; None means `num_heads` heads at every width.
        attention_order: Layout of the fused projection's rows: "qkv_heads" is (3, heads, channels), "heads_qkv" is
            (heads, 3, channels), OpenAI's older order.
        norm_groups: Groups of every group norm.
        norm_eps: Epsilon of every group norm.
        dropout: Probability of the dropout before each ResBlock's second convolution.
        scale_shift: Whether the embedding scales and shifts the second norm (ADM) instead of being added (Ho et al.).
        resblock_updown: Whether resolution changes inside a ResBlock (ADM) instead of by a convolution.
        resblock_down: The same for each level's way to the next coarser one; None repeats `resblock_updown`.
        resblock_up: The same for each level's way to the next finer one; None repeats `resblock_updown`.
        conv_resample: Whether plain down- and upsampling has a convolution; otherwise it is pooling and repetition.
        downsample_padding: "symmetric" pads all sides by one before the strided convolution, "asymmetric" only the
            right and the bottom (Ho et al.'s "SAME").
        num_classes: Rows of the class embedding, including the row that stands for "no class"; None for none.
        center_input: Whether the network sees 2x − 1 instead of x (diffusers' center_input_sample).
        embedding: Order of the sinusoids: "sin_cos", "cos_sin" or "interleaved" (sin, cos, sin, …).
        embedding_shift: What is subtracted from half the width in the frequencies' exponent (1 in Ho et al.).
    """

    sample_size: tuple[_Side, _Side] = (32, 32)
    in_channels: _Count = 3
    out_channels: _Count = 3
    channels: tuple[_Side, ...] = (128, 256, 256, 256)
    stem_channels: _Count | None = None
    embedding_channels: _Count | None = None
    time_channels: _Count | None = None
    layers: _Layers = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    up_attention: tuple[bool, ...] | None = None
    mid_attention: bool = True
    mid_attention_norm: bool = True
    mid_attention_groups: _Count | None = None
    mid_scale: Annotated[float, Within(1e-3, 1e3)] = 1.0
    num_heads: _Count = 1
    up_num_heads: _Count | None = None
    head_channels: _Count | None = None
    attention_order: Literal["qkv_heads", "heads_qkv"] = "qkv_heads"
    norm_groups: _Count = 32
    norm_eps: Annotated[float, Within(0, 1)] = 1e-6
    dropout: Annotated[float, Within(0, 0.999)] = 0.0
    scale_shift: bool = False
    resblock_updown: bool = False
    resblock_down: tuple[bool, ...] | None = None
    resblock_up: tuple[bool, ...] | None = None
    conv_resample: bool = True
    downsample_padding: Literal["symmetric", "asymmetric"] = "symmetric"
    num_classes: _Count | None = None
    center_input: bool = False
    embedding: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos"
    embedding_shift: Annotated[float, Within(0, 1)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _validate(self)

    @property
    def stem(self) -> int:
        """Width of the first convolution."""
        return self.channels[0] if self.stem_channels is None else self.stem_channels

    @property
    def sinusoids(self) -> int:
        """Width of the sinusoidal embedding."""
        return self.stem if self.embedding_channels is None else self.embedding_channels

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding after its two linear layers."""
        return 4 * self.sinusoids if self.time_channels is None else self.time_channels

    def changes_in_resblock(self, level: int, direction: Literal["down", "up"]) -> bool:
        """Whether the way from `level` to the next coarser ("down") or finer ("up") one is a ResBlock."""
        flags = self.resblock_down if direction == "down" else self.resblock_up
        return self.resblock_updown if flags is None else flags[level]


def _validate(config: UNetConfig) -> None:
    levels = len(config.channels)
    for name in ("attention", "up_attention", "resblock_down", "resblock_up"):
        flags = getattr(config, name)
        if flags is not None and len(flags) != levels:
            raise ValueError(f"UNetConfig: {name} must have one entry per level ({levels}), got {len(flags)}")
    if any(size % 2 ** (levels - 1) for size in config.sample_size):
        raise ValueError(
            f"UNetConfig: sample_size must be divisible by {2 ** (levels - 1)} ({levels} levels), "
            f"got {config.sample_size}; use fewer levels or pad the pictures"
        )
    for width in {config.stem, *config.channels}:
        if width % config.norm_groups:
            raise ValueError(
                f"UNetConfig: channels must be multiples of norm_groups={config.norm_groups}, got {width}; "
                "change one of the two"
            )
    groups = config.mid_attention_groups
    if groups is not None and config.channels[-1] % groups:
        raise ValueError(
            f"UNetConfig: mid_attention_groups must divide the coarsest level's width {config.channels[-1]}, "
            f"got {groups}; change one of the two"
        )
    _validate_heads(config)


def _validate_heads(config: UNetConfig) -> None:
    for width in {width for width in config.channels if _uses_attention(config, width)}:
        if config.head_channels is not None and width % config.head_channels:
            raise ValueError(
                f"UNetConfig: head_channels must divide the width of every attention, got {config.head_channels} "
                f"for {width}; change one of the two"
            )
        for heads in {config.num_heads, config.up_num_heads or config.num_heads}:
            if config.head_channels is None and width % heads:
                raise ValueError(
                    f"UNetConfig: num_heads must divide the width of every attention, got {heads} for {width}; "
                    "change one of the two"
                )


def _uses_attention(config: UNetConfig, width: int) -> bool:
    """Whether any attention layer has this width."""
    up = config.attention if config.up_attention is None else config.up_attention
    at_levels = any(w == width and (d or u) for w, d, u in zip(config.channels, config.attention, up, strict=True))
    return at_levels or (config.mid_attention and config.channels[-1] == width)
