/* Normals as a pure function of (seed, sample id, t, element), for CPUs: Philox4x32-10 (Salmon et al. 2011, "Parallel
 * random numbers: as easy as 1, 2, 3") and Box-Muller (Box and Muller 1958), as in philox.py.
 *
 * Element e is lane e % 4 of quad e / 4; u = word * 2^-32 + 2^-33; lanes 0 and 1 are sqrt(-2 ln u0) (cos, sin)(2 pi u1),
 * lanes 2 and 3 the same of u2 and u3.
 */
#include <math.h>
#include <stdint.h>

#define ROUNDS 10

static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t p0 = (uint64_t)c[0] * 0xD2511F53u, p1 = (uint64_t)c[2] * 0xCD9E8D57u;
        uint32_t c1 = c[1], c3 = c[3];
        c[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c[1] = (uint32_t)p1;
        c[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

static inline float uniform(uint32_t word) { return (float)word * 0x1p-32f + 0x1p-33f; }

/* out [B, numel]; seed, sample_id, t [B]: 64-bit patterns, of t the low 32 bits count. */
void normals(const int64_t *seed, const int64_t *sample_id, const int64_t *t, float *out, int64_t B, int64_t numel,
             int threads) {
    const int64_t quads = (numel + 3) / 4;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < B; b++)
        for (int64_t q = 0; q < quads; q++) {
            const uint64_t s = (uint64_t)seed[b], id = (uint64_t)sample_id[b];
            uint32_t c[4] = {(uint32_t)q, (uint32_t)t[b], (uint32_t)id, (uint32_t)(id >> 32)};
            philox(c, (uint32_t)s, (uint32_t)(s >> 32));
            const float r0 = sqrtf(-2.0f * logf(uniform(c[0]))), r1 = sqrtf(-2.0f * logf(uniform(c[2])));
            const float a0 = 6.28318530717958648f * uniform(c[1]), a1 = 6.28318530717958648f * uniform(c[3]);
            const float lanes[4] = {r0 * cosf(a0), r0 * sinf(a0), r1 * cosf(a1), r1 * sinf(a1)};
            for (int64_t i = 0; i < 4 && 4 * q + i < numel; i++) out[b * numel + 4 * q + i] = lanes[i];
        }
}
