/* A convolution in bfloat16 on the matrix unit of Intel's processors (AMX): 3x3 with stride 1 and padding 1, or 1x1, or
 * 3x3 behind an upsampling by repetition.
 *
 *     y[p, o] = bias[o] + sum over taps k and channels c of x[p + k, c] w[o, c, k]
 *
 * The unit multiplies tiles: ROWS pixels times PART channels by PART channels times ROWS output channels, and sums in
 * float32. A tile of weights is read from the second cache for up to MOST tiles of pixels, which the first cache has from
 * the tap before. While one block of sums is made, the block before it is stored.
 *
 * Pictures are NHWC. One is first spread out as rows of PART channels within a border of zeros,
 * [C / PART][H + 2][W + 1][G][PART]: then a tile of pixels is one piece of memory for each tap. The border on the right
 * of a row is that on the left of the next one. Where ROWS is no divisor of W, G = 2 or 4 pictures lie side by side if
 * that makes it one; else tiles go over the borders, whose results nobody stores. With one tap there is no border, and
 * pictures are read as they lie: all of them are one row, whose last tile begins early enough to end with it.
 * The weights are packed as tiles, w[o / ROWS][c / PART][k][pair of channels][o % ROWS][2].
 * Of a picture that was doubled, the 3x3 pixels around one are 2x2 of the picture before, and which ones depends on
 * whether row and column are even: four convolutions with four taps, whose weights are sums of the nine. Each is one
 * more block of output channels, and writes every other pixel of every other row.
 * The sums are made in the same order whatever G, the place and the threads. The unit takes denormal numbers for 0.
 */
#include <stdint.h>

#include "amx.h"
#include "scratch.h"
#include "shims.h"

#define SIDE 3 /* of the taps, unless there is one */

#ifdef HAS_AMX
#define SUMS (ROWS * ROWS)
#define MOST 4 /* tiles of pixels at a time: four registers for sums, one for weights, three for pixels */
#define LINE 32 /* numbers of a line of the cache */
#define NEAREST (1 << 15) /* bytes of pixels that stay in a core's first cache */
#define CACHED (1 << 20) /* bytes of pictures spread out that stay in a core's second cache beside the weights */
#define FEW_TIMES 4 /* blocks that weights are used for, under which they are fetched as they are read, this far ahead: */
#define NEAR 24 /* tiles */

/* A layer, and how G of its pictures lie when spread out: positions of a row, numbers of a part, tiles of pixels; numbers
 * from pixel to pixel; how much larger its result is.
 */
typedef struct {
    int64_t H, W, C, O, G, row, part, tiles, side, pitch, scale;
    int whole; /* whether each tile lies within a row */
} layer;

static layer layer_of(int64_t B, int64_t H, int64_t W, int64_t C, int64_t O, int64_t side) {
    int64_t G = 1;
    while (G < 4 && W * G % ROWS) G *= 2;
    if (W * G % ROWS || B % G) G = 1;
    layer l = {H, W, C, O, G, (W + 1) * G, 0, 0, side, PART, side == 2 ? 2 : 1, W * G % ROWS == 0};
    l.part = ((H + 2) * l.row + G + 2 * ROWS) * PART;
    l.tiles = ((l.whole ? H * W * G : H * l.row) + ROWS - 1) / ROWS;
    return l;
}

/* With one tap: a row of at least ROWS pixels, as it lies. */
static layer row_of(int64_t pixels, int64_t C, int64_t O) {
    return (layer){1, pixels, C, O, 1, pixels, PART, (pixels + ROWS - 1) / ROWS, 1, C, 1, 0};
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where the pixels of a tile begin, for the first tap. */
static int64_t start_of(const layer *l, int64_t tile) {
    if (l->side == 1) return least(tile * ROWS, l->W - ROWS) * l->C;
    if (!l->whole) return tile * TILE;
    const int64_t in_row = l->W * l->G / ROWS;
    return tile / in_row * l->row * PART + tile % in_row * TILE;
}

/* The pixels of the G results whose sums the rows of the tiles hold, or -1; of larger results the first of each four. */
static void pixels_of(const layer *l, int32_t *to) {
    int32_t *const end = to + l->tiles * ROWS;
    for (int64_t y = 0; y < l->H; y++)
        for (int64_t x = 0; x < (l->whole ? l->W : l->W + 1); x++)
            for (int64_t g = 0; g < l->G; g++)
                *to++ = x < l->W ? (int32_t)(((g * l->H + y) * l->W * l->scale + x) * l->scale) : -1;
    while (to < end) *to++ = -1;
}

/* With one tap. The last tile does not store again what the one before has stored. */
static void row_pixels_of(const layer *l, int32_t *to) {
    const int64_t last = (l->tiles - 1) * ROWS;
    for (int64_t i = 0; i < last; i++) to[i] = (int32_t)i;
    for (int64_t n = l->W - ROWS, r = 0; r < ROWS; n++, r++) to[last + r] = n < last ? -1 : (int32_t)n;
}

static void zeros(const layer *l, uint16_t *to, int64_t positions) {
    for (int64_t c = 0; c < l->C / PART; c++)
        for (int64_t i = 0; i < positions; i++)
            _mm512_storeu_si512(to + c * l->part + i * PART, _mm512_setzero_si512());
}

/* Spread out row y of G pictures, -1 <= y <= H: the border on its left and its pixels. */
static void spread_row(const layer *l, const uint16_t *x, int64_t y, uint16_t *to) {
    to += (y + 1) * l->row * PART;
    if (y < 0 || y == l->H) {
        zeros(l, to, y < 0 ? l->row : l->row + l->G + 2 * ROWS);
        return;
    }
    zeros(l, to, l->G);
    to += l->G * PART;
    for (int64_t q = 0; q < l->W; q++)
        for (int64_t g = 0; g < l->G; g++, to += PART) {
            const uint16_t *from = x + ((g * l->H + y) * l->W + q) * l->C;
            for (int64_t c = 0; c < l->C / PART; c++)
                _mm512_storeu_si512(to + c * l->part, _mm512_loadu_si512(from + c * PART));
        }
}

/* Rows of sums from `row` on that have yet to be stored; and weights that will be needed, of which each step fetches some
 * lines into the second cache.
 */
typedef struct {
    const float *sums, *bias;
    const int32_t *pixels;
    uint16_t *y;
    int row, rows;
    const uint16_t *ahead, *end;
    int64_t lines;
    int near; /* whether weights are fetched as they are read instead */
} pending;

static inline void store_row(const layer *l, pending *p) {
    const int r = p->row++;
    if (p->pixels[r] < 0) return;
    const __m512 v = _mm512_add_ps(_mm512_load_ps(p->sums + r * ROWS), _mm512_loadu_ps(p->bias));
    _mm256_storeu_si256((__m256i *)(p->y + p->pixels[r] * l->O), (__m256i)_mm512_cvtneps_pbh(v));
}

#define ZERO(i) \
    if (n > i) _tile_zero(i)
#define MULTIPLY(i, pixels) \
    if (n > i) { \
        _tile_loadd(pixels, a[i] + tap, pitch); \
        _tile_dpbf16ps(i, pixels, 4); \
    }
#define STORE(i) \
    if (n > i) _tile_stored(i, sums + i * SUMS, 4 * ROWS)

/* Sums [n][ROWS][ROWS] of n tiles of pixels for ROWS output channels; what is pending is done meanwhile. */
static inline __attribute__((always_inline)) void product(const int n, const int64_t side, const layer *l,
                                                          const uint16_t *const *a, const uint16_t *w, float *sums,
                                                          pending *p) {
    const int64_t parts = l->C / PART, steps = side * side * parts, each = (p->rows - p->row + steps - 1) / steps;
    const int64_t pitch = side == 1 ? 2 * l->pitch : 2 * PART;
    ZERO(0);
    ZERO(1);
    ZERO(2);
    ZERO(3);
    for (int64_t c = 0, at = 0; c < parts; c++, at += l->part)
        for (int64_t i = 0; i < side; i++)
            for (int64_t j = 0; j < side; j++, w += TILE) {
                const int64_t tap = at + (i * l->row + j * l->G) * PART;
                _tile_loadd(4, w, 2 * PART);
                MULTIPLY(0, 5)
                MULTIPLY(1, 6)
                MULTIPLY(2, 7)
                MULTIPLY(3, 5)
                if (p->near)
                    for (int64_t k = 0; k < TILE; k += LINE) _mm_prefetch(w + NEAR * TILE + k, _MM_HINT_T1);
                for (int64_t k = 0; k < p->lines && p->ahead < p->end; k++, p->ahead += LINE)
                    _mm_prefetch(p->ahead, _MM_HINT_T1);
                for (int64_t k = 0; k < each && p->row < p->rows; k++) store_row(l, p);
            }
    STORE(0);
    STORE(1);
    STORE(2);
    STORE(3);
}

static inline __attribute__((always_inline)) void products(const int64_t side, const layer *l, int64_t tiles,
                                                           const uint16_t *const *a, const uint16_t *w, float *sums,
                                                           pending *p) {
    if (tiles == 4) product(4, side, l, a, w, sums, p);
    else if (tiles == 3) product(3, side, l, a, w, sums, p);
    else if (tiles == 2) product(2, side, l, a, w, sums, p);
    else product(1, side, l, a, w, sums, p);
}

/* Tiles from ... to of n groups of pictures, for block o of output channels: PART of them, and of a larger result those of
 * one of its four convolutions.
 */
static void work(const layer *l, const uint16_t *spread, int64_t n, const int32_t *pixels, const uint16_t *w,
                 const float *bias, uint16_t *y, int64_t o, int64_t from, int64_t to) {
    float sums[2][MOST * SUMS] __attribute__((aligned(64)));
    const int64_t size = l->C * l->side * l->side * ROWS, blocks = (to - from + MOST - 1) / MOST, times = n * blocks;
    const int64_t channel = o % (l->O / PART) * PART, below = o / (l->O / PART) / 2, right = o / (l->O / PART) % 2;
    const int64_t results = l->G * l->H * l->W * l->scale * l->scale * l->O;
    pending p = {0};
    memory_is_written();
    w += 2 * o * size;
    spread += (below * l->row + right * l->G) * PART;
    y += (below * l->W * l->scale + right) * l->O + channel;
    p.ahead = w + 2 * size, p.end = w + 4 * size, p.near = times < FEW_TIMES;
    p.lines = p.near ? 0 : (TILE / LINE + times - 1) / times;
    for (int64_t g = 0; g < n; g++)
        for (int64_t left = blocks, at = from, tiles; left > 0; left--, at += tiles) {
            const uint16_t *a[MOST];
            tiles = (to - at + left - 1) / left;
            for (int64_t i = 0; i < tiles; i++) a[i] = spread + g * l->part * (l->C / PART) + start_of(l, at + i);
            for (int64_t half = 0; half < 2; half++) {
                if (l->side == 1) products(1, l, tiles, a, w + half * size, sums[half], &p);
                else if (l->side == 2) products(2, l, tiles, a, w + half * size, sums[half], &p);
                else products(SIDE, l, tiles, a, w + half * size, sums[half], &p);
                p.sums = sums[half], p.bias = bias + channel + half * ROWS, p.pixels = pixels + at * ROWS;
                p.y = y + g * results + half * ROWS;
                p.row = 0, p.rows = (int)tiles * ROWS;
            }
        }
    while (p.row < p.rows) store_row(l, &p);
}

/* In how many pieces the tiles are shared out besides the output channels, where these are no multiple of the threads. */
static int64_t pieces_of(int64_t outputs, int threads) {
    return outputs % threads ? (2 * threads + outputs - 1) / outputs : 1;
}

/* With one tap. Threads share out the output channels, or the pixels: where these are more than the weights, and where as
 * many as are taken at a time stay in the first cache for all output channels.
 */
static int row_conv(const uint16_t *x, const uint16_t *w, const float *bias, uint16_t *y, int64_t N, int64_t C,
                    int64_t O, int threads) {
    const int few = N < ROWS;
    const layer l = row_of(few ? ROWS : N, C, O);
    const int64_t outputs = O / PART, table = (l.tiles * ROWS * 4 + 63) / 64 * 64;
    const int stay = 2 * MOST * ROWS * C <= NEAREST && l.tiles >= MOST * threads;
    const int by_pixels = stay || (N > O && l.tiles >= threads);
    const int64_t pieces = stay ? (l.tiles + MOST - 1) / MOST : by_pixels ? threads : pieces_of(outputs, threads);
    const int64_t piece = (l.tiles + pieces - 1) / pieces;
    int32_t *pixels = scratch(table + (few ? 2 * ROWS * C : 0));
    if (!pixels) return 1;
    row_pixels_of(&l, pixels);
    if (few) { /* behind the last pixel nothing may be read */
        uint16_t *whole = (uint16_t *)((char *)pixels + table);
        for (int64_t i = 0; i < ROWS * C; i++) whole[i] = i < N * C ? x[i] : 0;
        for (int64_t i = N; i < ROWS; i++) pixels[i] = -1;
        x = whole;
    }
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
#pragma omp for schedule(static) nowait
        for (int64_t job = 0; job < outputs * pieces; job++) {
            const int64_t k = by_pixels ? job / outputs : job % pieces, o = by_pixels ? job % outputs : job / pieces;
            if (k * piece < l.tiles) work(&l, x, 1, pixels, w, bias, y, o, k * piece, least((k + 1) * piece, l.tiles));
        }
        _tile_release();
    }
    return 0;
}

/* y = conv(x) + bias. Returns 0, or 1 where there is no memory for the pictures spread out, or no unit to use.
 *
 * x [B,H,W,C] and y [B,H,W,O], bfloat16; bias [O], float32. C and O are multiples of PART; taps are 1 or 9, or 4 behind
 * an upsampling, whose result is y [B,2H,2W,O].
 * Threads share out the pictures, of which each spreads out as many at a time as its cache holds, so that weights are
 * read once for all of them. Where the weights are more than the pictures, and for pictures that are left over, they
 * share out the output channels, and the tiles where there are too few of these.
 */
int amx_conv(const uint16_t *x, const uint16_t *w, const float *bias, uint16_t *y, int64_t B, int64_t H, int64_t W,
             int64_t C, int64_t O, int64_t taps, int threads) {
    if (!allowed) return 1;
    if (taps == 1) return row_conv(x, w, bias, y, B * H * W, C, O, threads);
    const layer l = layer_of(B, H, W, C, O, taps == 9 ? SIDE : 2);
    const int64_t outputs = O / PART * l.scale * l.scale, pieces = pieces_of(outputs, threads);
    const int64_t groups = B / l.G, each = l.part * (C / PART), in = l.G * H * W * C;
    const int64_t out = l.G * H * W * l.scale * l.scale * O;
    const int64_t cached = CACHED / (2 * each) > 1 ? CACHED / (2 * each) : 1;
    const int64_t own = groups * each < outputs * PART * C * taps ? 0 : groups / threads, rest = groups - own * threads;
    const int64_t some = least(own, cached), shared = least(rest, cached);
    const int64_t piece = (l.tiles + pieces - 1) / pieces, table = (l.tiles * ROWS * 4 + 63) / 64 * 64;
    int32_t *pixels = scratch(table + 2 * each * (some * threads > shared ? some * threads : shared));
    uint16_t *spread = (uint16_t *)((char *)pixels + table);
    if (!pixels) return 1;
    pixels_of(&l, pixels);
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < (own ? threads : 0); k++)
            for (int64_t g = 0, n; g < own; g += n) {
                const int64_t first = k * own + g;
                uint16_t *to = spread + k * some * each;
                n = least(own - g, some);
                for (int64_t i = 0; i < n * (H + 2); i++)
                    spread_row(&l, x + (first + i / (H + 2)) * in, i % (H + 2) - 1, to + i / (H + 2) * each);
                for (int64_t o = 0; o < outputs; o++) work(&l, to, n, pixels, w, bias, y + first * out, o, 0, l.tiles);
            }
        for (int64_t g = own * threads, n; g < groups; g += n) {
            n = least(groups - g, shared);
            if (g > 0) { /* all have done with what was spread out before */
#pragma omp barrier
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n * (H + 2); i++)
                spread_row(&l, x + (g + i / (H + 2)) * in, i % (H + 2) - 1, spread + i / (H + 2) * each);
#pragma omp for schedule(static) nowait
            for (int64_t job = 0; job < outputs * pieces; job++) {
                const int64_t from = job % pieces * piece, to = least(from + piece, l.tiles);
                if (from < to) work(&l, spread, n, pixels, w, bias, y + g * out, job / pieces, from, to);
            }
        }
        _tile_release(); /* so that nobody else meets tiles of this shape */
    }
    return 0;
}

#else
int amx_conv(const uint16_t *x, const uint16_t *w, const float *bias, uint16_t *y, int64_t B, int64_t H, int64_t W,
             int64_t C, int64_t O, int64_t taps, int threads) {
    (void)x, (void)w, (void)bias, (void)y, (void)B, (void)H, (void)W, (void)C, (void)O, (void)taps, (void)threads;
    return 1;
}
#endif

/* ------------------------------------------------------------------ for compiled steps, without Python */

int32_t aoti_torch_cpu_amx_conv(tensor x, tensor w, tensor bias, int64_t threads, tensor *y) {
    const int64_t *n = sizes(x), O = sizes(bias)[0], taps = sizes(w)[2], scale = taps == 4 ? 2 : 1;
    if (!is_channels_last(x) || make_pictures(n[0], O, scale * n[2], scale * n[3], dtype(x), y)) return 1;
    return amx_conv(data(x), data(w), data(bias), data(*y), n[0], n[2], n[3], n[1], O, taps, (int)threads);
}
