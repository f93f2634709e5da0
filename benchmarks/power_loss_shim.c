/* Records in order what a run writes below a folder: LD_PRELOAD for `benchmarks.power_loss`.

   RECORD_ROOT is the folder, RECORD_LOG the file that gets the records. Each call is made and
   recorded under a lock that all processes of the run share, so the order of the records is that
   of the calls. fsync and fdatasync are recorded and not made: nothing is lost here, it is lost
   when the records are replayed. What is written through a mapping is not seen: neither the disk
   tier nor LMDB without MDB_WRITEMAP does that, but for LMDB's lock file. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC, TRUNCATE, EXTEND, ZERO, CREATE, MKDIR, RENAME, UNLINK, SYNC_FOLDER };
#define FILES 4096

struct record { uint32_t kind, sure; uint64_t inode; int64_t offset; uint64_t length; };
static struct { uint64_t inode; int dsync, append, folder; char *path; } files[FILES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *root;
static int log_fd = -1;


__attribute__((constructor)) static void begin(void) {
    root = getenv("RECORD_ROOT");
    const char *log = getenv("RECORD_LOG");
    if (root && log) log_fd = syscall(SYS_openat, AT_FDCWD, log, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void hold(int type) {
    struct flock lock = { .l_type = type, .l_whence = SEEK_SET };
    while (syscall(SYS_fcntl, log_fd, F_SETLKW, &lock) < 0 && errno == EINTR) {}
}
static void enter(void) { pthread_mutex_lock(&mutex); hold(F_WRLCK); }
static void leave(void) { int kept = errno; hold(F_UNLCK); pthread_mutex_unlock(&mutex); errno = kept; }

static void put(const void *data, size_t count) {
    const char *at = data;
    while (count) {
        ssize_t done = syscall(SYS_write, log_fd, at, count);
        if (done <= 0) abort();
        at += done; count -= done;
    }
}
static void note(int kind, int sure, uint64_t inode, int64_t offset, const void *data, uint64_t length) {
    struct record record = { kind, sure, inode, offset, length };
    put(&record, sizeof record);
    if (data) put(data, length);
}
static void note_paths(int kind, uint64_t inode, const char *one, const char *other) {
    char both[8192];
    size_t first = strlen(one), second = other ? strlen(other) : 0;
    if (first + second + 1 > sizeof both) abort();
    memcpy(both, one, first); both[first] = 0;
    if (other) memcpy(both + first + 1, other, second);
    note(kind, 0, inode, 0, both, first + (other ? 1 + second : 0));
}
static int below(const char *path) {
    size_t size = root ? strlen(root) : 0;
    return log_fd >= 0 && path && !strncmp(path, root, size) && (path[size] == '/' || !path[size]);
}
static int ours(int fd) { return log_fd >= 0 && fd >= 0 && fd < FILES && files[fd].path; }

static int opened(int folder, const char *path, int flags, mode_t mode) {
    if (!below(path)) return syscall(SYS_openat, folder, path, flags, mode);
    enter();
    struct stat at;
    int before = stat(path, &at) == 0;
    int64_t size = before ? at.st_size : 0;
    int fd = syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= FILES) abort();
    if (fd >= 0 && fstat(fd, &at) == 0) {
        files[fd].inode = at.st_ino;
        files[fd].dsync = (flags & (O_DSYNC | O_SYNC)) != 0;
        files[fd].append = (flags & O_APPEND) != 0;
        files[fd].folder = S_ISDIR(at.st_mode);
        free(files[fd].path);
        files[fd].path = strdup(path);
        if (!before) note_paths(CREATE, at.st_ino, path, NULL);
        if (before && (flags & O_TRUNC) && size) note(TRUNCATE, 0, at.st_ino, 0, NULL, 0);
    }
    leave();
    return fd;
}
#define MODE mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags | O_LARGEFILE, mode); }
int close(int fd) {
    if (ours(fd)) { enter(); free(files[fd].path); files[fd].path = NULL; leave(); }
    return syscall(SYS_close, fd);
}

static ssize_t written(int fd, const struct iovec *parts, int count, off_t offset, int moves) {
    enter();
    struct stat at;
    if (moves) {
        fstat(fd, &at);
        offset = files[fd].append ? at.st_size : lseek(fd, 0, SEEK_CUR);
    }
    ssize_t done = moves ? syscall(SYS_writev, fd, parts, count)
                         : syscall(SYS_pwritev, fd, parts, count, (long)offset, 0L);
    ssize_t left = done;
    for (int i = 0; i < count && left > 0; i++) {
        size_t size = parts[i].iov_len < (size_t)left ? parts[i].iov_len : (size_t)left;
        note(WRITE, files[fd].dsync, files[fd].inode, offset, parts[i].iov_base, size);
        offset += size; left -= size;
    }
    leave();
    return done;
}
ssize_t write(int fd, const void *data, size_t size) {
    struct iovec part = { (void *)data, size };
    return ours(fd) ? written(fd, &part, 1, 0, 1) : syscall(SYS_write, fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    struct iovec part = { (void *)data, size };
    return ours(fd) ? written(fd, &part, 1, offset, 0) : syscall(SYS_pwrite64, fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return ours(fd) ? written(fd, parts, count, 0, 1) : syscall(SYS_writev, fd, parts, count);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return ours(fd) ? written(fd, parts, count, offset, 0)
                    : syscall(SYS_pwritev, fd, parts, count, (long)offset, 0L);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) { return pwritev(fd, parts, count, offset); }

int fdatasync(int fd) {
    if (!ours(fd)) return syscall(SYS_fdatasync, fd);
    enter();
    if (files[fd].folder) note_paths(SYNC_FOLDER, files[fd].inode, files[fd].path, NULL);
    else note(SYNC, 0, files[fd].inode, 0, NULL, 0);
    leave();
    return 0;
}
int fsync(int fd) { return ours(fd) ? fdatasync(fd) : syscall(SYS_fsync, fd); }

static int resized(int fd, off_t size) {
    if (!ours(fd)) return syscall(SYS_ftruncate, fd, size);
    enter();
    int result = syscall(SYS_ftruncate, fd, size);
    if (!result) note(TRUNCATE, 0, files[fd].inode, size, NULL, 0);
    leave();
    return result;
}
int ftruncate(int fd, off_t size) { return resized(fd, size); }
int ftruncate64(int fd, off64_t size) { return resized(fd, size); }
int truncate(const char *path, off_t size) {
    if (!below(path)) return syscall(SYS_truncate, path, size);
    enter();
    struct stat at;
    int result = syscall(SYS_truncate, path, size);
    if (!result && !stat(path, &at)) note(TRUNCATE, 0, at.st_ino, size, NULL, 0);
    leave();
    return result;
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }
int fallocate(int fd, int mode, off_t offset, off_t size) {
    if (!ours(fd)) return syscall(SYS_fallocate, fd, mode, offset, size);
    enter();
    int result = syscall(SYS_fallocate, fd, mode, offset, size);
    if (!result && mode == 0) note(EXTEND, 0, files[fd].inode, offset + size, NULL, 0);
    if (!result && mode & 2) {
        struct record record = { ZERO, 0, files[fd].inode, offset, sizeof size };
        put(&record, sizeof record);
        put(&size, sizeof size);
    }
    leave();
    return result;
}
int fallocate64(int fd, int mode, off64_t offset, off64_t size) { return fallocate(fd, mode, offset, size); }
int posix_fallocate(int fd, off_t offset, off_t size) { return fallocate(fd, 0, offset, size) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t size) { return posix_fallocate(fd, offset, size); }

int mkdir(const char *path, mode_t mode) {
    if (!below(path)) return syscall(SYS_mkdir, path, mode);
    enter();
    int result = syscall(SYS_mkdir, path, mode);
    if (!result) note_paths(MKDIR, 0, path, NULL);
    leave();
    return result;
}
int rename(const char *from, const char *to) {
    if (!below(from) && !below(to)) return syscall(SYS_rename, from, to);
    enter();
    int result = syscall(SYS_rename, from, to);
    if (!result) note_paths(RENAME, 0, from, to);
    leave();
    return result;
}
int unlink(const char *path) {
    if (!below(path)) return syscall(SYS_unlink, path);
    enter();
    int result = syscall(SYS_unlink, path);
    if (!result) note_paths(UNLINK, 0, path, NULL);
    leave();
    return result;
}
int rmdir(const char *path) {
    if (!below(path)) return syscall(SYS_rmdir, path);
    enter();
    int result = syscall(SYS_rmdir, path);
    if (!result) note_paths(UNLINK, 0, path, NULL);
    leave();
    return result;
}
