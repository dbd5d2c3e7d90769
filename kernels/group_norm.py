"""`add_group_norm`: what a residual network leaves to add, its group norm and its SiLU, in one pass over the pictures.

With v the sum of up to four terms (a convolution's output, its bias, a time projection, a residual branch), groups of
consecutive channels and their mean μ and variance s² over channels and pixels (Wu and He 2018, eq. 1-2):

    y = (v − μ)/√(s² + ε) · weight + beta,  y ← (1 + scale) · y + shift,  y ← y · sigmoid(y)

The second step is the adaptive norm of Dhariwal and Nichol (2021, sec. 3); it and the third are optional. On a GPU a
group of a picture is held in registers, so that memory is read once; where it does not fit, one launch finds μ and s²
and a second one reads the terms again. On CPUs PyTorch's own operations serve, unless the kernel in C is asked for
(`group_norm_native.py`), as it is for compiled steps.
"""

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import OUT_DTYPES, check_contiguous, check_tensor
from .dispatch import runs_triton
from .group_norm_native import takes, threads_for

Mode = Literal["add", "scale_shift"]

GROUP_NORM_RTOL = 2.0**-19
"""Kernel against float64 for float32 inputs, relative to the largest |y|; lower types add their rounding."""

_MODES = ("add", "scale_shift")


class Norm(NamedTuple):
    """A group norm of C + C' channels.

    Attributes:
        weight: [C + C'], its factors, float32, bfloat16 or float16.
        beta: [C + C'], its offsets, of any of these types.
        groups: how many groups of consecutive channels; it divides C + C'.
        eps: ε > 0.
    """

    weight: Tensor
    beta: Tensor
    groups: int
    eps: float


class Terms(NamedTuple):
    """What is added to x, or comes beside it, before it is normalised.

    Attributes:
        bias: [C], added to x.
        residual: like x, added to it.
        skip: [B, C', H, W] of x's type, concatenated behind the sum.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    skip: Tensor | None = None


class Projection(NamedTuple):
    """The time projections of all blocks, and which of their entries are a norm's.

    Attributes:
        row: [R, D], contiguous. The norm takes C entries for mode "add", and 2(C + C') for "scale_shift", the scales
            first.
        mode: "add" (the entries are added before the norm; Ho et al. 2020) or "scale_shift" (used after it).
        column: the first of the entries. A slice would do, but a compiler would make a kernel for each.
        row_of: int64 [B], which of the rows is a picture's; None is the picture's own number, with R = B. A GPU cannot
            raise IndexError: outside of 0 ... R-1 it gives NaN.
    """

    row: Tensor
    mode: Mode
    column: int = 0
    row_of: Tensor | None = None


_NOTHING = Terms()


def add_group_norm_reference(
    x: Tensor, norm: Norm, terms: Terms = _NOTHING, projection: Projection | None = None, *, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """`add_group_norm` in plain PyTorch; nothing is validated, any memory layout will do, and it is differentiable.

    Args:
        x: as in `add_group_norm`, and so are all other arguments.
        norm: the norm.
        terms: what is added before it.
        projection: of the time.
        silu: whether SiLU follows.

    Returns:
        The sum and its norm.
    """
    mode, column, row = None, 0, x
    if projection is not None:
        mode, column = projection.mode, projection.column
        row = projection.row if projection.row_of is None else projection.row[projection.row_of]
    total = x if terms.bias is None else x + terms.bias[:, None, None]
    if mode == "add":
        total = total + row[:, column : column + x.shape[1], None, None].to(x.dtype)
    if terms.residual is not None:
        total = total + terms.residual
    if terms.skip is not None:
        total = torch.cat((total, terms.skip), dim=1)
    y = F.group_norm(total, norm.groups, norm.weight, norm.beta, norm.eps)
    if mode == "scale_shift":
        both = row[:, column : column + 2 * y.shape[1], None, None].to(x.dtype)
        scale, shift = both.chunk(2, dim=1)
        y = torch.addcmul(shift, y, 1 + scale)
    return total, F.silu(y) if silu else y


def add_group_norm(
    x: Tensor,
    norm: Norm,
    terms: Terms = _NOTHING,
    projection: Projection | None = None,
    *,
    silu: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sum of what is given, and its group norm, with the equations above; not differentiable on GPUs.

    On a GPU one launch does all of it, two where a picture is large (see `group_norm_tiles`); the arithmetic is then
    float32, whatever the tensors are. The results are channels-last there.

    Args:
        x: float32, bfloat16 or float16 [B, C, H, W], best channels-last.
        norm: the norm.
        terms: what is added before it.
        projection: of the time; None for none.
        silu: whether SiLU follows.
        keep: whether the sum is wanted; if not, and it is a new tensor, an empty one comes in its place on GPUs.

    Returns:
        The sum (x itself where nothing is added) and the norm, both [B, C + C', H, W] of x's type.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes or devices do not fit, or the mode is unknown.
    """
    _check(x, norm, terms, projection)
    return add_group_norm_unchecked(x, norm, terms, projection, silu=silu, keep=keep)


def add_group_norm_unchecked(
    x: Tensor,
    norm: Norm,
    terms: Terms = _NOTHING,
    projection: Projection | None = None,
    *,
    silu: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm` for a network's own loop: dozens of calls a step, whose arguments fit by construction."""
    bias, residual, skip = terms
    channels, pixels = x.shape[1] + (0 if skip is None else skip.shape[1]), x.shape[2] * x.shape[3]
    native = takes(x, skip)
    if not native and not runs_triton(x.device.type):
        return add_group_norm_reference(x, norm, terms, projection, silu=silu)
    row, mode, column, row_of = (None, None, 0, None) if projection is None else projection
    alone = bias is None and residual is None and skip is None and mode != "add"
    row_of = None if row_of is None else row_of.contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    residual, skip = _channels_last(residual), _channels_last(skip)
    arguments = (x, bias, row, row_of, residual, skip, *norm, column, mode == "scale_shift", silu, keep and not alone)
    if native:
        threads = threads_for(len(x) * channels * pixels)
        total, out = torch.ops.fastddpm.add_group_norm_native(*arguments, threads)
    else:
        from .group_norm_triton import add_group_norm_op

        total, out = add_group_norm_op(*arguments)
    return (x if alone else total), out


def _channels_last(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _check(x: Tensor, norm: Norm, terms: Terms, projection: Projection | None) -> None:
    groups, (bias, residual, skip) = norm.groups, terms
    check_tensor("add_group_norm: x", x, dtypes=OUT_DTYPES, shape=("B", "C", "H", "W"))
    batch, own, height, width = x.shape
    like = functools.partial(check_tensor, dtypes=(x.dtype,), device=x.device)
    check = functools.partial(check_tensor, dtypes=OUT_DTYPES, device=x.device)
    channels = own
    if skip is not None:
        like("add_group_norm: skip", skip, shape=(batch, "C'", height, width))
        channels += skip.shape[1]
    if residual is not None:
        like("add_group_norm: residual", residual, shape=tuple(x.shape))
    if groups < 1 or channels % groups:
        raise ValueError(
            f"add_group_norm: groups must divide the channels ({channels}), got {groups}; choose a divisor"
        )
    check("add_group_norm: weight", norm.weight, shape=(channels,))
    check("add_group_norm: beta", norm.beta, shape=(channels,))
    if bias is not None:
        check("add_group_norm: bias", bias, shape=(own,))
    check_contiguous("add_group_norm", weight=norm.weight, beta=norm.beta, bias=bias)
    if projection is None:
        return
    row, mode, column, row_of = projection
    if mode not in _MODES:
        raise ValueError(f"add_group_norm: mode must be one of {', '.join(_MODES)}, got {mode!r}; pick one")
    check("add_group_norm: row", row, shape=(batch if row_of is None else "R", "D"))
    check_contiguous("add_group_norm", row=row)
    wanted = own if mode == "add" else 2 * channels
    if not 0 <= column <= row.shape[1] - wanted:
        raise ValueError(
            f"add_group_norm: column must leave {wanted} entries of the row's {row.shape[1]}, got {column}; "
            "pass all projections and this norm's first column"
        )
    if row_of is not None:
        fix = "pass one row number per picture"
        check_tensor("add_group_norm: row_of", row_of, dtypes=(torch.int64,), shape=(batch,), device=x.device, fix=fix)
