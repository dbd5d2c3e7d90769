"""The Triton kernel of `add_group_norm` and its op; the equations stand there."""

import torch
from torch import Tensor
from torch.library import triton_op

from .common_triton import ON_INTERPRETER, approximations, jit, launcher, libdevice, tl
from .group_norm_tiles import next_power, plan_for


@jit
def _over_groups(value: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Each channel's value replaced by the sum over its group."""
    groups = tl.sum(tl.where(member, value[:, None], 0.0), axis=0)
    return tl.sum(tl.where(member, groups[None, :], 0.0), axis=1)


@jit
def _load(at: tl.tensor, present: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """Values as float32; 0 where they are not present, which is nowhere where the tile is full."""
    return tl.load(at).to(tl.float32) if FULL else tl.load(at, mask=present, other=0.0).to(tl.float32)


@jit
def _summed(
    x: tl.tensor,
    residual: tl.tensor,
    skip: tl.tensor,
    added: tl.tensor,
    line: tl.tensor,
    p: tl.tensor,
    c: tl.tensor,
    inside: tl.tensor,
    own: tl.tensor,
    channels: tl.tensor,
    FULL: tl.constexpr,
) -> tl.tensor:
    """The sum at pixels p and channels c of the picture that begins at pixel `line`, float32; 0 where not inside."""
    present, first, e = inside, line * tl.cast(channels, tl.uint32).to(tl.int64), p[:, None] * channels + c[None, :]
    if skip is not None:
        present = inside & (c < own)[None, :]
        first = line * tl.cast(own, tl.uint32).to(tl.int64)
        e = p[:, None] * own + c[None, :]
    v = _load(x + first + e, present, FULL and skip is None)
    if residual is not None:
        v += _load(residual + first + e, present, FULL and skip is None)
    if skip is not None:
        rest = channels - own
        theirs = skip + line * tl.cast(rest, tl.uint32).to(tl.int64)
        e = p[:, None] * rest + (c - own)[None, :]
        v += _load(theirs + e, inside & (c >= own)[None, :], False)
    return _cut(v + added[None, :], inside, FULL)


@jit
def _cut(v: tl.tensor, inside: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """0 where not inside."""
    return v if FULL else tl.where(inside, v, 0.0)


@jit
def add_group_norm_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    index: tl.tensor,
    residual: tl.tensor,
    skip: tl.tensor,
    weight: tl.tensor,
    beta: tl.tensor,
    moments: tl.tensor,
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
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    FULL: tl.constexpr,
    APPROX: tl.constexpr,
) -> None:
    """Program (j, s, b) has pixels s·TILES·PIXELS ... of groups j·GROUPS ... of picture b.

    Where SPLITS is 1 it has all of them, in registers, and writes `total` and `out`. Otherwise two launches share the
    work: one without `out` writes each program's mean and sum of squares, and `total`; one with it reads them.
    Optional pointers are None where unused.
    """
    # One number for all three, neighbouring groups next to each other: a grid's other sizes end at 65535.
    chunks, splits = channels // (GROUP * GROUPS), tl.cdiv(pixels, TILES * PIXELS)
    number = tl.program_id(0)
    j, s, b = number % chunks, number // chunks % splits, number // (chunks * splits)
    lane = tl.arange(0, WIDTH)
    c = j * (GROUP * GROUPS) + lane
    real = lane < GROUP * GROUPS
    member = (lane // GROUP)[:, None] == tl.arange(0, GROUPS)[None, :]
    # Unsigned, so that the products are one wide multiplication each.
    line = tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(pixels, tl.uint32).to(tl.int64)
    first = line * tl.cast(channels, tl.uint32).to(tl.int64)

    mine = real & (c < own)
    added = tl.zeros((WIDTH,), tl.float32)
    if bias is not None:
        added += tl.load(bias + c, mask=mine, other=0.0).to(tl.float32)
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
            added += tl.load(row + c, mask=mine & known, other=0.0).to(tl.float32)

    if SPLITS == 1:
        p = tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & real[None, :]
        v = _summed(x, residual, skip, added, line, p, c, inside, own, channels, FULL)
        e = p[:, None] * channels + c[None, :]
        if total is not None:
            tl.store(total + first + e, v, mask=inside)
        share = 1.0 / (pixels * GROUP)
        mean = _over_groups(tl.sum(v, axis=0), member) * share
        v = _cut(v - mean[None, :], inside, FULL)
        variance = _over_groups(tl.sum(v * v, axis=0), member) * share
    elif out is None:
        # Each channel's mean and sum of squares about it, tile after tile (Chan et al. 1979), then each group's.
        count, mean, squares = 0.0, tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for i in range(TILES):
            p = (s * TILES + i) * PIXELS + tl.arange(0, PIXELS)
            inside = (p < pixels)[:, None] & real[None, :]
            v = _summed(x, residual, skip, added, line, p, c, inside, own, channels, FULL)
            if total is not None:
                tl.store(total + first + (p[:, None] * channels + c[None, :]), v, mask=inside)
            more = tl.sum((p < pixels).to(tl.float32), axis=0)
            theirs = tl.sum(v, axis=0) / tl.maximum(more, 1.0)
            v = _cut(v - theirs[None, :], inside, FULL)
            part = more / tl.maximum(count + more, 1.0)
            squares += tl.sum(v * v, axis=0) + (theirs - mean) * (theirs - mean) * (count * part)
            mean += (theirs - mean) * part
            count += more
        groups = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0) / GROUP
        mean -= tl.sum(tl.where(member, groups[None, :], 0.0), axis=1)
        squares += count * mean * mean
        at = ((b * (channels // GROUP) + j * GROUPS).to(tl.int64) + tl.arange(0, GROUPS)) * (2 * SPLITS) + s
        tl.store(moments + at, groups)
        tl.store(moments + at + SPLITS, tl.sum(tl.where(member, squares[:, None], 0.0), axis=0))
    else:
        at = ((b * (channels // GROUP) + j * GROUPS).to(tl.int64) + tl.arange(0, GROUPS)) * (2 * SPLITS)
        part = tl.arange(0, SPLITS)
        counts = tl.minimum(tl.maximum(pixels - part * (TILES * PIXELS), 0), TILES * PIXELS).to(tl.float32)[None, :]
        means = tl.load(moments + (at[:, None] + part[None, :]), mask=counts > 0, other=0.0)
        squares = tl.load(moments + (at[:, None] + SPLITS + part[None, :]), mask=counts > 0, other=0.0)
        of_group = tl.sum(counts * means, axis=1) / pixels
        far = means - of_group[:, None]
        spread = tl.sum(squares + counts * far * far * GROUP, axis=1) / (pixels * GROUP)
        mean = tl.sum(tl.where(member, of_group[None, :], 0.0), axis=1)
        variance = tl.sum(tl.where(member, spread[None, :], 0.0), axis=1)

    if out is not None:
        # Inductor passes numbers as float64, which must not spread.
        a = tl.rsqrt(variance + tl.cast(eps, tl.float32)) * tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
        d = tl.load(beta + c, mask=real, other=0.0).to(tl.float32)
        if SCALE_SHIFT:
            scale = 1.0 + tl.load(row + c, mask=real & known, other=0.0).to(tl.float32)
            a *= scale
            d = tl.fma(d, scale, tl.load(row + channels + c, mask=real & known, other=0.0).to(tl.float32))
        d += poison
        if SPLITS == 1:
            _write(out + first, e, v, a, d, inside, SILU, FULL, APPROX)
        else:
            for i in range(TILES):
                p = (s * TILES + i) * PIXELS + tl.arange(0, PIXELS)
                inside = (p < pixels)[:, None] & real[None, :]
                v = _summed(x, residual, skip, added - mean, line, p, c, inside, own, channels, FULL)
                _write(out + first, p[:, None] * channels + c[None, :], v, a, d, inside, SILU, FULL, APPROX)


@jit
def _write(
    out: tl.tensor,
    e: tl.tensor,
    v: tl.tensor,
    a: tl.tensor,
    d: tl.tensor,
    inside: tl.tensor,
    SILU: tl.constexpr,
    FULL: tl.constexpr,
    APPROX: tl.constexpr,
) -> None:
    """Write a·v + d, or its SiLU."""
    y = tl.fma(v, tl.broadcast_to(a[None, :], v.shape), tl.broadcast_to(d[None, :], v.shape))
    if SILU:
        if APPROX and not ON_INTERPRETER:
            y = libdevice.fast_dividef(y, 1.0 + libdevice.fast_expf(-y))
        else:
            y = y * tl.sigmoid(y)
    if FULL:
        tl.store(out + e, y)
    else:
        tl.store(out + e, y, mask=inside)


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
    plan = plan_for(batch, channels, groups, pixels)
    splits = next_power(plan.splits)
    kernel = launcher(add_group_norm_kernel)[(groups // plan.together * plan.splits * batch,)]
    tensors = (x, bias, row, index, residual, skip, weight, beta)
    numbers = (pixels, own, channels, *((0, column, 0) if row is None else (row.shape[1], column, row.shape[0])), eps)
    options = {
        "SCALE_SHIFT": scale_shift, "SILU": silu, "GROUP": channels // groups, "GROUPS": plan.together,
        "WIDTH": plan.width, "PIXELS": plan.rows, "TILES": plan.tiles, "SPLITS": splits,
        "FULL": plan.is_full(channels // groups, pixels), "APPROX": approximations(),
        "num_warps": plan.warps(64 if torch.version.hip else 32),
    }  # fmt: skip
    written = total if keep else None
    if splits == 1:
        kernel(*tensors, None, written, out, *numbers, **options)
        return total, out
    moments = x.new_empty((batch, groups, 2, splits), dtype=torch.float32)
    kernel(*tensors, moments, written, None, *numbers, **options)
    kernel(*tensors, moments, None, out, *numbers, **options)
    return total, out
