/* A disk that fails and a clock that leaps, for hardships.py: preloaded.

   FAILING_DISK="ERRNO CALLS AFTER PATTERN" lets so many calls pass and fails all
   that follow. Counted are those that touch a path of the pattern and are named
   in CALLS: w(rite), s(ync), o(pen to make or change), m(ake a folder), r(ename
   to), u(nlink). Libraries in C++ and Rust write by the same calls as Python.

   LEAPING_CLOCK="SECONDS FILE" puts the clock of the wall forward by so many
   seconds, from when the file is there. Who waits for a time waits as before. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static int number;
static long after, seen, leap;
static char calls[16], pattern[PATH_MAX], leap_file[PATH_MAX];

__attribute__((constructor)) static void begin(void) {
  const char *said = getenv("FAILING_DISK");
  if (!said ||
      sscanf(said, "%d %15s %ld %4095[^\n]", &number, calls, &after, pattern) != 4)
    number = 0;
  said = getenv("LEAPING_CLOCK");
  if (!said || sscanf(said, "%ld %4095[^\n]", &leap, leap_file) != 2) leap = 0;
}

static int fails(char call, const char *path) {
  if (!number || !path || !strchr(calls, call) || fnmatch(pattern, path, 0))
    return 0;
  if (__atomic_fetch_add(&seen, 1, __ATOMIC_RELAXED) < after) return 0;
  errno = number;
  return 1;
}

static const char *path_of(int fd, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, buffer, PATH_MAX - 1);
  if (size < 0) return NULL;
  buffer[size] = 0;
  return buffer;
}

static int fd_fails(char call, int fd) {
  char buffer[PATH_MAX];
  int before = errno;
  if (!number || !strchr(calls, call)) return 0;
  if (fails(call, path_of(fd, buffer))) return 1;
  errno = before;
  return 0;
}

static int at_fails(char call, int folder, const char *path) {
  char whole[2 * PATH_MAX], buffer[PATH_MAX];
  if (!number || !path || path[0] == '/' || folder == AT_FDCWD)
    return fails(call, path);
  const char *start = path_of(folder, buffer);
  snprintf(whole, sizeof whole, "%s/%s", start ? start : "", path);
  return fails(call, whole);
}

#define NEXT(type, name, ...)                      \
  static type (*next)(__VA_ARGS__);                \
  if (!next) next = dlsym(RTLD_NEXT, #name)

#define ON_FD(call, type, name, parameters, arguments, ...) \
  type name parameters {                                    \
    NEXT(type, name, __VA_ARGS__);                          \
    return fd_fails(call, fd) ? -1 : next arguments;        \
  }

ON_FD('w', ssize_t, write, (int fd, const void *p, size_t n), (fd, p, n), int,
      const void *, size_t)
ON_FD('w', ssize_t, pwrite, (int fd, const void *p, size_t n, off_t at),
      (fd, p, n, at), int, const void *, size_t, off_t)
ON_FD('w', ssize_t, pwrite64, (int fd, const void *p, size_t n, off64_t at),
      (fd, p, n, at), int, const void *, size_t, off64_t)
ON_FD('w', ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n),
      int, const struct iovec *, int)
ON_FD('w', int, ftruncate, (int fd, off_t n), (fd, n), int, off_t)
ON_FD('w', int, ftruncate64, (int fd, off64_t n), (fd, n), int, off64_t)
ON_FD('w', ssize_t, copy_file_range,
      (int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned int flags),
      (from, a, fd, b, n, flags), int, off64_t *, int, off64_t *, size_t,
      unsigned int)
ON_FD('w', ssize_t, sendfile, (int fd, int from, off_t *a, size_t n),
      (fd, from, a, n), int, int, off_t *, size_t)
ON_FD('w', ssize_t, sendfile64, (int fd, int from, off64_t *a, size_t n),
      (fd, from, a, n), int, int, off64_t *, size_t)
ON_FD('s', int, fsync, (int fd), (fd), int)
ON_FD('s', int, fdatasync, (int fd), (fd), int)

#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

#define OPEN(name)                                               \
  int name(const char *path, int flags, ...) {                   \
    va_list rest;                                                \
    va_start(rest, flags);                                       \
    mode_t mode = va_arg(rest, mode_t);                          \
    va_end(rest);                                                \
    NEXT(int, name, const char *, int, ...);                     \
    if ((flags & CHANGES) && fails('o', path)) return -1;        \
    return next(path, flags, mode);                              \
  }
OPEN(open)
OPEN(open64)

#define OPEN_AT(name)                                                    \
  int name(int folder, const char *path, int flags, ...) {               \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    mode_t mode = va_arg(rest, mode_t);                                  \
    va_end(rest);                                                        \
    NEXT(int, name, int, const char *, int, ...);                        \
    if ((flags & CHANGES) && at_fails('o', folder, path)) return -1;     \
    return next(folder, path, flags, mode);                              \
  }
OPEN_AT(openat)
OPEN_AT(openat64)

int mkdir(const char *path, mode_t mode) {
  NEXT(int, mkdir, const char *, mode_t);
  return fails('m', path) ? -1 : next(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
  NEXT(int, mkdirat, int, const char *, mode_t);
  return at_fails('m', folder, path) ? -1 : next(folder, path, mode);
}

int rename(const char *from, const char *to) {
  NEXT(int, rename, const char *, const char *);
  return fails('r', to) ? -1 : next(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  NEXT(int, renameat, int, const char *, int, const char *);
  return at_fails('r', b, to) ? -1 : next(a, from, b, to);
}

int unlink(const char *path) {
  NEXT(int, unlink, const char *);
  return fails('u', path) ? -1 : next(path);
}

int unlinkat(int folder, const char *path, int flags) {
  NEXT(int, unlinkat, int, const char *, int);
  return at_fails('u', folder, path) ? -1 : next(folder, path, flags);
}

int rmdir(const char *path) {
  NEXT(int, rmdir, const char *);
  return fails('u', path) ? -1 : next(path);
}

static long leapt(void) {
  int before = errno;
  long found = leap && !access(leap_file, F_OK) ? leap : 0;
  errno = before;
  return found;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  NEXT(int, clock_gettime, clockid_t, struct timespec *);
  int result = next(clock, now);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec += leapt();
  return result;
}

int gettimeofday(struct timeval *now, void *zone) {
  NEXT(int, gettimeofday, struct timeval *, void *);
  int result = next(now, zone);
  if (!result) now->tv_sec += leapt();
  return result;
}

time_t time(time_t *kept) {
  NEXT(time_t, time, time_t *);
  time_t now = next(NULL) + leapt();
  if (kept) *kept = now;
  return now;
}
