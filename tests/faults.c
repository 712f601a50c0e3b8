/* Faults of the machine, for tests. Preloaded (LD_PRELOAD) into a GoCM, it looks into the directory $FAULTS:

     fsync     while this file is there, fsync and fdatasync end in EIO
     clock     the wall clock is off by as many seconds as this file says
     power     what is fsynced is copied to this directory, so that a test can put back what a power cut leaves at worst
     readonly  the directory $FAULTY_DISK is on a file system that is mounted read-only
     disk      the directory $FAULTY_DISK is a disk of as many bytes as this file says: its files cannot grow beyond

   Any C compiler makes it: cc -shared -fPIC -o faults.so faults.c
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* What a fault's file says, as a number; 0 when it is there and says nothing; `without` when it is not there. */
static long long fault(const char *name, long long without)
{
    char path[4096], text[32];
    const char *directory = getenv("FAULTS");
    int kept = errno;
    snprintf(path, sizeof path, "%s/%s", directory ? directory : "/nowhere", name);
    int file = REAL(open)(path, O_RDONLY | O_CLOEXEC);
    errno = kept;
    if (file < 0)
        return without;
    ssize_t got = REAL(read)(file, text, sizeof text - 1);
    close(file);
    text[got > 0 ? got : 0] = 0;
    errno = kept;
    return atoll(text);
}

/* Bytes that are free on the pretended disk. */
static long long left(void)
{
    long long size = fault("disk", -1), used = 0;
    const char *directory = getenv("FAULTY_DISK");
    DIR *listing = size >= 0 && directory ? opendir(directory) : NULL;
    if (!listing)
        return -1;
    struct dirent *entry;
    struct stat found;
    while ((entry = readdir(listing)))
        if (!fstatat(dirfd(listing), entry->d_name, &found, 0) && S_ISREG(found.st_mode))
            used += found.st_size;
    closedir(listing);
    return used < size ? size - used : 0;
}

/* Whether a file must not grow to `end`, for it is on the pretended disk and that is full. */
static int refuse(int fd, long long end)
{
    char link[64], path[4096];
    struct stat found;
    const char *directory = getenv("FAULTY_DISK");
    if (!directory || fstat(fd, &found) || !S_ISREG(found.st_mode) || end <= found.st_size)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || strncmp(path, directory, strlen(directory)))
        return 0;
    long long room = left();
    return room >= 0 && end - found.st_size > room;
}

static int on_disk(const char *path)
{
    const char *directory = getenv("FAULTY_DISK");
    return directory && !strncmp(path, directory, strlen(directory));
}

static int frozen(const char *path, int flags)
{
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && on_disk(path) && fault("readonly", -1) >= 0;
}

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...)                           \
    {                                                                    \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        int mode = flags & O_CREAT ? va_arg(rest, int) : 0;              \
        va_end(rest);                                                    \
        if (frozen(path, flags)) { errno = EROFS; return -1; }           \
        return REAL(name)(path, flags, mode);                            \
    }

OPEN(open)
OPEN(open64)

int unlink(const char *path)
{
    if (frozen(path, O_WRONLY)) { errno = EROFS; return -1; }
    return REAL(unlink)(path);
}

/* Copy a file of the pretended disk to "synced-" and its name. */
static void keep(int fd)
{
    char link[64], path[4096], fresh[8300], kept[8200], data[65536];
    const char *directory = getenv("FAULTS");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1), got;
    if (length < 0)
        return;
    path[length] = 0;
    if (!on_disk(path))
        return;
    snprintf(kept, sizeof kept, "%s/synced-%s", directory, strrchr(path, '/') + 1);
    snprintf(fresh, sizeof fresh, "%s.new", kept);
    int copy = REAL(open)(fresh, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    for (off_t at = 0; (got = pread(fd, data, sizeof data, at)) > 0; at += got)
        REAL(write)(copy, data, got);
    close(copy);
    rename(fresh, kept);
}

#define SYNC(name)                                                        \
    int name(int fd)                                                     \
    {                                                                    \
        if (fault("fsync", -1) >= 0) { errno = EIO; return -1; }         \
        int failed = REAL(name)(fd);                                     \
        if (!failed && fault("power", -1) >= 0)                          \
            keep(fd);                                                    \
        return failed;                                                   \
    }

SYNC(fsync)
SYNC(fdatasync)

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    if (refuse(fd, at + (long long)size)) { errno = ENOSPC; return -1; }
    return REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    if (refuse(fd, at + (long long)size)) { errno = ENOSPC; return -1; }
    return REAL(pwrite64)(fd, data, size, at);
}

ssize_t write(int fd, const void *data, size_t size)
{
    off_t at = lseek(fd, 0, SEEK_CUR);
    if (at >= 0 && refuse(fd, at + (long long)size)) { errno = ENOSPC; return -1; }
    return REAL(write)(fd, data, size);
}

int posix_fallocate(int fd, off_t at, off_t size)
{
    return refuse(fd, at + (long long)size) ? ENOSPC : REAL(posix_fallocate)(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size)
{
    return refuse(fd, at + (long long)size) ? ENOSPC : REAL(posix_fallocate64)(fd, at, size);
}

static void shrink(unsigned long block, unsigned long *free_blocks)
{
    long long room = left();
    if (room >= 0)
        *free_blocks = (unsigned long)(room / (long long)block);
}

int statvfs(const char *path, struct statvfs *found)
{
    int failed = REAL(statvfs)(path, found);
    if (!failed)
        shrink(found->f_frsize, &found->f_bavail);
    return failed;
}

int statvfs64(const char *path, struct statvfs64 *found)
{
    int failed = REAL(statvfs64)(path, found);
    if (!failed)
        shrink(found->f_frsize, &found->f_bavail);
    return failed;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = REAL(clock_gettime);
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME)
        now->tv_sec += fault("clock", 0);
    return failed;
}
