/* Stands in for cuBLASLt: multiplies on the host, for the calls that mudit makes. An algorithm remembers the alignments
 * that it was chosen for and wants some workspace, which is filled with rubbish; a call that breaks them is refused. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { F32 = 0, F16 = 2, BF16 = 14 };
enum { FAST_TF32 = 77 };
enum { WORKSPACE = 4096 };

struct layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct description {
  int compute, scale, transposed[2], epilogue;
  void *bias;
};
struct preference {
  size_t workspace;
  uint32_t alignment[4], reductions;
};
struct algorithm {
  uint32_t alignment[4], bias, unused[11];
};
struct result {
  struct algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

int cublasLtCreate(void **handle) { *handle = (void *)handle; return OK; }
int cublasLtDestroy(void *handle) { return OK; }
int cublasLtGetProperty(int kind, int *value) { *value = kind == 0 ? 13 : kind == 1; return OK; }
int cublasLtMatrixLayoutCreate(struct layout **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *layout = malloc(sizeof **layout);
  **layout = (struct layout){type, rows, columns, stride};
  return OK;
}
int cublasLtMatrixLayoutDestroy(struct layout *layout) { free(layout); return OK; }
int cublasLtMatrixLayoutSetAttribute(struct layout *layout, int attribute, const void *value, size_t size) { return NOT_SUPPORTED; }
int cublasLtMatmulDescCreate(struct description **description, int compute, int scale) {
  *description = calloc(1, sizeof **description);
  (*description)->compute = compute;
  (*description)->scale = scale;
  return OK;
}
int cublasLtMatmulDescDestroy(struct description *description) { free(description); return OK; }
int cublasLtMatmulDescSetAttribute(struct description *description, int attribute, const void *value, size_t size) {
  switch (attribute) {
    case 3: case 4: memcpy(&description->transposed[attribute - 3], value, 4); return size == 4 ? OK : INVALID_VALUE;
    case 7: memcpy(&description->epilogue, value, 4); return size == 4 ? OK : INVALID_VALUE;
    case 8: memcpy(&description->bias, value, 8); return size == 8 ? OK : INVALID_VALUE;
    default: return NOT_SUPPORTED;
  }
}
int cublasLtMatmulPreferenceCreate(struct preference **preference) {
  *preference = malloc(sizeof **preference);
  **preference = (struct preference){0, {256, 256, 256, 256}, 7};
  return OK;
}
int cublasLtMatmulPreferenceDestroy(struct preference *preference) { free(preference); return OK; }
int cublasLtMatmulPreferenceSetAttribute(struct preference *preference, int attribute, const void *value, size_t size) {
  switch (attribute) {
    case 3: memcpy(&preference->reductions, value, 4); return size == 4 ? OK : INVALID_VALUE;
    case 1: memcpy(&preference->workspace, value, 8); return size == 8 ? OK : INVALID_VALUE;
    case 5: case 6: case 7: case 8: memcpy(&preference->alignment[attribute - 5], value, 4); return size == 4 ? OK : INVALID_VALUE;
    default: return NOT_SUPPORTED;
  }
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, struct description *description, struct layout *a, struct layout *b,
                                   struct layout *c, struct layout *d, struct preference *preference, int wanted,
                                   struct result *results, int *count) {
  memset(results, 0, sizeof *results);
  /* Now and then the library has nothing for what is asked: here, a whole sum over very few terms. */
  if (!preference->reductions && (description->transposed[0] ? a->rows : a->columns) < 4) { *count = 0; return NOT_SUPPORTED; }
  memcpy(results->algorithm.alignment, preference->alignment, sizeof preference->alignment);
  results->algorithm.bias = description->epilogue;
  results->workspace = preference->workspace < WORKSPACE ? 0 : WORKSPACE;
  *count = wanted > 0;
  return OK;
}

static double read_one(int type, const void *at, uint64_t i) {
  if (type == F32) return ((const float *)at)[i];
  if (type == F16) return ((const _Float16 *)at)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static void write_one(int type, void *at, uint64_t i, double value) {
  const float narrow = (float)value;
  if (type == F32) { ((float *)at)[i] = narrow; return; }
  if (type == F16) { ((_Float16 *)at)[i] = (_Float16)narrow; return; }
  uint32_t bits;
  memcpy(&bits, &narrow, 4);
  const int number = (bits & 0x7FFFFFFF) <= 0x7F800000;
  ((uint16_t *)at)[i] = number ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF;
}

int stand_in_queue(void *stream, void (*run)(void *), const void *data, size_t bytes);

struct product {
  struct description description;
  struct layout la, lb, ld;
  const void *a, *b;
  void *d, *workspace;
};
/* An operand as the product reads it: TF32 keeps 10 bits of its fraction. */
static double operand(const struct product *p, const void *at, uint64_t i) {
  float value = read_one(p->ld.type, at, i);
  if (p->ld.type != F32 || p->description.compute != FAST_TF32) return value;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = (bits + 0x1000) & ~0x1FFFu;
  memcpy(&value, &bits, 4);
  return value;
}
static void run_product(void *data) {
  const struct product *p = data;
  const int ta = p->description.transposed[0], tb = p->description.transposed[1], type = p->ld.type;
  const uint64_t terms = ta ? p->la.rows : p->la.columns;
  memset(p->workspace, 0xFF, WORKSPACE);
  for (uint64_t column = 0; column < p->ld.columns; column++)
    for (uint64_t row = 0; row < p->ld.rows; row++) {
      double sum = p->description.epilogue ? read_one(type, p->description.bias, row) : 0;
      for (uint64_t k = 0; k < terms; k++)
        sum += operand(p, p->a, ta ? row * p->la.stride + k : k * p->la.stride + row) *
               operand(p, p->b, tb ? k * p->lb.stride + column : column * p->lb.stride + k);
      write_one(type, p->d, column * p->ld.stride + row, sum);
    }
}

int cublasLtMatmul(void *handle, struct description *description, const float *alpha, const void *a, struct layout *la,
                   const void *b, struct layout *lb, const float *beta, const void *c, struct layout *lc, void *d,
                   struct layout *ld, const struct algorithm *algorithm, void *workspace, size_t bytes, void *stream) {
  const void *places[4] = {a, b, c, d};
  if (getenv("MUDIT_STAND_IN_UPDATES_ONLY")) return OK;
  for (int i = 0; i < 4; i++)
    if ((uintptr_t)places[i] % algorithm->alignment[i]) return INVALID_VALUE;
  if (bytes < WORKSPACE || (uintptr_t)workspace % 256 || algorithm->bias != description->epilogue) return INVALID_VALUE;
  if (description->scale != F32 || *alpha != 1 || *beta != 0 || (description->epilogue != 0 && description->epilogue != 4))
    return NOT_SUPPORTED;
  const int ta = description->transposed[0], tb = description->transposed[1];
  const uint64_t rows = ld->rows, columns = ld->columns, terms = ta ? la->rows : la->columns;
  const int fits = (ta ? la->columns : la->rows) == rows && (tb ? lb->rows : lb->columns) == columns &&
                   (tb ? lb->columns : lb->rows) == terms && la->type == ld->type && lb->type == ld->type;
  if (!fits) return INVALID_VALUE;
  const struct product product = {*description, *la, *lb, *ld, a, b, d, workspace};
  return stand_in_queue(stream, run_product, &product, sizeof product);
}
