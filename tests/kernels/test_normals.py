"""The normals in C are those of the reference, for every size and bit pattern, and only where they are asked for."""

import pytest
import torch

from fastddpm.kernels import normals as module
from fastddpm.kernels.normals import native_normals, normals
from fastddpm.kernels.philox import LIKELIHOOD, NORMALS_ATOL, X_T_COUNTER, normals_reference

BITS = torch.tensor([0, 1, 1234, -1, 2**33 + 1, -(2**63) + 5])


@pytest.mark.parametrize("numel", [1, 3, 4, 27, 1023, 4096])
@pytest.mark.parametrize("t", [0, 999, X_T_COUNTER, LIKELIHOOD + 7])
def test_they_are_the_reference_s(numel, t):
    at = torch.full_like(BITS, t)
    with native_normals():
        got = normals(BITS, BITS.flip(0), at, numel)
    expected = normals_reference(BITS, BITS.flip(0), at, numel)
    assert got.shape == expected.shape and got.is_contiguous()
    assert (got - expected).abs().max() <= NORMALS_ATOL


def test_a_sample_s_do_not_depend_on_its_company():
    at = torch.full_like(BITS, 5)
    with native_normals():
        whole = normals(BITS, BITS, at, 1023)
        assert all(torch.equal(normals(BITS[i : i + 1], BITS[i : i + 1], at[:1], 1023)[0], whole[i]) for i in range(6))


def test_elsewhere_they_are_the_reference_itself(monkeypatch):
    at = torch.full_like(BITS, 5)
    expected = normals_reference(BITS, BITS, at, 27)
    assert torch.equal(normals(BITS, BITS, at, 27), expected)
    with native_normals():
        pass
    assert torch.equal(normals(BITS, BITS, at, 27), expected)
    monkeypatch.setattr(module, "loaded", lambda: None)  # no compiler
    with native_normals():
        assert torch.equal(normals(BITS, BITS, at, 27), expected)
