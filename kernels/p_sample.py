"""`p_sample`: one reverse step of any solver, with its noise, in one pass over the state.

A solver is a table of coefficients (see `COLUMNS`), and each sample of a batch stands at its own row of it. With a
row's entries, the network's output `out` and the previous row's estimate h:

    x̂₀ = clip(a_x·x + a_o·out, −bound, +bound)
    x  ← c_0·x̂₀ + c_x·x + c_o·out + c_h·h + σ·z

which covers DDPM (Ho et al. 2020, eq. 6-7, 11), DDIM (Song et al. 2021, eq. 12) and DPM-Solver++(2M) (Lu et al. 2022).
"""

import math

import torch
from torch import Tensor
from torch.library import wrap_triton

from ._checks import check_p_sample
from ._triton import GROUPS, approximations, jit, load_two_quads, num_warps, register_op, runs_triton, store_quad, tl
from .philox import MINUS_2_LN_2, normal_quad, normals_reference

COLUMNS = ("a_x", "a_o", "c_0", "c_x", "c_o", "c_h", "sigma", "bound", "log_beta", "log_beta_tilde")
"""The columns of a solver's table, in their order in memory."""

P_SAMPLE_RTOL = 2.0**-20
"""Kernel against reference, relative to the sum of the magnitudes of all terms, the noise's `NORMALS_ATOL` aside."""

_WIDTH = tl.constexpr(len(COLUMNS))
_QUARTER_LOG2_E = tl.constexpr(0.25 / math.log(2.0))


@jit
def _update(
    x: tl.tensor,
    o: tl.tensor,
    u: tl.tensor,
    v: tl.tensor,
    h: tl.tensor,
    z: tl.tensor,
    c: tl.tensor,
    GUIDED: tl.constexpr,
    LEARNED: tl.constexpr,
    HISTORY: tl.constexpr,
    BOUNDED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
    """The new state and x̂₀ of one quad per thread; `c` are the sample's scalars."""
    a_x, a_o, c_0, c_x, c_o, c_h, limit, guidance, v_scale, v_shift = c
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
    return new, x0


@jit
def _p_sample_kernel(
    x: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    timesteps: tl.tensor,
    step: tl.tensor,
    sample_id: tl.tensor,
    seed: tl.tensor,
    noise: tl.tensor,
    out_uncond: tl.tensor,
    guidance: tl.tensor,
    history: tl.tensor,
    bound: tl.tensor,
    numel: tl.tensor,
    last: tl.tensor,
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
    r = tl.minimum(tl.maximum(tl.load(step + b).to(tl.int32), 0), last)
    row = table + r * _WIDTH

    x += first
    x_low, x_high = load_two_quads(x, group, numel)
    o_low, o_high = load_two_quads(out + out_first, group, numel)
    c_h, w, v_scale, v_shift = 0.0, 0.0, 0.0, 0.0
    u_low, u_high, v_low, v_high, h_low, h_high, z_low, z_high = x, x, x, x, x, x, x, x
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
        h_low = tl.load(history + e, mask=e < readable, other=0.0)
        h_high = tl.load(history + e + 4, mask=e + 4 < readable, other=0.0)
    if STOCHASTIC:
        sigma = tl.load(row + 6)
        if LEARNED:
            # σ·exp(½(f log β + (1−f) log β̃)) with f = (v+1)/2, as a power of two.
            log_beta, log_beta_tilde = tl.load(row + 8), tl.load(row + 9)
            v_scale = (log_beta - log_beta_tilde) * _QUARTER_LOG2_E
            v_shift = (log_beta + log_beta_tilde) * _QUARTER_LOG2_E
            v_low, v_high = load_two_quads(out + out_first + numel, group, numel)
        if noise is not None:
            line = tl.cast(tl.minimum(r, noise_rows - 1) * tl.num_programs(0) + b, tl.uint32).to(tl.int64)
            z_low, z_high = load_two_quads(noise + line * tl.cast(numel, tl.uint32).to(tl.int64), group, numel)
            z_low, z_high = z_low * sigma, z_high * sigma
        else:
            t, number, key = tl.load(timesteps + r), tl.load(sample_id + b), tl.load(seed + b)
            scale = sigma * sigma * MINUS_2_LN_2
            q = (group * 2).to(tl.uint32)
            z_low = normal_quad(q, t, number, key, scale, APPROX)
            z_high = normal_quad(q + 1, t, number, key, scale, APPROX)

    a_x, a_o, c_0, c_x, c_o = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
    )
    c = (a_x, a_o, c_0, c_x, c_o, c_h, limit, w, v_scale, v_shift)
    G: tl.constexpr = out_uncond is not None
    H: tl.constexpr = history is not None
    B: tl.constexpr = bound is not None
    new_low, x0_low = _update(x_low, o_low, u_low, v_low, h_low, z_low, c, G, LEARNED, H, B, STOCHASTIC)
    new_high, x0_high = _update(x_high, o_high, u_high, v_high, h_high, z_high, c, G, LEARNED, H, B, STOCHASTIC)
    # The identity row would turn -0 into +0 and spread a NaN of the network: a finished sample is not written.
    writable = tl.where(r < last, numel, 0)
    store_quad(x, e, new_low, writable)
    store_quad(x, e + 4, new_high, writable)
    if history is not None:
        store_quad(history, e, x0_low, writable)
        store_quad(history, e + 4, x0_high, writable)


@register_op("fastddpm::p_sample", mutates=("x", "history"))
def _p_sample_op(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    step: Tensor,
    sample_id: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    out_uncond: Tensor | None,
    guidance: Tensor | None,
    history: Tensor | None,
    bound: Tensor | None,
    stochastic: bool,
) -> None:
    batch, numel = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    wrap_triton(_p_sample_kernel)[(batch, -(-numel // (8 * GROUPS)))](
        x,
        out,
        table,
        timesteps,
        step,
        sample_id,
        seed,
        noise,
        out_uncond,
        guidance,
        history,
        bound,
        numel,
        table.shape[0] - 1,
        1 if noise is None else noise.shape[0],
        LEARNED=out.shape[1] != x.shape[1],
        STOCHASTIC=stochastic,
        APPROX=approximations(),
        GROUPS=GROUPS,
        num_warps=num_warps(),
    )


def _clip(x: Tensor, limit: Tensor) -> Tensor:
    # As `clamp`, NaN included; but `clamp` with bounds that broadcast is three times slower on a CPU.
    return torch.minimum(torch.maximum(x, -limit), limit)


def p_sample_reference(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    step: Tensor,
    sample_id: Tensor,
    seed: Tensor,
    *,
    noise: Tensor | None = None,
    out_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    history: Tensor | None = None,
    bound: Tensor | None = None,
    stochastic: bool = True,
) -> tuple[Tensor, Tensor]:
    """`p_sample` as a function, in plain PyTorch: nothing is changed in place, nothing depends on values.

    It can be compiled, traced with fake tensors and exported to ONNX, and is differentiable.

    Args:
        x: as in `p_sample`, and so are all other arguments; nothing is validated.
        out: the network's output.
        table: the solver's rows.
        timesteps: each row's training timestep.
        step: each sample's row.
        sample_id: each sample's id.
        seed: each sample's seed.
        noise: supplied normals.
        out_uncond: the unconditional output.
        guidance: the guidance scales.
        history: the previous rows' x̂₀.
        bound: the dynamic thresholds.
        stochastic: whether σ·z is added.

    Returns:
        The new state and x̂₀, both float32 [B, C, H, W]. A finished sample keeps its state bit for bit. Where
        `history` is given, the second is what the history becomes: a finished sample keeps its own there too.
    """
    batch, channels = x.shape[0], x.shape[1]
    last = table.shape[0] - 1
    row = step.clamp(0, last)
    columns = (column.reshape(-1, 1, 1, 1) for column in table.index_select(0, row).unbind(1))
    a_x, a_o, c_0, c_x, c_o, c_h, sigma, limit, log_beta, log_beta_tilde = columns
    active = (row < last).reshape(-1, 1, 1, 1)

    eff = out[:, :channels].float()
    if out_uncond is not None and guidance is not None:
        base = out_uncond[:, :channels].float()
        eff = torch.addcmul(base, guidance.reshape(-1, 1, 1, 1), eff - base)
    x0 = torch.addcmul(a_x * x, a_o, eff)
    if bound is None:
        x0 = _clip(x0, limit)
    else:
        limit = bound.reshape(-1, 1, 1, 1)
        x0 = _clip(x0, limit) / limit

    new = torch.addcmul(torch.addcmul(c_0 * x0, c_x, x), c_o, eff)
    if history is not None:
        # Before a multistep solver's first row there is no history: c_h is 0 and the buffer may hold anything.
        new = torch.addcmul(new, c_h, torch.where(c_h == 0.0, 0.0, history))
        x0 = torch.where(active, x0, history)
    if stochastic:
        if noise is None:
            t = timesteps.index_select(0, row)
            z = normals_reference(seed, sample_id, t, x[0].numel()).reshape(x.shape)
        else:
            lane = torch.arange(batch, dtype=torch.int64, device=x.device)
            z = noise.flatten(0, 1).index_select(0, row.clamp(max=noise.shape[0] - 1) * batch + lane)
        if out.shape[1] > channels:
            v = out[:, channels:].float()
            middle, slope = 0.25 * (log_beta + log_beta_tilde), 0.25 * (log_beta - log_beta_tilde)
            sigma = sigma * torch.exp(torch.addcmul(middle, slope, v))
        new = torch.addcmul(new, sigma, z)
    # c_x = 1 alone would still turn -0 into +0.
    return torch.where(active, new, x), x0


def p_sample(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    step: Tensor,
    sample_id: Tensor,
    seed: Tensor,
    *,
    noise: Tensor | None = None,
    out_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    history: Tensor | None = None,
    bound: Tensor | None = None,
    stochastic: bool = True,
) -> None:
    """Move every sample of a batch one row on, in place, with the equations above.

    Everything that changes between steps is read from device memory, so a captured CUDA graph replays it rightly.
    Nothing is differentiated; `p_sample_reference` is the form for that. `step` is not advanced here.

    Args:
        x: float32 [B, C, H, W], contiguous: the state, updated in place.
        out: float32, bfloat16 or float16: the network's output at `x`, [B, C, H, W], or [B, 2C, H, W] for learned
            variance, where the second half is v in [-1, 1] and σ becomes σ·exp(½(f log β + (1−f) log β̃)) with
            f = (v+1)/2 (Nichol and Dhariwal 2021, eq. 15). Other memory layouts are copied first.
        table: float32 [S+1, len(COLUMNS)]: the solver's rows, all finite but for `bound`, σ ≥ 0; row S is the identity.
        timesteps: int64 [S+1]: the training timestep of each row, which is the noise's counter t.
        step: int64 [B], below 2³¹: each sample's row, clamped to [0, S]. A sample at S is finished: it is not written.
        sample_id: int64 [B]: each sample's id.
        seed: int64 [B]: each sample's seed, a 64-bit pattern.
        noise: float32 [N, B, C, H, W], contiguous: normals used instead of Philox's, at row min(step, N-1).
        out_uncond: like `out`: the unconditional output; the first C channels become
            out_uncond + guidance·(out − out_uncond) (Ho and Salimans 2022). v is taken from `out`.
        guidance: float32 [B]: the guidance scales, with `out_uncond`.
        history: float32 [B, C, H, W], contiguous: the previous row's x̂₀, read where c_h ≠ 0 and then overwritten
            with this row's. It may be uninitialised before a row whose c_h is 0.
        bound: float32 [B], ≥ 1: dynamic thresholds s, x̂₀ = clip(x̂₀, −s, s)/s (Saharia et al. 2022), instead of the
            table's bound.
        stochastic: False leaves out σ·z altogether, for solvers whose σ is 0 in every row; the noise, which is
            most of the arithmetic, is then not made.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes, devices or memory layouts do not fit, or one of `out_uncond` and `guidance` is missing.
    """
    per_sample = {"step": step, "sample_id": sample_id, "seed": seed}
    check_p_sample(x, out, table, timesteps, per_sample, noise, out_uncond, guidance, history, bound, len(COLUMNS))
    with torch.no_grad():
        if runs_triton(x.device.type):
            out, step, sample_id, seed = (tensor.contiguous() for tensor in (out, step, sample_id, seed))
            if out_uncond is not None and guidance is not None:
                out_uncond, guidance = out_uncond.contiguous(), guidance.contiguous()
            if bound is not None:
                bound = bound.contiguous()
            _p_sample_op(
                x,
                out,
                table,
                timesteps,
                step,
                sample_id,
                seed,
                noise,
                out_uncond,
                guidance,
                history,
                bound,
                stochastic,
            )
            return
        new, x0 = p_sample_reference(
            x,
            out,
            table,
            timesteps,
            step,
            sample_id,
            seed,
            noise=noise,
            out_uncond=out_uncond,
            guidance=guidance,
            history=history,
            bound=bound,
            stochastic=stochastic,
        )
        x.copy_(new)
        if history is not None:
            history.copy_(x0)
