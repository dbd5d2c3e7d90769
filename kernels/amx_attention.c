/* Attention in bfloat16 on the matrix unit of Intel's processors (AMX):
 *
 *     y[n] = sum over m of p[n, m] v[m] / sum over m of p[n, m],  p[n, m] = exp((q[n] k[m] - most of the row) / sqrt(D))
 *
 * with scores and sums in float32 and p rounded for the second product (Vaswani et al. 2017, eq. 1). Keys are first
 * packed as tiles of their transpose, [N / ROWS][D / PART][PART / 2][ROWS][2], and values as [N / PART][D / ROWS][PART / 2]
 * [ROWS][2]; then each block of queries has its scores, their exponentials and its result one after the other, in the
 * caches. What a picture's head gives depends neither on the others nor on the threads.
 */
#include <math.h>
#include <stdint.h>

#include "amx.h"
#include "scratch.h"
#include "shims.h"

#ifdef HAS_AMX

#define BLOCK (2 * ROWS) /* queries at a time */

/* Attention of one head of a picture: positions and channels, numbers from position to position of what is given and of
 * the result, where they lie; keys and values packed, and what a block of queries needs, [BLOCK][N].
 */
typedef struct {
    int64_t N, D, pitch, y_pitch;
    const uint16_t *q, *k, *v;
    uint16_t *y, *keys, *values, *weights;
    float *scores;
} head;

/* 16 rows of 16 pairs of numbers as 16 pairs' rows. */
static void transpose(const uint16_t *from, int64_t pitch, uint16_t *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * pitch);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) { /* a[i + j] has columns j, 4 + j, 8 + j and 12 + j of rows i to i + 3 */
        const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i more = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i rest = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * PART, _mm512_shuffle_i32x4(even, more, 0x88));
        _mm512_storeu_si512(to + (4 + j) * PART, _mm512_shuffle_i32x4(odd, rest, 0x88));
        _mm512_storeu_si512(to + (8 + j) * PART, _mm512_shuffle_i32x4(even, more, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * PART, _mm512_shuffle_i32x4(odd, rest, 0xdd));
    }
}

/* Two rows of 32 numbers as 32 pairs, in two tiles' rows. */
static inline void pair(const uint16_t *one, const uint16_t *other, uint16_t *low, uint16_t *high) {
    static const uint16_t order[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                       11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
                                       22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(other);
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, _mm512_loadu_si512(order), b));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, _mm512_loadu_si512(order + 32), b));
}

/* Pack PART positions' keys and values, from position n on. */
static void pack(const head *h, int64_t n) {
    for (int64_t at = n; at < n + PART; at += ROWS)
        for (int64_t d = 0; d < h->D; d += PART)
            transpose(h->k + at * h->pitch + d, h->pitch, h->keys + at * h->D + d * ROWS);
    for (int64_t d = 0; d < h->D; d += PART)
        for (int64_t i = 0; i < PART; i += 2) {
            const uint16_t *from = h->v + (n + i) * h->pitch + d;
            uint16_t *to = h->values + n * h->D + d * PART + i / 2 * PART;
            pair(from, from + h->pitch, to, to + TILE);
        }
}

/* Four tiles of sums, [2][ROWS] rows by [2][ROWS] columns with `pitch` from row to row: rows of a, `steps` parts long,
 * times tiles that lie `next` from each other for the same columns, and `beside` from one sixteen columns to the next.
 */
static inline void product(const uint16_t *a, int64_t a_pitch, const uint16_t *b, int64_t beside, int64_t next,
                           int64_t steps, float *sums, int64_t pitch) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, a + i * PART, 2 * a_pitch);
        _tile_loadd(5, a + i * PART + ROWS * a_pitch, 2 * a_pitch);
        _tile_loadd(6, b + i * next, 2 * PART);
        _tile_loadd(7, b + i * next + beside, 2 * PART);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * pitch);
    _tile_stored(1, sums + ROWS, 4 * pitch);
    _tile_stored(2, sums + ROWS * pitch, 4 * pitch);
    _tile_stored(3, sums + ROWS * pitch + ROWS, 4 * pitch);
}

/* 2^t for t <= 0, to a unit of float32's last place or two; a NaN stays one. */
static inline __m512 power(__m512 t) {
    static const float terms[] = {1.540353e-4f, 1.333356e-3f, 9.618129e-3f, 5.550411e-2f, 2.402265e-1f, 6.931472e-1f, 1.0f};
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-160.0f), t); /* an infinity less itself would be a NaN */
    const __m512 whole = _mm512_roundscale_ps(bounded, 8), rest = _mm512_sub_ps(bounded, whole);
    __m512 p = _mm512_set1_ps(terms[0]);
    for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(p, whole);
}

/* The exponentials of a row of scores, rounded, and one over their sum. */
static float exponentials(const float *scores, int64_t N, float scale, uint16_t *to) {
    __m512 most = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
    for (int64_t i = 16; i < N; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < N; i += 32) {
        const __m512 a = power(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top), factor));
        const __m512 b = power(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i + 16), top), factor));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* The results of BLOCK queries, from position n on. */
static void mix(const head *h, int64_t n) {
    float sums[BLOCK * BLOCK] __attribute__((aligned(64))), share[BLOCK];
    const float scale = 1.442695041f / sqrtf((float)h->D);
    memory_is_written();
    for (int64_t m = 0; m < h->N; m += BLOCK)
        product(h->q + n * h->pitch, h->pitch, h->keys + m * h->D, ROWS * h->D, TILE, h->D / PART, h->scores + m, h->N);
    memory_is_written();
    for (int i = 0; i < BLOCK; i++) share[i] = exponentials(h->scores + i * h->N, h->N, scale, h->weights + i * h->N);
    memory_is_written();
    for (int64_t d = 0; d < h->D; d += BLOCK) {
        product(h->weights, h->N, h->values + d * PART, TILE, PART * h->D, h->N / PART, sums, BLOCK);
        memory_is_written();
        for (int i = 0; i < BLOCK; i++) {
            const __m512 s = _mm512_set1_ps(share[i]), a = _mm512_mul_ps(_mm512_loadu_ps(sums + i * BLOCK), s);
            const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(sums + i * BLOCK + ROWS), s);
            _mm512_storeu_si512(h->y + (n + i) * h->y_pitch + d, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}

/* What is given, and memory for each thread: keys and values packed, and what a block of queries needs. */
typedef struct {
    const uint16_t *qkv;
    uint16_t *y;
    char *memory;
    int64_t N, D, heads;
    int heads_first;
} batch;

static int64_t packed_bytes(const batch *all) { return 2 * 2 * all->N * all->D; }
static int64_t bytes_of(const batch *all) { return packed_bytes(all) + BLOCK * all->N * (4 + 2); }

/* One head of a picture, packed in the memory of one thread and computed in that of another. */
static head head_of(const batch *all, int64_t item, int64_t packs, int64_t works) {
    const int64_t N = all->N, D = all->D, C = all->heads * D, part = all->heads_first ? D : C;
    const int64_t picture = item / all->heads, number = item % all->heads;
    const uint16_t *q = all->qkv + picture * N * 3 * C + number * (all->heads_first ? 3 * D : D);
    uint16_t *keys = (uint16_t *)(all->memory + packs * bytes_of(all));
    float *scores = (float *)(all->memory + works * bytes_of(all) + packed_bytes(all));
    return (head){N, D, 3 * C, C, q, q + part, q + 2 * part, all->y + picture * N * C + number * D,
                  keys, keys + N * D, (uint16_t *)(scores + BLOCK * N), scores};
}

/* y = attention(qkv). Returns 0, or 1 where there is no memory for what is packed, or no unit to use.
 *
 * qkv [B,N,3,heads,D], or [B,N,heads,3,D] where `heads_first`, and y [B,N,heads,D], bfloat16. N and D are multiples of
 * PART. Threads share out pictures and heads; those that are left over they make together, block by block.
 */
int amx_attention(const uint16_t *qkv, uint16_t *y, int64_t B, int64_t N, int64_t heads, int64_t D, int heads_first,
                  int threads) {
    if (!allowed) return 1;
    const int64_t items = B * heads, own = items / threads;
    batch all = {qkv, y, 0, N, D, heads, heads_first};
    all.memory = scratch(bytes_of(&all) * threads);
    if (!all.memory) return 1;
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < (own ? threads : 0); t++)
            for (int64_t i = t * own; i < (t + 1) * own; i++) {
                const head h = head_of(&all, i, t, t);
                for (int64_t n = 0; n < N; n += PART) pack(&h, n);
                for (int64_t n = 0; n < N; n += BLOCK) mix(&h, n);
            }
        for (int64_t i = own * threads; i < items; i++) {
            if (i > 0) { /* all have done with what was packed before */
#pragma omp barrier
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n += PART) {
                const head h = head_of(&all, i, 0, 0);
                pack(&h, n);
            }
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < threads; t++) {
                const head h = head_of(&all, i, 0, t);
                for (int64_t n = t * BLOCK; n < N; n += threads * BLOCK) mix(&h, n);
            }
        }
        _tile_release(); /* so that nobody else meets tiles of this shape */
    }
    return 0;
}

#else
int amx_attention(const uint16_t *qkv, uint16_t *y, int64_t B, int64_t N, int64_t heads, int64_t D, int heads_first,
                  int threads) {
    (void)qkv, (void)y, (void)B, (void)N, (void)heads, (void)D, (void)heads_first, (void)threads;
    return 1;
}
#endif

/* ------------------------------------------------------------------ for compiled steps, without Python */

int32_t aoti_torch_cpu_amx_attention(tensor qkv, int64_t heads, int32_t heads_first, int64_t threads, tensor *y) {
    const int64_t *n = sizes(qkv), C = n[2] / 3, size[3] = {n[0], n[1], C}, stride[3] = {n[1] * C, C, 1};
    int64_t *pitch = 0;
    aoti_torch_get_strides(qkv, &pitch);
    if (pitch[2] != 1 || pitch[1] != 3 * C || (n[0] > 1 && pitch[0] != n[1] * 3 * C)) return 1;
    if (aoti_torch_empty_strided(3, size, stride, dtype(qkv), aoti_torch_device_type_cpu(), 0, y)) return 1;
    return amx_attention(data(qkv), data(*y), n[0], n[1], heads, C / heads, heads_first, (int)threads);
}
