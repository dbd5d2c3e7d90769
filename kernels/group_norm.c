/* What a residual network leaves to add, its group norm and its SiLU on CPUs; the equations stand in group_norm.py.
 *
 * Pictures are NHWC, float32 or bfloat16; everything between them is float32, and sums over pixels are double every
 * CHUNK pixels. A pass makes the sums, shifted by the first pixel so that a large mean costs no digits; another one
 * makes the result. Where there are as many pictures as threads, a picture stays in one thread's cache; else its pixels
 * are shared out. Channels must be multiples of LANES: of x, and of what is behind it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "shims.h"

#define LANES 8 /* on every processor: many networks have no more than eight channels more than a multiple of 16 */
#define CHUNK 32

#include "vectors.h"

static inline float number(const void *p, int64_t i, int half) {
    union { uint32_t bits; float value; } u;
    if (!half) return ((const float *)p)[i];
    u.bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    return u.value;
}

/* e^x for x <= 88: 2^n times a polynomial on |r| <= ln 2 / 2; 2 units in the last place, 0 below -87, NaN for NaN. */
static inline vec exponential(vec x) {
    const vec low = (vec){0} - 87.0f, high = (vec){0} + 88.0f;
    x = (vec)(((words)(x < low) & (words)low) | (~(words)(x < low) & (words)x));
    x = (vec)(((words)(x > high) & (words)high) | (~(words)(x > high) & (words)x));
    const vec magic = (vec){0} + 12582912.0f; /* 1.5 * 2^23: to add and take it away rounds to a whole number */
    const vec n = (x * 1.44269504088896341f + magic) - magic;
    const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vec p = (vec){0} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return p * (vec)power;
}

/* The sum of what is to be added, wherever it lies. */
typedef struct {
    const void *x, *residual, *skip;
    const float *add; /* [own] */
    int64_t own, rest;
    int half;
} source;

static inline vec value(const source *s, int64_t p, int64_t c) {
    if (c >= s->own) return load_pixel(s->skip, p * s->rest + c - s->own, s->half);
    vec v = load_pixel(s->x, p * s->own + c, s->half);
    if (s->residual) v += load_pixel(s->residual, p * s->own + c, s->half);
    return v + load(s->add + c);
}

/* Sums of v - shift and of its square over pixels from ... to, for each channel; writes the sum v where it is kept. */
static void sums(const source *s, int64_t from, int64_t to, const float *shift, double *first, double *second,
                 void *total) {
    const int64_t C = s->own + s->rest;
    for (int64_t c = 0; c < C; c++) first[c] = second[c] = 0;
    for (int64_t at = from; at < to; at += CHUNK) {
        const int64_t end = at + CHUNK < to ? at + CHUNK : to;
        for (int64_t c = 0; c < C; c += LANES) {
            const vec k = load(shift + c);
            vec one = {0}, two = {0};
            for (int64_t p = at; p < end; p++) {
                const vec v = value(s, p, c), d = v - k;
                if (total) store_pixel(total, p * C + c, v, s->half);
                one += d;
                two += d * d;
            }
            for (int i = 0; i < LANES; i++) {
                first[c + i] += one[i];
                second[c + i] += two[i];
            }
        }
    }
}

/* y = (v - mean) * factor + offset, and its SiLU, of pixels from ... to. */
static void apply(const source *s, int64_t from, int64_t to, const float *mean, const float *factor,
                  const float *offset, int silu, void *y) {
    const int64_t C = s->own + s->rest;
    for (int64_t p = from; p < to; p++)
        for (int64_t c = 0; c < C; c += LANES) {
            vec v = (value(s, p, c) - load(mean + c)) * load(factor + c) + load(offset + c);
            if (silu) v = v / (1.0f + exponential(-v));
            store_pixel(y, p * C + c, v, s->half);
        }
}

#ifdef __AVX512F__
#include <immintrin.h>
#define WIDE 16
#define ALWAYS static inline __attribute__((always_inline))
/* The same two passes for channels that are multiples of WIDE, in half to two thirds of the time: what tells terms apart
 * stands outside of the loops, 2^r, |r| <= 1/2, is a polynomial of degree 5 (error 1e-7), and nothing is divided.
 */
static int is_wide(const source *s) { return s->own % WIDE == 0 && s->rest % WIDE == 0; }

ALWAYS __m512 wide_load(const void *x, int64_t i, const int half) {
    if (!half) return _mm512_loadu_ps((const float *)x + i);
    const __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

ALWAYS void wide_store(void *y, int64_t i, __m512 v, const int half) {
    if (!half) {
        _mm512_storeu_ps((float *)y + i, v);
        return;
    }
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)((uint16_t *)y + i), (__m256i)_mm512_cvtneps_pbh(v));
#else
    float values[WIDE] __attribute__((aligned(64)));
    _mm512_store_ps(values, v);
    store_pixel(y, i, load(values), 1);
    store_pixel(y, i + LANES, load(values + LANES), 1);
#endif
}

/* WIDE channels: where they lie, how far it is from pixel to pixel, and what is to be added. */
typedef struct {
    const void *x, *residual;
    int64_t first, step;
    __m512 add;
} column;

ALWAYS column column_of(const source *s, int64_t c) {
    if (c >= s->own) return (column){s->skip, 0, c - s->own, s->rest, _mm512_setzero_ps()};
    return (column){s->x, s->residual, c, s->own, _mm512_loadu_ps(s->add + c)};
}

ALWAYS __m512 wide_value(const column *k, int64_t p, const int half) {
    const __m512 v = wide_load(k->x, k->first + p * k->step, half);
    return k->residual ? _mm512_add_ps(v, wide_load(k->residual, k->first + p * k->step, half)) : v;
}

static inline void add_to(double *sum, __m512 v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), low));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), high));
}

ALWAYS void wide_sums_of(const source *s, int64_t from, int64_t to, const float *shift, double *first, double *second,
                         void *total, const int half) {
    const int64_t C = s->own + s->rest;
    for (int64_t c = 0; c < C; c++) first[c] = second[c] = 0;
    for (int64_t at = from; at < to; at += CHUNK) {
        const int64_t end = at + CHUNK < to ? at + CHUNK : to;
        for (int64_t c = 0; c < C; c += WIDE) {
            const column k = column_of(s, c);
            const __m512 centre = _mm512_loadu_ps(shift + c);
            __m512 one = _mm512_setzero_ps(), two = one;
            for (int64_t p = at; p < end; p++) {
                const __m512 v = _mm512_add_ps(wide_value(&k, p, half), k.add), d = _mm512_sub_ps(v, centre);
                if (total) wide_store(total, p * C + c, v, half);
                one = _mm512_add_ps(one, d);
                two = _mm512_fmadd_ps(d, d, two);
            }
            add_to(first + c, one);
            add_to(second + c, two);
        }
    }
}

static void wide_sums(const source *s, int64_t from, int64_t to, const float *shift, double *first, double *second,
                      void *total) {
    if (s->half) wide_sums_of(s, from, to, shift, first, second, total, 1);
    else wide_sums_of(s, from, to, shift, first, second, total, 0);
}

/* 1 / (1 + e^-v) */
ALWAYS __m512 sigmoid(__m512 v) {
    const __m512 t = _mm512_mul_ps(v, _mm512_set1_ps(-1.44269504f));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* v log2 e - n with the digits that t has lost */
    const __m512 low = _mm512_set1_ps(-1.925963033e-8f), high = _mm512_set1_ps(-1.44269504f);
    const __m512 r = _mm512_fmadd_ps(v, low, _mm512_fmsub_ps(v, high, n));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00132647273f), r, _mm512_set1_ps(0.00967151279f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0555073374f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240222421f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693146978f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    const __m512 q = _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f)), guess = _mm512_rcp14_ps(q);
    /* A step of Newton's; where e^-v is infinite, or v no number, the guess is the answer. */
    const __m512 better = _mm512_mul_ps(guess, _mm512_fnmadd_ps(q, guess, _mm512_set1_ps(2.0f)));
    return _mm512_mask_mov_ps(guess, _mm512_cmp_ps_mask(guess, _mm512_setzero_ps(), _CMP_GT_OQ), better);
}

ALWAYS void wide_apply_of(const source *s, int64_t from, int64_t to, const float *mean, const float *factor,
                          const float *offset, int silu, void *y, const int half) {
    const int64_t C = s->own + s->rest;
    for (int64_t at = from; at < to; at += CHUNK) {
        const int64_t end = at + CHUNK < to ? at + CHUNK : to;
        for (int64_t c = 0; c < C; c += WIDE) {
            const column k = column_of(s, c);
            const __m512 m = _mm512_loadu_ps(mean + c), f = _mm512_loadu_ps(factor + c), o = _mm512_loadu_ps(offset + c);
            for (int64_t p = at; p < end; p++) {
                const __m512 value = _mm512_add_ps(wide_value(&k, p, half), k.add);
                __m512 v = _mm512_fmadd_ps(_mm512_sub_ps(value, m), f, o);
                if (silu) v = _mm512_mul_ps(v, sigmoid(v));
                wide_store(y, p * C + c, v, half);
            }
        }
    }
}

static void wide_apply(const source *s, int64_t from, int64_t to, const float *mean, const float *factor,
                       const float *offset, int silu, void *y) {
    if (s->half) wide_apply_of(s, from, to, mean, factor, offset, silu, y, 1);
    else wide_apply_of(s, from, to, mean, factor, offset, silu, y, 0);
}
#endif

typedef struct {
    const void *x, *bias, *row, *residual, *skip, *weight, *beta;
    const int64_t *index;
    void *total, *y;
    int64_t B, P, own, rest, groups, width, rows, column;
    double eps;
    int scale_shift, silu, half, halves_in_norm, halves_in_row, threads;
} job;

/* A picture's row of projections; NULL where its number is none. */
static const void *row_of(const job *j, int64_t b) {
    const int64_t r = j->index ? j->index[b] : b;
    if (!j->row || r < 0 || r >= j->rows) return 0;
    return (const char *)j->row + r * j->width * (j->halves_in_row ? 2 : 4);
}

/* A row's number for a channel; NaN where the picture has no row. */
static inline float projected(const job *j, const void *row, int64_t c) {
    return row ? number(row, j->column + c, j->halves_in_row) : NAN;
}

static source source_of(const job *j, int64_t b, float *add, const void *row) {
    const int64_t bytes = j->half ? 2 : 4, at = b * j->P * j->own * bytes;
    for (int64_t c = 0; c < j->own; c++) {
        add[c] = j->bias ? number(j->bias, c, j->half) : 0.0f;
        if (j->row && !j->scale_shift) add[c] += projected(j, row, c);
    }
    source s = {(const char *)j->x + at, j->residual ? (const char *)j->residual + at : 0,
                j->skip ? (const char *)j->skip + b * j->P * j->rest * bytes : 0, add, j->own, j->rest, j->half};
    return s;
}

/* A picture on its way, with what a thread computes of it; the arrays have C entries, but for the sums [2][C], and those
 * of parts [parts][2][C], which all threads share.
 */
typedef struct {
    source s;
    const void *row;
    void *total, *y;
    double *partial, *sums;
    float *add, *shift, *mean, *factor, *offset;
} picture;

/* Bytes of a thread's own arrays; of sums of parts. */
static int64_t own_bytes(const job *j) { return ((j->own + j->rest) * (2 * 8 + 5 * 4) + 63) / 64 * 64; }
static int64_t part_bytes(const job *j, int64_t parts) { return (j->own + j->rest) * 2 * 8 * parts; }

static picture take(const job *j, int64_t b, double *partial, char *memory) {
    const int64_t C = j->own + j->rest, at = b * j->P * C * (j->half ? 2 : 4);
    double *sums = (double *)memory;
    float *add = (float *)(sums + 2 * C);
    const void *row = row_of(j, b);
    picture p = {source_of(j, b, add, row), row, j->total ? (char *)j->total + at : 0, (char *)j->y + at,
                 partial ? partial : sums, sums, add, add + C, add + 2 * C, add + 3 * C, add + 4 * C};
    for (int64_t c = 0; c < C; c += LANES) store(p.shift + c, value(&p.s, 0, c));
    return p;
}

/* Mean, factor and offset of each channel from the sums, which are added up on the way; the sum is then read where it was
 * kept. bfloat16 has rounded it, so there it is made again.
 */
static void finish(const job *j, picture *p, int64_t parts) {
    const int64_t C = j->own + j->rest, size = C / j->groups;
    const double P = (double)j->P, *first = p->sums, *second = p->sums + C;
    for (int64_t k = 0; k < parts && p->partial != p->sums; k++)
        for (int64_t i = 0; i < 2 * C; i++) p->sums[i] = (k ? p->sums[i] : 0) + p->partial[2 * k * C + i];
    for (int64_t g = 0; g < C; g += size) {
        double centre = 0, square = 0;
        for (int64_t c = g; c < g + size; c++) centre += (p->shift[c] + first[c] / P) / size;
        for (int64_t c = g; c < g + size; c++) {
            const double away = p->shift[c] + first[c] / P - centre;
            square += second[c] - first[c] * first[c] / P + P * away * away;
        }
        const double rstd = 1.0 / sqrt((square < 0 ? 0 : square) / (P * size) + j->eps);
        for (int64_t c = g; c < g + size; c++) {
            p->mean[c] = (float)centre;
            p->factor[c] = (float)rstd * number(j->weight, c, j->halves_in_norm);
            p->offset[c] = number(j->beta, c, j->halves_in_norm);
            if (!j->row || !j->scale_shift) continue;
            const float scale = 1.0f + projected(j, p->row, c);
            p->factor[c] *= scale;
            p->offset[c] = p->offset[c] * scale + projected(j, p->row, C + c);
        }
    }
    if (!p->total || j->half) return;
    for (int64_t c = 0; c < C; c++) p->add[c] = 0.0f;
    p->s = (source){p->total, 0, 0, p->add, C, 0, 0};
}

/* The pixels of part k of a picture. */
static void sum_part(const job *j, const picture *p, int64_t k, int64_t part) {
    const int64_t C = j->own + j->rest, end = (k + 1) * part;
    double *first = p->partial + 2 * k * C;
#ifdef __AVX512F__
    if (is_wide(&p->s)) {
        wide_sums(&p->s, k * part, end < j->P ? end : j->P, p->shift, first, first + C, p->total);
        return;
    }
#endif
    sums(&p->s, k * part, end < j->P ? end : j->P, p->shift, first, first + C, p->total);
}

static void apply_part(const job *j, const picture *p, int64_t k, int64_t part) {
    const int64_t end = (k + 1) * part;
#ifdef __AVX512F__
    if (is_wide(&p->s)) {
        wide_apply(&p->s, k * part, end < j->P ? end : j->P, p->mean, p->factor, p->offset, j->silu, p->y);
        return;
    }
#endif
    apply(&p->s, k * part, end < j->P ? end : j->P, p->mean, p->factor, p->offset, j->silu, p->y);
}

static void whole_pictures(const job *j, int64_t from, int64_t to, char *memory) {
    for (int64_t b = from; b < to; b++) {
        picture p = take(j, b, 0, memory);
        sum_part(j, &p, 0, j->P);
        finish(j, &p, 1);
        apply_part(j, &p, 0, j->P);
    }
}

/* Each thread looks at its part of a picture and makes mean and factors of all parts' sums for itself: so the threads
 * wait for each other once a picture. Every other picture's sums lie elsewhere, for threads that are behind.
 */
static void shared_pictures(const job *j, char *memory) {
    /* Whole chunks, so that a picture's sums are the same in any batch. */
    const int64_t parts = j->threads, part = (j->P + parts * CHUNK - 1) / (parts * CHUNK) * CHUNK;
    char *partial = memory + parts * own_bytes(j);
#pragma omp parallel num_threads(j->threads)
    for (int64_t b = 0; b < j->B; b++) {
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < parts; k++) {
            picture p = take(j, b, (double *)(partial + b % 2 * part_bytes(j, parts)), memory + k * own_bytes(j));
            sum_part(j, &p, k, part);
        }
#pragma omp barrier
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < parts; k++) {
            picture p = take(j, b, (double *)(partial + b % 2 * part_bytes(j, parts)), memory + k * own_bytes(j));
            finish(j, &p, parts);
            apply_part(j, &p, k, part);
        }
    }
}

/* Returns 0, or 1 where there is no memory for the sums. */
int add_group_norm(const job *j) {
    const int64_t threads = j->threads, whole = j->B % threads == 0;
    char *memory = malloc((size_t)(threads * own_bytes(j) + (whole ? 0 : 2 * part_bytes(j, threads))));
    if (!memory) return 1;
    if (threads == 1) {
        whole_pictures(j, 0, j->B, memory); /* a region of one thread would cost as much as a small picture */
    } else if (whole) {
        const int64_t n = j->B / threads;
#pragma omp parallel for num_threads(j->threads) schedule(static)
        for (int64_t k = 0; k < threads; k++) whole_pictures(j, k * n, (k + 1) * n, memory + k * own_bytes(j));
    } else {
        shared_pictures(j, memory);
    }
    free(memory);
    return 0;
}

/* ------------------------------------------------------------------ for compiled steps, without Python */

static const void *optional(tensor *t) { return t ? data(*t) : 0; }

int32_t aoti_torch_cpu_add_group_norm_native(tensor x, tensor *bias, tensor *row, tensor *index, tensor *residual,
                                             tensor *skip, tensor weight, tensor beta, int64_t groups, double eps,
                                             int64_t column, int32_t scale_shift, int32_t silu, int32_t keep,
                                             int64_t threads, tensor *total, tensor *y) {
    const int64_t *size = sizes(x), rest = skip ? sizes(*skip)[1] : 0;
    if (!is_channels_last(x) || (residual && !is_channels_last(*residual)) || (skip && !is_channels_last(*skip)))
        return 1;
    if (make_pictures(size[0], size[1] + rest, size[2], size[3], dtype(x), y)) return 1;
    if (make_pictures(keep ? size[0] : 0, size[1] + rest, size[2], size[3], dtype(x), total)) return 1;
    const job j = {data(x), optional(bias), optional(row), optional(residual), optional(skip), data(weight), data(beta),
                   optional(index), keep ? data(*total) : 0, data(*y), size[0], size[2] * size[3], size[1], rest, groups,
                   row ? sizes(*row)[1] : 0, row ? sizes(*row)[0] : 0, column, eps, scale_shift, silu, is_half(x),
                   is_half(weight), row ? is_half(*row) : 0, (int)threads};
    return add_group_norm(&j);
}
