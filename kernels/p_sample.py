"""`p_sample`: one reverse step of any solver, with its noise, in one pass over the state.

A solver is a table of coefficients (see `operands.COLUMNS`), and each sample of a batch stands at its own row of it.
Several runs may stand in one table, one after the other: each is a chapter, which ends with its identity row, where its
samples stay. With a row's entries, the network's output `out`, the previous row's estimate h and that of the row before
it, h₂:

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

from .dispatch import runs_triton
from .normals import normals
from .operands import Operands, check_operands

P_SAMPLE_RTOL = 2.0**-20
"""Kernel against reference, relative to the sum of the magnitudes of all terms, the noise's `NORMALS_ATOL` aside."""


def clip(x: Tensor, limit: Tensor) -> Tensor:
    """Cut x off at −limit and limit."""
    # As `clamp`, NaN included; but `clamp` with bounds that broadcast is three times slower on a CPU.
    return torch.minimum(torch.maximum(x, -limit), limit)


def p_sample_reference(given: Operands, *, stochastic: bool = True) -> tuple[Tensor, ...]:
    """`p_sample` as a function, in plain PyTorch: nothing is changed in place, nothing depends on values.

    It can be compiled, traced with fake tensors and exported to ONNX, and is differentiable.

    Args:
        given: the operands; nothing is validated.
        stochastic: whether σ·z is added.

    Returns:
        The new state and x̂₀, both float32 [B, C, H, W]. A finished sample keeps its state bit for bit. Where
        `history` is given, the second is what the history becomes: a finished sample keeps its own there too. Where
        `history2` is given, there is a third, which it becomes likewise.
    """
    (
        x, out, table, timesteps, step, end, sample_id, seed,
        noise, out_uncond, guidance, history, history2, known, mask, bound,
    ) = given  # fmt: skip
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


def p_sample(given: Operands, *, stochastic: bool = True) -> None:
    """Move every sample of a batch one row on, in place, with the equations above.

    Everything that changes between steps is read from device memory, so a captured CUDA graph replays it rightly.
    Nothing is differentiated; `p_sample_reference` is the form for that. `step` is not advanced here.

    Args:
        given: the operands, of which `x` is updated in place; `history` is overwritten with this row's x̂₀, and
            `history2` with what `history` was.
        stochastic: False leaves out σ·z altogether, for solvers whose σ is 0 in every row; the noise, which is
            most of the arithmetic, is then not made. With `known` it must be made.

    Raises:
        TypeError: an operand is not a tensor or of another dtype.
        ValueError: shapes, devices or memory layouts do not fit, one of `out_uncond` and `guidance` or one of `known`
            and `mask` is missing, these two come without noise, or `history2` comes without `history`.
    """
    check_operands(given, stochastic)
    with torch.no_grad():
        if runs_triton(given.x.device.type):
            from .p_sample_triton import p_sample_op

            p_sample_op(*(None if tensor is None else tensor.contiguous() for tensor in given), stochastic)
            return
        changed = p_sample_reference(given, stochastic=stochastic)
        for mine, new in zip((given.x, given.history, given.history2), changed, strict=False):
            if mine is not None:
                mine.copy_(new)
