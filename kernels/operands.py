"""What `p_sample` is given, and its validation: one clear line for whoever passed the wrong tensor."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import OUT_DTYPES, check_contiguous, check_tensor


class Row(NamedTuple):
    """One row of a solver's table as numbers; `fastddpm.process.table` explains them."""

    a_x: float
    a_o: float
    c_0: float
    c_x: float
    c_o: float
    c_h: float
    sigma: float
    bound: float
    log_beta: float
    log_beta_tilde: float
    c_h2: float
    k_0: float
    k_z: float


COLUMNS = Row._fields
"""The columns of a solver's table, in their order in memory."""


class Operands(NamedTuple):
    """The tensors of one reverse step of a batch; see `fastddpm.kernels.p_sample` for the equations.

    Attributes:
        x: float32 [B, C, H, W], contiguous: the state.
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
        history: float32 [B, C, H, W], contiguous: the previous row's x̂₀, read where c_h ≠ 0. It may be uninitialised
            before a row whose c_h is 0.
        history2: float32 [B, C, H, W], contiguous, with `history`: the x̂₀ of the row before the previous one, read
            where c_h2 ≠ 0. It may be uninitialised before a row whose c_h2 is 0.
        known: float32 [B, C, H, W], contiguous, finite: the pictures of which a part is known.
        mask: float32 [B, C, H, W], contiguous, in [0, 1], with `known`: 1 where an element is to be drawn, 0 where it
            is known; in between the two are mixed. It is as large as x, and not one plane for all channels, so that a
            thread finds an element's mask where it finds the element.
        bound: float32 [B], ≥ 1: dynamic thresholds s, x̂₀ = clip(x̂₀, −s, s)/s (Saharia et al. 2022), instead of the
            table's bound.
    """

    x: Tensor
    out: Tensor
    table: Tensor
    timesteps: Tensor
    step: Tensor
    end: Tensor
    sample_id: Tensor
    seed: Tensor
    noise: Tensor | None = None
    out_uncond: Tensor | None = None
    guidance: Tensor | None = None
    history: Tensor | None = None
    history2: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    bound: Tensor | None = None


def check_operands(given: Operands, stochastic: bool) -> None:
    """Check what `p_sample` is given.

    Raises:
        TypeError: an operand is not a tensor or of another dtype.
        ValueError: shapes, devices or memory layouts do not fit, one of `out_uncond` and `guidance` or one of `known`
            and `mask` is missing, these two come without noise, or `history2` comes without `history`.
    """
    if not isinstance(given, Operands):
        raise TypeError(f"p_sample: it must be given Operands, got {type(given).__name__}; see kernels.Operands")
    f32, i64 = (torch.float32,), (torch.int64,)
    check_tensor("p_sample: x", given.x, dtypes=f32, shape=("B", "C", "H", "W"))
    shape = batch, channels, height, width = tuple(given.x.shape)
    check = functools.partial(check_tensor, device=given.x.device)
    fix = "pass the network's output for this x"
    check("p_sample: out", given.out, dtypes=OUT_DTYPES, shape=(batch, "C or 2C", height, width), fix=fix)
    if given.out.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"p_sample: out must be of {channels} channels (fixed variance) or {2 * channels} (learned), "
            f"got {given.out.shape[1]}; check the network's out_channels"
        )
    fix = "make it with fastddpm.make_table; kernels.COLUMNS names its columns"
    check("p_sample: table", given.table, dtypes=f32, shape=("R", len(COLUMNS)), fix=fix)
    rows, fix = (given.table.shape[0],), "pass one timestep for each row of the table"
    check("p_sample: timesteps", given.timesteps, dtypes=i64, shape=rows, fix=fix)
    for name in ("step", "end", "sample_id", "seed"):
        check(f"p_sample: {name}", getattr(given, name), dtypes=i64, shape=(batch,), fix="pass one per sample")
    if given.noise is not None:
        fix = "pass normals for N rows of the table"
        check("p_sample: noise", given.noise, dtypes=f32, shape=("N", *shape), fix=fix)
        if given.noise.shape[0] * batch >= 2**32:  # the kernel counts pictures in 32 bits
            raise ValueError(
                f"p_sample: noise must hold fewer than 2**32 pictures, got {given.noise.shape[0]} × {batch}; "
                "pass fewer rows"
            )
    _check_pair(given, "out_uncond", "guidance")
    if given.out_uncond is not None:
        fix = "pass both halves of one batch"
        as_out = tuple(given.out.shape)
        check("p_sample: out_uncond", given.out_uncond, dtypes=(given.out.dtype,), shape=as_out, fix=fix)
        check("p_sample: guidance", given.guidance, dtypes=f32, shape=(batch,), fix="pass one scale per sample")
    if given.history2 is not None and given.history is None:
        raise ValueError("p_sample: history must be given with history2, got None; pass both, or history alone")
    _check_pair(given, "known", "mask")
    if given.known is not None and not stochastic:
        raise ValueError(
            "p_sample: stochastic must be True with known, got False; known pixels are noised in every row"
        )
    for name in ("history", "history2", "known", "mask"):
        if (value := getattr(given, name)) is not None:
            check(f"p_sample: {name}", value, dtypes=f32, shape=shape, fix="expand it to one number per element")
    check_contiguous(
        "p_sample", x=given.x, table=given.table, timesteps=given.timesteps, noise=given.noise, history=given.history,
        history2=given.history2, known=given.known, mask=given.mask,
    )  # fmt: skip
    if given.bound is not None:
        check("p_sample: bound", given.bound, dtypes=f32, shape=(batch,), fix="pass one per sample")


def _check_pair(given: Operands, *names: str) -> None:
    missing = [name for name in names if getattr(given, name) is None]
    if len(missing) == 1:
        (other,) = set(names) - set(missing)
        raise ValueError(f"p_sample: {missing[0]} must be given with {other}, got None; pass both or neither")
