"""The Triton kernels of `add_group_norm` and its op; the equations stand there."""

import torch
from torch import Tensor
from torch.library import triton_op

from .common_triton import ON_INTERPRETER, approximations, jit, launcher, libdevice, tl
from .group_norm_tiles import next_power, plan_for


@jit
def _load(at: tl.tensor, present: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """Values as float32; 0 where they are not present, which is nowhere where the tile is full."""
    return tl.load(at).to(tl.float32) if FULL else tl.load(at, mask=present, other=0.0).to(tl.float32)


@jit
def _store(at: tl.tensor, value: tl.tensor, present: tl.tensor, FULL: tl.constexpr) -> None:
    """Store what is present."""
    if FULL:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=present)


@jit
def _cut(v: tl.tensor, inside: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """0 where not inside."""
    return v if FULL else tl.where(inside, v, 0.0)


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
def _place(
    splits: tl.tensor, channels: tl.tensor, pixels: tl.tensor, CHUNK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Which chunk of channels and which split of which picture a program has, and the picture's first pixel."""
    # One number for all, neighbouring groups next to each other: a grid's other sizes end at 65535.
    chunks, number = channels // CHUNK, tl.program_id(0)
    j, s, b = number % chunks, number // chunks % splits, number // (chunks * splits)
    # Unsigned, so that the product is one wide multiplication.
    return j, s, b, tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(pixels, tl.uint32).to(tl.int64)


@jit
def _row_of(
    row: tl.tensor, index: tl.tensor, b: tl.tensor, rows: tl.tensor, row_width: tl.tensor, column: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Where the projections of picture b begin, and whether there are any: no foreign memory must be read."""
    r = tl.cast(b, tl.uint32).to(tl.int64)
    if index is not None:
        r = tl.load(index + b)
    return row + r * tl.cast(row_width, tl.uint32).to(tl.int64) + column, r.to(tl.uint64, bitcast=True) < rows


@jit
def _of_channels(
    bias: tl.tensor,
    row: tl.tensor,
    c: tl.tensor,
    mine: tl.tensor,
    known: tl.tensor,
    SCALE_SHIFT: tl.constexpr,
) -> tl.tensor:
    """What every pixel of a channel has added: bias and time projection."""
    added = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        added += tl.load(bias + c, mask=mine, other=0.0).to(tl.float32)
    if row is not None and not SCALE_SHIFT:
        added += tl.load(row + c, mask=mine & known, other=0.0).to(tl.float32)
    return added


@jit
def _to_groups(value: tl.tensor, lane: tl.tensor, GROUP: tl.constexpr, GROUPS: tl.constexpr) -> tl.tensor:
    """Each group's sum of its channels' values."""
    member = (lane // GROUP)[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(member, value[:, None], 0.0), axis=0)


@jit
def _to_channels(value: tl.tensor, lane: tl.tensor, GROUP: tl.constexpr, GROUPS: tl.constexpr) -> tl.tensor:
    """Each channel's group's value."""
    member = (lane // GROUP)[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(member, value[None, :], 0.0), axis=1)


@jit
def _over_groups(
    v: tl.tensor,
    lane: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
) -> tl.tensor:
    """Each channel's group's sum over all pixels of a tile."""
    if WIDTH == GROUP * GROUPS:
        # The channels of a group are a thread's own or its neighbour's: added first, they leave little to exchange.
        groups = tl.sum(tl.sum(tl.reshape(v, (PIXELS, GROUPS, GROUP)), axis=2), axis=0)
        over = tl.reshape(tl.broadcast_to(groups[:, None], (GROUPS, GROUP)), (WIDTH,))
    else:
        over = _to_channels(_to_groups(tl.sum(v, axis=0), lane, GROUP, GROUPS), lane, GROUP, GROUPS)
    return over


@jit
def _factors(
    variance: tl.tensor, eps: tl.tensor, weight: tl.tensor, beta: tl.tensor, c: tl.tensor, real: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The factor and the offset of each channel's values, whose mean is taken off already."""
    # Inductor passes numbers as float64, which must not spread.
    a = tl.rsqrt(variance + tl.cast(eps, tl.float32)) * tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    return a, tl.load(beta + c, mask=real, other=0.0).to(tl.float32)


@jit
def _modulated(
    a: tl.tensor, d: tl.tensor, row: tl.tensor, c: tl.tensor, there: tl.tensor, channels: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The same with the scale and the shift of a row."""
    scale = 1.0 + tl.load(row + c, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(row + channels + c, mask=there, other=0.0).to(tl.float32)
    return a * scale, tl.fma(d, scale, shift)


@jit
def _normalised(v: tl.tensor, a: tl.tensor, d: tl.tensor, SILU: tl.constexpr, APPROX: tl.constexpr) -> tl.tensor:
    """a·v + d, or its SiLU."""
    y = tl.fma(v, tl.broadcast_to(a[None, :], v.shape), tl.broadcast_to(d[None, :], v.shape))
    if SILU:
        if APPROX and not ON_INTERPRETER:
            y = libdevice.fast_dividef(y, 1.0 + libdevice.fast_expf(-y))
        else:
            y = y * tl.sigmoid(y)
    return y


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
    FULL: tl.constexpr,
    APPROX: tl.constexpr,
) -> None:
    """Program (j, b) holds groups j·GROUPS ... of picture b in registers; optional pointers are None where unused."""
    j, _, b, line = _place(1, channels, pixels, GROUP * GROUPS)
    lane = tl.arange(0, WIDTH)
    c, real = j * (GROUP * GROUPS) + lane, lane < GROUP * GROUPS
    p = tl.arange(0, PIXELS)
    inside = (p < pixels)[:, None] & real[None, :]
    e = line * tl.cast(channels, tl.uint32).to(tl.int64) + (p[:, None] * channels + c[None, :])
    known = True
    if row is not None:
        row, known = _row_of(row, index, b, rows, row_width, column)
    added = _of_channels(bias, row, c, real & (c < own), known, SCALE_SHIFT)
    v = _summed(x, residual, skip, added, line, p, c, inside, own, channels, FULL)
    if total is not None:
        _store(total + e, v, inside, FULL)
    share = 1.0 / (pixels * GROUP)
    v = _cut(v - (_over_groups(v, lane, GROUP, GROUPS, WIDTH, PIXELS) * share)[None, :], inside, FULL)
    variance = _over_groups(v * v, lane, GROUP, GROUPS, WIDTH, PIXELS) * share
    a, d = _factors(variance, eps, weight, beta, c, real)
    if SCALE_SHIFT:
        a, d = _modulated(a, d, row, c, real & known, channels)
    if row is not None:
        d += tl.where(known, 0.0, float("nan"))  # a row that is not there shows
    _store(out + e, _normalised(v, a, d, SILU, APPROX), inside, FULL)


@jit
def group_moments_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    index: tl.tensor,
    residual: tl.tensor,
    skip: tl.tensor,
    moments: tl.tensor,
    total: tl.tensor,
    pixels: tl.tensor,
    own: tl.tensor,
    channels: tl.tensor,
    row_width: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    SCALE_SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    APART: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    """Program (j, s, b): mean and sum of squares of pixels s·TILES·PIXELS ... of groups j·GROUPS ... of picture b.

    Pixels that are APART lie in one thread. It takes their values less the mean of those of its first tile, so that
    squares are exact, and exchanges nothing before the end (Chan et al. 1979).
    """
    j, s, b, line = _place(tl.cdiv(pixels, TILES * PIXELS), channels, pixels, GROUP * GROUPS)
    lane = tl.arange(0, WIDTH)
    c, real = j * (GROUP * GROUPS) + lane, lane < GROUP * GROUPS
    first = line * tl.cast(channels, tl.uint32).to(tl.int64)
    known = True
    if row is not None:
        row, known = _row_of(row, index, b, rows, row_width, column)
    added = _of_channels(bias, row, c, real & (c < own), known, SCALE_SHIFT)

    pivot, count = tl.zeros((APART, WIDTH), tl.float32), tl.zeros((APART, 1), tl.float32)
    sums, squares = tl.zeros((APART, WIDTH), tl.float32), tl.zeros((APART, WIDTH), tl.float32)
    for i in range(TILES):
        p = (s * TILES + i) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & real[None, :]
        v = _summed(x, residual, skip, added, line, p, c, inside, own, channels, FULL)
        if total is not None:
            _store(total + first + (p[:, None] * channels + c[None, :]), v, inside, FULL)
        v = tl.reshape(v, (PIXELS // APART, APART, WIDTH))
        there = tl.reshape(p, (PIXELS // APART, APART)) < pixels
        if FULL:
            more = tl.full((APART, 1), PIXELS // APART, tl.float32)
        else:
            more = tl.sum(there.to(tl.float32), axis=0)[:, None]
        if i == 0:
            pivot = tl.sum(v, axis=0) / tl.maximum(more, 1.0)
        v = _cut(v - pivot[None, :, :], there[:, :, None], FULL)
        sums += tl.sum(v, axis=0)
        squares += tl.sum(v * v, axis=0)
        count += more

    off = sums / tl.maximum(count, 1.0)
    squares = tl.maximum(squares - sums * off, 0.0)
    mean = pivot + off
    of_channel = tl.sum(mean * count, axis=0) / tl.sum(count, axis=0)
    of_group = _to_groups(of_channel, lane, GROUP, GROUPS) / GROUP
    far = mean - _to_channels(of_group, lane, GROUP, GROUPS)[None, :]
    squares = _to_groups(tl.sum(squares + count * far * far, axis=0), lane, GROUP, GROUPS)
    at = ((b * (channels // GROUP) + j * GROUPS).to(tl.int64) + tl.arange(0, GROUPS)) * (2 * SPLITS) + s
    tl.store(moments + at, of_group)
    tl.store(moments + at + SPLITS, squares)


@jit
def normalise_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    index: tl.tensor,
    residual: tl.tensor,
    skip: tl.tensor,
    weight: tl.tensor,
    beta: tl.tensor,
    moments: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    own: tl.tensor,
    channels: tl.tensor,
    row_width: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    share: tl.tensor,
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
    """Program (j, s, b): the norm of pixels s·TILES·PIXELS ... of groups j·GROUPS ... of picture b.

    Moments are those of `share` pixels each. The sum is made once more: what the first launch kept of it is rounded.
    """
    j, s, b, line = _place(tl.cdiv(pixels, TILES * PIXELS), channels, pixels, GROUP * GROUPS)
    lane = tl.arange(0, WIDTH)
    c, real = j * (GROUP * GROUPS) + lane, lane < GROUP * GROUPS
    out += line * tl.cast(channels, tl.uint32).to(tl.int64)

    at = ((b * (channels // GROUP) + j * GROUPS).to(tl.int64) + tl.arange(0, GROUPS)) * (2 * SPLITS)
    part = tl.arange(0, SPLITS)
    counts = tl.minimum(tl.maximum(pixels - part * share, 0), share).to(tl.float32)[None, :]
    means = tl.load(moments + (at[:, None] + part[None, :]), mask=counts > 0, other=0.0)
    squares = tl.load(moments + (at[:, None] + SPLITS + part[None, :]), mask=counts > 0, other=0.0)
    mean = tl.sum(counts * means, axis=1) / pixels
    far = means - mean[:, None]
    variance = tl.sum(squares + counts * far * far * GROUP, axis=1) / (pixels * GROUP)
    variance = _to_channels(variance, lane, GROUP, GROUPS)

    known = True
    if row is not None:
        row, known = _row_of(row, index, b, rows, row_width, column)
    added = _of_channels(bias, row, c, real & (c < own), known, SCALE_SHIFT)
    added -= _to_channels(mean, lane, GROUP, GROUPS)
    a, d = _factors(variance, eps, weight, beta, c, real)
    if SCALE_SHIFT:
        a, d = _modulated(a, d, row, c, real & known, channels)
    if row is not None:
        d += tl.where(known, 0.0, float("nan"))  # a row that is not there shows
    for i in range(TILES):
        p = (s * TILES + i) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & real[None, :]
        v = _summed(x, residual, skip, added, line, p, c, inside, own, channels, FULL)
        _store(out + (p[:, None] * channels + c[None, :]), _normalised(v, a, d, SILU, APPROX), inside, FULL)


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
    plan = plan_for(batch, channels, groups, pixels, keep, x.element_size())
    lanes = 64 if torch.version.hip else 32
    pieces, written = groups // plan.together * batch, total if keep else None
    terms = (x, bias, row, index, residual, skip)
    numbers = (pixels, own, channels, *((0, column, 0) if row is None else (row.shape[1], column, row.shape[0])))
    tile = {
        "SCALE_SHIFT": scale_shift, "GROUP": plan.size, "GROUPS": plan.together, "WIDTH": plan.width,
        "PIXELS": plan.rows, "num_warps": plan.warps(lanes),
    }  # fmt: skip
    result = {"SILU": silu, "APPROX": approximations()}
    if plan.at_once:
        launcher(add_group_norm_kernel)[(pieces,)](
            *terms, weight, beta, written, out, *numbers, eps,
            FULL=plan.is_full(pixels), **tile, **result,
        )  # fmt: skip
        return total, out
    splits = next_power(plan.splits)
    moments = x.new_empty((batch, groups, 2, splits), dtype=torch.float32)
    launcher(group_moments_kernel)[(pieces * plan.splits,)](
        *terms, moments, written, *numbers,
        APART=plan.apart(lanes), TILES=plan.tiles, SPLITS=splits, FULL=plan.is_full(pixels), **tile,
    )  # fmt: skip
    launcher(normalise_kernel)[(pieces * -(-pixels // (plan.rows * plan.later)),)](
        *terms, weight, beta, moments, out, *numbers, plan.rows * plan.tiles, eps,
        TILES=plan.later, SPLITS=splits, FULL=plan.is_full(pixels, plan.later), **tile, **result,
    )  # fmt: skip
    return total, out
