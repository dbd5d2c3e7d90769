"""The U-Net of Ho et al. (2020, appendix B) with the options of its ADM descendants (Dhariwal & Nichol 2021).

One network covers the common DDPM code bases: they differ in the options of `UNetConfig`, not in structure.

The time embedding depends on the timestep (and the class) alone, never on the picture. All the linear layers that
turn it into per-block shifts are therefore one stacked layer, `time_projection`: training calls it once per step, and a
sampler tabulates it once per run (`UNet.tabulate`) and hands `body` a row of numbers. With that the U-Net is a
`fastddpm.step.network.Network`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastddpm.nets.blocks import Attention, Downsample, ResBlock, Stage, Upsample, timestep_embedding
from fastddpm.nets.config import UNetConfig
from fastddpm.nets.fused_body import fused_body, is_fusable
from fastddpm.nets.rows import RowNetwork

__all__ = ["UNet", "UNetConfig"]


class UNet(RowNetwork):
    """ε(x_t, t[, y]), or whatever the network was trained to predict."""

    config: UNetConfig
    kind = "unet"

    def __init__(self, config: UNetConfig) -> None:
        """Make a network with Ho et al.'s initialisation: each residual branch and the output start at zero."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.time_mlp = nn.Sequential(
            nn.Linear(config.sinusoids, config.embedding_dim),
            nn.SiLU(),
            nn.Linear(config.embedding_dim, config.embedding_dim),
        )
        self.label_embedding = None
        if config.num_classes is not None:
            size = (config.num_classes, config.embedding_dim)
            # `normal_` on the meta device, where checkpoints are loaded, would import PyTorch's compiler.
            self.label_embedding = nn.Embedding(*size, _weight=torch.randn(size))
        self.stem = nn.Conv2d(config.in_channels, config.stem, 3, padding=1)
        self.down, skips = down_stages(config)
        self.mid = mid_stage(config)
        self.up = _up_stages(config, skips)
        self.norm_out = nn.GroupNorm(config.norm_groups, config.channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)
        self.projection_widths = [m.projection_width for m in self.modules() if isinstance(m, ResBlock)]
        self.time_projection = nn.Linear(config.embedding_dim, sum(self.projection_widths))
        self._initialise()

    @property
    def structure(self) -> UNetConfig:
        """The configuration, which a classifier has too."""
        return self.config

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.label_embedding is not None and not self.label_embedding.weight.is_meta:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        nn.init.zeros_(self.conv_out.weight)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)

    def _embedded(self, t: Tensor) -> Tensor:
        c = self.config
        features = timestep_embedding(t, c.sinusoids, order=c.embedding, shift=c.embedding_shift)
        return torch.as_tensor(self.time_mlp(features.to(self.time_projection.weight.dtype)))

    def _projected(self, embedding: Tensor, y: Tensor | None) -> Tensor:
        if y is not None and self.label_embedding is not None:
            embedding = embedding + self.label_embedding(y)
        return torch.as_tensor(self.time_projection(F.silu(embedding)))

    @property
    def dtype(self) -> torch.dtype:
        """What `body` computes in."""
        return self.stem.weight.dtype

    def row_numbers(self) -> int:
        """D, the numbers in a row of projections."""
        return self.time_projection.out_features

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from x [B, C, H, W] at timesteps t [B] (and classes y [B]): [B, out_channels, H, W]."""
        return self.body(x, self.embed(t, y))

    def body(
        self,
        x: Tensor,
        conditions: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """The network after the time embedding; without gradients, GPUs and compiled steps run it as `fused_body`.

        Args:
            x: [B, in_channels, H, W].
            conditions: [B, D] from `embed`, or [R, D] or [R, E] from `tabulate` with `index`.
            index: int64 [B], which row of `conditions` is a sample's; None is the sample's own.
            labels: int64 [B], classes, where `conditions` are embeddings without them.
            x_self_cond: None; a U-Net takes none.

        Returns:
            [B, out_channels, H, W].
        """
        if labels is not None:
            embeddings = conditions if index is None else conditions[index]
            conditions, index = self._projected(embeddings, labels), None
        if is_fusable(self, x):
            return fused_body(self, x, conditions, index)
        projections = conditions if index is None else conditions[index]
        dtype = self.stem.weight.dtype
        x, projections = x.to(dtype), projections.to(dtype)
        rows = iter(torch.split(projections, self.projection_widths, dim=1))
        h = self.stem(2.0 * x - 1.0 if self.config.center_input else x)
        skips = [h]
        for stage in _stages(self.down):
            for block, attention in stage.pairs():
                h = attention(self._run(block, h, next(rows)))
                skips.append(h)
            if stage.resample is not None:
                h = self._change_resolution(stage.resample, h, rows)
                skips.append(h)
        for block, attention in self.mid.pairs():
            h = attention(self._run(block, h, next(rows)))
        for stage in _stages(self.up):
            for block, attention in stage.pairs():
                h = attention(self._run(block, torch.cat((h, skips.pop()), dim=1), next(rows)))
            if stage.resample is not None:
                h = self._change_resolution(stage.resample, h, rows)
        return torch.as_tensor(self.conv_out(F.silu(self.norm_out(h))))

    def cast(self, dtype: torch.dtype) -> UNet:
        """A copy with `body` in `dtype`; the embedding stays as it is. Inputs are cast on the way in."""
        network = copy.deepcopy(self)
        embedding = (network.time_mlp, network.label_embedding, network.time_projection)
        for module in network.children():
            if module not in embedding:
                module.to(dtype)
        return network

    def _change_resolution(self, module: nn.Module, h: Tensor, rows: Iterator[Tensor]) -> Tensor:
        if isinstance(module, ResBlock):
            return self._run(module, h, next(rows))
        return torch.as_tensor(module(h))

    def _run(self, block: nn.Module, h: Tensor, row: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return torch.as_tensor(checkpoint(block, h, row, use_reentrant=False))
        return torch.as_tensor(block(h, row))


def _stages(modules: nn.ModuleList) -> list[Stage]:
    return [cast(Stage, module) for module in modules]


def mid_stage(config: UNetConfig) -> Stage:
    """The bottom."""
    bottom, attention = config.channels[-1], None
    if config.mid_attention:
        norm, groups = config.mid_attention_norm, config.mid_attention_groups
        attention = Attention(config, bottom, config.num_heads, norm, groups, config.mid_scale)
    blocks = [ResBlock(config, bottom, bottom, scale=config.mid_scale) for _ in range(2)]
    return Stage(blocks, [attention, None], None)


def down_stages(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
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
            in_block = config.changes_in_resblock(level, "down")
            resample = ResBlock(config, width, width, "down") if in_block else Downsample(config, width)
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
            in_block = config.changes_in_resblock(level, "up")
            resample = ResBlock(config, width, width, "up") if in_block else Upsample(config, width)
        stages.append(Stage(blocks, attentions, resample))
    return stages
