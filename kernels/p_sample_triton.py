"""The Triton kernel of `p_sample` and its op; the equations stand there."""

import math

from torch import Tensor
from torch.library import triton_op

from .common_triton import GROUPS, approximations, jit, launcher, load_two_quads, num_warps, tl
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
    GROUPS: tl.constexpr,
) -> None:
    """Program (b, j) advances groups j·GROUPS ... of sample b; optional pointers are None where unused."""
    b = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    e = group[:, None] * 8 + tl.arange(0, 4)[None, :]
    # Unsigned, so that the product is one wide multiplication.
    first = tl.cast(b, tl.uint32).to(tl.int64) * tl.cast(numel, tl.uint32).to(tl.int64)
    out_first = first * 2 if LEARNED else first
    last = tl.load(end + b).to(tl.int32)
    r = tl.maximum(tl.minimum(tl.load(step + b).to(tl.int32), last), 0)
    # Unsigned for the same reason.
    line = tl.cast(r, tl.uint32).to(tl.int64)
    row = table + line * _WIDTH

    x += first
    x_low, x_high = load_two_quads(x, group, numel)
    o_low, o_high = load_two_quads(out + out_first, group, numel)
    c_h, c_h2, w, v_scale, v_shift = 0.0, 0.0, 0.0, 0.0, 0.0
    u_low, u_high, v_low, v_high, h_low, h_high, z_low, z_high = x, x, x, x, x, x, x, x
    h2_low, h2_high, past_low, past_high = x, x, x, x
    if bound is None:
        limit = tl.load(row + 7)
    else:
        limit = tl.load(bound + b)
    if out_uncond is not None:
        w = tl.load(guidance + b)
        u_low, u_high = load_two_quads(out_uncond + out_first, group, numel)
    if history is not None:
        history += first
        c_h = tl.load(row + 5)
        # Where c_h is 0 the buffer may not have been written yet: it is not read.
        readable = tl.where(c_h != 0.0, numel, 0)
        if history2 is None:
            h_low = tl.load(history + e, mask=e < readable, other=0.0)
            h_high = tl.load(history + e + 4, mask=e + 4 < readable, other=0.0)
        else:
            # It is handed on whatever c_h is, but must not count where that is 0.
            past_low, past_high = load_two_quads(history, group, numel)
            h_low, h_high = tl.where(e < readable, past_low, 0.0), tl.where(e + 4 < readable, past_high, 0.0)
    if history2 is not None:
        history2 += first
        c_h2 = tl.load(row + 10)
        readable2 = tl.where(c_h2 != 0.0, numel, 0)
        h2_low = tl.load(history2 + e, mask=e < readable2, other=0.0)
        h2_high = tl.load(history2 + e + 4, mask=e + 4 < readable2, other=0.0)
    if STOCHASTIC:
        sigma = tl.load(row + 6)
        if LEARNED:
            # σ·exp(½(f log β + (1−f) log β̃)) with f = (v+1)/2, as a power of two.
            log_beta, log_beta_tilde = tl.load(row + 8), tl.load(row + 9)
            v_scale = (log_beta - log_beta_tilde) * _QUARTER_LOG2_E
            v_shift = (log_beta + log_beta_tilde) * _QUARTER_LOG2_E
            v_low, v_high = load_two_quads(out + out_first + numel, group, numel)
        if noise is not None:
            # As far from the noise's end as the row is from its chapter's; a finished sample may read what it likes.
            picture = tl.maximum(noise_rows + tl.minimum(r - last, -1), 0) * tl.num_programs(0) + b
            picture = tl.cast(picture, tl.uint32).to(tl.int64) * tl.cast(numel, tl.uint32).to(tl.int64)
            z_low, z_high = load_two_quads(noise + picture, group, numel)
            if known is None:
                z_low, z_high = z_low * sigma, z_high * sigma
        else:
            t, number, key = tl.load(timesteps + line), tl.load(sample_id + b), tl.load(seed + b)
            if known is None:
                scale = sigma * sigma * MINUS_2_LN_2
            else:
                scale = MINUS_2_LN_2
            q = (group * 2).to(tl.uint32)
            z_low = normal_quad(q, t, number, key, scale, APPROX)
            z_high = normal_quad(q + 1, t, number, key, scale, APPROX)
        if known is not None:
            # The known elements take the same normals at another scale, so these come unscaled.
            k_0, k_z = tl.load(row + 11), tl.load(row + 12)
            held_low, held_high = load_two_quads(known + first, group, numel)
            held_low, held_high = tl.fma(k_z, z_low, k_0 * held_low), tl.fma(k_z, z_high, k_0 * held_high)
            z_low, z_high = z_low * sigma, z_high * sigma

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
    new_low, x0_low = _update(
        x_low, o_low, u_low, v_low, h_low, h2_low, z_low, c, G, LEARNED, H, H2, B, STOCHASTIC
    )  # fmt: skip
    new_high, x0_high = _update(
        x_high, o_high, u_high, v_high, h_high, h2_high, z_high, c, G, LEARNED, H, H2, B, STOCHASTIC
    )
    if known is not None:
        m_low, m_high = load_two_quads(mask + first, group, numel)
        new_low = tl.fma(m_low, new_low, (1.0 - m_low) * held_low)
        new_high = tl.fma(m_high, new_high, (1.0 - m_high) * held_high)
    # The identity row would turn -0 into +0 and spread a NaN of the network: a finished sample is not written.
    active = r < last
    low, high = (e < numel) & active, (e + 4 < numel) & active
    tl.store(x + e, new_low, mask=low)
    tl.store(x + e + 4, new_high, mask=high)
    if history is not None:
        tl.store(history + e, x0_low, mask=low)
        tl.store(history + e + 4, x0_high, mask=high)
    if history2 is not None:
        tl.store(history2 + e, past_low, mask=low)
        tl.store(history2 + e + 4, past_high, mask=high)


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
    launcher(p_sample_kernel)[(batch, -(-numel // (8 * GROUPS)))](
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
        GROUPS=GROUPS,
        num_warps=num_warps(),
    )
