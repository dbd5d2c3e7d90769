"""`q_sample`: the forward noising of a training batch, x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4)."""

import torch
from torch import Tensor

from ._checks import check_tensor
from .philox import normals_reference


def q_sample_reference(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    eps: Tensor | None = None,
    seed: Tensor | None = None,
    sample_id: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`q_sample` in plain PyTorch, with the same arguments; nothing is validated.

    Args:
        x_start: as in `q_sample`, and so are all other arguments.
        t: each sample's timestep.
        sqrt_alphas_cumprod: √ᾱ.
        sqrt_one_minus_alphas_cumprod: √(1−ᾱ).
        eps: supplied normals.
        seed: each sample's seed.
        sample_id: each sample's id.

    Returns:
        x_t and ε, both float32 [B, C, H, W].
    """
    if x_start.dtype == torch.uint8:
        x_start = x_start.float() / 127.5 - 1.0
    if eps is None:
        if seed is None or sample_id is None:
            raise ValueError("q_sample: seed and sample_id must be given, got None; pass both, or eps")
        eps = normals_reference(seed, sample_id, t, x_start[0].numel()).reshape(x_start.shape)
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
) -> tuple[Tensor, Tensor]:
    """x."""
    return q_sample_reference(
        x_start, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, eps=eps, seed=seed, sample_id=sample_id
    )
