"""The update of a scheduler's step, on tensors as callers of diffusers have them.

What a row holds stands in `fastddpm.process.table`:

    x̂_0     = clip(a_x · x_t + a_o · out, −bound, +bound)
    x_{t−1} = c_0 · x̂_0 + c_x · x_t + c_o · out + c_h · history + c_h2 · history2 + σ · z
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fastddpm.integrations.scheduler_rows import Rows
from fastddpm.kernels.dispatch import runs_triton
from fastddpm.kernels.operands import Operands, Row
from fastddpm.kernels.p_sample import p_sample, p_sample_reference
from fastddpm.process.table import StepTable, dynamic_bound

Place = tuple[Rows, int | Tensor]
_Thresholding = Callable[[Tensor], Tensor]
_Past = tuple[Tensor | None, Tensor | None]
_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fits(out: Tensor, x: Tensor, table: StepTable) -> bool:
    """Whether the tensors are what the table is for; the parent knows what to make of others."""
    if x.dtype not in _FLOATS or out.dtype not in _FLOATS or x.device != out.device or x.ndim < 2 or not x.numel():
        return False
    if table.variance == "learned_range":
        return out.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    return out.shape == x.shape


def update(
    place: Place,
    x: Tensor,
    out: Tensor,
    z: Tensor | None,
    threshold_sample: _Thresholding,
    past: _Past = (None, None),
) -> tuple[Tensor, Tensor]:
    """The new state and x̂_0 of all samples, in the dtype that diffusers' arithmetic has.

    Args:
        place: the table, and the row of all samples; or int [1] or [B], the row of each.
        x: float [B, C, …], x_t.
        out: float [B, C, …], or [B, 2C, …] with a learned variance.
        z: float, broadcast to the shape of x, standard normals; None adds no noise.
        threshold_sample: the scheduler's dynamic thresholding of an x̂_0.
        past: float [B, C, …], the x̂_0 of the last step and of the one before; None where no row reads it.

    Returns:
        x_{t−1} and x̂_0, [B, C, …].

    Raises:
        ValueError: there are neither one nor B timesteps.
    """
    rows, at = place
    dtype = x.dtype if x.dtype == out.dtype else torch.promote_types(x.dtype, out.dtype)
    differentiates = torch.is_grad_enabled() and (x.requires_grad or out.requires_grad)
    fused = not differentiates and runs_triton(x.device.type)
    if isinstance(at, int) and not (fused and rows.table.threshold is None):
        threshold = None if rows.table.threshold is None else threshold_sample
        floats = _float(past[0]), _float(past[1])
        new, x0 = _update_alike(rows.host[at], _float(x), _float(out), _float(z), floats, threshold)
    else:
        new, x0 = update_each(place, x, out, z, past, fused)
    return (new, x0) if dtype == torch.float32 else (new.to(dtype), x0.to(dtype))


def _update_alike(
    row: Row, x: Tensor, out: Tensor, z: Tensor | None, past: _Past, threshold: _Thresholding | None
) -> tuple[Tensor, Tensor]:
    """All samples at one row, whose numbers the host knows: plain PyTorch, in as few operations as there are."""
    variance = None
    if out.shape[1:2] != x.shape[1:2]:
        out, variance = out.chunk(2, dim=1)
    x0 = out if row.a_x == 0.0 and row.a_o == 1.0 else torch.mul(x, row.a_x).add_(out, alpha=row.a_o)
    if threshold is not None:
        x0 = threshold(x0)
    elif row.bound != math.inf:
        x0 = x0.clamp(-row.bound, row.bound) if x0 is out else x0.clamp_(-row.bound, row.bound)
    new = torch.mul(x0, row.c_0)
    if row.c_x:
        new.add_(x, alpha=row.c_x)
    if row.c_o:
        new.add_(out, alpha=row.c_o)
    for weight, history in zip((row.c_h, row.c_h2), past, strict=True):
        if weight and history is not None:
            new.add_(history, alpha=weight)
    if row.sigma and z is not None:
        new.add_(z if variance is None else z * _spread(row, variance), alpha=row.sigma)
    return new, x0


def update_each(
    place: Place, x: Tensor, out: Tensor, z: Tensor | None, past: _Past, fused: bool
) -> tuple[Tensor, Tensor]:
    """The update by the kernel, or by its reference where it must be differentiable: each sample at its own row."""
    (rows, at), batch, shape, device = place, len(x), x.shape, x.device
    table, times, _ = rows.on(device)
    if isinstance(at, int):
        step = rows.step(at, batch, device)
    elif at.numel() in (1, batch):
        step = at.to(device).expand(batch)
    else:
        raise ValueError(f"step: timestep must be one, or one for each of {batch} samples, got {at.numel()}; mend it")

    def flat(tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 4 else tensor.reshape(batch, tensor.shape[1], -1, 1)

    x4, out4 = flat(x), flat(out)
    bound = None
    if rows.table.threshold is not None:
        bound = dynamic_bound(x4, out4, table.index_select(0, step), rows.table.threshold)
    noise = None if z is None else flat(z).float().expand(x4.shape).contiguous()[None]
    history, history2 = (None if tensor is None else flat(tensor).float() for tensor in past)
    end, zeros = rows.step(len(table) - 1, batch, device), torch.zeros_like(step)
    new = x4.to(torch.float32, copy=True, memory_format=torch.contiguous_format) if fused else x4.float()
    given = Operands(
        new, out4, table, times, step, end, zeros, zeros,
        noise=noise, history=history, history2=history2, bound=bound,
    )  # fmt: skip
    if fused:
        x_start = torch.empty_like(new) if history is None else history.clone().reshape(new.shape)
        history2 = None if history2 is None else history2.clone().reshape(new.shape)
        # In place, all of them.
        p_sample(given._replace(history=x_start, history2=history2), stochastic=z is not None)
    else:
        new, x_start, *_ = p_sample_reference(given, stochastic=z is not None)
    return new.reshape(shape), x_start.reshape(shape)


def _spread(row: Row, v: Tensor) -> Tensor:
    """exp(½ (f log β + (1 − f) log β̃)), f = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15)."""
    middle, slope = 0.25 * (row.log_beta + row.log_beta_tilde), 0.25 * (row.log_beta - row.log_beta_tilde)
    return (v * slope).add_(middle).exp_()


def _float(tensor: _Maybe) -> _Maybe:
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()
