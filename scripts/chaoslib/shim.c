/* System calls that fail when they are told to. Loaded into the supervisor by LD_PRELOAD; which call fails, in
 * which process and how often, stands in a page of memory that the runner writes (shim.py has its layout).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum call { NONE, WRITE, FSYNC, FDATASYNC, OPEN, ACCEPT, FORK };

struct slot {
    int call, pid, after, times, error, seen, failed, unused;
};

#define SLOTS 16
static struct slot *page;

__attribute__((constructor)) static void map_page(void)
{
    const char *path = getenv("CHAOS_PAGE");
    if (!path)
        return;
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *found = mmap(0, SLOTS * sizeof(struct slot), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (found != MAP_FAILED)
        page = found;
}

/* Whether this call fails; errno is set then. */
static int fails(enum call call)
{
    if (!page)
        return 0;
    for (struct slot *slot = page; slot < page + SLOTS; slot++) {
        if (__atomic_load_n(&slot->call, __ATOMIC_ACQUIRE) != (int)call)
            continue;
        if (slot->pid != (int)getpid())
            continue;
        int seen = __atomic_fetch_add(&slot->seen, 1, __ATOMIC_RELAXED);
        if (seen < slot->after || seen - slot->after >= slot->times)
            continue;
        __atomic_fetch_add(&slot->failed, 1, __ATOMIC_RELAXED);
        errno = slot->error;
        return 1;
    }
    return 0;
}

/* What is written to sockets and pipes fails in other ways; standard output is nobody's data. */
static int to_disk(int fd)
{
    struct stat found;
    return page && fd > 2 && fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
}

ssize_t write(int fd, const void *data, size_t size)
{
    return to_disk(fd) && fails(WRITE) ? -1 : syscall(SYS_write, fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return to_disk(fd) && fails(WRITE) ? -1 : syscall(SYS_pwrite64, fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return pwrite(fd, data, size, at);
}

int fsync(int fd)
{
    return fails(FSYNC) ? -1 : syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    return fails(FDATASYNC) ? -1 : syscall(SYS_fdatasync, fd);
}

static int open_at(int folder, const char *path, int flags, int mode)
{
    return fails(OPEN) ? -1 : syscall(SYS_openat, folder, path, flags, mode);
}

#define MODE(flags, mode) \
    int mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, int); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_at(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_at(AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_at(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_at(folder, path, flags, mode);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
    return fails(ACCEPT) ? -1 : syscall(SYS_accept4, fd, address, size, flags);
}

int accept(int fd, struct sockaddr *address, socklen_t *size)
{
    return accept4(fd, address, size, 0);
}

pid_t fork(void)
{
    static pid_t (*real)(void);
    if (fails(FORK))
        return -1;
    if (!real)
        real = (pid_t(*)(void))dlsym(RTLD_NEXT, "fork"); /* which runs what others want done at a fork */
    return real();
}
