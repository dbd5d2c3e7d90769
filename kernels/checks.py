"""Validation shared by the ops: one clear line for whoever passed the wrong tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = (
    "a_x",
    "a_o",
    "c_0",
    "c_x",
    "c_o",
    "c_h",
    "sigma",
    "bound",
    "log_beta",
    "log_beta_tilde",
    "c_h2",
    "k_0",
    "k_z",
)
"""The columns of a solver's table, in their order in memory."""

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the network's output may be; the state is always float32."""


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes as a person writes them: `float32 | bfloat16`."""
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    function: str,
    argument: str,
    value: object,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None = None,
    contiguous: bool = False,
    fix: str = "",
) -> Tensor:
    """Check one tensor argument and return it.

    Args:
        function: the op's name, for the error line.
        argument: the argument's name, for the error line.
        value: what the caller passed.
        dtypes: the dtypes accepted.
        shape: expected sizes; a string stands for any size of at least 1.
        device: the device expected, if it matters.
        contiguous: whether the memory must be dense and in order.
        fix: how to mend a wrong shape.

    Returns:
        `value`, now known to be a tensor.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape, on another device, or not contiguous.
    """
    name = f"{function}: {argument}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; pass a torch.Tensor")
    if value.dtype not in dtypes:
        wanted = names_of(dtypes)
        raise TypeError(f"{name} must be {wanted}, got {names_of([value.dtype])}; convert it with .to()")
    if len(value.shape) != len(shape) or any(
        have < 1 if isinstance(want, str) else have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        wanted = f"[{', '.join(str(size) for size in shape)}]"
        raise ValueError(f"{name} must be of shape {wanted}, got {list(value.shape)}; {fix or 'reshape it'}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}; move it with .to({str(device)!r})")
    if contiguous and not value.is_contiguous():
        strides = tuple(value.stride())
        raise ValueError(f"{name} must be contiguous, got strides {strides}; call .contiguous() once, outside the loop")
    return value


def check_p_sample(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    per_sample: dict[str, Tensor],
    noise: Tensor | None,
    out_uncond: Tensor | None,
    guidance: Tensor | None,
    history: Tensor | None,
    history2: Tensor | None,
    bound: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    stochastic: bool,
    columns: int,
) -> None:
    """Check the arguments of `p_sample`; `per_sample` holds step, end, sample_id and seed, `columns` the table's width.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes, devices or memory layouts do not fit, one of `out_uncond` and `guidance` or one of `known`
            and `mask` is missing, these two come without noise, or `history2` comes without `history`.
    """
    f32 = (torch.float32,)
    check_tensor("p_sample", "x", x, dtypes=f32, shape=("B", "C", "H", "W"), contiguous=True)
    batch, channels, height, width = x.shape
    on = x.device
    check_tensor(
        "p_sample",
        "out",
        out,
        dtypes=OUT_DTYPES,
        shape=(batch, "C or 2C", height, width),
        device=on,
        fix="pass the network's output for this x",
    )
    if out.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"p_sample: out must be of {channels} channels (fixed variance) or {2 * channels} (learned), "
            f"got {out.shape[1]}; check the network's out_channels"
        )
    check_tensor(
        "p_sample",
        "table",
        table,
        dtypes=f32,
        shape=("R", columns),
        device=on,
        contiguous=True,
        fix="make it with fastddpm.make_table; kernels.COLUMNS names its columns",
    )
    check_tensor(
        "p_sample",
        "timesteps",
        timesteps,
        dtypes=(torch.int64,),
        shape=(table.shape[0],),
        device=on,
        contiguous=True,
        fix="pass one timestep for each row of the table",
    )
    for name, value in per_sample.items():
        fix = "pass one per sample"
        check_tensor("p_sample", name, value, dtypes=(torch.int64,), shape=(batch,), device=on, fix=fix)
    if noise is not None:
        shape = ("N", batch, channels, height, width)
        check_tensor(
            "p_sample",
            "noise",
            noise,
            dtypes=f32,
            shape=shape,
            device=on,
            contiguous=True,
            fix="pass normals for N rows of the table",
        )
        if noise.shape[0] * batch >= 2**32:  # the kernel counts pictures in 32 bits
            raise ValueError(
                f"p_sample: noise must hold fewer than 2**32 pictures, got {noise.shape[0]} × {batch}; pass fewer rows"
            )
    if (out_uncond is None) != (guidance is None):
        missing, given = ("guidance", "out_uncond") if guidance is None else ("out_uncond", "guidance")
        raise ValueError(f"p_sample: {missing} must be given with {given}, got None; pass both or neither")
    if out_uncond is not None:
        check_tensor(
            "p_sample",
            "out_uncond",
            out_uncond,
            dtypes=(out.dtype,),
            shape=tuple(out.shape),
            device=on,
            fix="pass both halves of one batch",
        )
        fix = "pass one scale per sample"
        check_tensor("p_sample", "guidance", guidance, dtypes=f32, shape=(batch,), device=on, fix=fix)
    if history2 is not None and history is None:
        raise ValueError("p_sample: history must be given with history2, got None; pass both, or history alone")
    for name, past in (("history", history), ("history2", history2)):
        if past is not None:
            check_tensor("p_sample", name, past, dtypes=f32, shape=tuple(x.shape), device=on, contiguous=True)
    if bound is not None:
        fix = "pass one per sample"
        check_tensor("p_sample", "bound", bound, dtypes=f32, shape=(batch,), device=on, fix=fix)
    _check_known(x, known, mask, stochastic)


def _check_known(x: Tensor, known: Tensor | None, mask: Tensor | None, stochastic: bool) -> None:
    """Check what `p_sample` is told of known pixels."""
    if (known is None) != (mask is None):
        missing, given = ("mask", "known") if mask is None else ("known", "mask")
        raise ValueError(f"p_sample: {missing} must be given with {given}, got None; pass both or neither")
    for name, value in (("known", known), ("mask", mask)):
        if value is not None:
            shape, fix = tuple(x.shape), "expand it to one number per element"
            check_tensor(
                "p_sample", name, value, dtypes=(x.dtype,), shape=shape, device=x.device, contiguous=True, fix=fix
            )
    if known is not None and not stochastic:
        raise ValueError(
            "p_sample: stochastic must be True with known, got False; known pixels are noised in every row"
        )


def check_q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    eps: Tensor | None,
    seed: Tensor | None,
    sample_id: Tensor | None,
) -> None:
    """Check the arguments of `q_sample`.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes or devices do not fit, or neither `eps` nor both `seed` and `sample_id` are given.
    """
    f32, i64 = (torch.float32,), (torch.int64,)
    dtypes = (torch.float32, torch.uint8)
    check_tensor("q_sample", "x_start", x_start, dtypes=dtypes, shape=("B", "C", "H", "W"))
    batch, on = x_start.shape[0], x_start.device
    check_tensor("q_sample", "t", t, dtypes=i64, shape=(batch,), device=on, fix="pass one timestep per sample")
    check_tensor("q_sample", "sqrt_alphas_cumprod", sqrt_alphas_cumprod, dtypes=f32, shape=("T",), device=on)
    name, shape = "sqrt_one_minus_alphas_cumprod", (sqrt_alphas_cumprod.shape[0],)
    check_tensor("q_sample", name, sqrt_one_minus_alphas_cumprod, dtypes=f32, shape=shape, device=on)
    if eps is not None:
        if seed is not None or sample_id is not None:
            raise ValueError("q_sample: seed and sample_id must be None with eps, got both; pass eps or them")
        check_tensor("q_sample", "eps", eps, dtypes=f32, shape=tuple(x_start.shape), device=on)
        return
    if seed is None or sample_id is None:
        raise ValueError("q_sample: seed and sample_id must be given without eps, got None; pass both, or eps")
    for name, value in (("seed", seed), ("sample_id", sample_id)):
        check_tensor("q_sample", name, value, dtypes=i64, shape=(batch,), device=on, fix="pass one per sample")
