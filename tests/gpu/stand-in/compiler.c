/* Stands in for NVRTC: whatever it compiles, the answer is the name of the source, by which the stand-in driver finds the
 * same kernels compiled for the host. With MUDIT_STAND_IN_NVRTC the real library of that path compiles, and the answer is its
 * PTX in the place of machine code, which the stand-in driver runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6, INTERNAL = 11 };
struct program {
  char name[128];
  const char *log;
  int whole;
};

/* A function of the real library, when that is asked for. */
static void *real(const char *name) {
  static void *library;
  const char *path = getenv("MUDIT_STAND_IN_NVRTC");
  if (!path) return 0;
  if (!library) {
    char folder[4096], builtins[5000];
    snprintf(folder, sizeof folder, "%s", path);
    snprintf(builtins, sizeof builtins, "%s/libnvrtc-builtins.so.13.0", dirname(folder));
    /* The compiler asks for it by its bare name, and calls its own functions, not these. */
    if (!dlopen(builtins, RTLD_NOW | RTLD_GLOBAL) || !(library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND))) {
      fprintf(stderr, "the real NVRTC: %s\n", dlerror());
      abort();
    }
  }
  return dlsym(library, name);
}
#define FORWARD(type, name, ...) do { int (*it) type = real(name); if (it) return it(__VA_ARGS__); } while (0)

int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return OK; }
int nvrtcCreateProgram(struct program **program, const char *text, const char *name, int headers, const char *const *t, const char *const *n) {
  FORWARD((struct program **, const char *, const char *, int, const char *const *, const char *const *), "nvrtcCreateProgram", program, text, name, headers, t, n);
  *program = calloc(1, sizeof **program);
  snprintf((*program)->name, sizeof (*program)->name, "%s", name);
  (*program)->whole = strstr(text, "device.cuh") && strstr(text, name);
  (*program)->log = "";
  return OK;
}
int nvrtcDestroyProgram(struct program **program) {
  FORWARD((struct program **), "nvrtcDestroyProgram", program);
  free(*program);
  *program = 0;
  return OK;
}
int nvrtcCompileProgram(struct program *program, int count, const char *const *options) {
  FORWARD((struct program *, int, const char *const *), "nvrtcCompileProgram", program, count, options);
  int architecture = 0;
  char wanted[40];
  const char *capability = getenv("MUDIT_STAND_IN_CAPABILITY");
  snprintf(wanted, sizeof wanted, "--gpu-architecture=sm_%s", capability ? capability : "80");
  for (int i = 0; i < count; i++) architecture |= !strcmp(options[i], wanted);
  if (!architecture) { program->log = "not for the stand-in's architecture"; return INVALID_OPTION; }
  if (!program->whole) { program->log = "not a source of ours"; return COMPILATION; }
  return OK;
}
int nvrtcGetProgramLogSize(struct program *program, size_t *size) {
  FORWARD((struct program *, size_t *), "nvrtcGetProgramLogSize", program, size);
  *size = strlen(program->log) + 1;
  return OK;
}
int nvrtcGetProgramLog(struct program *program, char *log) {
  FORWARD((struct program *, char *), "nvrtcGetProgramLog", program, log);
  strcpy(log, program->log);
  return OK;
}
int nvrtcGetCUBINSize(struct program *program, size_t *size) {
  FORWARD((struct program *, size_t *), "nvrtcGetPTXSize", program, size);
  *size = sizeof "stand-in " + strlen(program->name);
  return OK;
}
int nvrtcGetCUBIN(struct program *program, char *image) {
  FORWARD((struct program *, char *), "nvrtcGetPTX", program, image);
  sprintf(image, "stand-in %s", program->name);
  return OK;
}
