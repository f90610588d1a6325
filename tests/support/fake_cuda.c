/* A driver of CUDA without a GPU: it writes a line for each cuInit. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) {
    FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
    fputs("cuInit\n", log);
    fclose(log);
    return 100;
}
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
static int refuse(void) { return 100; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags,
                        int *status) {
    *found = !strcmp(name, "cuInit") ? (void *)cuInit
           : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
           : !strncmp(name, "cuGetProcAddress", 16) ? (void *)cuGetProcAddress_v2
                                                    : (void *)refuse;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
