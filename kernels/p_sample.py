"""`p_sample`: one reverse step of any solver, with its noise, in one pass over the state.

A solver is a table of coefficients (see `COLUMNS`), and each sample of a batch stands at its own row of it. Several
runs may stand in one table, one after the other: each is a chapter, which ends with its identity row, where its samples
stay. With a row's entries, the network's output `out`, the previous row's estimate h and that of the row before it, h₂:

    x̂₀ = clip(a_x·x + a_o·out, −bound, +bound)
    x  ← c_0·x̂₀ + c_x·x + c_o·out + c_h·h + c_h2·h₂ + σ·z

which covers DDPM (Ho et al. 2020, eq. 6-7, 11), DDIM (Song et al. 2021, eq. 12), and DPM-Solver++(2M) and (3M) (Lu et
al. 2022). Where a part of the pictures is known, x₀ᵏ, and a mask m says where the rest is (1), there follows (Lugmayr
et al. 2022, eq. 8)

    x  ← (1 − m)·(k_0·x₀ᵏ + k_z·z) + m·x

with the same z: an element is either known or not, so none counts twice.
"""

import torch
from torch import Tensor

from .checks import COLUMNS as COLUMNS
from .checks import check_p_sample
from .dispatch import runs_triton
from .normals import normals

P_SAMPLE_RTOL = 2.0**-20
"""Kernel against reference, relative to the sum of the magnitudes of all terms, the noise's `NORMALS_ATOL` aside."""


def clip(x: Tensor, limit: Tensor) -> Tensor:
    """Cut x off at −limit and limit."""
    # As `clamp`, NaN included; but `clamp` with bounds that broadcast is three times slower on a CPU.
    return torch.minimum(torch.maximum(x, -limit), limit)


def p_sample_reference(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    step: Tensor,
    end: Tensor,
    sample_id: Tensor,
    seed: Tensor,
    *,
    noise: Tensor | None = None,
    out_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    history: Tensor | None = None,
    history2: Tensor | None = None,
    bound: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    stochastic: bool = True,
) -> tuple[Tensor, ...]:
    """`p_sample` as a function, in plain PyTorch: nothing is changed in place, nothing depends on values.

    It can be compiled, traced with fake tensors and exported to ONNX, and is differentiable.

    Args:
        x: as in `p_sample`, and so are all other arguments; nothing is validated.
        out: the network's output.
        table: the rows.
        timesteps: each row's noise counter.
        step: each sample's row.
        end: each sample's last row.
        sample_id: each sample's id.
        seed: each sample's seed.
        noise: supplied normals.
        out_uncond: the unconditional output.
        guidance: the guidance scales.
        history: the previous rows' x̂₀.
        history2: the x̂₀ of the rows before those.
        bound: the dynamic thresholds.
        known: known pictures.
        mask: where they are not known.
        stochastic: whether σ·z is added.

    Returns:
        The new state and x̂₀, both float32 [B, C, H, W]. A finished sample keeps its state bit for bit. Where
        `history` is given, the second is what the history becomes: a finished sample keeps its own there too. Where
        `history2` is given, there is a third, which it becomes likewise.
    """
    batch, channels = x.shape[0], x.shape[1]
    row = torch.minimum(step.clamp(min=0), end)
    columns = [column.reshape(-1, 1, 1, 1) for column in table.index_select(0, row).unbind(1)]
    a_x, a_o, c_0, c_x, c_o, c_h, sigma, limit, log_beta, log_beta_tilde, c_h2, k_0, k_z = columns
    active = (row < end).reshape(-1, 1, 1, 1)

    eff = out[:, :channels].float()
    if out_uncond is not None and guidance is not None:
        base = out_uncond[:, :channels].float()
        eff = torch.addcmul(base, guidance.reshape(-1, 1, 1, 1), eff - base)
    x0 = torch.addcmul(a_x * x, a_o, eff)
    if bound is None:
        x0 = clip(x0, limit)
    else:
        limit = bound.reshape(-1, 1, 1, 1)
        x0 = clip(x0, limit) / limit

    new = torch.addcmul(torch.addcmul(c_0 * x0, c_x, x), c_o, eff)
    if history is not None:
        # Before a multistep solver's first row there is no history: c_h is 0 and the buffer may hold anything.
        new = torch.addcmul(new, c_h, torch.where(c_h == 0.0, 0.0, history))
        x0 = torch.where(active, x0, history)
    if history is not None and history2 is not None:
        new = torch.addcmul(new, c_h2, torch.where(c_h2 == 0.0, 0.0, history2))
        history2 = torch.where(active, history, history2)
    if stochastic:
        if noise is None:
            t = timesteps.index_select(0, row)
            z = normals(seed, sample_id, t, x[0].numel()).reshape(x.shape)
        elif noise.shape[0] == 1:
            z = noise[0]
        else:
            rows, lane = noise.shape[0], torch.arange(batch, dtype=torch.int64, device=x.device)
            z = noise.flatten(0, 1).index_select(0, (rows - end + row).clamp(0, rows - 1) * batch + lane)
        if out.shape[1] > channels:
            v = out[:, channels:].float()
            middle, slope = 0.25 * (log_beta + log_beta_tilde), 0.25 * (log_beta - log_beta_tilde)
            sigma = sigma * torch.exp(torch.addcmul(middle, slope, v))
        new = torch.addcmul(new, sigma, z)
        if known is not None and mask is not None:
            # So spelt, what is known stays as it is to the last bit where k_0 is 1 and k_z is 0.
            new = torch.addcmul((1.0 - mask) * torch.addcmul(k_0 * known, k_z, z), mask, new)
    # c_x = 1 alone would still turn -0 into +0.
    new = torch.where(active, new, x)
    return (new, x0) if history2 is None else (new, x0, history2)


def p_sample(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    step: Tensor,
    end: Tensor,
    sample_id: Tensor,
    seed: Tensor,
    *,
    noise: Tensor | None = None,
    out_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    history: Tensor | None = None,
    history2: Tensor | None = None,
    bound: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
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
        table: float32 [R, len(COLUMNS)]: the rows of one chapter or of several, all finite but for `bound`, σ ≥ 0.
        timesteps: int64 [R]: the noise's counter t of each row: its training timestep, and more than that where a run
            comes back to one (`philox.VISIT`).
        step: int64 [B], below 2³¹: each sample's row, clamped to [0, end].
        end: int64 [B], 0 ... R-1, which is not checked: the identity row of each sample's chapter. A sample that has
            reached it is finished: it is not written, whatever rows follow.
        sample_id: int64 [B]: each sample's id.
        seed: int64 [B]: each sample's seed, a 64-bit pattern.
        noise: float32 [N, B, C, H, W], contiguous: normals used instead of Philox's. Its rows count from the end: with
            r the sample's row, it is row N − (end − r), clamped to [0, N-1]. So N rows are one for each row of an
            N-step chapter, wherever that begins, and one row serves every step.
        out_uncond: like `out`: the unconditional output; the first C channels become
            out_uncond + guidance·(out − out_uncond) (Ho and Salimans 2022). v is taken from `out`.
        guidance: float32 [B]: the guidance scales, with `out_uncond`.
        history: float32 [B, C, H, W], contiguous: the previous row's x̂₀, read where c_h ≠ 0 and then overwritten
            with this row's. It may be uninitialised before a row whose c_h is 0.
        history2: float32 [B, C, H, W], contiguous, with `history`: the x̂₀ of the row before the previous one, read
            where c_h2 ≠ 0 and then overwritten with what `history` was. It may be uninitialised before a row whose
            c_h2 is 0.
        bound: float32 [B], ≥ 1: dynamic thresholds s, x̂₀ = clip(x̂₀, −s, s)/s (Saharia et al. 2022), instead of the
            table's bound.
        known: float32 [B, C, H, W], contiguous, finite: the pictures of which a part is known.
        mask: float32 [B, C, H, W], contiguous, in [0, 1], with `known`: 1 where an element is to be drawn, 0 where it
            is known; in between the two are mixed. It is as large as x, and not one plane for all channels, so that a
            thread finds an element's mask where it finds the element.
        stochastic: False leaves out σ·z altogether, for solvers whose σ is 0 in every row; the noise, which is
            most of the arithmetic, is then not made. With `known` it must be made.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes, devices or memory layouts do not fit, one of `out_uncond` and `guidance` or one of `known`
            and `mask` is missing, these two come without noise, or `history2` comes without `history`.
    """
    per_sample = {"step": step, "end": end, "sample_id": sample_id, "seed": seed}
    check_p_sample(
        x, out, table, timesteps, per_sample, noise, out_uncond, guidance, history, history2, bound, known, mask,
        stochastic, len(COLUMNS),
    )  # fmt: skip
    with torch.no_grad():
        if runs_triton(x.device.type):
            from .p_sample_triton import p_sample_op

            out, step, end = (tensor.contiguous() for tensor in (out, step, end))
            sample_id, seed = sample_id.contiguous(), seed.contiguous()
            if out_uncond is not None and guidance is not None:
                out_uncond, guidance = out_uncond.contiguous(), guidance.contiguous()
            if bound is not None:
                bound = bound.contiguous()
            p_sample_op(
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
                stochastic,
            )
            return
        changed = p_sample_reference(
            x,
            out,
            table,
            timesteps,
            step,
            end,
            sample_id,
            seed,
            noise=noise,
            out_uncond=out_uncond,
            guidance=guidance,
            history=history,
            history2=history2,
            bound=bound,
            known=known,
            mask=mask,
            stochastic=stochastic,
        )
        for mine, new in zip((x, history, history2), changed, strict=False):
            if mine is not None:
                mine.copy_(new)
