"""The U-Net of Ho et al. (2020, appendix B) with the options of its ADM descendants (Dhariwal & Nichol 2021).

One network covers the common DDPM code bases: they differ in the options of `UNetConfig`, not in structure.

The time embedding depends on the timestep (and the class) alone, never on the picture. All the linear layers that
turn it into per-block shifts are therefore one stacked layer, `time_projection`, outside of `UNet.body`: training
calls it once per step, and a sampler tabulates it once per run (`UNet.tabulate`) and hands `body` a row of numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Everything that determines the network's structure and its parameters' shapes.

    Args:
        sample_size: Height and width of x, each divisible by 2**(levels - 1).
        in_channels: Channels C of x.
        out_channels: Channels of the output: C, or 2C where the variance is learned.
        channels: Width of each level, finest first.
        stem_channels: Width of the first convolution and of the sinusoidal embedding; None is `channels[0]`.
        layers: ResBlocks per level on the way down; the way up has one more.
        attention: For each level, whether its blocks on the way down are followed by self-attention.
        up_attention: The same for the way up; None repeats `attention`.
        mid_attention: Whether the bottom has self-attention between its two blocks.
        mid_attention_norm: Whether that attention normalises its input.
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
        conv_resample: Whether plain down- and upsampling has a convolution; otherwise it is pooling and repetition.
        downsample_padding: "symmetric" pads all sides by one before the strided convolution, "asymmetric" only the
            right and the bottom (Ho et al.'s "SAME").
        num_classes: Rows of the class embedding, including the row that stands for "no class"; None for none.
        embedding: Order of the sinusoids: "sin_cos", "cos_sin" or "interleaved" (sin, cos, sin, …).
        embedding_shift: What is subtracted from half the width in the frequencies' exponent (1 in Ho et al.).
    """

    sample_size: tuple[int, int] = (32, 32)
    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    stem_channels: int | None = None
    layers: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    up_attention: tuple[bool, ...] | None = None
    mid_attention: bool = True
    mid_attention_norm: bool = True
    num_heads: int = 1
    up_num_heads: int | None = None
    head_channels: int | None = None
    attention_order: Literal["qkv_heads", "heads_qkv"] = "qkv_heads"
    norm_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    scale_shift: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    downsample_padding: Literal["symmetric", "asymmetric"] = "symmetric"
    num_classes: int | None = None
    embedding: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos"
    embedding_shift: float = 1.0

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def stem(self) -> int:
        """Width of the first convolution and of the sinusoidal embedding."""
        return self.channels[0] if self.stem_channels is None else self.stem_channels

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding after its two linear layers."""
        return 4 * self.stem

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
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(
                f"UNetConfig: keys must be among {sorted(names)}, got {unknown}; remove or correct them"
            )
        return cls(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )


_INTEGERS = ("in_channels", "out_channels", "layers", "num_heads", "norm_groups")
_OPTIONAL_INTEGERS = ("stem_channels", "up_num_heads", "head_channels", "num_classes")
_BOOLEANS = ("mid_attention", "mid_attention_norm", "scale_shift", "resblock_updown", "conv_resample")
_CHOICES = {
    "attention_order": ("qkv_heads", "heads_qkv"),
    "downsample_padding": ("symmetric", "asymmetric"),
    "embedding": ("sin_cos", "cos_sin", "interleaved"),
}


def _validate(config: UNetConfig) -> None:
    _validate_types(config)
    levels = len(config.channels)
    for name in ("attention", "up_attention"):
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
        for heads in {config.num_heads, config.up_num_heads or config.num_heads}:
            per_head = config.head_channels or max(1, width // heads)
            if width in config.channels and _uses_attention(config, width) and width % per_head:
                raise ValueError(
                    f"UNetConfig: attention width {width} must be a multiple of its heads, got {per_head}"
                )


def _uses_attention(config: UNetConfig, width: int) -> bool:
    """Whether any attention layer has this width."""
    up = config.attention if config.up_attention is None else config.up_attention
    at_levels = any(
        w == width and (d or u) for w, d, u in zip(config.channels, config.attention, up, strict=True)
    )
    return at_levels or (config.mid_attention and config.channels[-1] == width)


def _validate_types(config: UNetConfig) -> None:
    for name in _INTEGERS + _OPTIONAL_INTEGERS:
        value = getattr(config, name)
        if value is None and name in _OPTIONAL_INTEGERS:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20:
            raise ValueError(f"UNetConfig: {name} must be an integer in [1, 2**20], got {value!r}")
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
    for name in ("attention", "up_attention"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, tuple) and all(isinstance(v, bool) for v in value)):
            raise ValueError(f"UNetConfig: {name} must be a list of true/false, got {value!r}")
    for name, low, high in (("norm_eps", 0.0, 1.0), ("dropout", 0.0, 0.999), ("embedding_shift", 0.0, 1.0)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"UNetConfig: {name} must be a number in [{low}, {high}], got {value!r}")


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    order: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos",
    shift: float = 1.0,
    max_period: float = 10_000.0,
) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5, as used by Ho et al. 2020).

    With h = dim // 2 frequencies ω_k = max_period^(−k/(h − shift)), the features are sin(ω_k t) and cos(ω_k t).

    Args:
        t: Timesteps [B], integer or fractional, usually in [0, T).
        dim: Width of the result; an odd width gets one zero at the end.
        order: Whether sines come first, cosines come first, or the two alternate.
        shift: 1 in Ho et al., 0 in OpenAI's code.
        max_period: Longest wavelength divided by 2π.

    Returns:
        float32 [B, dim] on t's device.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - shift, 1e-9)
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    sin, cos = torch.sin(angles), torch.cos(angles)
    if order == "interleaved":
        features = torch.stack((sin, cos), dim=-1).flatten(1)
    else:
        features = torch.cat((sin, cos) if order == "sin_cos" else (cos, sin), dim=1)
    return F.pad(features, (0, dim - 2 * half))


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, embedding, norm, SiLU, dropout, convolution, plus a skip path."""

    def __init__(
        self, config: UNetConfig, c_in: int, c_out: int, resample: Literal["down", "up"] | None = None
    ) -> None:
        """Make a block from `c_in` to `c_out` channels that may also change the resolution by two."""
        super().__init__()
        self.resample = resample
        self.scale_shift = config.scale_shift
        self.projection_width = c_out * (2 if config.scale_shift else 1)
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:
        """Map x [B, c_in, H, W] with this block's slice of the time projection [B, projection_width]."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = _resample(h, self.resample), _resample(x, self.resample)
        h = self.conv1(h)
        projection = projection[:, :, None, None]
        if self.scale_shift:
            scale, shift = projection.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + projection)
        return self.conv2(self.dropout(F.silu(h))) + self.skip(x)


def _resample(x: Tensor, direction: Literal["down", "up"]) -> Tensor:
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self-attention over the H·W positions with a residual connection (Ho et al. 2020, appendix B)."""

    def __init__(self, config: UNetConfig, channels: int, heads: int, normalise: bool = True) -> None:
        """Make attention over `channels` channels; heads come from `config.head_channels` where that is set."""
        super().__init__()
        self.heads = heads if config.head_channels is None else channels // config.head_channels
        self.order = config.attention_order
        self.norm = (
            nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps) if normalise else nn.Identity()
        )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        b, c, height, width = x.shape
        rows = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        axes = (3, self.heads) if self.order == "qkv_heads" else (self.heads, 3)
        qkv = self.qkv(rows).unflatten(2, (*axes, c // self.heads))
        if self.order == "heads_qkv":
            qkv = qkv.transpose(2, 3)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        return x + self.out(h).reshape(b, height, width, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution or by averaging."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        """Make a downsampler that keeps the number of channels."""
        super().__init__()
        self.asymmetric = config.downsample_padding == "asymmetric"
        padding = 0 if self.asymmetric else 1
        self.conv = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if config.conv_resample else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H/2, W/2]."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return torch.as_tensor(self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x))


class Upsample(nn.Module):
    """Double the resolution by repetition, usually followed by a convolution."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        """Make an upsampler that keeps the number of channels."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if config.conv_resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, 2H, 2W]."""
        return torch.as_tensor(self.conv(_resample(x, "up")))


class Stage(nn.Module):
    """The blocks of one resolution: (ResBlock, attention or nothing) pairs, then a change of resolution or nothing."""

    def __init__(
        self, blocks: list[ResBlock], attentions: list[Attention | None], resample: nn.Module | None
    ) -> None:
        """Collect the parts; `attentions` has one entry per block."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(nn.Identity() if a is None else a for a in attentions)
        self.resample = resample


class UNet(nn.Module):
    """ε(x_t, t[, y]), or whatever the network was trained to predict."""

    def __init__(self, config: UNetConfig) -> None:
        """Make a network with Ho et al.'s initialisation: each residual branch and the output start at zero."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.time_mlp = nn.Sequential(
            nn.Linear(config.stem, config.embedding_dim),
            nn.SiLU(),
            nn.Linear(config.embedding_dim, config.embedding_dim),
        )
        has_classes = config.num_classes is not None
        self.label_embedding = (
            nn.Embedding(config.num_classes or 1, config.embedding_dim) if has_classes else None
        )
        self.stem = nn.Conv2d(config.in_channels, config.stem, 3, padding=1)
        self.down, skips = _down_stages(config)
        bottom = config.channels[-1]
        attention = (
            Attention(config, bottom, config.num_heads, config.mid_attention_norm)
            if config.mid_attention
            else None
        )
        self.mid = Stage([ResBlock(config, bottom, bottom) for _ in range(2)], [attention, None], None)
        self.up = _up_stages(config, skips)
        self.norm_out = nn.GroupNorm(config.norm_groups, config.channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)
        self.projection_widths = [m.projection_width for m in self.modules() if isinstance(m, ResBlock)]
        self.time_projection = nn.Linear(config.embedding_dim, sum(self.projection_widths))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        zeros = [self.conv_out] + [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        for layer in [*zeros, *(m.out for m in self.modules() if isinstance(m, Attention))]:
            nn.init.zeros_(layer.weight)

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """All blocks' time projections for timesteps t and classes y.

        Args:
            t: Timesteps as the network was trained to be fed, [B], integer or float.
            y: Class indices int64 [B] in [0, num_classes); required if and only if the network has classes.

        Returns:
            [B, sum of projection_widths], the input of `body`.

        Raises:
            ValueError: If y is missing or superfluous.
        """
        if (y is None) != (self.label_embedding is None):
            wanted = "labels y" if self.label_embedding is not None else "no labels"
            raise ValueError(
                f"UNet: y must be {wanted} for this network, got {'none' if y is None else 'labels'}"
            )
        c = self.config
        features = timestep_embedding(t, c.stem, order=c.embedding, shift=c.embedding_shift)
        embedding = self.time_mlp(features.to(self.stem.weight.dtype))
        if y is not None and self.label_embedding is not None:
            embedding = embedding + self.label_embedding(y)
        return torch.as_tensor(self.time_projection(F.silu(embedding)))

    @torch.no_grad()
    def tabulate(self, times: Tensor, labels: Tensor | None = None) -> Tensor:
        """`embed` for every row of a step table and every class asked for.

        Args:
            times: The value of t that is fed at each row, [R], integer or float.
            labels: int64 [L], the classes, for networks that have them; None for networks without.

        Returns:
            [R · L, D], L = 1 without classes: row r, class labels[l] is at r · L + l.
        """
        if labels is None:
            return self.embed(times)
        return self.embed(times.repeat_interleave(len(labels)), labels.repeat(len(times)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from x [B, C, H, W] at timesteps t [B] (and classes y [B]): [B, out_channels, H, W]."""
        return self.body(x, self.embed(t, y))

    def body(self, x: Tensor, projections: Tensor) -> Tensor:
        """The network after the time embedding.

        Args:
            x: [B, in_channels, H, W].
            projections: [B, D] from `embed` or a row of `tabulate` per sample.

        Returns:
            [B, out_channels, H, W].
        """
        rows = iter(projections.split(self.projection_widths, dim=1))
        h = self.stem(x)
        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                h = attention(self._run(block, h, next(rows)))
                skips.append(h)
            if stage.resample is not None:
                h = self._change_resolution(stage.resample, h, rows)
                skips.append(h)
        for block, attention in zip(self.mid.blocks, self.mid.attentions, strict=True):
            h = attention(self._run(block, h, next(rows)))
        for stage in self.up:
            for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                h = attention(self._run(block, torch.cat((h, skips.pop()), dim=1), next(rows)))
            if stage.resample is not None:
                h = self._change_resolution(stage.resample, h, rows)
        return torch.as_tensor(self.conv_out(F.silu(self.norm_out(h))))

    def _change_resolution(self, module: nn.Module, h: Tensor, rows: Any) -> Tensor:
        if isinstance(module, ResBlock):
            return self._run(module, h, next(rows))
        return torch.as_tensor(module(h))

    def _run(self, block: nn.Module, h: Tensor, row: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return torch.as_tensor(checkpoint(block, h, row, use_reentrant=False))
        return torch.as_tensor(block(h, row))


def _down_stages(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The way down and the widths of the skip connections that it leaves."""
    stages, skips, width = nn.ModuleList(), [config.stem], config.stem
    for level, c_out in enumerate(config.channels):
        blocks: list[ResBlock] = []
        attentions: list[Attention | None] = []
        for _ in range(config.layers):
            blocks.append(ResBlock(config, width, c_out))
            attentions.append(Attention(config, c_out, config.num_heads) if config.attention[level] else None)
            width = c_out
            skips.append(width)
        resample: nn.Module | None = None
        if level + 1 < len(config.channels):
            updown = config.resblock_updown
            resample = ResBlock(config, width, width, "down") if updown else Downsample(config, width)
            skips.append(width)
        stages.append(Stage(blocks, attentions, resample))
    return stages, skips


def _up_stages(config: UNetConfig, skips: list[int]) -> nn.ModuleList:
    """The way up, coarsest level first; consumes `skips` from the end."""
    stages, width = nn.ModuleList(), config.channels[-1]
    flags = config.attention if config.up_attention is None else config.up_attention
    heads = config.up_num_heads or config.num_heads
    for level in reversed(range(len(config.channels))):
        c_out = config.channels[level]
        blocks: list[ResBlock] = []
        attentions: list[Attention | None] = []
        for _ in range(config.layers + 1):
            blocks.append(ResBlock(config, width + skips.pop(), c_out))
            attentions.append(Attention(config, c_out, heads) if flags[level] else None)
            width = c_out
        resample: nn.Module | None = None
        if level > 0:
            resample = (
                ResBlock(config, width, width, "up") if config.resblock_updown else Upsample(config, width)
            )
        stages.append(Stage(blocks, attentions, resample))
    return stages
