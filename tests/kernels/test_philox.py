"""The noise: known answers, bit-exactness, and its agreement with what NVIDIA's instructions may return."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastddpm.kernels import X_T_COUNTER, normals_reference, philox4x32_reference
from fastddpm.kernels.philox import NORMALS_ATOL
from tests.kernels.cases import normals_float64, philox_words

WORDS = {
    "zeros": ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
    "seed 1234": ((191, 999, 7, 0), (1234, 0), "204a9ee9 e93a0a99 8982ae6b 2d0b544c"),
    "seed 2^63+5": ((3, 0xFFFFFFFF, 1, 2), (5, 0x80000000), "448f88f6 b980bf24 d3828438 f260635b"),
}
NORMALS = {
    "zeros": (0, 0, 0, 0, (0.9911378, -0.9246624, -0.6176090, -0.4820686)),
    "seed 1234": (1234, 7, 999, 191, (1.7252094, -1.0790737, 0.5001802, 0.9963807)),
    "seed 2^63+5": (5 - 2**63, 2**33 + 1, X_T_COUNTER, 3, (-0.2577507, -1.6026481, 0.5836877, -0.2027823)),
}
word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), WORDS.values(), ids=WORDS.keys())
def test_words_known_answers(counter, key, expected):
    got = philox4x32_reference(*(torch.tensor(value) for value in counter + key))
    assert " ".join(f"{int(value):08x}" for value in got) == expected


@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word))
def test_words_are_exact_for_any_counter_and_key(counter, key):
    got = philox4x32_reference(*(torch.tensor(value) for value in counter + key))
    assert tuple(int(value) for value in got) == philox_words(counter, key)


def test_words_broadcast():
    q = torch.arange(6)[None, :]
    key = torch.tensor([3, 0xFFFFFFFF])[:, None]
    zero = torch.zeros((), dtype=torch.int64)
    got = torch.stack(philox4x32_reference(q, zero, zero, zero, key, zero))
    assert got.shape == (4, 2, 6)
    assert got[:, 1, 5].tolist() == list(philox_words((5, 0, 0, 0), (0xFFFFFFFF, 0)))


@pytest.mark.parametrize(("seed", "sample_id", "t", "quad", "expected"), NORMALS.values(), ids=NORMALS.keys())
def test_normals_known_answers(seed, sample_id, t, quad, expected):
    got = normals_reference(*(torch.tensor([value]) for value in (seed, sample_id, t)), 4 * quad + 4)
    np.testing.assert_allclose(got[0, -4:].numpy(), expected, rtol=0, atol=NORMALS_ATOL)


@pytest.mark.parametrize("numel", [1, 3, 4, 1023])
def test_normals_against_float64(numel):
    seeds, ids, ts = [5 - 2**63, 0, -1], [2**40 + 3, 1, -(2**63)], [0, 999, X_T_COUNTER]
    got = normals_reference(torch.tensor(seeds), torch.tensor(ids), torch.tensor(ts), numel)
    assert got.shape == (3, numel) and got.dtype == torch.float32
    for line, seed, number, t in zip(got, seeds, ids, ts, strict=True):
        expected = normals_float64(seed, number, t, numel)
        np.testing.assert_allclose(line.numpy(), expected, rtol=0, atol=NORMALS_ATOL)


def test_normals_do_not_depend_on_the_batch():
    seed, ids, t = torch.tensor([9, 8, 9, 9]), torch.tensor([1, 2, 3, 2**35]), torch.tensor([5, 5, 0, X_T_COUNTER])
    together = normals_reference(seed, ids, t, 37)
    alone = [normals_reference(seed[b : b + 1], ids[b : b + 1], t[b : b + 1], 37) for b in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_normals_are_normal():
    """Kolmogorov-Smirnov over a million draws of fixed seeds, and no correlation of neighbours."""
    ids = torch.arange(256)
    z = normals_reference(ids * 0 + 42, ids, ids * 0 + 17, 4096).double().numpy()
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z[:, 0::2].ravel(), z[:, 1::2].ravel())[0, 1]) < 5 / np.sqrt(z.size / 2)


def _hardware(words, log2_error, trig_error, sqrt_error):
    """The kernel's arithmetic on NVIDIA hardware in float32, each instruction off by the error given, in float64."""
    f32 = np.float32
    radius, angle = words
    u = (radius.astype(f32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(f32)
    exact = np.log2(u.astype(np.float64))
    inside = (u > 0.5) & (u < 2)
    log2 = (exact + np.where(inside, log2_error, log2_error * np.abs(exact))).astype(f32)
    log2_e = f32(1 / np.log(2))
    linear = (u.astype(np.float64) * float(log2_e) - float(log2_e)).astype(f32)
    log2 = np.where(u > f32(1 - 2.0**-11), linear, log2)
    # Whatever the error, log2 u ≤ 0 below the linear part; the instruction's sign is not in doubt there.
    scaled = (log2 * f32(-2 * np.log(2))).astype(f32)
    r = (np.sqrt(np.maximum(scaled, 0).astype(np.float64)) * (1 + sqrt_error)).astype(f32).astype(np.float64)
    signed = angle.astype(np.uint32).view(np.int32).astype(f32).astype(np.float64)
    turn = (signed * float(f32(2 * np.pi * 2.0**-32)) + float(f32(2 * np.pi * 2.0**-33))).astype(f32).astype(np.float64)
    return r * (np.cos(turn) + trig_error), r * (np.sin(turn) + trig_error)


def test_documented_hardware_errors_leave_normals_within_tolerance():
    """The CPU cannot run lg2, sqrt, sin and cos.approx, so each is given the worst error that its maker documents.

    lg2.approx: 2⁻²² absolute on (0.5, 2), 2⁻²² relative elsewhere; sqrt.approx: 2⁻²³ relative (both PTX ISA);
    sin and cos: 2⁻²¹·⁴¹ and 2⁻²¹·¹⁹ absolute on [−π, π] (CUDA C++ Programming Guide). All signs together.
    """
    rng = np.random.default_rng(0)
    radius = np.concatenate(
        [
            rng.integers(0, 2**32, 1 << 17, dtype=np.uint64),
            np.arange(0, 4096, dtype=np.uint64),
            np.uint64(2**32 - 1) - np.arange(0, 1 << 22, 64, dtype=np.uint64),
            (2.0 ** rng.uniform(0, 32, 1 << 16)).astype(np.uint64),
        ]
    )
    angle = rng.integers(0, 2**32, radius.size, dtype=np.uint64)
    u = [
        (torch.from_numpy(words.astype(np.int64)).float() * 2.0**-32 + 2.0**-33).double().numpy()
        for words in (radius, angle)
    ]
    r = np.sqrt(-2 * np.log(u[0]))
    expected = r * np.cos(2 * np.pi * u[1]), r * np.sin(2 * np.pi * u[1])
    worst = 0.0
    for a in (-1, 1):
        for b in (-1, 1):
            for c in (-1, 1):
                got = _hardware((radius, angle), a * 2.0**-22, b * 2.0**-21.19, c * 2.0**-23)
                worst = max(worst, *(np.abs(have - want).max() for have, want in zip(got, expected, strict=True)))
    assert worst < NORMALS_ATOL, f"off by {worst:.2e}"
