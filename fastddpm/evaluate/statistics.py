"""Mean and covariance of features: gathered batch by batch in float64, and the .npz files that hold them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.files import atomic_path
from fastddpm.pictures.arrays import read_npz

_ASYMMETRY = 1e-6
"""What a covariance may differ from its transpose, against its largest entry: float32 files differ by rounding."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A Gaussian that stands for a set of features.

    Args:
        mu: float64 [D], the mean.
        sigma: float64 [D, D], the covariance, with n − 1 in the denominator.
        n: how many features it was made of; None where a file does not say.
        digest: of the `Features` that they are of; None where a file does not say.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None = None
    digest: str | None = None

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.mu)


class RunningStatistics:
    """Mean and scatter in one pass, memory that of one batch and of the scatter.

    With n features so far, mean μ and scatter S = Σ (f − μ)(f − μ)ᵀ, a batch of m with mean μ_b and scatter S_b gives,
    with δ = μ_b − μ (Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm, 1979):

        μ ← μ + δ m / (n + m),    S ← S + S_b + δ δᵀ n m / (n + m).

    Unlike Σ f fᵀ − n μ μᵀ this does not cancel where the mean is large against the deviations.
    """

    def __init__(self, dimension: int) -> None:
        """Begin with nothing.

        Args:
            dimension: D of the features.
        """
        self.n = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in a batch.

        Args:
            features: float [m, D].
        """
        batch = features.to("cpu", torch.float64)
        m, total = len(batch), self.n + len(batch)
        if not m:
            return
        mean = batch.mean(0)
        delta, centred = mean - self._mean, batch - mean
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(delta, delta, alpha=self.n * m / total)
        self._mean += delta * (m / total)
        self.n = total

    def finish(self, digest: str | None = None) -> Statistics:
        """Mean and covariance of what was taken in.

        Args:
            digest: of the features, to be kept with them.

        Raises:
            ValueError: there were fewer than two features, which have no covariance.
        """
        if self.n < 2:
            raise ValueError(f"statistics: pictures must be at least 2, got {self.n}; one has no covariance")
        return Statistics(self._mean.clone(), self._scatter / (self.n - 1), self.n, digest)


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read mu and sigma from an .npz archive, as pytorch-fid, OpenAI and EDM write them.

    Args:
        path: the file; other arrays in it are passed over.

    Returns:
        The statistics.

    Raises:
        ValueError: mu or sigma is missing, or they are not the mean and the covariance of anything.
        OSError: the file cannot be read.
    """
    path = Path(path)
    arrays = read_npz(path, ("mu", "sigma", "n", "features"))
    found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"{path}: must hold mu [D] and sigma [D, D], got {found or 'neither'}; give other statistics")
    mu, sigma = arrays["mu"], arrays["sigma"]
    fits = mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and len(mu) > 0
    if not fits or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise ValueError(f"{path}: mu must be floats [D] and sigma floats [D, D], got {found}; give other statistics")
    mean, covariance = (torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (mu, sigma))
    if not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path}: mu and sigma must be finite, got NaN or infinity; make the statistics anew")
    if float((covariance - covariance.T).abs().max()) > _ASYMMETRY * float(covariance.abs().max()):
        raise ValueError(f"{path}: sigma must be symmetric, got a matrix that is not; make the statistics anew")
    n, digest = (arrays[name] if name in arrays and arrays[name].ndim == 0 else None for name in ("n", "features"))
    return Statistics(
        mean,
        (covariance + covariance.T) / 2,
        int(n) if n is not None and n.dtype.kind in "iu" else None,
        str(digest) if digest is not None and digest.dtype.kind == "U" else None,
    )


def write_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write mu and sigma, and what else is known, as an .npz archive that pytorch-fid reads too, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    known = {"n": statistics.n, "features": statistics.digest}
    more = {name: np.array(value) for name, value in known.items() if value is not None}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, mu=statistics.mu.numpy(), sigma=statistics.sigma.numpy(), **more)
