"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.evaluate.statistics import Statistics


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """The squared Fréchet distance between two Gaussians (Dowson, Landau 1982; Heusel et al. 2017, eq. 6).

        d² = |μ_1 − μ_2|² + tr Σ_1 + tr Σ_2 − 2 tr (Σ_1 Σ_2)^½

    The last trace is the sum of the singular values of R_1ᵀ R_2, where Σ = R Rᵀ and R = V √λ by the eigenvalues of Σ:
    the eigenvalues of Σ_1 Σ_2 are their squares. No root of a rounding error is taken on the way, so it is exact to
    rounding for singular covariances too, where a root of the product itself is not.

    Args:
        first: one of them.
        second: the other, of features of the same dimension.

    Returns:
        d², at least 0.

    Raises:
        ValueError: the dimensions differ.
    """
    if first.dimension != second.dimension:
        raise ValueError(
            f"frechet_distance: statistics must have one dimension, got {first.dimension} and {second.dimension}; "
            "they are of different features"
        )
    shift = (first.mu - second.mu).square().sum()
    overlap = torch.linalg.svdvals(_root(first.sigma).T @ _root(second.sigma)).sum()
    distance = shift + first.sigma.trace() + second.sigma.trace() - 2 * overlap
    return max(0.0, float(distance))  # equal Gaussians may be a rounding below


def _root(sigma: Tensor) -> Tensor:
    """R with R Rᵀ = Σ; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(sigma)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
