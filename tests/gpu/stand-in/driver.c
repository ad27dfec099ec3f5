/* Stands in for NVIDIA's driver library on a machine without a GPU: one device that says it is of compute capability 8.0.
 * Its memory is the host's, copies are copies, everything that is queued is done at once. mudit's kernels run, compiled for
 * the host; those of NVIDIA's libraries and of ONNX Runtime compute nothing. MUDIT_STAND_IN_MEMORY is the size of its memory
 * in bytes; with MUDIT_STAND_IN_BACKWARDS the threads and blocks of a kernel take turns in the opposite order. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_IMAGE = 200, NOT_FOUND = 500, FAILED = 719, NOT_SUPPORTED = 801 };
enum { HEADER = 256 };
static size_t used;
static void *current;
static char context, object;

static size_t total(void) {
  const char *limit = getenv("MUDIT_STAND_IN_MEMORY");
  return limit ? strtoull(limit, 0, 10) : 80ull << 30;
}

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : OK; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "stand-in"); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = total(); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;    /* threads of a block */
    case 10: *value = 32; break;     /* threads of a warp */
    case 16: *value = 108; break;    /* multiprocessors */
    case 75: *value = 8; break;      /* compute capability, major */
    case 76: *value = 0; break;      /* and minor */
    case 97: *value = 166912; break; /* shared memory of a block, on request */
    case 115: *value = 0; break;     /* memory pools */
    default: *value = 1;
  }
  return OK;
}
int cuDevicePrimaryCtxRetain(void **ctx, int device) { *ctx = &context; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuCtxGetCurrent(void **ctx) { *ctx = current; return OK; }
int cuCtxSetCurrent(void *ctx) { current = ctx; return OK; }
int cuCtxSynchronize(void) { return OK; }

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  if (bytes == 0) return INVALID;
  if (bytes > total() || __atomic_load_n(&used, __ATOMIC_SEQ_CST) > total() - bytes) return OUT_OF_MEMORY;
  size_t whole = HEADER + (bytes + HEADER - 1) / HEADER * HEADER;
  char *block = aligned_alloc(HEADER, whole);
  if (!block) return OUT_OF_MEMORY;
  *(size_t *)block = bytes;
  /* Ones are no numbers in any float type: what reads them before it writes shows. */
  if (bytes <= 64 << 20) memset(block + HEADER, 0xFF, bytes);
  __atomic_add_fetch(&used, bytes, __ATOMIC_SEQ_CST);
  *address = (uint64_t)(uintptr_t)(block + HEADER);
  return OK;
}
int cuMemFree_v2(uint64_t address) {
  if (!address) return OK;
  char *block = (char *)(uintptr_t)address - HEADER;
  __atomic_sub_fetch(&used, *(size_t *)block, __ATOMIC_SEQ_CST);
  free(block);
  return OK;
}
int cuMemGetInfo_v2(size_t *available, size_t *whole) { *whole = total(); *available = total() - used; return OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) { memcpy((void *)(uintptr_t)to, from, n); return OK; }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) { memcpy(to, (void *)(uintptr_t)from, n); return OK; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *stream) { memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, n); return OK; }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void *stream) { memset((void *)(uintptr_t)to, value, n); return OK; }

int cuStreamCreate(void **stream, unsigned flags) { *stream = &object; return OK; }
int cuStreamDestroy_v2(void *stream) { return OK; }
int cuStreamSynchronize(void *stream) { return OK; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return OK; }
int cuEventCreate(void **event, unsigned flags) { *event = &object; return OK; }
int cuEventDestroy_v2(void *event) { return OK; }
int cuEventRecord(void *event, void *stream) { return OK; }
int cuEventQuery(void *event) { return OK; }
int cuEventSynchronize(void *event) { return OK; }
/* A module is a source of kernels, compiled for the host beside this library. */
typedef const char *launch(const char *, const uint32_t *, uint32_t, uint32_t, bool, void **);
struct function {
  launch *launch;
  char name[64];
  int shared;
};
static const char *complaint = "a kernel failed";

int cuModuleLoadData(void **module, const char *image) {
  static const char begin[] = "stand-in ";
  Dl_info here;
  char path[4096];
  if (strncmp(image, begin, sizeof begin - 1) || !dladdr(cuModuleLoadData, &here)) return NO_IMAGE;
  snprintf(path, sizeof path, "%.*s%s.so", (int)(strrchr(here.dli_fname, '/') + 1 - here.dli_fname), here.dli_fname, image + sizeof begin - 1);
  *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return *module ? OK : NO_IMAGE;
}
int cuModuleGetFunction(struct function **function, void *module, const char *name) {
  bool (*has)(const char *) = dlsym(module, "mudit_has");
  if (!has || !has(name)) return NOT_FOUND;
  *function = calloc(1, sizeof **function);
  (*function)->launch = dlsym(module, "mudit_launch");
  snprintf((*function)->name, sizeof (*function)->name, "%s", name);
  (*function)->shared = 48 << 10;
  return OK;
}
int cuFuncSetAttribute(struct function *function, int attribute, int value) {
  if (attribute != 8 || value > 166912) return INVALID;
  if (value > function->shared) function->shared = value;
  return OK;
}
int cuLaunchKernel(struct function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra) {
  static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
  const uint32_t grid[3] = {x, y, z};
  if (!x || !y || !z || x > 2147483647 || y > 65535 || z > 65535 || threads > 1024 || threads_y != 1 || threads_z != 1 ||
      shared > (unsigned)function->shared)
    return INVALID;
  pthread_mutex_lock(&turn);
  const char *words = function->launch(function->name, grid, threads, shared, getenv("MUDIT_STAND_IN_BACKWARDS"), arguments);
  if (words) complaint = words;
  pthread_mutex_unlock(&turn);
  return words ? FAILED : OK;
}

int cuGetErrorName(int error, const char **text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : error == FAILED ? complaint : "refused by the stand-in";
  return OK;
}
int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }
int cuTensorMapEncodeTiled(void) { return NOT_SUPPORTED; }
