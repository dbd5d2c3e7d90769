/* Normals as a pure function of (seed, sample id, t, element), for CPUs: Philox4x32-10 (Salmon et al. 2011, "Parallel
 * random numbers: as easy as 1, 2, 3") and Box-Muller (Box and Muller 1958), as in philox.py.
 *
 * Element e is lane e % 4 of quad e / 4; u = word * 2^-32 + 2^-33; lanes 0 and 1 are sqrt(-2 ln u0) (cos, sin)(2 pi u1),
 * lanes 2 and 3 the same of u2 and u3. QUADS of them are made at a time, by loops that compilers turn into vectors; a
 * block is always whole, so that an element's bits depend neither on its sample's company nor on the threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "shims.h"

#define ROUNDS 10
#define QUADS 32
#define LEAST_BLOCKS 32 /* for which it pays to wake a thread */

typedef uint32_t words[QUADS];
typedef float floats[QUADS];

/* One round; c is the counter of each quad, and k0, k1 the key. */
static inline void philox_round(words c0, words c1, words c2, words c3, uint32_t k0, uint32_t k1) {
    for (int i = 0; i < QUADS; i++) {
        const uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
        c0[i] = n0;
        c1[i] = (uint32_t)p1;
        c2[i] = n2;
        c3[i] = (uint32_t)p0;
    }
}

/* (float)word * 2^-32 + 2^-33; by halves, since vectors of signed words alone become floats quickly. */
static inline float uniform(uint32_t word) {
    const float whole = (float)(int32_t)(word >> 16) * 65536.0f + (float)(int32_t)(word & 0xffff);
    return whole * 0x1p-32f + 0x1p-33f;
}

static inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* ln u for u in [2^-33, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), and the series of ln m = 2 artanh((m-1)/(m+1)). */
static inline float logarithm(float u) {
    const int32_t e = (bits_of(u) - 0x3f3504f3) >> 23;
    const float m = of_bits(bits_of(u) - (int32_t)((uint32_t)e << 23)), s = (m - 1.0f) / (m + 1.0f), q = s * s;
    const float series = q * (0.6666666667f + q * (0.4f + q * (0.2857142857f + q * (0.2222222222f + q * 0.1818181818f))));
    return (float)e * 0.6931471806f + (2.0f * s + s * series);
}

/* radius * (cos, sin)(2 pi u): the nearest quarter of a turn is exact, and the rest is at most an eighth. Without
 * branches, which loops of vectors cannot have: an odd quarter swaps the two, and two quarters turn the signs. */
static inline void turn(float radius, float u, float *x, float *y) {
    const int32_t quarter = (int32_t)(4.0f * u + 0.5f), odd = -(quarter & 1);
    const float a = (u - 0.25f * (float)quarter) * 6.283185307f, q = a * a;
    const float s = a + a * q * (-0.1666666667f + q * (8.333333333e-3f + q * (-1.984126984e-4f + q * 2.755731922e-6f)));
    const float c = 1.0f + q * (-0.5f + q * (4.166666667e-2f + q * (-1.388888889e-3f + q * 2.480158730e-5f)));
    const int32_t swap = (bits_of(s) ^ bits_of(c)) & odd;
    *x = radius * of_bits(bits_of(c) ^ swap ^ (int32_t)((uint32_t)((quarter + 1) & 2) << 30));
    *y = radius * of_bits(bits_of(s) ^ swap ^ (int32_t)((uint32_t)(quarter & 2) << 30));
}

static inline void box_muller(const words of_radius, const words of_turn, floats x, floats y) {
    floats radius;
    for (int i = 0; i < QUADS; i++) radius[i] = sqrtf(-2.0f * logarithm(uniform(of_radius[i])));
    for (int i = 0; i < QUADS; i++) turn(radius[i], uniform(of_turn[i]), &x[i], &y[i]);
}

static void block(uint64_t seed, uint64_t id, uint32_t t, uint32_t first, floats lanes[4]) {
    words c0, c1, c2, c3;
    for (int i = 0; i < QUADS; i++) {
        c0[i] = first + (uint32_t)i;
        c1[i] = t;
        c2[i] = (uint32_t)id;
        c3[i] = (uint32_t)(id >> 32);
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < ROUNDS; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        philox_round(c0, c1, c2, c3, k0, k1);
    box_muller(c0, c1, lanes[0], lanes[1]);
    box_muller(c2, c3, lanes[2], lanes[3]);
}

/* out [B, numel]; seed, sample_id, t [B]: 64-bit patterns, of t the low 32 bits count. */
void philox_normals(const int64_t *seed, const int64_t *sample_id, const int64_t *t, float *out, int64_t B, int64_t numel,
                    int threads) {
    const int64_t blocks = (numel + 4 * QUADS - 1) / (4 * QUADS), enough = B * blocks / LEAST_BLOCKS;
    if (threads > enough) threads = enough < 1 ? 1 : (int)enough;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < B; b++)
        for (int64_t k = 0; k < blocks; k++) {
            floats lanes[4];
            block((uint64_t)seed[b], (uint64_t)sample_id[b], (uint32_t)t[b], (uint32_t)(k * QUADS), lanes);
            const int64_t first = 4 * QUADS * k, left = numel - first;
            float *to = out + b * numel + first;
            if (left >= 4 * QUADS) { /* which becomes vectors */
                for (int i = 0; i < QUADS; i++)
                    for (int lane = 0; lane < 4; lane++) to[4 * i + lane] = lanes[lane][i];
                continue;
            }
            for (int64_t i = 0; i < left; i++) to[i] = lanes[i % 4][i / 4];
        }
}

/* As compiled steps call it; the strides of seed, sample_id and t are 1. */
int32_t aoti_torch_cpu_normals(tensor seed, tensor sample_id, tensor t, int64_t numel, int64_t threads, tensor *y) {
    const int64_t size[2] = {sizes(seed)[0], numel}, stride[2] = {numel, 1};
    const int32_t type = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
    if (aoti_torch_empty_strided(2, size, stride, type, cpu, 0, y)) return 1;
    philox_normals(data(seed), data(sample_id), data(t), data(*y), size[0], numel, (int)threads);
    return 0;
}
