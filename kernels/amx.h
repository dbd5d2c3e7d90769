/* The matrix unit of Intel's processors (AMX): eight registers, tiles of ROWS rows of PART bfloat16 numbers, or of ROWS
 * sums in float32. A tile of a product's second factor holds pairs of its rows: [PART / 2][ROWS][2].
 */
#include <stdint.h>

#define ROWS 16
#define PART 32

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE (ROWS * PART) /* numbers of a tile */

static int allowed; /* whether the system lends the tiles' registers: without its leave they end the process */

/* Ask the system for them, for all threads of the process. Returns 0, or an error. */
int amx_start(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return !allowed;
}

/* Some compilers' intrinsics for tiles do not tell that they read memory: what was written must be there by now. */
static inline void memory_is_written(void) { __asm__ volatile("" : : : "memory"); }

static void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 2 * PART, tiles.rows[i] = ROWS;
    __asm__ volatile("" : : "r"(&tiles) : "memory");
    _tile_loadconfig(&tiles);
}

#else /* a processor or a compiler without it */
int amx_start(void) { return 1; }
#endif
