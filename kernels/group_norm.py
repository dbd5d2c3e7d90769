"""`add_group_norm`: what a residual network leaves to add, its group norm and its SiLU, in one pass over the pictures.

With v the sum of up to four terms (a convolution's output, its bias, a time projection, a residual branch), groups of
consecutive channels and their mean μ and variance s² over channels and pixels (Wu and He 2018, eq. 1-2):

    y = (v − μ)/√(s² + ε) · weight + beta,  y ← (1 + scale) · y + shift,  y ← y · sigmoid(y)

The second step is the adaptive norm of Dhariwal and Nichol (2021, sec. 3); it and the third are optional. A group of a
picture is held in registers, so that memory is read once; where it does not fit, PyTorch's own operations are used.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import OUT_DTYPES, check_tensor
from .dispatch import runs_triton
from .group_norm_tiles import tile

Mode = Literal["none", "add", "scale_shift"]

GROUP_NORM_RTOL = 2.0**-19
"""Kernel against float64 for float32 inputs, relative to the largest |y|; lower types add their rounding."""

_MODES = ("none", "add", "scale_shift")


def add_group_norm_reference(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    *,
    bias: Tensor | None = None,
    row: Tensor | None = None,
    mode: Mode = "none",
    column: int = 0,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm` in plain PyTorch; nothing is validated, any memory layout will do, and it is differentiable.

    Args:
        x: as in `add_group_norm`, and so are all other arguments.
        weight: the norm's factors.
        beta: the norm's offsets.
        groups: their number.
        eps: ε.
        bias: a bias.
        row: time projections.
        mode: what they do.
        column: where in the rows.
        index: which row is whose.
        residual: a residual branch.
        skip: more channels.
        silu: whether SiLU follows.

    Returns:
        The sum and its norm.
    """
    if row is not None and index is not None:
        row = row[index]
    total = x if bias is None else x + bias[:, None, None]
    if row is not None and mode == "add":
        total = total + row[:, column : column + x.shape[1], None, None].to(x.dtype)
    if residual is not None:
        total = total + residual
    if skip is not None:
        total = torch.cat((total, skip), dim=1)
    y = F.group_norm(total, groups, weight, beta, eps)
    if row is not None and mode == "scale_shift":
        both = row[:, column : column + 2 * y.shape[1], None, None].to(x.dtype)
        scale, shift = both.chunk(2, dim=1)
        y = torch.addcmul(shift, y, 1 + scale)
    return total, F.silu(y) if silu else y


def add_group_norm(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    *,
    bias: Tensor | None = None,
    row: Tensor | None = None,
    mode: Mode = "none",
    column: int = 0,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    silu: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sum of what is given, and its group norm, with the equations above; not differentiable on GPUs.

    On a GPU one launch does all of it, if a group of a picture has at most `MOST_ELEMENTS` elements; the arithmetic is
    then float32, whatever the tensors are. The results are channels-last there.

    Args:
        x: float32, bfloat16 or float16 [B, C, H, W], best channels-last.
        weight: [C + C'], the norm's factors, of any of these types.
        beta: [C + C'], the norm's offsets.
        groups: how many groups of consecutive channels; it divides C + C'.
        eps: ε > 0.
        bias: [C], added to x.
        row: [R, D], contiguous: time projections of all blocks, of which this norm takes C entries for mode "add", and
            2(C + C') for "scale_shift", the scales first.
        mode: "none", "add" (the entries are added before the norm; Ho et al. 2020) or "scale_shift" (used after it).
        column: the first of the entries. A slice would do, but a compiler would make a kernel for each.
        index: int64 [B], which of the rows is a picture's; None is the picture's own number, with R = B. A GPU cannot
            raise IndexError: outside of 0 ... R-1 it gives NaN.
        residual: like x, added to it.
        skip: [B, C', H, W] of x's type, concatenated behind the sum before it is normalised.
        silu: whether SiLU follows.
        keep: whether the sum is wanted; if not, and it is a new tensor, an empty one comes in its place on GPUs.

    Returns:
        The sum (x itself where nothing is added) and the norm, both [B, C + C', H, W] of x's type.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes or devices do not fit, the mode is unknown, or the mode and the row do not go together.
    """
    _check(x, weight, beta, groups, bias, row, mode, column, index, residual, skip)
    return add_group_norm_unchecked(
        x,
        weight,
        beta,
        groups,
        eps,
        bias=bias,
        row=row,
        mode=mode,
        column=column,
        index=index,
        residual=residual,
        skip=skip,
        silu=silu,
        keep=keep,
    )


def add_group_norm_unchecked(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    *,
    bias: Tensor | None = None,
    row: Tensor | None = None,
    mode: Mode = "none",
    column: int = 0,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    silu: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm` for a network's own loop: dozens of calls a step, whose arguments fit by construction."""
    channels, pixels = x.shape[1] + (0 if skip is None else skip.shape[1]), x.shape[2] * x.shape[3]
    if not runs_triton(x.device.type) or tile(channels, groups, pixels) is None:
        return add_group_norm_reference(
            x,
            weight,
            beta,
            groups,
            eps,
            bias=bias,
            row=row,
            mode=mode,
            column=column,
            index=index,
            residual=residual,
            skip=skip,
            silu=silu,
        )
    from .group_norm_triton import add_group_norm_op

    alone = bias is None and residual is None and skip is None and mode != "add"
    index = None if index is None else index.contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    residual, skip = _channels_last(residual), _channels_last(skip)
    total, out = add_group_norm_op(
        x,
        bias,
        row,
        index,
        residual,
        skip,
        weight,
        beta,
        groups,
        eps,
        column,
        mode == "scale_shift",
        silu,
        keep and not alone,
    )
    return (x if alone else total), out


def _channels_last(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _check(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    bias: Tensor | None,
    row: Tensor | None,
    mode: str,
    column: int,
    index: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
) -> None:
    name = "add_group_norm"
    check_tensor(name, "x", x, dtypes=OUT_DTYPES, shape=("B", "C", "H", "W"))
    batch, own, height, width = x.shape
    more: dict[str, Any] = {"dtypes": OUT_DTYPES, "device": x.device}
    like: dict[str, Any] = {"dtypes": (x.dtype,), "device": x.device}
    channels = own
    if skip is not None:
        check_tensor(name, "skip", skip, shape=(batch, "C'", height, width), **like)
        channels += skip.shape[1]
    if residual is not None:
        check_tensor(name, "residual", residual, shape=tuple(x.shape), **like)
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups must divide the channels ({channels}), got {groups}; choose a divisor")
    for argument, value in (("weight", weight), ("beta", beta)):
        check_tensor(name, argument, value, shape=(channels,), contiguous=True, **more)
    if bias is not None:
        check_tensor(name, "bias", bias, shape=(own,), contiguous=True, **more)
    if mode not in _MODES:
        raise ValueError(f"{name}: mode must be one of {', '.join(_MODES)}, got {mode!r}; pick one")
    if (row is None) != (mode == "none"):
        given = "none" if row is None else "one"
        raise ValueError(
            f"{name}: row must be given unless mode is none, got {given} with {mode!r}; change one of them"
        )
    if row is not None:
        check_tensor(name, "row", row, shape=(batch if index is None else "R", "D"), contiguous=True, **more)
        wanted = own if mode == "add" else 2 * channels
        if not 0 <= column <= row.shape[1] - wanted:
            raise ValueError(
                f"{name}: column must leave {wanted} entries of the row's {row.shape[1]}, got {column}; "
                "pass all projections and this norm's first column"
            )
        if index is not None:
            fix = "pass one row number per picture"
            check_tensor(name, "index", index, dtypes=(torch.int64,), shape=(batch,), device=x.device, fix=fix)
