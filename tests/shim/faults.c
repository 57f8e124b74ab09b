// Faults of reads, writes, and processes, for a program that this library is preloaded into.
//
// FAULT names one fault. Writes are those to files of temporary names, reads those of models and of
// inputs, whose names begin with "in.".
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fault(const char *name) {
  const char *wanted = getenv("FAULT");
  return wanted && strcmp(wanted, name) == 0;
}

// Whether the path of an open file contains a text.
static int is_named(int fd, const char *text) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strstr(path, text) != NULL;
}

static int is_temporary(int fd) { return is_named(fd, "/.tier-plan-"); }

static int fail(int code) {
  errno = code;
  return -1;
}

// Every second call, from the first on.
static int is_turn(void) {
  static int calls;
  return __sync_fetch_and_add(&calls, 1) % 2 == 0;
}

static int is_input(int fd) { return is_named(fd, "/in."); }

ssize_t read(int fd, void *bytes, size_t n) {
  static ssize_t (*real)(int, void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "read");
  if (getenv("FAULT") && is_input(fd)) {
    static int calls;
    if (fault("input-error")) return fail(EIO);
    // The first bytes arrive, so that the file is known for what it is.
    if (fault("input-breaks") && calls++) return fail(EIO);
    if (fault("input-interrupted") && is_turn()) return fail(EINTR);
    if (fault("input-breaks") && n > 8) n = 8;
    if (fault("input-short") && n > 3) n = n / 3;
  }
  return real(fd, bytes, n);
}

ssize_t write(int fd, const void *bytes, size_t n) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  if (getenv("FAULT") && is_temporary(fd)) {
    static int calls;
    if (fault("kill-write")) raise(SIGKILL);
    // Half of the first write arrives, as on a disk that fills up.
    if (fault("full") && calls++) return fail(ENOSPC);
    if (fault("bumpy") && is_turn()) return fail(EINTR);
    if ((fault("full") || fault("bumpy")) && n > 1) n = n / 2;
  }
  return real(fd, bytes, n);
}

int fsync(int fd) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  if (fault("fsync") && is_temporary(fd)) return fail(EIO);
  return real(fd);
}

int rename(const char *from, const char *to) {
  static int (*real)(const char *, const char *);
  if (!real) real = dlsym(RTLD_NEXT, "rename");
  if (fault("kill-rename")) raise(SIGKILL);
  return real(from, to);
}

ssize_t pread64(int fd, void *bytes, size_t n, off64_t offset) {
  static ssize_t (*real)(int, void *, size_t, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "pread64");
  if (getenv("FAULT") && is_input(fd)) {
    if (fault("input-error") || fault("input-breaks")) return fail(EIO);
    if (fault("input-interrupted") && is_turn()) return fail(EINTR);
    // Direct reads end at a page.
    if (fault("input-short") && n > 8192) n = n / 2 / 4096 * 4096;
  }
  if (getenv("FAULT") && is_named(fd, ".gguf")) {
    if (fault("read-slow")) sleep(5);
    // Headers are read as they are.
    if (fault("read-error") && offset > (1 << 20)) return fail(EIO);
    if (fault("read-interrupted") && is_turn()) return fail(EINTR);
    // Direct reads end at a page.
    if (fault("read-short") && n > 4096) n = n / 2 / 4096 * 4096 + (n < 8192 ? 4096 : 0);
  }
  return real(fd, bytes, n, offset);
}
