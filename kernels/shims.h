/* What PyTorch's stable C interface for compiled models offers (torch/csrc/inductor/aoti_torch/c/shim.h), as far as the
 * kernels here use it: a compiled step calls them as it calls PyTorch's own operations, without Python between.
 */
#include <stdint.h>

typedef struct AtenTensorOpaque *tensor;

int32_t aoti_torch_get_data_ptr(tensor t, void **result);
int32_t aoti_torch_get_sizes(tensor t, int64_t **result);
int32_t aoti_torch_get_strides(tensor t, int64_t **result);
int32_t aoti_torch_get_dtype(tensor t, int32_t *result);
int32_t aoti_torch_dtype_float32(void);
int32_t aoti_torch_dtype_bfloat16(void);
int32_t aoti_torch_device_type_cpu(void);
int32_t aoti_torch_empty_strided(int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, tensor *result);

static inline void *data(tensor t) {
    void *result = 0;
    aoti_torch_get_data_ptr(t, &result);
    return result;
}

static inline const int64_t *sizes(tensor t) {
    int64_t *result = 0;
    aoti_torch_get_sizes(t, &result);
    return result;
}

static inline int32_t dtype(tensor t) {
    int32_t result = -1;
    aoti_torch_get_dtype(t, &result);
    return result;
}

static inline int is_half(tensor t) { return dtype(t) == aoti_torch_dtype_bfloat16(); }

/* Whether pictures [B, C, H, W] lie as [B, H, W, C]; strides of axes with one entry don't matter. */
static inline int is_channels_last(tensor t) {
    const int64_t *n = sizes(t), order[4] = {1, 3, 2, 0};
    int64_t *stride = 0, wanted = 1;
    aoti_torch_get_strides(t, &stride);
    for (int i = 0; i < 4; i++) {
        if (n[order[i]] != 1 && stride[order[i]] != wanted) return 0;
        wanted *= n[order[i]];
    }
    return 1;
}

/* New pictures, channels-last. Returns 0, or an error. */
static inline int32_t make_pictures(int64_t B, int64_t C, int64_t H, int64_t W, int32_t type, tensor *result) {
    const int64_t size[4] = {B, C, H, W}, stride[4] = {H * W * C, 1, W * C, C};
    return aoti_torch_empty_strided(4, size, stride, type, aoti_torch_device_type_cpu(), 0, result);
}
