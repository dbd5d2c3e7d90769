"""UNetConfig: all that determines the U-Net's structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
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

    sample_size: tuple[int, int] = (32, 32)
    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    stem_channels: int | None = None
    embedding_channels: int | None = None
    time_channels: int | None = None
    layers: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    up_attention: tuple[bool, ...] | None = None
    mid_attention: bool = True
    mid_attention_norm: bool = True
    mid_attention_groups: int | None = None
    mid_scale: float = 1.0
    num_heads: int = 1
    up_num_heads: int | None = None
    head_channels: int | None = None
    attention_order: Literal["qkv_heads", "heads_qkv"] = "qkv_heads"
    norm_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    scale_shift: bool = False
    resblock_updown: bool = False
    resblock_down: tuple[bool, ...] | None = None
    resblock_up: tuple[bool, ...] | None = None
    conv_resample: bool = True
    downsample_padding: Literal["symmetric", "asymmetric"] = "symmetric"
    num_classes: int | None = None
    center_input: bool = False
    embedding: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos"
    embedding_shift: float = 1.0

    def __post_init__(self) -> None:
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

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Build a configuration from JSON values.

        Raises:
            ValueError: If a key is unknown or a value is out of range.
            TypeError: If a value has the wrong type.
        """
        return from_named_values(cls, values)


def from_named_values(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a dataclass from JSON values, lists being tuples there.

    Raises:
        ValueError: If a key is unknown, or the class refuses a value.
        TypeError: If it is no object, or the class refuses a type.
    """
    kind = cls.__name__
    if not isinstance(values, Mapping):
        raise TypeError(f"{kind}: must be an object of named values, got {type(values).__name__}")
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"{kind}: keys must be among {sorted(names)}, got {unknown}; remove or correct them")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


_MOST_LAYERS = 64  # far above any network's; building a million blocks would look like hanging
_INTEGERS = ("in_channels", "out_channels", "layers", "num_heads", "norm_groups")
_OPTIONAL_INTEGERS = (
    "stem_channels",
    "embedding_channels",
    "time_channels",
    "mid_attention_groups",
    "up_num_heads",
    "head_channels",
    "num_classes",
)
_LEVEL_FLAGS = ("attention", "up_attention", "resblock_down", "resblock_up")
_BOOLEANS = ("mid_attention", "mid_attention_norm", "scale_shift", "resblock_updown", "conv_resample",
             "center_input")  # fmt: skip
_RANGES = {
    "norm_eps": (0.0, 1.0),
    "dropout": (0.0, 0.999),
    "embedding_shift": (0.0, 1.0),
    "mid_scale": (1e-3, 1e3),
}
_CHOICES = {
    "attention_order": ("qkv_heads", "heads_qkv"),
    "downsample_padding": ("symmetric", "asymmetric"),
    "embedding": ("sin_cos", "cos_sin", "interleaved"),
}


def _validate(config: UNetConfig) -> None:
    _validate_types(config)
    levels = len(config.channels)
    for name in _LEVEL_FLAGS:
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


def _validate_types(config: UNetConfig) -> None:
    for name in _INTEGERS + _OPTIONAL_INTEGERS:
        value = getattr(config, name)
        if value is None and name in _OPTIONAL_INTEGERS:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20:
            raise ValueError(f"UNetConfig: {name} must be an integer in [1, 2**20], got {value!r}")
    if config.layers > _MOST_LAYERS:
        raise ValueError(f"UNetConfig: layers must be at most {_MOST_LAYERS}, got {config.layers}; use fewer")
    for name in _BOOLEANS:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"UNetConfig: {name} must be true or false, got {getattr(config, name)!r}")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"UNetConfig: {name} must be one of {choices}, got {getattr(config, name)!r}")
    for name, length in (("sample_size", 2), ("channels", None)):
        value = getattr(config, name)
        ok = isinstance(value, tuple) and all(isinstance(v, int) and 1 <= v <= 2**16 for v in value)
        if not ok or not value or (length is not None and len(value) != length):
            raise ValueError(f"UNetConfig: {name} must be a list of positive integers, got {value!r}")
    for name in _LEVEL_FLAGS:
        value = getattr(config, name)
        if value is not None and not (isinstance(value, tuple) and all(isinstance(v, bool) for v in value)):
            raise ValueError(f"UNetConfig: {name} must be a list of true/false, got {value!r}")
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"UNetConfig: {name} must be a number in [{low:g}, {high:g}], got {value!r}")
