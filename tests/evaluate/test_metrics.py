"""The numbers themselves, against scipy, formulas written out, closed forms, and the libraries' own where installed."""

import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from fastddpm.evaluate import (
    RunningStatistics,
    Statistics,
    frechet_distance,
    kernel_distance,
    neighbours,
    prdc,
    read_statistics,
    write_statistics,
)

RTOL = 1e-4  # what is promised of every number
EXACT = 1e-9  # float64 on both sides


def features(n, dimension=12, shift=0.0, seed=0, mean=3.0):
    """Correlated features, float32."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, dimension, generator=random) @ mixing + mean + shift


def statistics(values, batch=17):
    running = RunningStatistics(values.shape[1])
    for part in values.split(batch):
        running.add(part)
    return running.finish()


# ---------------------------------------------------------------------- mean and covariance


@pytest.mark.parametrize("batch", [1, 7, 100, 1000])
def test_statistics_are_numpy_s(batch):
    values = features(100)
    found = statistics(values, batch)
    np.testing.assert_allclose(found.mu, values.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(values.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-13)
    assert found.n == 100


def test_a_large_mean_costs_no_digits():
    values = features(500, mean=0.0).double()
    expected = np.cov(values.numpy(), rowvar=False)
    found = statistics(values + 1e6, 50).sigma.numpy()
    assert np.abs(found - expected).max() < 1e-8 * expected.max()
    moved = (values + 1e6).numpy()
    naive = (moved.T @ moved - 500 * np.outer(moved.mean(0), moved.mean(0))) / 499
    assert np.abs(naive - expected).max() > 1e-5 * expected.max()  # which is what the update avoids


def test_one_picture_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        statistics(features(1))


# ---------------------------------------------------------------------- Fréchet distance


def sqrtm_distance(first, second):
    """The formula as it is written, by scipy's root of the product."""
    mu1, mu2, s1, s2 = (x.double().numpy() for x in (first.mu, second.mu, first.sigma, second.sigma))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real))


@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["same mean", "shifted"])
def test_frechet_distance_is_scipy_s(shift):
    first, second = statistics(features(300)), statistics(1.3 * features(200, shift=shift, seed=1))
    assert frechet_distance(first, second) == pytest.approx(sqrtm_distance(first, second), rel=EXACT)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=EXACT)


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    a, b = torch.rand(9, dtype=torch.float64) * 4, torch.rand(9, dtype=torch.float64)
    mu = torch.randn(9, dtype=torch.float64)
    found = frechet_distance(Statistics(mu, a.square().diag()), Statistics(0 * mu, b.square().diag()))
    assert found == pytest.approx(float((mu.square() + (a - b).square()).sum()), rel=EXACT)


def test_frechet_distance_of_singular_covariances_is_exact():
    """Rank one each: the trace of the root is |u · v|, where a root of the product is off by the root of rounding."""
    u, v = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(200, dtype=torch.float64)
    found = frechet_distance(Statistics(zero, torch.outer(u, u)), Statistics(zero, torch.outer(v, v)))
    assert found == pytest.approx(float(u @ u + v @ v - 2 * (u @ v).abs()), rel=1e-8)


def test_frechet_distance_to_itself_is_nothing():
    same = statistics(features(40, dimension=64))  # fewer pictures than dimensions
    assert 0 <= frechet_distance(same, same) < 1e-9 * float(same.sigma.trace())


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="one dimension, got 12 and 5"):
        frechet_distance(statistics(features(50)), statistics(features(50, dimension=5)))


# ---------------------------------------------------------------------- KID


def written_out_mmd2(x, y):
    """The unbiased estimate, pair by pair."""
    m, D = x.shape

    def k(a, b):
        return (float(np.dot(a, b)) / D + 1) ** 3

    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in x for b in y) / m**2


def test_kid_is_the_formula_over_its_subsets(monkeypatch):
    monkeypatch.setattr("fastddpm.evaluate.kernel.SUBSETS", 4)
    generated, reference = features(30, shift=0.2), features(24, seed=1)
    found = kernel_distance(generated, reference)
    assert found.subset_size == 12  # half of the smaller side
    random = np.random.RandomState(2020)
    values = []
    for _ in range(4):
        rows = [random.choice(n, 12, replace=False) for n in (30, 24)]
        values.append(written_out_mmd2(generated.double().numpy()[rows[0]], reference.double().numpy()[rows[1]]))
    assert (found.mean, found.std) == pytest.approx((np.mean(values), np.std(values)), rel=EXACT)


def test_kid_is_unbiased(monkeypatch):
    """Of two sets of one distribution its mean is nothing within its error, and may be below."""
    monkeypatch.setattr("fastddpm.evaluate.kernel.SUBSETS", 4)
    found = [kernel_distance(features(60, seed=2 * i), features(60, seed=2 * i + 1)).mean for i in range(40)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(40)


def test_kid_needs_pictures():
    with pytest.raises(ValueError, match="at least 4 on either side, got 3"):
        kernel_distance(features(3), features(9))


# ---------------------------------------------------------------------- precision, recall, density, coverage


def written_out_prdc(generated, reference, k):
    """The papers' definitions on whole tables of distances."""
    real, fake = reference.double().numpy(), generated.double().numpy()
    real_radius, fake_radius = (np.sort(cdist(s, s), 1)[:, k] for s in (real, fake))
    between = cdist(fake, real)
    return (
        (between <= real_radius).any(1).mean(),
        (between <= fake_radius[:, None]).any(0).mean(),
        (between <= real_radius).sum() / (k * len(fake)),
        (between <= real_radius).any(0).mean(),
    )


def numbers(found):
    return found.precision, found.recall, found.density, found.coverage


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("sizes", [(80, 130), (131, 61)], ids=str)
def test_prdc_is_the_papers(k, sizes, monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 16)
    monkeypatch.setattr(neighbours, "COLUMNS", 27)
    generated, reference = features(sizes[0], dimension=4, shift=1.5), features(sizes[1], dimension=4, seed=1)
    found = numbers(prdc(generated, reference, k=k))
    assert found == pytest.approx(written_out_prdc(generated, reference, k), rel=EXACT)
    assert all(0 < number < 1.5 for number in found)


def test_prdc_of_extremes():
    same = features(50)
    assert numbers(prdc(same, same))[:2] == (1.0, 1.0) and prdc(same, same).coverage == 1.0
    assert numbers(prdc(same + 1000, same)) == (0.0, 0.0, 0.0, 0.0)
    one = same[:1] + 0.01 * features(50, seed=3, mean=0.0)  # a mode that collapsed: precise, and covers little
    collapsed = prdc(one, same)
    assert collapsed.precision > 0.9 and collapsed.recall < 0.1 and collapsed.coverage < 0.5


def test_prdc_does_not_lose_digits_to_a_large_mean():
    generated, reference = features(80, dimension=4, shift=1.5).double(), features(90, dimension=4, seed=1).double()
    assert numbers(prdc(generated + 2.0**20, reference + 2.0**20)) == numbers(prdc(generated, reference))


@pytest.mark.parametrize("k", [0, 5])
def test_prdc_without_neighbours_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in 1 … 4, got {k}"):
        prdc(features(5), features(9), k=k)


# ---------------------------------------------------------------------- files


def test_statistics_are_read_back_and_are_pytorch_fid_s(tmp_path):
    found = statistics(features(40))
    write_statistics(tmp_path / "s.npz", found)
    again = read_statistics(tmp_path / "s.npz")
    assert torch.equal(again.mu, found.mu) and again.n == 40 and again.digest is None
    assert frechet_distance(again, found) < 1e-9
    with np.load(tmp_path / "s.npz") as archive:  # as pytorch-fid reads it
        assert archive["mu"].shape == (12,) and archive["sigma"].shape == (12, 12)


WRONG = {
    "no sigma": ({"mu": np.zeros(3)}, r"must hold mu \[D\] and sigma"),
    "shapes": ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma floats \[D, D\], got .*float64\[4, 4\]"),
    "integers": ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "mu must be floats"),
    "NaN": ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "must be finite"),
    "asymmetric": ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "must be symmetric"),
    "objects": ({"mu": np.array([None]), "sigma": np.eye(1)}, "must hold plain numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_statistics_are_refused(tmp_path, name):
    arrays, message = WRONG[name]
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / "s.npz")


# ---------------------------------------------------------------------- the libraries' own


@pytest.fixture
def torch_fidelity(monkeypatch):
    """torch-fidelity's functions of features; torchvision, which they import and do not use, may be absent."""
    pytest.importorskip("tqdm")
    if not any((Path(path) / "torch_fidelity").is_dir() for path in sys.path):
        pytest.skip("needs torch-fidelity")
    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models"):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", mock.MagicMock())
    before = set(sys.modules)
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    yield types.SimpleNamespace(fid=metric_fid, kid=metric_kid, prc=metric_prc)
    for name in set(sys.modules) - before:
        if name.startswith("torch_fidelity"):
            del sys.modules[name]


def test_numbers_are_torch_fidelity_s(torch_fidelity):
    generated, reference = features(90, shift=0.3), features(80, seed=1)
    theirs = torch_fidelity.fid.fid_statistics_to_metric(
        *map(torch_fidelity.fid.fid_features_to_statistics, (generated, reference)), False
    )
    ours = frechet_distance(statistics(generated), statistics(reference))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=RTOL)
    theirs = torch_fidelity.kid.kid_features_to_metric(
        generated.double(), reference.double(), kid_subset_size=40, verbose=False
    )
    kid = kernel_distance(generated, reference)
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=EXACT)
    assert kid.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=EXACT)
    theirs = torch_fidelity.prc.prc_features_to_metric(generated, reference, verbose=False)
    found = prdc(generated, reference, k=3)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=RTOL)
