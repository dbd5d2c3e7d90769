"""The kernel distance (KID): the unbiased squared maximum mean discrepancy, over random subsets."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

SUBSETS = 100
SUBSET_SIZE = 1000
_SEED = 2020


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """An estimate and its spread.

    Args:
        mean: over the subsets. Being unbiased it may be a little below 0.
        std: the standard deviation over the subsets, which is the error of the estimate from one subset.
        subset_size: features of either side in a subset.
    """

    mean: float
    std: float
    subset_size: int


def kernel_distance(generated: Tensor, reference: Tensor) -> KernelDistance:
    """KID (Bińkowski et al. 2018): MMD² with k(x, y) = (xᵀy / D + 1)³, from 100 pairs of subsets of 1,000.

        MMD² = Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] / (m (m − 1)) − 2 Σ_{ij} k(x_i, y_j) / m²

    The subsets are those that torch-fidelity draws by default, from NumPy's legacy generator with seed 2020, so that
    the same features give the same number. Where a side has no more than 1,000 features a subset has half as many as
    the smaller side: subsets that are all the same would have no spread.

    Args:
        generated: float [n, D].
        reference: float [m, D].

    Returns:
        Mean and spread, computed in float64.

    Raises:
        ValueError: a side has fewer than 4 features.
    """
    smaller = min(len(generated), len(reference))
    if smaller < 4:
        raise ValueError(f"kernel_distance: pictures must be at least 4 on either side, got {smaller}; leave out kid")
    size = SUBSET_SIZE if smaller > SUBSET_SIZE else smaller // 2
    random = np.random.RandomState(_SEED)  # noqa: NPY002 - its draws are those of the libraries, and never change
    estimates = [_mmd2(_subset(random, generated, size), _subset(random, reference, size)) for _ in range(SUBSETS)]
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)), size)


def _subset(random: np.random.RandomState, features: Tensor, size: int) -> Tensor:
    return features[torch.from_numpy(random.choice(len(features), size, replace=False))].double()


def _mmd2(x: Tensor, y: Tensor) -> float:
    m = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
