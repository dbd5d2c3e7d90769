"""The parts that the U-Net is made of."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.kernels import amx_attention
from fastddpm.nets.config import UNetConfig


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    order: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos",
    shift: float = 1.0,
) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5, as used by Ho et al. 2020).

    With h = dim // 2 frequencies ω_k = 10000^(−k/(h − shift)), the features are sin(ω_k t) and cos(ω_k t).

    Args:
        t: Timesteps [B], integer or fractional, usually in [0, T).
        dim: Width of the result; an odd width gets one zero at the end.
        order: Whether sines come first, cosines come first, or the two alternate.
        shift: 1 in Ho et al., 0 in OpenAI's code.

    Returns:
        float32 [B, dim] on t's device.
    """
    half = dim // 2
    # In the order of operations that networks are trained with elsewhere: near t = 1000 the rounding of ω_k shows.
    exponent = -math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(exponent / max(half - shift, 1e-9))[None]
    sin, cos = torch.sin(angles), torch.cos(angles)
    if order == "interleaved":
        features = torch.stack((sin, cos), dim=-1).flatten(1)
    else:
        features = torch.cat((sin, cos) if order == "sin_cos" else (cos, sin), dim=1)
    return F.pad(features, (0, dim - 2 * half))


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, embedding, norm, SiLU, dropout, convolution, plus a skip path."""

    def __init__(
        self,
        config: UNetConfig,
        c_in: int,
        c_out: int,
        resample: Literal["down", "up"] | None = None,
        scale: float = 1.0,
    ) -> None:
        """Make a block from `c_in` to `c_out` channels that may change the resolution by two and divides by `scale`."""
        super().__init__()
        self.resample = resample
        self.scale = scale
        self.scale_shift = config.scale_shift
        self.projection_width = c_out * (2 if config.scale_shift else 1)
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    @property
    def upsampled_conv(self) -> nn.Module | None:
        """The convolution before which pictures are doubled, if they are."""
        return self.conv1 if self.resample == "up" else None

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:
        """Map x [B, c_in, H, W] with this block's slice of the time projection [B, projection_width]."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = resample(h, self.resample, self.conv1), resample(x, self.resample)
        h = self.conv1(h)
        projection = projection[:, :, None, None]
        if self.scale_shift:
            scale, shift = projection.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + projection)
        return divided(self.conv2(self.dropout(F.silu(h))) + self.skip(x), self.scale)


def divided(x: Tensor, scale: float) -> Tensor:
    """The quotient x / scale, and x itself where that is 1: most networks divide by nothing."""
    return x if scale == 1.0 else x / scale


def resample(x: Tensor, direction: Literal["down", "up"], before: nn.Module | None = None) -> Tensor:
    """Halve the resolution of x [B, C, H, W] by averaging, or double it by repetition.

    Not where the convolution that it is done before doubles by itself: see `fastddpm.engines.fast_layers`.
    """
    if direction == "down":
        return F.avg_pool2d(x, 2)
    return x if getattr(before, "doubles", False) else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self-attention over the H·W positions with a residual connection (Ho et al. 2020, appendix B)."""

    def __init__(
        self,
        config: UNetConfig,
        channels: int,
        heads: int,
        normalise: bool = True,
        groups: int | None = None,
        scale: float = 1.0,
    ) -> None:
        """Make attention over `channels` channels; heads come from `config.head_channels` where that is set."""
        super().__init__()
        self.scale = scale
        self.heads = heads if config.head_channels is None else channels // config.head_channels
        self.order = config.attention_order
        groups = config.norm_groups if groups is None else groups
        self.norm = nn.GroupNorm(groups, channels, eps=config.norm_eps) if normalise else nn.Identity()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.otherwise = False  # a kernel of our own, or two products; see `fastddpm.engines.fast_layers`

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        b, c, height, width = x.shape
        rows = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        h = self.out(self.mixed(self.qkv(rows)))
        return divided(x + torch.as_tensor(h).reshape(b, height, width, c).permute(0, 3, 1, 2), self.scale)

    def mixed(self, qkv: Tensor) -> Tensor:
        """Attention proper: queries, keys and values [B, H·W, 3C] of the fused projection, mixed to [B, H·W, C]."""
        if self.otherwise and amx_attention.fits(qkv, self.heads):
            return amx_attention.amx_attention(qkv, self.heads, heads_first=self.order == "heads_qkv")
        b, positions, width = qkv.shape
        axes = (3, self.heads) if self.order == "qkv_heads" else (self.heads, 3)
        parts = torch.unflatten(qkv, 2, (*axes, width // (3 * self.heads)))
        if self.order == "heads_qkv":
            parts = parts.transpose(2, 3)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mix = attention_by_products if self.otherwise else F.scaled_dot_product_attention
        return mix(q, k, v).transpose(1, 2).reshape(b, positions, width // 3)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of q, k, v [B, heads, N, D] as two matrix products, the sum divided out at the end.

    PyTorch's own attention keeps to small blocks on a CPU; where a whole product of scores fits into the caches and the
    processor multiplies bfloat16 by itself, this is up to three times quicker.
    """
    scores = (q @ k.transpose(-1, -2)).float()
    weights = torch.exp((scores - scores.amax(-1, keepdim=True)) * q.shape[-1] ** -0.5)
    return ((weights.to(v.dtype) @ v).float() / weights.sum(-1, keepdim=True)).to(v.dtype)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution or by averaging."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        """Make a downsampler that keeps the number of channels."""
        super().__init__()
        self.asymmetric = config.downsample_padding == "asymmetric"
        padding = 0 if self.asymmetric else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if config.conv_resample else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H/2, W/2]."""
        h = self.before(x)
        return h if self.conv is None else torch.as_tensor(self.conv(h))

    def before(self, x: Tensor) -> Tensor:
        """What the convolution is fed; without one, the result."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x


class Upsample(nn.Module):
    """Double the resolution by repetition, usually followed by a convolution."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        """Make an upsampler that keeps the number of channels."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if config.conv_resample else nn.Identity()

    @property
    def upsampled_conv(self) -> nn.Module:
        """The convolution before which pictures are doubled."""
        return self.conv

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, 2H, 2W]."""
        return torch.as_tensor(self.conv(self.before(x)))

    def before(self, x: Tensor) -> Tensor:
        """What the convolution is fed; without one, the result."""
        return resample(x, "up", self.conv)


class Stage(nn.Module):
    """The blocks of one resolution: (ResBlock, attention or nothing) pairs, then a change of resolution or nothing."""

    def __init__(self, blocks: list[ResBlock], attentions: list[Attention | None], resample: nn.Module | None) -> None:
        """Collect the parts; `attentions` has one entry per block."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(nn.Identity() if a is None else a for a in attentions)
        self.resample = resample

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each ResBlock with the attention that follows it (the identity where there is none)."""
        return list(zip(self.blocks, self.attentions, strict=True))
