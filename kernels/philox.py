"""Normals as a pure function of (seed, sample_id, t, element): Philox4x32-10 and Box-Muller.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a 128-bit counter and a 64-bit key
to four 32-bit words. Here the key is the seed and the counter is (quad, t, sample_id low, sample_id high), so a
sample's noise depends on nothing but itself. Element e, counted in C, H, W order, is lane e mod 4 of quad e div 4.
"""

import math

import torch
from torch import Tensor

from ._triton import ON_INTERPRETER, jit, libdevice, tl

X_T_COUNTER = 0xFFFFFFFF
"""The counter t of x_T; training timesteps are 0 ... T-1."""

NORMALS_ATOL = 1e-5
"""How closely every backend's normals agree; the words are equal bit for bit."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF

_ROUNDS_IN_KERNEL = tl.constexpr(_ROUNDS)
_M0, _M1 = tl.constexpr(_MULTIPLIERS[0]), tl.constexpr(_MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(_WEYL[0]), tl.constexpr(_WEYL[1])
_TURN = tl.constexpr(2.0 * math.pi)
# Least-squares coefficients of sine and cosine on [−π/4, π/4], off by less than 2e-9; the number is the angle's power.
_S3, _S5, _S7 = tl.constexpr(-1.66666502e-01), tl.constexpr(8.33195798e-03), tl.constexpr(-1.94934967e-04)
_C4, _C6, _C8 = tl.constexpr(4.16666462e-02), tl.constexpr(-1.38873415e-03), tl.constexpr(2.44358517e-05)
_LOG2_E = tl.constexpr(1.0 / math.log(2.0))

MINUS_2_LN_2 = tl.constexpr(-2.0 * math.log(2.0))
"""Turns log2(u) into -2 ln u; the kernels multiply it by σ² beforehand, which scales the normals at no cost."""

LINEAR_ABOVE = tl.constexpr(1.0 - 2.0**-11)
"""Where log2(u) is taken as (u - 1)/ln 2.

The hardware's logarithm has an absolute error of up to 2⁻²² on (0.5, 2), so that near u = 1, where r = √(−2 ln u)
is small, r would be off by up to 5.7e-4. Above this point the linear form is off by at most 3.8e-6 in r, below it
the hardware by at most 5.3e-6.
"""


@jit
def philox4x32(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """The words of `philox4x32_reference`; uint32 in and out. Words that a whole sample shares may be scalars."""
    for _ in tl.static_range(_ROUNDS_IN_KERNEL):
        # One 64-bit product is one wide multiply-add, where a high and a low half are two instructions.
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@jit
def _radius(word: tl.tensor, scale: tl.tensor, APPROX: tl.constexpr) -> tl.tensor:
    """√(scale · log2 u), u = word·2⁻³² + 2⁻³³."""
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    if APPROX and not ON_INTERPRETER:
        log2_u = libdevice.fast_log2f(u)
    else:
        log2_u = tl.log2(u)
    log2_u = tl.where(u > LINEAR_ABOVE, tl.fma(u, _LOG2_E, -_LOG2_E), log2_u)
    return tl.sqrt(log2_u * scale)


@jit
def _circle(word: tl.tensor, APPROX: tl.constexpr) -> tl.tensor:
    """(cos, sin)(2π u), u = word·2⁻³² + 2⁻³³.

    Read as a signed number, the word means the same angle in [−π, π), where the hardware is at its best and no range
    reduction is needed. Without that hardware the word's two top bits choose the quarter turn and polynomials on
    [−π/4, π/4] (absolute error 2e-7) do the rest.
    """
    if APPROX:
        a = tl.fma(word.to(tl.int32, bitcast=True).to(tl.float32), _TURN * 2.0**-32, _TURN * 2.0**-33)
        if ON_INTERPRETER:
            cos, sin = tl.cos(a), tl.sin(a)
        else:
            cos, sin = libdevice.fast_cosf(a), libdevice.fast_sinf(a)
    else:
        quarter = (word + 0x20000000) >> 30
        rest = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32)
        a = tl.fma(rest, _TURN * 2.0**-32, _TURN * 2.0**-33)
        s = a * a
        p = tl.fma(a * s, tl.fma(s, tl.fma(s, _S7, _S5), _S3), a)
        q = tl.fma(s * s, tl.fma(s, tl.fma(s, _C8, _C6), _C4), tl.fma(s, -0.5, 1.0))
        odd = (quarter & 1) != 0
        cos = tl.where(((quarter + 1) & 2) != 0, -1.0, 1.0) * tl.where(odd, p, q)
        sin = tl.where((quarter & 2) != 0, -1.0, 1.0) * tl.where(odd, q, p)
    return cos, sin


@jit
def normal_quad(
    q: tl.tensor,
    t: tl.tensor,
    sample_id: tl.tensor,
    seed: tl.tensor,
    scale: tl.tensor,
    APPROX: tl.constexpr,
) -> tl.tensor:
    """Four consecutive normals per quad, times √(scale / (−2 ln 2)).

    Args:
        q: uint32 [n], the quads' numbers within their sample.
        t: the counter t; a scalar, like all that follow.
        sample_id: int64.
        seed: int64.
        scale: float32, `MINUS_2_LN_2` times the variance wanted.
        APPROX: whether NVIDIA's transcendental instructions may be used.

    Returns:
        float32 [n, 4].
    """
    w0, w1, w2, w3 = philox4x32(
        q,
        t.to(tl.uint32),
        sample_id.to(tl.uint32),
        (sample_id >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    r0 = _radius(w0, scale, APPROX)
    r1 = _radius(w2, scale, APPROX)
    cos0, sin0 = _circle(w1, APPROX)
    cos1, sin1 = _circle(w3, APPROX)
    even = tl.join(r0 * cos0, r1 * cos1)
    odd = tl.join(r0 * sin0, r1 * sin1)
    return tl.reshape(tl.join(even, odd), (q.shape[0], 4))


def philox4x32_reference(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words from a counter and a key (Salmon et al. 2011, section 3.3).

    Args:
        c0: int64, values in [0, 2³²): the counter's lowest word.
        c1: likewise, its second word.
        c2: likewise, its third word.
        c3: likewise, its highest word.
        k0: likewise, the key's low word.
        k1: likewise, the key's high word. All six broadcast against each other.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2³²).
    """
    # Inductor would multiply a bare `arange` as an index, with a step of 32 bits; what is masked is data to it.
    c0 = c0 & _LOW
    # A product needs 64 bits without sign, and compilers may take for granted that signed ones do not overflow. So each
    # factor M is taken less 2³¹, and c·2³¹ is added to the product's high and low word apart; nothing is ever negative.
    for _ in range(_ROUNDS):
        p0 = c0 * (_MULTIPLIERS[0] - 2**31)
        p1 = c2 * (_MULTIPLIERS[1] - 2**31)
        c0, c1, c2, c3 = (
            (((p1 >> 31) + c2) >> 1) ^ c1 ^ k0,
            (p1 ^ (c2 << 31)) & _LOW,
            (((p0 >> 31) + c0) >> 1) ^ c3 ^ k1,
            (p0 ^ (c0 << 31)) & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def normals_reference(seed: Tensor, sample_id: Tensor, t: Tensor, numel: int) -> Tensor:
    """Standard normals of a batch of samples: u = word·2⁻³² + 2⁻³³, then Box-Muller (Box and Muller 1958).

    Lanes 0 and 1 are √(−2 ln u₀)·(cos, sin)(2π u₁), lanes 2 and 3 are √(−2 ln u₂)·(cos, sin)(2π u₃).

    Args:
        seed: int64 [B], 64-bit patterns: a seed of 2⁶³ or more is held as the negative number of the same bits.
        sample_id: int64 [B], likewise.
        t: int64 [B], 0 ... T-1, or `X_T_COUNTER` for x_T.
        numel: elements of one sample.

    Returns:
        float32 [B, numel] on the device of `seed`.
    """
    quads = (numel + 3) // 4
    seed, sample_id, t = seed[:, None], sample_id[:, None], t[:, None]
    q = torch.arange(quads, dtype=torch.int64, device=seed.device)[None, :]
    words = philox4x32_reference(
        q, t & _LOW, sample_id & _LOW, (sample_id >> 32) & _LOW, seed & _LOW, (seed >> 32) & _LOW
    )
    u0, u1, u2, u3 = (word.to(torch.float32) * 2.0**-32 + 2.0**-33 for word in words)
    r0, r1 = torch.sqrt(torch.log(u0) * -2.0), torch.sqrt(torch.log(u2) * -2.0)
    a0, a1 = u1 * (2.0 * math.pi), u3 * (2.0 * math.pi)
    lanes = torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1)
    return lanes.reshape(seed.shape[0], 4 * quads)[:, :numel]
