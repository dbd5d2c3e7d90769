"""The Triton kernel of `p_sample` and its op; the equations stand there."""

import math

from torch import Tensor
from torch.library import triton_op

from .common_triton import QUADS, approximations, jit, launcher, load_quad, num_warps, store_quad, tl
from .operands import COLUMNS
from .philox_triton import MINUS_2_LN_2, normal_quad

_WIDTH = tl.constexpr(len(COLUMNS))
_QUARTER_LOG2_E = tl.constexpr(0.25 / math.log(2.0))


@jit
def _update(
    x: tl.tensor,
    o: tl.tensor,
    u: tl.tensor,
    v: tl.tensor,
    h: tl.tensor,
    h2: tl.tensor,
    z: tl.tensor,
    c: tl.tensor,
    GUIDED: tl.constexpr,
    LEARNED: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY2: tl.constexpr,
    BOUNDED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
    """The new state and x̂₀ of one quad per thread; `c` are the sample's scalars."""
    a_x, a_o, c_0, c_x, c_o, c_h, c_h2, limit, guidance, v_scale, v_shift = c
    if GUIDED:
        o = tl.fma(guidance, o - u, u)
    # Fused multiply-adds are spelt out: whether Triton contracts a·b + c by itself has changed between its versions.
    # Without propagate_nan a NaN of the network would come out as a finite bound.
    x0 = tl.clamp(tl.fma(a_x, x, a_o * o), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if BOUNDED:
        x0 = x0 * (1.0 / limit)
    if STOCHASTIC:
        if LEARNED:
            z = z * tl.exp2(tl.fma(v, v_scale, v_shift))
        new = tl.fma(c_0, x0, z)
    else:
        new = c_0 * x0
    new = tl.fma(c_o, o, tl.fma(c_x, x, new))
    if HISTORY:
        new = tl.fma(c_h, h, new)
    if HISTORY2:
        new = tl.fma(c_h2, h2, new)
    return new, x0


@jit
def p_sample_kernel(
    x: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    timesteps: tl.tensor,
    step: tl.tensor,
    end: tl.tensor,
    sample_id: tl.tensor,
    seed: tl.tensor,
    noise: tl.tensor,
    out_uncond: tl.tensor,
    guidance: tl.tensor,
    history: tl.tensor,
    history2: tl.tensor,
    bound: tl.tensor,
    known: tl.tensor,
    mask: tl.tensor,
    numel: tl.tensor,
    noise_rows: tl.tensor,
    LEARNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    APPROX: tl.constexpr,
    QUADS: tl.constexpr,
) -> None:
    """Program (b, j) advances quads j·QUADS ... of sample b; optional pointers are None where unused."""
    b = tl.program_id(0)
    q = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    e = q[:, None] * 4 + tl.arange(0, 4)[None, :]
    # Unsigned, so that the product is one wide multiplication.
    first = tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(numel, tl.uint32).to(tl.int64)
    out_first = first * 2 if LEARNED else first
    last = tl.load(end + b).to(tl.int32)
    r = tl.maximum(tl.minimum(tl.load(step + b).to(tl.int32), last), 0)
    # Unsigned for the same reason.
    line = tl.cast(r, tl.uint32).to(tl.int64)
    row = table + line * _WIDTH

    x += first
    now = load_quad(x, e, numel)
    o = load_quad(out + out_first, e, numel)
    c_h, c_h2, w, v_scale, v_shift = 0.0, 0.0, 0.0, 0.0, 0.0
    u, v, h, h2, z, past, held = now, now, now, now, now, now, now
    if bound is None:
        limit = tl.load(row + 7)
    else:
        limit = tl.load(bound + b)
    if out_uncond is not None:
        w = tl.load(guidance + b)
        u = load_quad(out_uncond + out_first, e, numel)
    if history is not None:
        history += first
        c_h = tl.load(row + 5)
        # Where c_h is 0 the buffer may not have been written yet: it is not read.
        readable = tl.where(c_h != 0.0, numel, 0)
        if history2 is None:
            h = tl.load(history + e, mask=e < readable, other=0.0)
        else:
            # It is handed on whatever c_h is, but must not count where that is 0.
            past = load_quad(history, e, numel)
            h = tl.where(e < readable, past, 0.0)
    if history2 is not None:
        history2 += first
        c_h2 = tl.load(row + 10)
        h2 = tl.load(history2 + e, mask=e < tl.where(c_h2 != 0.0, numel, 0), other=0.0)
    if STOCHASTIC:
        sigma = tl.load(row + 6)
        if LEARNED:
            # σ·exp(½(f log β + (1−f) log β̃)) with f = (v+1)/2, as a power of two.
            log_beta, log_beta_tilde = tl.load(row + 8), tl.load(row + 9)
            v_scale = (log_beta - log_beta_tilde) * _QUARTER_LOG2_E
            v_shift = (log_beta + log_beta_tilde) * _QUARTER_LOG2_E
            v = load_quad(out + out_first + numel, e, numel)
        if noise is not None:
            # As far from the noise's end as the row is from its chapter's; a finished sample may read what it likes.
            picture = tl.maximum(noise_rows + tl.minimum(r - last, -1), 0) * tl.num_programs(0) + b
            picture = tl.cast(picture, tl.uint32).to(tl.int64) * tl.cast(numel, tl.uint32).to(tl.int64)
            z = load_quad(noise + picture, e, numel)
            if known is None:
                z = z * sigma
        else:
            t, number, key = tl.load(timesteps + line), tl.load(sample_id + b), tl.load(seed + b)
            if known is None:
                scale = sigma * sigma * MINUS_2_LN_2
            else:
                scale = MINUS_2_LN_2
            z = normal_quad(q.to(tl.uint32), t, number, key, scale, APPROX)
        if known is not None:
            # The known elements take the same normals at another scale, so these come unscaled.
            k_0, k_z = tl.load(row + 11), tl.load(row + 12)
            held = tl.fma(k_z, z, k_0 * load_quad(known + first, e, numel))
            z = z * sigma

    a_x, a_o, c_0, c_x, c_o = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
    )
    c = (a_x, a_o, c_0, c_x, c_o, c_h, c_h2, limit, w, v_scale, v_shift)
    G: tl.constexpr = out_uncond is not None
    H: tl.constexpr = history is not None
    H2: tl.constexpr = history2 is not None
    B: tl.constexpr = bound is not None
    new, x0 = _update(now, o, u, v, h, h2, z, c, G, LEARNED, H, H2, B, STOCHASTIC)
    if known is not None:
        m = load_quad(mask + first, e, numel)
        new = tl.fma(m, new, (1.0 - m) * held)
    # The identity row would turn -0 into +0 and spread a NaN of the network: a finished sample is not written.
    written = tl.where(r < last, numel, 0)
    store_quad(x, e, new, written)
    if history is not None:
        store_quad(history, e, x0, written)
    if history2 is not None:
        store_quad(history2, e, past, written)


@triton_op("fastddpm::p_sample", mutates_args=("x", "history", "history2"))
def p_sample_op(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    step: Tensor,
    end: Tensor,
    sample_id: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    out_uncond: Tensor | None,
    guidance: Tensor | None,
    history: Tensor | None,
    history2: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    bound: Tensor | None,
    stochastic: bool,
) -> None:
    """`p_sample` on a GPU, with the fields of `Operands` in their order: contiguous, and nothing is validated."""
    batch, numel = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    launcher(p_sample_kernel)[(batch, -(-numel // (4 * QUADS)))](
        x,
        out,
        table,
        timesteps,
        step,
        end,
        sample_id,
        seed,
        noise,
        out_uncond,
        guidance,
        history,
        history2,
        bound,
        known,
        mask,
        numel,
        1 if noise is None else noise.shape[0],
        LEARNED=out.shape[1] != x.shape[1],
        STOCHASTIC=stochastic,
        APPROX=approximations(),
        QUADS=QUADS,
        num_warps=num_warps(),
    )
