"""The Triton kernel of `q_sample`, its op and the op's gradients; the equations stand there."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from .common_triton import GROUPS, approximations, jit, launcher, load_two_quads, num_warps, store_quad, tl
from .philox_triton import MINUS_2_LN_2, normal_quad


@jit
def _noised(
    x: tl.tensor,
    eps: tl.tensor,
    x_t: tl.tensor,
    eps_out: tl.tensor,
    e: tl.tensor,
    q: tl.tensor,
    c: tl.tensor,
    numel: tl.tensor,
    MAKE: tl.constexpr,
    APPROX: tl.constexpr,
) -> None:
    """Noise one quad per thread and store it; `c` are the sample's scalars."""
    scale, shift, spread, t, number, key = c
    if MAKE:
        eps = normal_quad(q, t, number, key, MINUS_2_LN_2, APPROX)
        store_quad(eps_out, e, eps, numel)
    store_quad(x_t, e, tl.fma(x, scale, tl.fma(eps, spread, shift)), numel)


@jit
def q_sample_kernel(
    x_start: tl.tensor,
    t: tl.tensor,
    signals: tl.tensor,
    spreads: tl.tensor,
    eps: tl.tensor,
    seed: tl.tensor,
    sample_id: tl.tensor,
    x_t: tl.tensor,
    eps_out: tl.tensor,
    numel: tl.tensor,
    steps: tl.tensor,
    DOMAIN: tl.constexpr,
    APPROX: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Program (b, j) noises groups j·GROUPS ... of sample b: 8 floats to a group, or 16 bytes."""
    b = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    first = tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(numel, tl.uint32).to(tl.int64)
    step = tl.load(t + b)
    # A timestep outside the schedule must not read foreign memory; it shows as NaN.
    known = step.to(tl.uint64, bitcast=True) < steps
    signal = tl.load(signals + step, mask=known, other=float("nan"))
    spread = tl.load(spreads + step, mask=known, other=float("nan"))
    MAKE: tl.constexpr = eps is None
    number, key = step, step
    if MAKE:
        number, key = tl.load(sample_id + b), tl.load(seed + b)
        eps_out += first
    x_start += first
    x_t += first
    lane = tl.arange(0, 4)[None, :]
    if x_start.dtype.element_ty == tl.uint8:
        # x/127.5 − 1, folded into the signal's coefficient.
        c = (signal / 127.5, -signal, spread, step + DOMAIN, number, key)
        e = group[:, None] * 16 + tl.arange(0, 16)[None, :]
        x = tl.load(x_start + e, mask=e < numel).to(tl.float32)
        even, odd = tl.split(tl.permute(tl.reshape(x, (GROUPS, 2, 2, 4)), (0, 1, 3, 2)))
        x0, x2 = tl.split(tl.permute(even, (0, 2, 1)))
        x1, x3 = tl.split(tl.permute(odd, (0, 2, 1)))
        e = group[:, None] * 16 + lane
        q = (group * 4).to(tl.uint32)
        e0, e1, e2, e3 = x0, x1, x2, x3
        if not MAKE:
            e0, e1 = load_two_quads(eps + first, group * 2, numel)
            e2, e3 = load_two_quads(eps + first, group * 2 + 1, numel)
        _noised(x0, e0, x_t, eps_out, e, q, c, numel, MAKE, APPROX)
        _noised(x1, e1, x_t, eps_out, e + 4, q + 1, c, numel, MAKE, APPROX)
        _noised(x2, e2, x_t, eps_out, e + 8, q + 2, c, numel, MAKE, APPROX)
        _noised(x3, e3, x_t, eps_out, e + 12, q + 3, c, numel, MAKE, APPROX)
    else:
        c = (signal, 0.0, spread, step + DOMAIN, number, key)
        x0, x1 = load_two_quads(x_start, group, numel)
        e = group[:, None] * 8 + lane
        q = (group * 2).to(tl.uint32)
        e0, e1 = x0, x1
        if not MAKE:
            e0, e1 = load_two_quads(eps + first, group, numel)
        _noised(x0, e0, x_t, eps_out, e, q, c, numel, MAKE, APPROX)
        _noised(x1, e1, x_t, eps_out, e + 4, q + 1, c, numel, MAKE, APPROX)


@triton_op("fastddpm::q_sample", mutates_args=())
def q_sample_op(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    eps: Tensor | None,
    seed: Tensor | None,
    sample_id: Tensor | None,
    domain: int,
) -> tuple[Tensor, Tensor]:
    """x_t and the ε that was made; an op may not return its argument, so a given ε comes back as an empty tensor."""
    x_t = torch.empty_like(x_start, dtype=torch.float32)
    eps_out = x_t.new_empty(0) if eps is not None else torch.empty_like(x_t)
    batch, numel = x_start.shape[0], x_start.shape[1] * x_start.shape[2] * x_start.shape[3]
    owned = 16 if x_start.dtype == torch.uint8 else 8
    launcher(q_sample_kernel)[(batch, -(-numel // (owned * GROUPS)))](
        x_start,
        t,
        sqrt_alphas_cumprod,
        sqrt_one_minus_alphas_cumprod,
        eps,
        seed,
        sample_id,
        x_t,
        eps_out,
        numel,
        sqrt_alphas_cumprod.shape[0],
        DOMAIN=domain,
        APPROX=approximations(),
        GROUPS=GROUPS,
        num_warps=num_warps(),
    )
    return x_t, eps_out


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    _, t, signals, spreads, *_ = inputs
    ctx.save_for_backward(t, signals, spreads)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, grad_eps: Tensor) -> tuple[Tensor | None, ...]:
    t, signals, spreads = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_x, _, _, _, needs_eps, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    of_x = signals.index_select(0, t).reshape(-1, 1, 1, 1) * grad if needs_x else None
    of_eps = spreads.index_select(0, t).reshape(-1, 1, 1, 1) * grad if needs_eps else None
    return of_x, None, None, None, of_eps, None, None, None


q_sample_op.register_autograd(_backward, setup_context=_setup_context)
