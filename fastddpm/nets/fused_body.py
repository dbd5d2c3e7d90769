"""`UNet.body` for inference on GPUs and in steps compiled for CPUs: the same modules with fewer launches, less traffic.

A U-Net's time goes to convolutions and to passes over memory around them. Here no bias, time projection,
residual branch or concatenation is made by itself: each is left pending until the next group norm, which adds what is
pending on its way through the pictures (`add_group_norm`), and writes the sum where somebody else needs it.
Convolutions of one pixel are matrix products, biases of the others are pending, and all pictures are channels-last.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.kernels.dispatch import runs_triton
from fastddpm.kernels.group_norm import Norm, Projection, Terms, add_group_norm_unchecked
from fastddpm.kernels.group_norm_native import is_asked
from fastddpm.nets.blocks import Attention, Downsample, ResBlock, Stage, Upsample, resample
from fastddpm.nets.config import UNetConfig

__all__ = ["Pending", "fused_body", "is_fusable"]


class Trunk(Protocol):
    """The parts of a `UNet`."""

    config: UNetConfig
    training: bool
    stem: nn.Conv2d
    down: nn.ModuleList
    mid: Stage
    up: nn.ModuleList
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d


def is_fusable(network: Trunk, x: Tensor) -> bool:
    """Whether `fused_body` is the way to run: with a kernel for its norms, for inference, without autocast."""
    kind = x.device.type
    if not (runs_triton(kind) or is_asked(kind)) or network.training or torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled(x.device.type)


class Pending:
    """x + bias + residual, with `skip` behind it, all of which somebody has yet to make.

    Attributes:
        x: [B, C, H, W].
        bias: [C] or None.
        residual: [B, C, H, W] or None.
        skip: [B, C', H, W], more channels, or None.
    """

    def __init__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Keep the terms."""
        self.x, self.bias, self.residual, self.skip = x, bias, residual, skip
        self._total: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum [B, C + C', H, W]; made by itself if no norm has made it before."""
        if self._total is None:
            total = self.x if self.bias is None else self.x + self.bias[:, None, None]
            total = total if self.residual is None else total + self.residual
            self._total = total if self.skip is None else torch.cat((total, self.skip), dim=1)
        return self._total

    def beside(self, skip: Tensor) -> Pending:
        """The sum with more channels behind it."""
        return (
            Pending(self.x, self.bias, self.residual, skip) if self._total is None else Pending(self._total, skip=skip)
        )

    def normed(
        self, norm: nn.Module, projection: Projection | None = None, *, silu: bool = True, keep: bool = True
    ) -> Tensor:
        """The sum's group norm; with `keep`, the sum is made as well."""
        module = cast(nn.GroupNorm, norm)
        parts = Norm(module.weight, module.bias, module.num_groups, module.eps)
        if self._total is not None:
            return add_group_norm_unchecked(self._total, parts, projection=projection, silu=silu)[1]
        terms = Terms(self.bias, self.residual, self.skip)
        total, y = add_group_norm_unchecked(self.x, parts, terms, projection, silu=silu, keep=keep)
        if keep:
            self._total = total
        return y


class _Rows:
    """The time projections of all blocks, handed out block by block."""

    def __init__(self, values: Tensor, index: Tensor | None) -> None:
        self._values, self._index, self._next = values, index, 0

    def take(self, block: ResBlock) -> Projection:
        """The next block's projection."""
        column, self._next = self._next, self._next + block.projection_width
        return Projection(self._values, "scale_shift" if block.scale_shift else "add", column, self._index)


def fused_body(network: Trunk, x: Tensor, projections: Tensor, index: Tensor | None = None) -> Tensor:
    """What `UNet.body` computes, without gradients; see there.

    It runs on any device: where there is no kernel, `add_group_norm` is plain PyTorch.
    """
    x = x.to(network.stem.weight.dtype)
    rows = _Rows(projections.contiguous(), index)
    h = _convolved(network.stem, 2.0 * x - 1.0 if network.config.center_input else x)
    skips = [h]
    for stage in _stages(network.down):
        for block, attention in stage.pairs():
            h = _attended(attention, _res_block(block, h, rows))
            skips.append(h)
        if stage.resample is not None:
            h = _resampled(stage.resample, h, rows)
            skips.append(h)
    for block, attention in network.mid.pairs():
        h = _attended(attention, _res_block(block, h, rows))
    for stage in _stages(network.up):
        for block, attention in stage.pairs():
            h = _attended(attention, _res_block(block, h.beside(skips.pop().total), rows))
        if stage.resample is not None:
            h = _resampled(stage.resample, h, rows)
    return _convolved(network.conv_out, h.normed(network.norm_out, keep=False)).total


def _stages(modules: nn.ModuleList) -> list[Stage]:
    return [cast(Stage, module) for module in modules]


def _convolved(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Pending:
    """A convolution, whose bias is pending, and what is to be added to it; one that runs another way adds its own."""
    if not isinstance(layer, nn.Conv2d):
        return Pending(layer(x), None, residual)
    return Pending(F.conv2d(x, layer.weight, None, layer.stride, layer.padding), layer.bias, residual)


def _per_pixel(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B·H·W, C], a view of channels-last pictures."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _as_pictures(rows: Tensor, like: Tensor) -> Tensor:
    """The reverse of `_per_pixel`: channels-last pictures of the size of `like`."""
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _res_block(module: nn.Module, h: Pending, rows: _Rows) -> Pending:
    block = cast(ResBlock, module)
    y, x = h.normed(block.norm1), h.total
    if block.resample is not None:
        y, x = resample(y, block.resample, block.conv1), resample(x, block.resample)
    hidden = _convolved(block.conv1, y)
    y = hidden.normed(block.norm2, rows.take(block), keep=False)
    skip = cast(nn.Module, block.skip)
    if isinstance(skip, nn.Conv2d):
        x = _as_pictures(F.linear(_per_pixel(x), skip.weight.flatten(1), skip.bias), x)
    else:  # nothing, or one that runs another way
        x = skip(x)
    return _divided(_convolved(block.conv2, y, x), block.scale)


def _divided(h: Pending, scale: float) -> Pending:
    return h if scale == 1.0 else Pending(h.total / scale)


def _attended(module: nn.Module, h: Pending) -> Pending:
    if not isinstance(module, Attention):
        return h
    y = h.normed(module.norm, silu=False) if isinstance(module.norm, nn.GroupNorm) else h.total
    x = h.total
    mixed = module.mixed(module.qkv(torch.unflatten(_per_pixel(y), 0, (x.shape[0], -1))))
    last = cast(nn.Module, module.out)
    if isinstance(last, nn.Linear):
        h = Pending(_as_pictures(F.linear(mixed.flatten(0, 1), last.weight), x), last.bias, x)
    else:  # one that runs another way adds its own bias
        h = Pending(_as_pictures(last(mixed).flatten(0, 1), x), None, x)
    return _divided(h, module.scale)


def _resampled(module: nn.Module, h: Pending, rows: _Rows) -> Pending:
    if isinstance(module, ResBlock):
        return _res_block(module, h, rows)
    x, convolution = cast("Downsample | Upsample", module).before(h.total), module.conv
    if not isinstance(convolution, nn.Module) or isinstance(convolution, nn.Identity):
        return Pending(x)
    return _convolved(convolution, x)
