/* Winograd's F(4x4, 3x3) for CPUs: a 3x3 convolution with stride 1 and padding 1 in a quarter of the multiplications.
 *
 *     Y = A' [ (B' d B) . (G g G') ] A        (Lavin & Gray 2016, sec. 4.1, with the points 0, 1, -1, 2, -2, inf)
 *
 * Each 4x4 tile of the output comes from a 6x6 tile d of the input. The product over channels is, at each of the 36
 * positions of a transformed tile, one matrix product [tiles, C] x [C, O]: V_k U_k = M_k, k = 0 ... 35.
 *
 * Pictures are NHWC, float32 or bfloat16; everything between them is float32.
 * Tiles are worked through in blocks whose V and M stay in the caches. The weights are packed as lines of
 * T = G g in panels, t[line][o / PANEL][c][3][o % PANEL]. U = T G' is made of them when it is needed, six positions of
 * a panel at a time, which stay in a core's own cache: U as a whole would be twice as large, and little quicker.
 * C must be a multiple of LANES, O one of PANEL. Zen 4 and later and Intel's servers have LANES 16, older processors 8;
 * see the compiler's flags in native.py.
 */
#include <stdint.h>

#include "scratch.h"
#include "shims.h"

#ifdef __AVX512F__
#define LANES 16
#define ROWS 12 /* rows of a register block: 12 x 2 sums, 2 of U and a broadcast of V fill 27 of 32 registers */
#else
#define LANES 8
#define ROWS 6 /* 6 x 2 + 2 + 1 of 16 registers */
#endif
#define PANEL (2 * LANES)
#define POSITIONS 36
#define LINE 6 /* positions of one row of a transformed tile */
#define TAPS 3 /* of a line of G g */
#define BLOCK 36 /* tiles at a time, so that V and M stay in the caches; a multiple of ROWS */

#include "vectors.h"

int omp_get_thread_num(void);
int winograd_lanes(void) { return LANES; }

/* B' applied to six values. */
static inline void input_line(const vec *d, int stride, vec *out, int step) {
    vec d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
    vec a = d4 - 4.0f * d2, b = d3 - 4.0f * d1, c = d4 - d2, e = 2.0f * (d3 - d1);
    out[0] = 4.0f * d0 - 5.0f * d2 + d4;
    out[step] = a + b;
    out[2 * step] = a - b;
    out[3 * step] = c + e;
    out[4 * step] = c - e;
    out[5 * step] = 4.0f * d1 - 5.0f * d3 + d5;
}

/* A' applied to six values. */
static inline void output_line(const vec *m, int stride, vec *out, int step) {
    vec m0 = m[0], m5 = m[5 * stride];
    vec s = m[stride] + m[2 * stride], d = m[stride] - m[2 * stride];
    vec u = m[3 * stride] + m[4 * stride], v = m[3 * stride] - m[4 * stride];
    out[0] = m0 + s + u;
    out[step] = d + 2.0f * v;
    out[2 * step] = s + 4.0f * u;
    out[3 * step] = d + 8.0f * v + m5;
}

/* V of one tile and LANES channels. */
static void input_tile(const void *x, int64_t at, int half, int64_t H, int64_t W, int64_t C, int64_t top, int64_t left,
                       float *v, int64_t vk) {
    vec d[36], t[36];
    const vec zero = {0};
    if (top >= 0 && left >= 0 && top + 6 <= H && left + 6 <= W) {
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) d[6 * i + j] = load_pixel(x, at + ((top + i) * W + left + j) * C, half);
    } else {
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) {
                int64_t r = top + i, q = left + j;
                int inside = r >= 0 && r < H && q >= 0 && q < W;
                d[6 * i + j] = inside ? load_pixel(x, at + (r * W + q) * C, half) : zero;
            }
    }
    for (int j = 0; j < 6; j++) input_line(d + j, 6, t + j, 6);
    for (int i = 0; i < 6; i++) input_line(t + 6 * i, 1, d + 6 * i, 1);
    for (int k = 0; k < POSITIONS; k++) store(v + k * vk, d[k]);
}

/* Y of one tile and LANES channels. */
static void output_tile(const float *m, int64_t mk, vec bias, void *y, int64_t at, int half, int64_t H, int64_t W,
                        int64_t O, int64_t top, int64_t left) {
    vec d[36], t[24], out[16];
    for (int k = 0; k < POSITIONS; k++) d[k] = load(m + k * mk);
    for (int j = 0; j < 6; j++) output_line(d + j, 6, t + j, 6);
    for (int i = 0; i < 4; i++) output_line(t + 6 * i, 1, out + 4 * i, 1);
    for (int i = 0; i < 4 && top + i < H; i++)
        for (int j = 0; j < 4 && left + j < W; j++)
            store_pixel(y, at + ((top + i) * W + left + j) * O, out[4 * i + j] + bias, half);
}

/* A line of U for C channels of a panel, six positions uk apart: G' applied to a line of G g. */
static void weights_line(const float *restrict t, int64_t C, float *restrict u, int64_t uk) {
    for (int64_t c = 0; c < C; c++)
        for (int half = 0; half < PANEL; half += LANES) {
            const float *at = t + c * TAPS * PANEL + half;
            float *to = u + c * PANEL + half;
            vec t0 = load(at), t1 = load(at + PANEL), t2 = load(at + 2 * PANEL);
            vec sum = (-1 / 6.f) * (t0 + t2), middle = (1 / 6.f) * t1;
            vec outer = (1 / 24.f) * t0 + (1 / 6.f) * t2, half_middle = (1 / 12.f) * t1;
            store(to, 0.25f * t0);
            store(to + uk, sum - middle);
            store(to + 2 * uk, sum + middle);
            store(to + 3 * uk, outer + half_middle);
            store(to + 4 * uk, outer - half_middle);
            store(to + 5 * uk, t2);
        }
}

/* ROWS x PANEL of M: rows of V times a panel of U. Meanwhile C * step bytes from `ahead` on are fetched: the weights are
 * read once in a step, from memory, and a panel is worked on several times, during which the next one comes.
 */
static void product(const float *restrict v, int64_t row, const float *restrict u, int64_t C, float *restrict m,
                    int64_t mrow, const char *ahead, int64_t step) {
    vec sum[ROWS][2] = {{{0}}};
    for (int64_t c = 0; c < C; c++) {
        __builtin_prefetch(ahead + c * step);
        vec u0 = load(u + c * PANEL), u1 = load(u + c * PANEL + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            float value = v[r * row + c];
            sum[r][0] += value * u0;
            sum[r][1] += value * u1;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        store(m + r * mrow, sum[r][0]);
        store(m + r * mrow + LANES, sum[r][1]);
    }
}

/* y = conv(x) + bias. Returns 0, or 1 where there is no memory for V, M and U.
 *
 * x [B,H,W,C] and y [B,H,W,O], bfloat16 if `half`; t [6,O/PANEL,C,3,PANEL], bias [O].
 * The rows of V and M, and the positions of U, are longer than needed, so that they do not all fall into the same sets
 * of the cache.
 */
int winograd_conv(const void *x, const float *t, const float *bias, void *y, int64_t B, int64_t H, int64_t W, int64_t C,
                  int64_t O, int half, int threads) {
    const int64_t th = (H + 3) / 4, tw = (W + 3) / 4, tiles = B * th * tw;
    const int64_t block = tiles < BLOCK ? (tiles + ROWS - 1) / ROWS * ROWS : BLOCK;
    const int64_t vrow = C + LANES, mrow = O + LANES, vk = block * vrow, mk = block * mrow, uk = (C + 1) * PANEL, line = LINE * uk;
    const int64_t cs = C / LANES, os = O / LANES, panels = O / PANEL;
    /* It starts as zeros: rows that no tile fills are multiplied too, and must not be denormal. */
    float *v = scratch(4 * (POSITIONS * (vk + mk) + threads * line)), *m = v + POSITIONS * vk;
    float *lines = m + POSITIONS * mk;
    if (!v) return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < tiles; first += block) {
        const int64_t n = tiles - first < block ? tiles - first : block;
        const int64_t rows = (n + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            const int64_t tile = first + i, b = tile / (th * tw), r = tile / tw % th, q = tile % tw;
            for (int64_t c = 0; c < cs; c++)
                input_tile(x, b * H * W * C + c * LANES, half, H, W, C, 4 * r - 1, 4 * q - 1, v + i * vrow + c * LANES, vk);
        }
        float *u = lines + omp_get_thread_num() * line;
#pragma omp for schedule(static)
        for (int64_t job = 0; job < LINE * panels; job++) { /* a line's V stays in the cache for all panels */
            const int64_t i = job / panels, p = job % panels, products = LINE * rows;
            const char *next = (const char *)(t + (job + 1) * C * TAPS * PANEL);
            const int64_t step = (TAPS * PANEL * 4 + products - 1) / products; /* each product fetches its part */
            weights_line(t + job * C * TAPS * PANEL, C, u, uk);
            for (int64_t j = 0; j < LINE; j++)
                for (int64_t r = 0, k = LINE * i + j; r < rows; r++)
                    product(v + k * vk + r * ROWS * vrow, vrow, u + j * uk, C,
                            m + k * mk + r * ROWS * mrow + p * PANEL, mrow, next + (j * rows + r) * C * step, step);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            const int64_t tile = first + i, b = tile / (th * tw), r = tile / tw % th, q = tile % tw;
            for (int64_t o = 0; o < os; o++)
                output_tile(m + i * mrow + o * LANES, mk, load(bias + o * LANES), y, b * H * W * O + o * LANES, half, H,
                            W, O, 4 * r, 4 * q);
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ for compiled steps, without Python */

int32_t aoti_torch_cpu_winograd_conv(tensor x, tensor t, tensor bias, int64_t threads, tensor *y) {
    const int64_t *n = sizes(x), O = sizes(bias)[0];
    if (!is_channels_last(x) || make_pictures(n[0], O, n[2], n[3], dtype(x), y)) return 1;
    return winograd_conv(data(x), data(t), data(bias), data(*y), n[0], n[2], n[3], n[1], O, is_half(x), (int)threads);
}
