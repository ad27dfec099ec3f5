/* Stands in for NVRTC: whatever it compiles, the answer is the name of the source, by which the stand-in driver finds the
 * same kernels compiled for the host. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6 };
struct program {
  char name[128];
  const char *log;
  int whole;
};

int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return OK; }
int nvrtcCreateProgram(struct program **program, const char *text, const char *name, int headers, const char *const *t, const char *const *n) {
  *program = calloc(1, sizeof **program);
  snprintf((*program)->name, sizeof (*program)->name, "%s", name);
  (*program)->whole = strstr(text, "device.cuh") && strstr(text, name);
  (*program)->log = "";
  return OK;
}
int nvrtcDestroyProgram(struct program **program) { free(*program); *program = 0; return OK; }
int nvrtcCompileProgram(struct program *program, int count, const char *const *options) {
  int architecture = 0;
  for (int i = 0; i < count; i++) architecture |= !strcmp(options[i], "--gpu-architecture=sm_80");
  if (!architecture) { program->log = "not for the stand-in's architecture"; return INVALID_OPTION; }
  if (!program->whole) { program->log = "not a source of ours"; return COMPILATION; }
  return OK;
}
int nvrtcGetProgramLogSize(struct program *program, size_t *size) { *size = strlen(program->log) + 1; return OK; }
int nvrtcGetProgramLog(struct program *program, char *log) { strcpy(log, program->log); return OK; }
int nvrtcGetCUBINSize(struct program *program, size_t *size) { *size = sizeof "stand-in " + strlen(program->name); return OK; }
int nvrtcGetCUBIN(struct program *program, char *image) { sprintf(image, "stand-in %s", program->name); return OK; }
