/* A CUDA driver that does nothing but hand each launch to a callback: enough for Triton's JIT and C launcher to run. */
#include <stddef.h>

typedef int Result;
typedef unsigned long long DevicePtr;
typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void *stream, *attributes;
    unsigned attribute_count;
} LaunchConfig;
typedef void (*Recorder)(const unsigned *grid, const unsigned *block, unsigned shared_bytes, void **parameters);

static Recorder recorder;
void stub_record(Recorder callback) { recorder = callback; }

Result cuInit(unsigned flags) { return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 8: *value = 49152; break;   /* shared memory per block */
    case 10: *value = 32; break;     /* warp size */
    case 12: *value = 65536; break;  /* registers per block */
    case 16: *value = 132; break;    /* multiprocessors */
    case 81: *value = 233472; break; /* shared memory per multiprocessor */
    case 97: *value = 232448; break; /* shared memory per block, opt-in */
    default: *value = 1;
    }
    return 0;
}
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)8; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)8; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)16; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)24; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuPointerGetAttribute(void *data, int attribute, DevicePtr pointer) { *(DevicePtr *)data = pointer; return 0; }
Result cuPointerGetAttributes(unsigned n, int *attributes, void **data, DevicePtr pointer) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
/* The 128 bytes of a map hold what it was encoded from, innermost dimension first, for the callback to read. */
typedef struct {
    unsigned long long address, shape[5], strides[4];
    unsigned box[5], rank, type, swizzle;
} TensorMap;
/* What CUDA's driver API documents of cuTensorMapEncodeTiled's arguments, as far as kernels here use it. */
static int refused(unsigned type, unsigned rank, void *address, const unsigned long long *shape,
                   const unsigned long long *strides, const unsigned *box, const unsigned *element_strides,
                   int interleave, int swizzle, int fill) {
    unsigned size = type == 0 ? 1 : type == 6 || type == 9 ? 2 : 0; /* UINT8, FLOAT16, BFLOAT16 */
    if (!size || rank < 1 || rank > 5 || (unsigned long long)address % 16 || interleave || fill) return 1;
    if (swizzle < 1 || swizzle > 3 || box[0] * size % 16 || box[0] * size > 16u << swizzle) return 1;
    for (unsigned i = 0; i < rank; i++) {
        if (!shape[i] || shape[i] > 1ull << 32 || !box[i] || box[i] > 256 || element_strides[i] != 1) return 1;
        if (i + 1 == rank) break;
        if (!strides[i] || strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < shape[0] * size) return 1;
        if (i && strides[i] % strides[i - 1]) return 1;
    }
    return 0;
}
Result cuTensorMapEncodeTiled(TensorMap *map, unsigned type, unsigned rank, void *address,
                              const unsigned long long *shape, const unsigned long long *strides, const unsigned *box,
                              const unsigned *element_strides, int interleave, int swizzle, int promotion, int fill) {
    if (refused(type, rank, address, shape, strides, box, element_strides, interleave, swizzle, fill)) return 1;
    map->address = (unsigned long long)address;
    map->rank = rank;
    map->type = type;
    map->swizzle = swizzle;
    for (unsigned i = 0; i < rank; i++) {
        map->shape[i] = shape[i];
        map->box[i] = box[i];
        if (i + 1 < rank) map->strides[i] = strides[i];
    }
    return 0;
}
Result cuTensorMapEncodeIm2col(void *map) { return 0; }
Result cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    if (config->shared_bytes > 232448 || config->block[0] > 1024 || !config->grid[0]) return 1;
    if (recorder) recorder(config->grid, config->block, config->shared_bytes, parameters);
    return 0;
}
Result cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared_bytes, void *stream, void **parameters, void **extra) {
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    if (recorder) recorder(grid, block, shared_bytes, parameters);
    return 0;
}
