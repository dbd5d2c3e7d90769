"""The parts that denoising-diffusion-pytorch's U-Net is made of, under its names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.nets.blocks import resample
from fastddpm.nets.lucidrains_config import LucidrainsConfig

_MEMORY = 4  # keys and values that an attention has of its own, in all versions that give it any
_EPS = 1e-5


class Sinusoids(nn.Module):
    """[sin(ω_k t), cos(ω_k t)] with ω_k = θ^(−k/(h − 1)) of h = dim / 2 frequencies."""

    def __init__(self, dim: int, theta: float) -> None:
        """Note the width and the longest wavelength."""
        super().__init__()
        self.frequencies, self.theta = dim // 2, theta

    def forward(self, t: Tensor) -> Tensor:
        """Map t [B] to [B, dim]."""
        # In the package's order of operations: near t = 1000 the rounding of ω_k shows.
        rate = -math.log(self.theta) / (self.frequencies - 1)
        angles = t[:, None] * torch.exp(torch.arange(self.frequencies, dtype=torch.float32, device=t.device) * rate)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Fourier(nn.Module):
    """[t, sin(2π w t), cos(2π w t)] of frequencies w that were learned, or drawn at random."""

    def __init__(self, dim: int) -> None:
        """Make dim / 2 frequencies."""
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        """Map t [B] to [B, dim + 1]."""
        angles = t[:, None] * self.weights * 2 * math.pi
        return torch.cat((t[:, None], angles.sin(), angles.cos()), dim=-1)


class RMSNorm(nn.Module):
    """g √C x / ‖x‖ over the channels, or g (x − mean) / √(var + ε) where layer norms are meant."""

    def __init__(self, channels: int, is_layer_norm: bool = False) -> None:
        """Make a norm over `channels` channels."""
        super().__init__()
        self.is_layer_norm = is_layer_norm
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W]; computed in float32."""
        h, g = x.float(), self.g.float()
        if self.is_layer_norm:
            var, mean = torch.var_mean(h, dim=1, unbiased=False, keepdim=True)
            h = (h - mean) * (var + _EPS).rsqrt()
        else:
            h, g = F.normalize(h, dim=1), g * math.sqrt(x.shape[1])
        return (h * g).to(x.dtype)


class Block(nn.Module):
    """Convolution, norm, scale and shift, SiLU."""

    def __init__(self, config: LucidrainsConfig, c_in: int, c_out: int) -> None:
        """Make a block from `c_in` to `c_out` channels."""
        super().__init__()
        self.proj = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = RMSNorm(c_out) if config.groups is None else nn.GroupNorm(config.groups, c_out)

    def forward(self, x: Tensor, projection: Tensor | None = None) -> Tensor:
        """Map x [B, c_in, H, W], scaled and shifted by [B, 2 · c_out] if there is any."""
        h = self.norm(self.proj(x))
        if projection is not None:
            scale, shift = projection[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, scale + 1)
        return F.silu(h)


class ResnetBlock(nn.Module):
    """Two blocks, the first of which the time (and the class) scales and shifts, plus a skip path."""

    def __init__(self, config: LucidrainsConfig, c_in: int, c_out: int) -> None:
        """Make a block from `c_in` to `c_out` channels."""
        super().__init__()
        embedding = 4 * config.dim * (1 if config.num_classes is None else 2)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * c_out))
        self.projection_width = 2 * c_out
        self.block1 = Block(config, c_in, c_out)
        self.block2 = Block(config, c_out, c_out)
        self.res_conv = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:
        """Map x [B, c_in, H, W] with this block's slice [B, projection_width] of what `mlp` made of the time."""
        return torch.as_tensor(self.block2(self.block1(x, projection)) + self.res_conv(x))


class Attention(nn.Module):
    """Attention over the H·W positions with a residual connection.

    Linear attention (Shen et al. 2021) is softmax_d(q) / √D · (softmax_n(k) vᵀ), whose cost grows with H·W, not with
    its square.
    """

    def __init__(self, config: LucidrainsConfig, channels: int, place: int) -> None:
        """Make the attention of level `place`, or with −1 that of the middle."""
        super().__init__()
        self.heads, width = config.attn_heads[place], config.attn_dim_head[place]
        self.is_full = place == -1 or config.full_attn[place]
        self.mean_value = config.mean_value
        self.norm = RMSNorm(channels, config.layer_norm)
        self.mem_kv = None
        if config.memory:
            size = (_MEMORY, width) if self.is_full else (width, _MEMORY)
            self.mem_kv = nn.Parameter(torch.randn(2, self.heads, *size))
        self.to_qkv = nn.Conv2d(channels, 3 * self.heads * width, 1, bias=False)
        out = nn.Conv2d(self.heads * width, channels, 1)
        self.to_out = out if self.is_full else nn.Sequential(out, RMSNorm(channels, config.layer_norm))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        qkv = torch.unflatten(self.to_qkv(self.norm(x)).flatten(2), 1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # [B, heads, D, H·W]
        h = self._full(q.mT, k.mT, v.mT).mT if self.is_full else self._linear(q, k, v)
        return torch.as_tensor(x + self.to_out(torch.unflatten(h.flatten(1, 2), 2, x.shape[2:])))

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of q, k, v [B, heads, N, D]."""
        return F.scaled_dot_product_attention(q, *self._with_memory(k, v, dim=-2))

    def _linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of q, k, v [B, heads, D, N]."""
        if self.mean_value:
            v = v / v.shape[-1]
        k, v = self._with_memory(k, v, dim=-1)
        context = v @ k.softmax(dim=-1).mT
        return torch.matmul(context, q.softmax(dim=-2) * q.shape[-2] ** -0.5)

    def _with_memory(self, k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if self.mem_kv is None:
            return k, v
        memory = self.mem_kv.unsqueeze(1).expand(-1, k.shape[0], -1, -1, -1)  # `len` would fix a traced batch
        return torch.cat((memory[0], k), dim), torch.cat((memory[1], v), dim)


def downsample(config: LucidrainsConfig, c_in: int, c_out: int) -> nn.Module:
    """Halve the resolution."""
    if config.num_classes is not None:
        return nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c_in, c_out, 1))


class Upsample(nn.Sequential):
    """Double the resolution by repetition, followed by a convolution, which has the second place."""

    def __init__(self, c_in: int, c_out: int) -> None:
        """Make the convolution from `c_in` to `c_out` channels."""
        super().__init__(nn.Identity(), nn.Conv2d(c_in, c_out, 3, padding=1))

    @property
    def upsampled_conv(self) -> nn.Module:
        """The convolution before which pictures are doubled."""
        return self[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, c_in, H, W] to [B, c_out, 2H, 2W]."""
        return torch.as_tensor(self.upsampled_conv(resample(x, "up", self.upsampled_conv)))
