"""Noise as a function of (seed, sample_id, t), and the 64-bit numbers that it takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastddpm.kernels.philox import normals_reference
from fastddpm.process.noise import id_bits, initial_noise, normals, seed_bits
from tests.networks import ODD_SHAPES


def test_known_answers():
    seed, ids, t = torch.tensor([0]), torch.tensor([0]), torch.tensor([0])
    got = normals(seed, ids, t, (1, 1, 4)).flatten().tolist()
    assert got == pytest.approx([0.9911378, -0.9246624, -0.6176090, -0.4820686], abs=1e-5)
    got = normals(torch.tensor([1234]), torch.tensor([7]), torch.tensor([999]), (3, 16, 16)).flatten()[4 * 191 :]
    assert got.tolist() == pytest.approx([1.7252094, -1.0790737, 0.5001802, 0.9963807], abs=1e-5)
    seed, ids = torch.tensor([seed_bits(2**63 + 5)]), id_bits([2**33 + 1])
    got = initial_noise(seed, ids, (1, 4, 4)).flatten()[12:]
    assert got.tolist() == pytest.approx([-0.2577507, -1.6026481, 0.5836877, -0.2027823], abs=1e-5)


def test_noise_is_standard_normal_and_independent_across_ids_and_timesteps():
    ids = torch.arange(64)
    z = normals(torch.zeros(64, dtype=torch.int64), ids, torch.full((64,), 5), (3, 32, 32)).flatten()
    # Kolmogorov-Smirnov: under the hypothesis p < 1e-6 happens once in a million seeds, and the seed is fixed.
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6
    other = normals(torch.zeros(64, dtype=torch.int64), ids, torch.full((64,), 6), (3, 32, 32)).flatten()
    assert abs(float(torch.corrcoef(torch.stack([z, other]))[0, 1])) < 5 / len(z) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([z[:-3072], z[3072:]]))[0, 1])) < 5 / len(z) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (3, 4, 4)], ids=str)
def test_noise_is_contiguous(shape, n):
    """Four normals are made at a time, so the last of a sample whose size is not a multiple of four are left out."""
    ids = torch.arange(n)
    made = initial_noise(ids, ids, shape), normals(ids, ids, ids, shape)
    assert all(z.is_contiguous() and z.shape == (n, *shape) for z in made)
    numel = made[0][0].numel()
    flat = normals_reference(ids, ids, ids, numel)
    assert flat.is_contiguous() and torch.equal(flat, made[1].flatten(1))
    whole = normals_reference(ids, ids, ids, numel + -numel % 4)
    assert torch.equal(flat, whole[:, :numel])


@given(st.integers(0, 2**64 - 1))
def test_a_seed_keeps_its_64_bits(seed):
    assert seed_bits(seed) % 2**64 == seed
    assert -(2**63) <= seed_bits(seed) < 2**63
    assert int(id_bits([seed])[0]) % 2**64 == seed


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_what_is_no_seed_is_refused(value, error):
    with pytest.raises(error, match="seed must be"):
        seed_bits(value)


@pytest.mark.parametrize("ids", [[], torch.zeros(2, 2, dtype=torch.int64)], ids=["none", "matrix"])
def test_ids_must_be_a_list(ids):
    with pytest.raises(ValueError, match="sample_ids must be a list"):
        id_bits(ids)


def test_float_ids_are_refused():
    with pytest.raises(TypeError, match="sample_ids must be integers"):
        id_bits(torch.zeros(2))


IDS = [0, 1, 2**31, 2**32 - 1, 2**33, 2**40 - 1, 2**63 - 1, 2**63, 2**64 - 2**32, 2**64 - 1]


@pytest.mark.slow
def test_compiled_noise_is_the_same_for_all_ids():
    """A compiler may take for granted that signed products do not overflow, and may multiply indices in 32 bits."""
    compiled = torch.compile(lambda seed, ids, t: normals(seed, ids, t, (1, 16, 20)), fullgraph=True)
    ids = id_bits(IDS)
    for seed in (0, 1234, 2**63 + 5, 2**64 - 1):
        arguments = (torch.full_like(ids, seed_bits(seed)), ids, torch.arange(len(IDS)) * 111)
        expected = normals(*arguments, (1, 16, 20))
        assert (compiled(*arguments) - expected).abs().max() < 1e-5
