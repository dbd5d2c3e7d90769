"""The Triton kernel of `add_group_norm` and its op; the equations stand there."""

import torch
from torch import Tensor
from torch.library import triton_op

from .common_triton import jit, launcher, tl
from .group_norm_tiles import next_power, tile, warps_for


@jit
def _over_groups(value: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Each channel's value replaced by the sum over its group."""
    groups = tl.sum(tl.where(member, value[:, None], 0.0), axis=0)
    return tl.sum(tl.where(member, groups[None, :], 0.0), axis=1)


@jit
def _add_group_norm_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    index: tl.tensor,
    residual: tl.tensor,
    skip: tl.tensor,
    weight: tl.tensor,
    beta: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    own: tl.tensor,
    channels: tl.tensor,
    row_width: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    SCALE_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    """Program (b, j) normalises groups j·GROUPS ... of picture b; optional pointers are None where unused."""
    b = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    c = tl.program_id(1) * (GROUP * GROUPS) + lane
    real = lane < GROUP * GROUPS
    p = tl.arange(0, PIXELS)
    inside = (p < pixels)[:, None] & real[None, :]
    # Unsigned, so that the products are one wide multiplication each.
    line = tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(pixels, tl.uint32).to(tl.int64)
    first = line * tl.cast(channels, tl.uint32).to(tl.int64)
    e = p[:, None] * channels + c[None, :]

    mine, own_first, own_e = real, first, e
    if skip is not None:
        mine = real & (c < own)
        own_first = line * tl.cast(own, tl.uint32).to(tl.int64)
        own_e = p[:, None] * own + c[None, :]
    present = inside & mine[None, :]
    v = tl.load(x + own_first + own_e, mask=present, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + own_first + own_e, mask=present, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + c, mask=mine, other=0.0).to(tl.float32)[None, :]
    known, poison = True, 0.0
    if row is not None:
        r = tl.cast(b, tl.uint32).to(tl.int64)
        if index is not None:
            r = tl.load(index + b)
        # A row outside must not read foreign memory; it shows as NaN.
        known = r.to(tl.uint64, bitcast=True) < rows
        row += r * tl.cast(row_width, tl.uint32).to(tl.int64) + column
        poison = tl.where(known, 0.0, float("nan"))
        if not SCALE_SHIFT:
            v += tl.load(row + c, mask=mine & known, other=0.0).to(tl.float32)[None, :]
    if skip is not None:
        rest = channels - own
        theirs = skip + line * tl.cast(rest, tl.uint32).to(tl.int64)
        e_skip = p[:, None] * rest + (c - own)[None, :]
        v += tl.load(theirs + e_skip, mask=inside & (c >= own)[None, :], other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + first + e, v, mask=inside)

    member = (lane // GROUP)[:, None] == tl.arange(0, GROUPS)[None, :]
    share = 1.0 / (pixels * GROUP).to(tl.float32)
    mean = _over_groups(tl.sum(tl.where(inside, v, 0.0), axis=0), member) * share
    v = tl.where(inside, v - mean[None, :], 0.0)
    variance = _over_groups(tl.sum(v * v, axis=0), member) * share
    # Inductor passes numbers as float64, which must not spread.
    a = tl.rsqrt(variance + tl.cast(eps, tl.float32)) * tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    d = tl.load(beta + c, mask=real, other=0.0).to(tl.float32)
    if SCALE_SHIFT:
        scale = 1.0 + tl.load(row + c, mask=real & known, other=0.0).to(tl.float32)
        a *= scale
        d = tl.fma(d, scale, tl.load(row + channels + c, mask=real & known, other=0.0).to(tl.float32))
    d += poison
    y = tl.fma(v, tl.broadcast_to(a[None, :], v.shape), tl.broadcast_to(d[None, :], v.shape))
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + first + e, y, mask=inside)


@triton_op("fastddpm::add_group_norm", mutates_args=())
def add_group_norm_op(
    x: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    index: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    column: int,
    scale_shift: bool,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The sum, or an empty tensor where it is not to be kept, and its norm."""
    batch, own, height, width = x.shape
    channels, pixels = own + (0 if skip is None else skip.shape[1]), height * width
    # In this form Inductor sees buffers; of `empty` with a memory format it makes a kernel that fills them.
    out = x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    total = x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2) if keep else x.new_empty(0)
    together, wide = tile(channels, groups, pixels) or (1, 1)
    rows = next_power(pixels)
    launcher(_add_group_norm_kernel)[(batch, groups // together)](
        x,
        bias,
        row,
        index,
        residual,
        skip,
        weight,
        beta,
        total if keep else None,
        out,
        pixels,
        own,
        channels,
        0 if row is None else row.shape[1],
        column,
        0 if row is None else row.shape[0],
        eps,
        SCALE_SHIFT=scale_shift,
        SILU=silu,
        GROUP=channels // groups,
        GROUPS=together,
        WIDTH=wide,
        PIXELS=rows,
        num_warps=warps_for(wide * rows, 64 if torch.version.hip else 32),
    )
    return total, out
