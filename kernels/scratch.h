/* Memory that the calling thread keeps between calls: fresh pages would cost as much as the arithmetic. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define SCRATCH_LINE 64 /* bytes; of a line of the cache, and what the memory is aligned to */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static void make_scratch_key(void) { pthread_key_create(&scratch_key, free); }

/* So many bytes, zeros when they are new; NULL where there is no memory. */
static void *scratch(int64_t bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    int64_t *kept = pthread_getspecific(scratch_key);
    if (!kept || *kept < bytes) {
        free(kept);
        kept = 0;
        pthread_setspecific(scratch_key, 0);
        void *memory = calloc(1, (size_t)bytes + 2 * SCRATCH_LINE);
        if (!memory) return 0;
        /* freed by its own address, which is kept beside the size */
        kept = memory;
        *kept = bytes;
        pthread_setspecific(scratch_key, kept);
    }
    return (char *)(((uintptr_t)kept + 2 * SCRATCH_LINE - 1) / SCRATCH_LINE * SCRATCH_LINE);
}
