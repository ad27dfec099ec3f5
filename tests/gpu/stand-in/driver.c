/* Stands in for NVIDIA's driver library on a machine without a GPU: one device that says it is of compute capability 8.0, or
 * of the one in MUDIT_STAND_IN_CAPABILITY (90 is 9.0).
 * Its memory is the host's, copies are copies. mudit's kernels run, compiled for the host or as PTX; those of NVIDIA's libraries and
 * of ONNX Runtime compute nothing. What is queued on a stream is done at once, or, on the streams whose numbers (from 1, in
 * the order of their making) MUDIT_STAND_IN_LATE holds, as late as the program's own waits allow: a wait that is missing then
 * shows in the values. A stream can be recorded, and the recording played. MUDIT_STAND_IN_MEMORY is the size of its memory in bytes; with
 * MUDIT_STAND_IN_BACKWARDS the threads and blocks of a kernel take turns in the opposite order; with
 * MUDIT_STAND_IN_UPDATES_ONLY no kernels run but those of the noise and of the parameters' update, so that every gradient
 * is zero. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_IMAGE = 200, NO_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, FAILED = 719, NOT_SUPPORTED = 801, RECORDING = 900, SPOILT = 901 };
enum { HEADER = 256 };
static size_t used;
static char context;
/* Each thread must have made the context its own. */
static __thread void *current;
#define WANTS_CONTEXT if (!current) return NO_CONTEXT

/* What went over the bus, and how often the host waited; for the proofs. */
struct counts { uint64_t to_device, to_device_bytes, from_device, from_device_bytes, on_device, waits; };
static struct counts counts;
void stand_in_counts(struct counts *out) { *out = counts; }

/* Streams: work that was queued and is not done. */
struct work { void (*run)(void *); struct work *next; _Alignas(16) char data[]; };
struct stream { int late; bool gone; uint64_t queued, done; struct work *first, *last; };
struct event { struct stream *stream; uint64_t after; };
enum { STREAMS = 64 };
static struct stream streams[STREAMS];
static int made;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

/* Does what was queued on a stream, up to its piece of number `until`. */
static void drain(struct stream *s, uint64_t until) {
  while (s && s->done < until && s->first) {
    struct work *work = s->first;
    s->first = work->next;
    if (!s->first) s->last = 0;
    s->done++;
    work->run(work->data);
    free(work);
  }
}
static void drain_all(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < made; i++) drain(&streams[i], streams[i].queued);
  pthread_mutex_unlock(&lock);
}
/* A recording: what is queued on its stream is not done, but kept. The host must not wait or ask for memory meanwhile. */
struct graph { struct work *first, *last; bool spoilt; };
static struct graph *recording;
static void *recorded;
static int mode;
static pthread_t recorder;
static __thread int own_mode;
int cuThreadExchangeStreamCaptureMode(int *mode) { WANTS_CONTEXT; const int before = own_mode; own_mode = *mode; *mode = before; return OK; }
/* What the recording's mode 0 forbids to every thread of mode 0, and each mode but 2 to the thread that records. */
static bool spoils(void) {
  const bool mine = recording && pthread_equal(pthread_self(), recorder);
  return recording && ((mode == 0 && own_mode == 0) || (mine && mode != 2)) && (recording->spoilt = true);
}

static struct work *copy_of(void (*run)(void *), const void *data, size_t bytes) {
  struct work *work = malloc(sizeof *work + bytes);
  work->run = run;
  work->next = 0;
  memcpy(work->data, data, bytes);
  return work;
}
/* Queues work with a copy of its data. */
int stand_in_queue(void *stream, void (*run)(void *), const void *data, size_t bytes) {
  struct stream *s = stream;
  if (s >= streams && s < streams + made && s->gone) return INVALID_HANDLE;
  pthread_mutex_lock(&lock);
  if (recording && stream == recorded) {
    struct work *work = copy_of(run, data, bytes);
    if (recording->last) recording->last->next = work; else recording->first = work;
    recording->last = work;
  } else if (s >= streams && s < streams + made && s->late) {
    struct work *work = copy_of(run, data, bytes);
    if (s->last) s->last->next = work; else s->first = work;
    s->last = work;
    s->queued++;
  } else {
    _Alignas(16) char copy[bytes + 1];
    memcpy(copy, data, bytes);
    run(copy);
  }
  pthread_mutex_unlock(&lock);
  return OK;
}
int stand_in_record(void *stream, int how) {
  if (recording) return RECORDING;
  mode = how;
  recorder = pthread_self();
  recorded = stream;
  recording = calloc(1, sizeof *recording);
  return OK;
}
bool stand_in_records(void *stream) { return recording && stream == recorded; }
int stand_in_recorded(struct graph **graph) {
  if (!recording) return INVALID;
  *graph = recording;
  recording = 0;
  return (*graph)->spoilt ? SPOILT : OK;
}
static void run_graph(void *data) {
  for (struct work *work = (*(struct graph **)data)->first; work; work = work->next) work->run(work->data);
}
int stand_in_play(struct graph *graph, void *stream) { return stand_in_queue(stream, run_graph, &graph, sizeof graph); }

/* A kernel that fails makes every later wait fail. */
static const char *complaint = "a kernel failed";
static int failed;

struct copy { void *to; const void *from; size_t bytes; int value; };
static void run_copy(void *data) { struct copy *c = data; memcpy(c->to, c->from, c->bytes); }
static void run_fill(void *data) { struct copy *c = data; memset(c->to, c->value, c->bytes); }
static void run_wait(void *data) { struct event *e = data; drain(e->stream, e->after); }

static size_t total(void) {
  const char *limit = getenv("MUDIT_STAND_IN_MEMORY");
  return limit ? strtoull(limit, 0, 10) : 80ull << 30;
}

/* 80 is 8.0. */
int stand_in_capability(void) {
  const char *given = getenv("MUDIT_STAND_IN_CAPABILITY");
  return given ? atoi(given) : 80;
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
    case 75: *value = stand_in_capability() / 10; break; /* compute capability, major */
    case 76: *value = stand_in_capability() % 10; break; /* and minor */
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
int cuCtxSynchronize(void) {
  WANTS_CONTEXT;
  if (spoils()) return RECORDING;
  counts.waits++;
  drain_all();
  return failed;
}

/* Blocks of memory by their addresses. */
struct block { uint64_t begin, end; };
static struct block *blocks;
static size_t block_count;
/* Where the block with an address belongs, or would. */
static size_t place_of(uint64_t address) {
  size_t low = 0, high = block_count;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (blocks[middle].end <= address) low = middle + 1; else high = middle;
  }
  return low;
}
static void remember(uint64_t begin, size_t bytes) {
  pthread_mutex_lock(&lock);
  const size_t place = place_of(begin);
  blocks = realloc(blocks, (block_count + 1) * sizeof *blocks);
  memmove(blocks + place + 1, blocks + place, (block_count++ - place) * sizeof *blocks);
  blocks[place] = (struct block){begin, begin + bytes};
  pthread_mutex_unlock(&lock);
}
static void forget(uint64_t begin) {
  pthread_mutex_lock(&lock);
  const size_t place = place_of(begin);
  memmove(blocks + place, blocks + place + 1, (--block_count - place) * sizeof *blocks);
  pthread_mutex_unlock(&lock);
}
/* The block that holds an address, for kernels that are watched; whether there is one. */
bool stand_in_block(uint64_t address, struct block *found) {
  pthread_mutex_lock(&lock);
  const size_t place = place_of(address);
  const bool held = place < block_count && blocks[place].begin <= address;
  if (held) *found = blocks[place];
  pthread_mutex_unlock(&lock);
  return held;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  WANTS_CONTEXT;
  if (bytes == 0) return INVALID;
  if (spoils()) return RECORDING;
  if (bytes > total() || __atomic_load_n(&used, __ATOMIC_SEQ_CST) > total() - bytes) return OUT_OF_MEMORY;
  size_t whole = HEADER + (bytes + HEADER - 1) / HEADER * HEADER;
  char *block = aligned_alloc(HEADER, whole);
  if (!block) return OUT_OF_MEMORY;
  *(size_t *)block = bytes;
  /* Ones are no numbers in any float type: what reads them before it writes shows. */
  if (bytes <= 64 << 20) memset(block + HEADER, getenv("MUDIT_STAND_IN_UPDATES_ONLY") ? 0 : 0xFF, bytes);
  __atomic_add_fetch(&used, bytes, __ATOMIC_SEQ_CST);
  *address = (uint64_t)(uintptr_t)(block + HEADER);
  remember(*address, bytes);
  return OK;
}
int cuMemFree_v2(uint64_t address) {
  WANTS_CONTEXT;
  if (!address) return OK;
  if (spoils()) return RECORDING;
  drain_all();
  forget(address);
  char *block = (char *)(uintptr_t)address - HEADER;
  __atomic_sub_fetch(&used, *(size_t *)block, __ATOMIC_SEQ_CST);
  free(block);
  return OK;
}
int cuMemGetInfo_v2(size_t *available, size_t *whole) { WANTS_CONTEXT; *whole = total(); *available = total() - used; return OK; }
/* Whether bytes of the device lie in one block. */
static bool held(uint64_t address, size_t bytes) {
  struct block block;
  return stand_in_block(address, &block) && bytes <= block.end - address;
}
int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) { WANTS_CONTEXT; if (spoils()) return RECORDING; *address = aligned_alloc(HEADER, bytes / HEADER * HEADER + HEADER); return *address ? OK : OUT_OF_MEMORY; }
int cuMemFreeHost(void *address) { WANTS_CONTEXT; drain_all(); free(address); return OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) {
  WANTS_CONTEXT;
  if (!held(to, n)) return INVALID;
  __atomic_add_fetch(&counts.to_device, 1, __ATOMIC_SEQ_CST);
  __atomic_add_fetch(&counts.to_device_bytes, n, __ATOMIC_SEQ_CST);
  return stand_in_queue(stream, run_copy, &(struct copy){(void *)(uintptr_t)to, from, n}, sizeof(struct copy));
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) {
  WANTS_CONTEXT;
  if (!held(from, n)) return INVALID;
  __atomic_add_fetch(&counts.from_device, 1, __ATOMIC_SEQ_CST);
  __atomic_add_fetch(&counts.from_device_bytes, n, __ATOMIC_SEQ_CST);
  return stand_in_queue(stream, run_copy, &(struct copy){to, (void *)(uintptr_t)from, n}, sizeof(struct copy));
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *stream) {
  WANTS_CONTEXT;
  if (!held(to, n) || !held(from, n)) return INVALID;
  __atomic_add_fetch(&counts.on_device, 1, __ATOMIC_SEQ_CST);
  return stand_in_queue(stream, run_copy, &(struct copy){(void *)(uintptr_t)to, (void *)(uintptr_t)from, n}, sizeof(struct copy));
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void *stream) {
  WANTS_CONTEXT;
  if (!held(to, n)) return INVALID;
  return stand_in_queue(stream, run_fill, &(struct copy){(void *)(uintptr_t)to, 0, n, value}, sizeof(struct copy));
}

int cuStreamCreate(void **stream, unsigned flags) {
  WANTS_CONTEXT;
  const char *late = getenv("MUDIT_STAND_IN_LATE");
  pthread_mutex_lock(&lock);
  int number = made < STREAMS ? made++ : STREAMS - 1;
  streams[number].late = late && strchr(late, '1' + number) != 0;
  *stream = &streams[number];
  pthread_mutex_unlock(&lock);
  return OK;
}
int cuStreamDestroy_v2(void *stream) {
  struct stream *s = stream;
  if (s < streams || s >= streams + made || s->gone) return INVALID_HANDLE;
  drain(s, s->queued);
  s->gone = true;
  return OK;
}
int cuStreamSynchronize(void *stream) {
  WANTS_CONTEXT;
  struct stream *s = stream;
  if (recording && (stream == recorded || !stream) && spoils()) return RECORDING;
  counts.waits++;
  if (s < streams || s >= streams + made) { drain_all(); return failed; }
  pthread_mutex_lock(&lock);
  drain(s, s->queued);
  pthread_mutex_unlock(&lock);
  return failed;
}
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { WANTS_CONTEXT; return stand_in_queue(stream, run_wait, event, sizeof(struct event)); }
int cuEventCreate(void **event, unsigned flags) { WANTS_CONTEXT; *event = calloc(1, sizeof(struct event)); return OK; }
int cuEventDestroy_v2(void *event) { free(event); return OK; }
int cuEventRecord(void *event, void *stream) {
  WANTS_CONTEXT;
  struct stream *s = stream;
  struct event *e = event;
  pthread_mutex_lock(&lock);
  *e = (struct event){s, s->queued};
  pthread_mutex_unlock(&lock);
  return OK;
}
int cuEventQuery(void *event) { struct event *e = event; return !e->stream || e->stream->done >= e->after ? OK : NOT_READY; }
int cuEventSynchronize(void *event) {
  WANTS_CONTEXT;
  if (spoils()) return RECORDING;
  pthread_mutex_lock(&lock);
  counts.waits++;
  run_wait(event);
  pthread_mutex_unlock(&lock);
  return failed;
}
/* A module is a source of kernels, compiled for the host beside this library and known by its name, or the PTX of one, which
 * the library `ptx.so` beside this one runs. */
typedef const char *launch(const void *, const uint32_t *, uint32_t, uint32_t, bool, void **);
typedef void **keep(const void *, void **);
struct module { void *library, *ptx; };
struct function {
  launch *launch;
  keep *keep;
  const void *what; /* for those two: its name, or its instructions */
  char name[64];
  int shared;
};
static void *beside(const char *name) {
  Dl_info here;
  char path[4096];
  if (!dladdr(beside, &here)) return 0;
  snprintf(path, sizeof path, "%.*s%s.so", (int)(strrchr(here.dli_fname, '/') + 1 - here.dli_fname), here.dli_fname, name);
  return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

int cuModuleLoadData(struct module **module, const char *image) {
  WANTS_CONTEXT;
  static const char begin[] = "stand-in ";
  const bool compiled = !strncmp(image, begin, sizeof begin - 1);
  struct module m = {beside(compiled ? image + sizeof begin - 1 : "ptx"), 0};
  if (!m.library) return NO_IMAGE;
  if (!compiled) {
    void *(*load)(const char *, bool (*)(uint64_t, struct block *)) = dlsym(m.library, "ptx_load");
    if (!(m.ptx = load(image, stand_in_block))) return NO_IMAGE;
  }
  *module = malloc(sizeof m);
  **module = m;
  return OK;
}
int cuModuleGetFunction(struct function **function, struct module *module, const char *name) {
  WANTS_CONTEXT;
  struct function f = {.shared = 48 << 10};
  snprintf(f.name, sizeof f.name, "%s", name);
  if (module->ptx) {
    const void *(*find)(void *, const char *) = dlsym(module->library, "ptx_function");
    uint32_t (*shared)(const void *) = dlsym(module->library, "ptx_shared_bytes");
    if (!(f.what = find(module->ptx, name))) return NOT_FOUND;
    f.launch = dlsym(module->library, "ptx_launch");
    f.keep = dlsym(module->library, "ptx_keep");
    f.shared -= shared(f.what);
  } else {
    bool (*has)(const char *) = dlsym(module->library, "mudit_has");
    if (!has || !has(name)) return NOT_FOUND;
    f.launch = dlsym(module->library, "mudit_launch");
    f.keep = dlsym(module->library, "mudit_keep");
  }
  *function = malloc(sizeof f);
  **function = f;
  if (!module->ptx) (*function)->what = (*function)->name;
  return OK;
}
int cuFuncSetAttribute(struct function *function, int attribute, int value) {
  WANTS_CONTEXT;
  if (attribute != 8 || value > 166912) return INVALID;
  if (value > function->shared) function->shared = value;
  return OK;
}
struct call { struct function *function; uint32_t grid[3], threads, shared; void **arguments; };
static void run_call(void *data) {
  struct call *c = data;
  const char *words = c->function->launch(c->function->what, c->grid, c->threads, c->shared, getenv("MUDIT_STAND_IN_BACKWARDS"), c->arguments);
  if (words) { complaint = words; failed = FAILED; }
}
int cuLaunchKernel(struct function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra) {
  WANTS_CONTEXT;
  if (!x || !y || !z || x > 2147483647 || y > 65535 || z > 65535 || threads > 1024 || threads_y != 1 || threads_z != 1 ||
      shared > (unsigned)function->shared)
    return INVALID;
  const bool update = !strncmp(function->name, "update_", 7) || !strncmp(function->name, "accumulate_", 11) ||
                      !strncmp(function->name, "random_", 7);
  if (getenv("MUDIT_STAND_IN_UPDATES_ONLY") && !update) return OK;
  /* What the arguments point to is gone when the kernel runs. */
  struct call call = {function, {x, y, z}, threads, shared, function->keep(function->what, arguments)};
  stand_in_queue(stream, run_call, &call, sizeof call);
  return failed;
}

int cuGetErrorName(int error, const char **text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : error == FAILED ? complaint : "refused by the stand-in";
  return OK;
}
int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }
/* NVRTC looks for it. */
int cuGetExportTable(const void **table, const void *which) { *table = 0; return NOT_FOUND; }
int cuTensorMapEncodeTiled(void) { return NOT_SUPPORTED; }
