"""Normals as a pure function of (seed, sample_id, t, element): Philox4x32-10 and Box-Muller.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a 128-bit counter and a 64-bit key
to four 32-bit words. Here the key is the seed and the counter is (quad, t, sample_id low, sample_id high), so a
sample's noise depends on nothing but itself. Element e, counted in C, H, W order, is lane e mod 4 of quad e div 4.
"""

import math

import torch
from torch import Tensor

X_T_COUNTER = 0xFFFFFFFF
"""The counter t of x_T; a step's is its timestep, 0 ... T-1."""

VISIT = 1 << 20
"""What a step's counter grows by each time that a run comes back to its timestep; T is at most this."""

TRAINING, LIKELIHOOD, START = 1 << 28, 2 << 28, 3 << 28
"""Domains of noise, added to a timestep's counter, so that one seed serves different purposes with different noise:
that of training, of likelihoods, and of runs that start from a noised picture. Sampling's steps have none."""

NORMALS_ATOL = 1e-5
"""How closely every backend's normals agree; the words are equal bit for bit."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""The factors of a round's two products."""

WEYL = (0x9E3779B9, 0xBB67AE85)
"""What the key's two words grow by from round to round."""

ROUNDS = 10
"""As the paper recommends."""

_LOW = 0xFFFFFFFF


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
    for _ in range(ROUNDS):
        p0 = c0 * (MULTIPLIERS[0] - 2**31)
        p1 = c2 * (MULTIPLIERS[1] - 2**31)
        c0, c1, c2, c3 = (
            (((p1 >> 31) + c2) >> 1) ^ c1 ^ k0,
            (p1 ^ (c2 << 31)) & _LOW,
            (((p0 >> 31) + c0) >> 1) ^ c3 ^ k1,
            (p0 ^ (c0 << 31)) & _LOW,
        )
        k0 = (k0 + WEYL[0]) & _LOW
        k1 = (k1 + WEYL[1]) & _LOW
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
        float32 [B, numel] on the device of `seed`, contiguous.
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
    # Copied only where normals are left over.
    return lanes.reshape(seed.shape[0], 4 * quads)[:, :numel].contiguous()
