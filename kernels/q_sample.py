"""`q_sample`: the forward noising of a training batch, x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4)."""

import torch
from torch import Tensor

from .checks import check_q_sample
from .dispatch import runs_triton
from .philox import normals_reference

Q_SAMPLE_RTOL = 2.0**-21
"""Kernel against reference, relative to |√ᾱ·x₀| + |√(1−ᾱ)·ε|, the noise's `NORMALS_ATOL` aside."""


def q_sample_reference(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    eps: Tensor | None = None,
    seed: Tensor | None = None,
    sample_id: Tensor | None = None,
    domain: int = 0,
) -> tuple[Tensor, Tensor]:
    """`q_sample` in plain PyTorch: it can be compiled, traced with fake tensors and exported to ONNX.

    Args:
        x_start: as in `q_sample`, and so are all other arguments.
        t: each sample's timestep.
        sqrt_alphas_cumprod: √ᾱ.
        sqrt_one_minus_alphas_cumprod: √(1−ᾱ).
        eps: supplied normals.
        seed: each sample's seed.
        sample_id: each sample's id.
        domain: of the noise.

    Returns:
        x_t and ε, both float32 [B, C, H, W].

    Raises:
        ValueError: neither `eps` nor both `seed` and `sample_id` are given.
    """
    if eps is None:
        if seed is None or sample_id is None:
            raise ValueError("q_sample: seed and sample_id must be given without eps, got None; pass both, or eps")
        eps = normals_reference(seed, sample_id, t + domain, x_start[0].numel()).reshape(x_start.shape)
    if x_start.dtype == torch.uint8:
        x_start = x_start.float() / 127.5 - 1.0
    signal = sqrt_alphas_cumprod.index_select(0, t).reshape(-1, 1, 1, 1)
    spread = sqrt_one_minus_alphas_cumprod.index_select(0, t).reshape(-1, 1, 1, 1)
    return torch.addcmul(signal * x_start, spread, eps), eps


def q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    eps: Tensor | None = None,
    seed: Tensor | None = None,
    sample_id: Tensor | None = None,
    domain: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noise a batch: x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4), in one pass.

    Differentiable in a float `x_start` and in a given `eps`.

    Args:
        x_start: float32 or uint8 [B, C, H, W]; bytes are mapped to [-1, 1] as x/127.5 − 1.
        t: int64 [B], 0 ... T-1. Outside, the CPU raises IndexError; a GPU cannot, and gives NaN.
        sqrt_alphas_cumprod: float32 [T], √ᾱ.
        sqrt_one_minus_alphas_cumprod: float32 [T], √(1−ᾱ).
        eps: float32 [B, C, H, W]: the noise; without it, it is made from Philox with counter t + domain.
        seed: int64 [B]: each sample's seed, a 64-bit pattern.
        sample_id: int64 [B]: each sample's id.
        domain: what is added to t to make the counter: a domain of `fastddpm.kernels.philox`, so that one seed makes
            different noise for training, for likelihoods, and for sampling.

    Returns:
        x_t and ε, both float32 [B, C, H, W]; a given `eps` is returned as it is.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes or devices do not fit, or neither `eps` nor both `seed` and `sample_id` are given.
    """
    check_q_sample(x_start, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, eps, seed, sample_id)
    if not runs_triton(x_start.device.type):
        return q_sample_reference(
            x_start,
            t,
            sqrt_alphas_cumprod,
            sqrt_one_minus_alphas_cumprod,
            eps=eps,
            seed=seed,
            sample_id=sample_id,
            domain=domain,
        )
    from .q_sample_triton import q_sample_op

    tables = sqrt_alphas_cumprod.contiguous(), sqrt_one_minus_alphas_cumprod.contiguous()
    given = (None if tensor is None else tensor.contiguous() for tensor in (eps, seed, sample_id))
    x_t, made = q_sample_op(x_start.contiguous(), t.contiguous(), *tables, *given, domain)
    return x_t, made if eps is None else eps
