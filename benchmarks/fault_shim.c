/* Faults of a disk and of a clock, between a process and libc: LD_PRELOAD of benchmarks.fault_shim.
 *
 * Only files below $FAULT_BELOW are touched. What happens now is in the file $FAULT_CONTROL, which
 * the process maps: it may be changed at any moment, by anyone. A sync that fails also takes the
 * bytes written since the last one that did not, as a kernel may that drops the pages: they read
 * as zeros from then on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control { int64_t read_errno, write_errno, sync_errno, bytes_s, clock_s, hits; };
static struct control nothing, *now = &nothing;
static const char *below = "";
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
enum { RANGES = 65536 };
static struct { ino_t inode; off_t at; size_t size; } ranges[RANGES];
static int num_ranges;

#define REAL(name) static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("FAULT_CONTROL");
  if (getenv("FAULT_BELOW")) below = getenv("FAULT_BELOW");
  int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *at = mmap(NULL, sizeof *now, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at != MAP_FAILED) now = at;
  close(fd);
}

static int ours(int fd) {
  if (!(now->read_errno | now->write_errno | now->sync_errno | now->bytes_s)) return 0;
  char link[64], path[512];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  return length > 0 && *below && !strncmp(path, below, strlen(below));
}

static int fails(int64_t error) {
  if (!error) return 0;
  __atomic_add_fetch(&now->hits, 1, __ATOMIC_RELAXED);
  errno = (int)error;
  return 1;
}

static void slow(size_t size) {
  if (!now->bytes_s) return;
  __atomic_add_fetch(&now->hits, 1, __ATOMIC_RELAXED);
  pthread_mutex_lock(&lock); /* one device */
  usleep((useconds_t)(1e6 * (double)size / (double)now->bytes_s));
  pthread_mutex_unlock(&lock);
}

static void note(int fd, off_t at, ssize_t size) {
  struct stat seen;
  if (!now->sync_errno || size <= 0 || fstat(fd, &seen)) return;
  if (fcntl(fd, F_GETFL) & O_DSYNC) return; /* synced as it was written: LMDB's first pages */
  pthread_mutex_lock(&lock);
  if (num_ranges < RANGES) {
    ranges[num_ranges].inode = seen.st_ino;
    ranges[num_ranges].at = at;
    ranges[num_ranges++].size = (size_t)size;
  }
  pthread_mutex_unlock(&lock);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  REAL(pwrite);
  if (!ours(fd)) return real(fd, data, size, at);
  if (fails(now->write_errno)) return -1;
  slow(size);
  ssize_t done = real(fd, data, size, at);
  note(fd, at, done);
  return done;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return pwrite(fd, data, size, at); }

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
  REAL(pwritev);
  if (!ours(fd)) return real(fd, parts, count, at);
  if (fails(now->write_errno)) return -1;
  ssize_t done = real(fd, parts, count, at);
  if (done > 0) slow((size_t)done);
  note(fd, at, done);
  return done;
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  return flags ? (errno = EOPNOTSUPP, -1) : pwritev(fd, parts, count, at);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at) { return pwritev(fd, parts, count, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) { /* LMDB: runs of pages */
  REAL(writev);
  if (!ours(fd)) return real(fd, parts, count);
  if (fails(now->write_errno)) return -1;
  off_t at = lseek(fd, 0, SEEK_CUR);
  ssize_t done = real(fd, parts, count);
  if (done > 0) slow((size_t)done);
  note(fd, at, done);
  return done;
}

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) {
  REAL(preadv);
  if (!ours(fd)) return real(fd, parts, count, at);
  if (fails(now->read_errno)) return -1;
  ssize_t done = real(fd, parts, count, at);
  if (done > 0) slow((size_t)done);
  return done;
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  return flags ? (errno = EOPNOTSUPP, -1) : preadv(fd, parts, count, at);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) { return preadv(fd, parts, count, at); }

ssize_t sendfile(int out, int in, off_t *at, size_t size) {
  REAL(sendfile);
  if (ours(in) && fails(now->read_errno)) return -1;
  return real(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off_t *at, size_t size) { return sendfile(out, in, at, size); }

int posix_fallocate(int fd, off_t at, off_t size) {
  REAL(posix_fallocate);
  if (ours(fd) && fails(now->write_errno)) return (int)now->write_errno;
  return real(fd, at, size);
}
int posix_fallocate64(int fd, off_t at, off_t size) { return posix_fallocate(fd, at, size); }

/* Every second or so fails: so the one of the slots may, and the one of the index behind it not. */
static int sync_fails(int fd) {
  static const char zeros[4096];
  static unsigned calls;
  struct stat seen;
  if (!now->sync_errno || !ours(fd) || fstat(fd, &seen)) return 0;
  unsigned call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  int lost = (call * 2654435761u >> 16 & 1) && fails(now->sync_errno);
  ssize_t (*put)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  int plain = lost ? open(link, O_WRONLY | O_CLOEXEC) : -1; /* fd may be O_DIRECT */
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_ranges; i++) {
    if (ranges[i].inode != seen.st_ino) continue;
    for (size_t done = 0; plain >= 0 && done < ranges[i].size; done += sizeof zeros) {
      size_t left = ranges[i].size - done;
      if (put(plain, zeros, left < sizeof zeros ? left : sizeof zeros, ranges[i].at + (off_t)done) < 0) break;
    }
    ranges[i--] = ranges[--num_ranges];
  }
  pthread_mutex_unlock(&lock);
  if (plain >= 0) close(plain);
  if (lost) errno = (int)now->sync_errno;
  return lost;
}

int fdatasync(int fd) { REAL(fdatasync); return sync_fails(fd) ? -1 : real(fd); }
int fsync(int fd) { REAL(fsync); return sync_fails(fd) ? -1 : real(fd); }

int clock_gettime(clockid_t which, struct timespec *out) {
  REAL(clock_gettime);
  int result = real(which, out);
  if (!result && which == CLOCK_REALTIME) out->tv_sec += now->clock_s;
  return result;
}
time_t time(time_t *out) {
  struct timespec read;
  clock_gettime(CLOCK_REALTIME, &read);
  if (out) *out = read.tv_sec;
  return read.tv_sec;
}
