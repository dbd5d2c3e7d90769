/* Vectors of LANES floats, and of the pictures' float32 or bfloat16 numbers that they are made of. LANES is defined by the
 * kernel that includes this.
 */
#include <stdint.h>

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_u __attribute__((vector_size(LANES * 4), aligned(4)));

static inline vec load(const float *p) { return *(const vec_u *)p; }
static inline void store(float *p, vec v) { *(vec_u *)p = v; }

typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));

/* LANES values of a picture, from element i on: bfloat16 if `half`. */
static inline vec load_pixel(const void *x, int64_t i, int half) {
    if (!half) return load((const float *)x + i);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)x + i), words) << 16);
}

static inline void store_pixel(void *y, int64_t i, vec v, int half) {
    if (!half) {
        store((float *)y + i, v);
        return;
    }
    words bits = (words)v; /* round to nearest, ties to even; a NaN stays one */
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words nan = (words)(v != v);
    rounded = (nan & 0x7fc0) | (~nan & rounded);
    *(halves *)((uint16_t *)y + i) = __builtin_convertvector(rounded, halves);
}
