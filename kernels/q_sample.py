"""`q_sample`: the forward noising of a training batch, x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensor
from .dispatch import runs_triton
from .normals import normals

Q_SAMPLE_RTOL = 2.0**-21
"""Kernel against reference, relative to |√ᾱ·x₀| + |√(1−ᾱ)·ε|, the noise's `NORMALS_ATOL` aside."""


class Levels(NamedTuple):
    """What the signal and the noise of each timestep are multiplied with.

    Attributes:
        signal: float32 [T], √ᾱ.
        spread: float32 [T], √(1−ᾱ).
    """

    signal: Tensor
    spread: Tensor


class Draw(NamedTuple):
    """Noise that is made by Philox, of each sample's seed and id, with counter t + domain.

    Attributes:
        seed: int64 [B]: each sample's seed, a 64-bit pattern.
        sample_id: int64 [B]: each sample's id.
        domain: one of `fastddpm.kernels.philox`, so that one seed makes different noise for training, for likelihoods,
            and for sampling.
    """

    seed: Tensor
    sample_id: Tensor
    domain: int = 0


def q_sample_reference(x_start: Tensor, t: Tensor, levels: Levels, noise: Tensor | Draw) -> tuple[Tensor, Tensor]:
    """`q_sample` in plain PyTorch: it can be compiled, traced with fake tensors and exported to ONNX.

    Args:
        x_start: as in `q_sample`, and so are all other arguments; nothing is validated.
        t: each sample's timestep.
        levels: of each timestep.
        noise: ε, or what makes it.

    Returns:
        x_t and ε, both float32 [B, C, H, W].
    """
    if isinstance(noise, Draw):
        made = normals(noise.seed, noise.sample_id, t + noise.domain, x_start[0].numel())
        noise = made.reshape(x_start.shape)
    if x_start.dtype == torch.uint8:
        x_start = x_start.float() / 127.5 - 1.0
    signal, spread = (values.index_select(0, t).reshape(-1, 1, 1, 1) for values in levels)
    return torch.addcmul(signal * x_start, spread, noise), noise


def q_sample(x_start: Tensor, t: Tensor, levels: Levels, noise: Tensor | Draw) -> tuple[Tensor, Tensor]:
    """Noise a batch: x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4), in one pass.

    Differentiable in a float `x_start` and in a given ε.

    Args:
        x_start: float32 or uint8 [B, C, H, W]; bytes are mapped to [-1, 1] as x/127.5 − 1.
        t: int64 [B], 0 ... T-1. Outside, the CPU raises IndexError; a GPU cannot, and gives NaN.
        levels: of each timestep.
        noise: ε, float32 [B, C, H, W], or what makes it.

    Returns:
        x_t and ε, both float32 [B, C, H, W]; a given ε is returned as it is.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes or devices do not fit.
    """
    _check(x_start, t, levels, noise)
    if not runs_triton(x_start.device.type):
        return q_sample_reference(x_start, t, levels, noise)
    from .q_sample_triton import q_sample_op

    eps, seed, sample_id, domain = (None, *noise) if isinstance(noise, Draw) else (noise, None, None, 0)
    given = (x_start, t, *levels, eps, seed, sample_id)
    x_t, made = q_sample_op(*(None if tensor is None else tensor.contiguous() for tensor in given), domain)
    return x_t, made if eps is None else eps


def _check(x_start: Tensor, t: Tensor, levels: Levels, noise: Tensor | Draw) -> None:
    f32, i64 = (torch.float32,), (torch.int64,)
    dtypes = (torch.float32, torch.uint8)
    check_tensor("q_sample: x_start", x_start, dtypes=dtypes, shape=("B", "C", "H", "W"))
    check = functools.partial(check_tensor, device=x_start.device)
    batch = (x_start.shape[0],)
    check("q_sample: t", t, dtypes=i64, shape=batch, fix="pass one timestep per sample")
    signal, spread = levels
    check("q_sample: levels.signal", signal, dtypes=f32, shape=("T",))
    check("q_sample: levels.spread", spread, dtypes=f32, shape=tuple(signal.shape))
    if isinstance(noise, Draw):
        check("q_sample: noise.seed", noise.seed, dtypes=i64, shape=batch, fix="pass one per sample")
        check("q_sample: noise.sample_id", noise.sample_id, dtypes=i64, shape=batch, fix="pass one per sample")
    elif not isinstance(noise, Tensor):
        raise TypeError(f"q_sample: noise must be a tensor or a Draw, got {type(noise).__name__}; pass ε or a Draw")
    else:
        check("q_sample: noise", noise, dtypes=f32, shape=tuple(x_start.shape))
