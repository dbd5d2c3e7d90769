"""The Triton kernel of `q_sample`, its op and the op's gradients; the equations stand there."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from .common_triton import QUADS, approximations, jit, launcher, load_quad, num_warps, store_quad, tl
from .philox_triton import MINUS_2_LN_2, normal_quad


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
    QUADS: tl.constexpr,
) -> None:
    """Program (b, j) noises quads j·QUADS ... of sample b."""
    b = tl.program_id(0)
    q = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    e = q[:, None] * 4 + tl.arange(0, 4)[None, :]
    first = tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(numel, tl.uint32).to(tl.int64)
    step = tl.load(t + b)
    # A timestep outside the schedule must not read foreign memory; it shows as NaN.
    known = step.to(tl.uint64, bitcast=True) < steps
    signal = tl.load(signals + step, mask=known, other=float("nan"))
    spread = tl.load(spreads + step, mask=known, other=float("nan"))
    x = load_quad(x_start + first, e, numel)
    shift = 0.0
    if x_start.dtype.element_ty == tl.uint8:
        # x/127.5 − 1, folded into the signal's coefficient.
        signal, shift = signal / 127.5, -signal
    if eps is None:
        number, key = tl.load(sample_id + b), tl.load(seed + b)
        z = normal_quad(q.to(tl.uint32), step + DOMAIN, number, key, MINUS_2_LN_2, APPROX)
        store_quad(eps_out + first, e, z, numel)
    else:
        z = load_quad(eps + first, e, numel)
    store_quad(x_t + first, e, tl.fma(x, signal, tl.fma(z, spread, shift)), numel)


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
    launcher(q_sample_kernel)[(batch, -(-numel // (4 * QUADS)))](
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
        QUADS=QUADS,
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
