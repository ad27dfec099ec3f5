/* Stands in for NVIDIA's runtime library, on top of the stand-in driver. What the CUDA provider needs beside these
 * functions is filled in when the library is built, as functions that succeed and do nothing. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0 };
int cuMemAlloc_v2(uint64_t *, size_t);
int cuMemFree_v2(uint64_t);
int cuMemGetInfo_v2(size_t *, size_t *);
int cuDeviceGetAttribute(int *, int, int);
int cuMemcpyHtoDAsync_v2(uint64_t, const void *, size_t, void *);
int cuMemcpyDtoHAsync_v2(void *, uint64_t, size_t, void *);
int cuMemcpyDtoDAsync_v2(uint64_t, uint64_t, size_t, void *);
int cuMemsetD8Async(uint64_t, unsigned char, size_t, void *);
int cuStreamSynchronize(void *);
int cuCtxSynchronize(void);
_Bool stand_in_records(void *);
int stand_in_record(void *, int);
int stand_in_recorded(void **);
int stand_in_play(void *, void *);
int stand_in_capability(void);
int stand_in_queue(void *, void (*)(void *), const void *, size_t);
int cuCtxSetCurrent(void *);
int cuDevicePrimaryCtxRetain(void **, int);
static char object;
/* The runtime makes the context a thread's own when the thread first asks for something. */
static void begin(void) {
  void *context;
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxSetCurrent(context);
}

int cudaGetDeviceCount(int *count) { *count = 1; return OK; }
int cudaGetDevice(int *device) { *device = 0; return OK; }
int cudaSetDevice(int device) { return OK; }
int cudaDriverGetVersion(int *version) { *version = 13000; return OK; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return OK; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { return cuDeviceGetAttribute(value, attribute, device); }
/* CUDA 13's record has 1008 bytes; these are the places of what the provider reads. */
int cudaGetDeviceProperties(char *record, int device) {
  begin();
  size_t free_bytes;
  memset(record, 0, 1008);
  strcpy(record, "stand-in");
  cuMemGetInfo_v2(&free_bytes, (size_t *)(record + 288));
  *(size_t *)(record + 296) = 49152;   /* shared memory of a block */
  *(int *)(record + 304) = 65536;      /* registers of a block */
  *(int *)(record + 308) = 32;         /* threads of a warp */
  *(int *)(record + 320) = 1024;       /* threads of a block */
  memcpy(record + 324, (int[]){1024, 1024, 64}, 12);
  memcpy(record + 336, (int[]){2147483647, 65535, 65535}, 12);
  memcpy(record + 360, (int[]){stand_in_capability() / 10, stand_in_capability() % 10}, 8);
  *(int *)(record + 384) = 108;        /* multiprocessors */
  *(int *)(record + 596) = 40 << 20;   /* second-level cache */
  *(int *)(record + 604) = 2048;       /* threads of a multiprocessor */
  *(size_t *)(record + 624) = 167936;  /* shared memory of a multiprocessor */
  *(int *)(record + 632) = 65536;      /* registers of a multiprocessor */
  *(size_t *)(record + 672) = 166912;  /* shared memory of a block, on request */
  *(int *)(record + 688) = 32;         /* blocks of a multiprocessor */
  return OK;
}
int cudaMalloc(void **address, size_t n) { begin(); uint64_t a; int e = cuMemAlloc_v2(&a, n ? n : 1); if (!e) *address = (void *)(uintptr_t)a; return e; }
int cudaMallocFromPoolAsync(void **address, size_t n, void *pool, void *stream) { return cudaMalloc(address, n); }
int cudaFree(void *address) { begin(); return cuMemFree_v2((uint64_t)(uintptr_t)address); }
int cudaFreeAsync(void *address, void *stream) { return cudaFree(address); }
int cudaMallocHost(void **address, size_t n) { *address = aligned_alloc(256, (n + 256) / 256 * 256); return *address ? OK : 2; }
int cudaHostAlloc(void **address, size_t n, unsigned flags) { return cudaMallocHost(address, n); }
int cudaFreeHost(void *address) { free(address); return OK; }
int cudaMemGetInfo(size_t *available, size_t *whole) { begin(); return cuMemGetInfo_v2(available, whole); }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
  begin();
  switch (kind) {
    case 1: return cuMemcpyHtoDAsync_v2((uint64_t)(uintptr_t)to, from, n, stream);
    case 2: return cuMemcpyDtoHAsync_v2(to, (uint64_t)(uintptr_t)from, n, stream);
    default: return cuMemcpyDtoDAsync_v2((uint64_t)(uintptr_t)to, (uint64_t)(uintptr_t)from, n, stream);
  }
}
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { begin(); cuCtxSynchronize(); return cudaMemcpyAsync(to, from, n, kind, 0); }
int cudaMemset(void *to, int value, size_t n) { begin(); cuCtxSynchronize(); memset(to, value, n); return OK; }
int cudaMemsetAsync(void *to, int value, size_t n, void *stream) { begin(); return cuMemsetD8Async((uint64_t)(uintptr_t)to, value, n, stream); }
int cudaDeviceSynchronize(void) { begin(); return cuCtxSynchronize(); }
int cudaStreamSynchronize(void *stream) { begin(); return cuStreamSynchronize(stream); }
int cudaStreamCreate(void **stream) { *stream = &object; return OK; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = &object; return OK; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = stand_in_records(stream); return OK; }
int cudaStreamBeginCapture(void *stream, int mode) { return stand_in_record(stream, mode); }
int cudaStreamEndCapture(void *stream, void **graph) { return stand_in_recorded(graph); }
/* A line in the journal of engines, where there is one. */
static void note(const char *line) {
  const char *file = getenv("MUDIT_STAND_IN_TENSORRT");
  FILE *out = file ? fopen(file, "a") : 0;
  if (out) { fprintf(out, "%s\n", line); fclose(out); }
}
int cudaGraphInstantiate(void **playable, void *graph, unsigned long long flags) { note("{\"recorded\":true}"); *playable = graph; return OK; }
int cudaGraphLaunch(void *playable, void *stream) { note("{\"played\":true}"); return stand_in_play(playable, stream); }
struct host_call { void (*function)(void *); void *argument; };
static void run_host_call(void *data) { struct host_call *c = data; c->function(c->argument); }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
  return stand_in_queue(stream, run_host_call, &(struct host_call){function, argument}, sizeof(struct host_call));
}
int cudaEventCreate(void **event) { *event = &object; return OK; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = &object; return OK; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return OK; }
int cudaMemPoolCreate(void **pool, void *properties) { *pool = &object; return OK; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) { *function = 0; if (status) *status = 1; return OK; }
int cudaPointerGetAttributes(int *record, const void *address) {
  memset(record, 0, 88);
  record[0] = 2; /* memory of the device */
  memcpy((char *)record + 8, &address, sizeof address);
  return OK;
}
int cudaFuncGetAttributes(char *record, const void *function) { memset(record, 0, 144); *(int *)(record + 24) = 1024; return OK; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) { *blocks = 2; return OK; }
const char *cudaGetErrorString(int error) { return error == 2 ? "out of memory" : "refused by the stand-in"; }
const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }
void **__cudaRegisterFatBinary(void *code) { static void *handle; return &handle; }
