"""Precision, recall, density and coverage: which features lie among the nearest neighbours of the other side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS, COLUMNS = 1024, 8192
"""Distances that are in memory at a time: a block of float64 takes 67 MB."""


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """How two sets of features cover each other.

    Args:
        precision: the part of the generated that lie in a ball around a reference (Kynkäänniemi et al. 2019).
        recall: the part of the reference that lie in a ball around a generated one (likewise).
        density: in how many of the references' balls a generated one lies, divided by k, on average; may exceed 1
            (Naeem et al. 2020).
        coverage: the part of the references' balls that hold a generated one (likewise).
        k: a ball reaches to the k-th nearest neighbour on its own side.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def prdc(generated: Tensor, reference: Tensor, *, k: int = 5, device: torch.device | str = "cpu") -> Neighbourhood:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Around each feature f of a set F lies a ball of radius |f − NN_k(f)|, its distance to the k-th nearest other one of
    F. What lies on a ball's surface is inside it.

    Distances are Euclidean, computed in float64 from products of blocks, so that memory does not grow with n m.

    Args:
        generated: float [n, D].
        reference: float [m, D].
        k: at least 1; the papers take 3 for precision and recall, and 5 for density and coverage.
        device: where the distances are computed.

    Returns:
        The four numbers.

    Raises:
        ValueError: k is below 1, or a side has no k-th neighbour.
    """
    fewest = min(len(generated), len(reference))
    if not 1 <= k < fewest:
        raise ValueError(f"prdc: k must be in 1 … {max(1, fewest - 1)}, got {k}; give more pictures or leave out prdc")
    centre = reference.mean(0, dtype=torch.float64).to(device)
    fake_radii, real_radii = (_radii(side, k, centre) for side in (generated, reference))
    precise = torch.zeros(len(generated), dtype=torch.bool, device=device)
    recalled, covered = (torch.zeros(len(reference), dtype=torch.bool, device=device) for _ in range(2))
    inside = 0
    for rows, columns, distances in _distances(generated, reference, centre):
        in_real = distances <= real_radii[columns]
        precise[rows] |= in_real.any(1)
        covered[columns] |= in_real.any(0)
        recalled[columns] |= (distances <= fake_radii[rows, None]).any(0)
        inside += int(in_real.sum())
    return Neighbourhood(
        float(precise.double().mean()),
        float(recalled.double().mean()),
        inside / (k * len(generated)),
        float(covered.double().mean()),
        k,
    )


def _radii(features: Tensor, k: int, centre: Tensor) -> Tensor:
    """float64 [n]: the squared distance of each to its k-th nearest other one."""
    nearest = torch.full((len(features), k + 1), torch.inf, dtype=torch.float64, device=centre.device)
    for rows, _, distances in _distances(features, features, centre):
        candidates = torch.cat((nearest[rows], distances), 1)
        nearest[rows] = candidates.topk(k + 1, largest=False).values
    return nearest.amax(1)  # the nearest of all is itself


def _distances(first: Tensor, second: Tensor, centre: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of squared distances |a|² + |b|² − 2 aᵀb, float64 [rows, columns], with where they belong.

    The origin is moved to `centre`, which changes no distance and lets the products cancel less.
    """
    for top in range(0, len(first), ROWS):
        rows = slice(top, min(top + ROWS, len(first)))
        a = first[rows].to(centre) - centre
        for left in range(0, len(second), COLUMNS):
            columns = slice(left, min(left + COLUMNS, len(second)))
            b = second[columns].to(centre) - centre
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            yield rows, columns, (squares - 2 * (a @ b.T)).clamp(min=0)
