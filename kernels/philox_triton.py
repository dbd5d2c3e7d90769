"""Normals from Philox4x32-10 inside the kernels; `philox` says what they are, and has them in PyTorch."""

import math

from .common_triton import ON_INTERPRETER, jit, libdevice, tl
from .philox import MULTIPLIERS, ROUNDS, WEYL

_ROUNDS_IN_KERNEL = tl.constexpr(ROUNDS)
_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
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
