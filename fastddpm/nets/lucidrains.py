"""The U-Net of denoising-diffusion-pytorch, of all its versions since 0.32, under the names of today's weights.

What depends on the time (and the class) alone is one row of numbers for all blocks (`fastddpm.nets.rows`).
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.nets.lucidrains_blocks import (
    Attention,
    Block,
    Fourier,
    ResnetBlock,
    Sinusoids,
    Upsample,
    downsample,
)
from fastddpm.nets.lucidrains_config import LucidrainsConfig
from fastddpm.nets.rows import RowNetwork

__all__ = ["LucidrainsConfig", "LucidrainsUNet"]


class LucidrainsUNet(RowNetwork):
    """ε(x_t, t[, y][, x̂_0]), or whatever the network was trained to predict."""

    config: LucidrainsConfig
    kind = "lucidrains"

    def __init__(self, config: LucidrainsConfig) -> None:
        """Make a network for weights to be loaded into."""
        super().__init__()
        self.config = config
        embedding, fourier = 4 * config.dim, config.learned_sinusoidal_dim
        features: nn.Module = Sinusoids(config.dim, config.sinusoidal_pos_emb_theta)
        if fourier is not None:
            features = Fourier(fourier)
        width = config.dim if fourier is None else fourier + 1
        self.time_mlp = nn.Sequential(features, *_perceptron(width, embedding))
        self.classes_emb = None
        if config.num_classes is not None:
            # `normal_` on the meta device, where checkpoints are loaded, would import PyTorch's compiler.
            size = (config.num_classes, config.dim)
            self.classes_emb = nn.Embedding(*size, _weight=torch.randn(size))
            self.null_classes_emb = nn.Parameter(torch.randn(config.dim))
            self.classes_mlp = nn.Sequential(*_perceptron(config.dim, embedding))
        widths, levels = config.widths, len(config.dim_mults)
        self.init_conv = nn.Conv2d(config.channels * (2 if config.self_condition else 1), widths[0], 7, padding=3)
        self.downs = nn.ModuleList()
        for level, (c_in, c_out) in enumerate(zip(widths, widths[1:], strict=False)):
            is_last = level == levels - 1
            change = nn.Conv2d(c_in, c_out, 3, padding=1) if is_last else downsample(config, c_in, c_out)
            blocks = [ResnetBlock(config, c_in, c_in) for _ in range(2)]
            self.downs.append(nn.ModuleList([*blocks, Attention(config, c_in, level), change]))
        self.mid_block1 = ResnetBlock(config, widths[-1], widths[-1])
        self.mid_attn = Attention(config, widths[-1], -1)
        self.mid_block2 = ResnetBlock(config, widths[-1], widths[-1])
        self.ups = nn.ModuleList()
        for level in reversed(range(levels)):
            c_out, c_in = widths[level : level + 2]
            change = Upsample(c_in, c_out) if level > 0 else nn.Conv2d(c_in, c_out, 3, padding=1)
            blocks = [ResnetBlock(config, c_in + c_out, c_in) for _ in range(2)]
            self.ups.append(nn.ModuleList([*blocks, Attention(config, c_in, level), change]))
        self.final_res_block = ResnetBlock(config, 2 * widths[0], widths[0])
        self.final_conv = nn.Conv2d(widths[0], config.out_channels, 1)
        # In the order in which `body` runs them.
        self.projection_widths = [block.projection_width for block in self._blocks()]

    def _blocks(self) -> list[ResnetBlock]:
        return [module for module in self.modules() if isinstance(module, ResnetBlock)]

    def _embedded(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self.time_mlp(t.to(torch.float32)))

    def _projected(self, embedding: Tensor, y: Tensor | None) -> Tensor:
        if y is not None and self.classes_emb is not None:
            rows = torch.cat((self.classes_emb.weight, self.null_classes_emb[None]))
            embedding = torch.cat((embedding, self.classes_mlp(rows[y])), dim=1)
        return torch.cat([block.mlp(embedding) for block in self._blocks()], dim=1)

    @property
    def dtype(self) -> torch.dtype:
        """What `body` computes in."""
        return self.init_conv.weight.dtype

    def row_numbers(self) -> int:
        """D, the numbers in a row of projections."""
        return sum(self.projection_widths)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, x_self_cond: Tensor | None = None) -> Tensor:
        """Predict from x [B, C, H, W] at timesteps t [B] (and classes y [B]); see `embed` and `body`."""
        return self.body(x, self.embed(t, y), x_self_cond=x_self_cond)

    def body(
        self,
        x: Tensor,
        conditions: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """The network after the time embedding.

        Args:
            x: [B, C, H, W]; H and W divisible by 2 for each level but one.
            conditions: [B, D] from `embed`, or [R, D] or [R, E] from `tabulate` with `index`.
            index: int64 [B], which row of `conditions` is a sample's; None is the sample's own.
            labels: int64 [B], classes, where `conditions` are embeddings without them.
            x_self_cond: [B, C, H, W], an estimate of x_0, for self-conditioned networks; None is zeros.

        Returns:
            [B, C or 2C, H, W].

        Raises:
            ValueError: x_self_cond is given for a network that takes none.
        """
        if x_self_cond is not None and not self.config.self_condition:
            raise ValueError("LucidrainsUNet: x_self_cond must be None here, got a tensor; leave it out")
        conditions = conditions if index is None else conditions[index]
        if labels is not None:
            conditions = self._projected(conditions, labels)
        if self.config.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), dim=1)
        dtype = self.init_conv.weight.dtype
        rows = iter(torch.split(conditions.to(dtype), self.projection_widths, dim=1))
        h = self.init_conv(x.to(dtype))
        skips = [h]
        for block1, block2, attention, change in _levels(self.downs):
            h = block1(h, next(rows))
            skips.append(h)
            h = attention(block2(h, next(rows)))
            skips.append(h)
            h = change(h)
        h = self.mid_attn(self.mid_block1(h, next(rows)))
        h = self.mid_block2(h, next(rows))
        for block1, block2, attention, change in _levels(self.ups):
            h = block1(torch.cat((h, skips.pop()), dim=1), next(rows))
            h = block2(torch.cat((h, skips.pop()), dim=1), next(rows))
            h = change(attention(h))
        h = self.final_res_block(torch.cat((h, skips.pop()), dim=1), next(rows))
        return torch.as_tensor(self.final_conv(h))

    def cast(self, dtype: torch.dtype) -> LucidrainsUNet:
        """A copy with `body` in `dtype`; what makes projections stays as it is. Inputs are cast on the way in."""
        network = copy.deepcopy(self)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, Block, Attention)):
                module.to(dtype)
        return network


def _levels(modules: nn.ModuleList) -> list[list[nn.Module]]:
    return [list(cast(nn.ModuleList, level)) for level in modules]


def _perceptron(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Linear(c_in, c_out), nn.GELU(), nn.Linear(c_out, c_out)]
