/* A slow file: a file system of one file, some of whose blocks take a while to read.
 *
 *     slowfs FILE MILLISECONDS EVERY
 *
 * It mounts itself over FILE, which takes root, and takes itself away when it is told to end
 * (SIGTERM). Every so-manieth block of 4 KiB takes a while to read or write, and so does making it
 * durable; everything else is there at once. It reads as zeroes. Requests do not wait for each
 * other: what a server makes of it is the server's doing. It speaks to the kernel itself
 * (linux/fuse.h, fs/fuse), as libraries and ready-made file systems have queues of their own.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    THREADS = 64,            /* and as many requests at a time */
    LARGEST = 128 << 10,     /* bytes that one request reads or writes at most */
    SIZE = 256 << 20,
    BLOCK = 4096,
    A_DAY = 86400,           /* seconds that the kernel may keep the attributes */
};

static int device;
static struct timespec delay;
static uint64_t every;
static const char zeroes[LARGEST];

static void wait_if_slow(uint64_t offset, uint64_t length)
{
    uint64_t first = (offset / BLOCK + every - 1) / every * every;
    if (length && first <= (offset + length - 1) / BLOCK)
        nanosleep(&delay, NULL);
}

static void answer(uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header header = {
        .len = sizeof header + length, .error = -error, .unique = unique};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)data, length}};
    if (writev(device, parts, 2) < 0 && errno != ENOENT)
        perror("slowfs: answering"); /* ENOENT: who asked has been interrupted */
}

static void answer_attributes(uint64_t unique)
{
    struct fuse_attr_out out = {.attr_valid = A_DAY};
    out.attr = (struct fuse_attr){
        .ino = 1, .size = SIZE, .blocks = SIZE / 512, .mode = S_IFREG | 0666, .nlink = 1,
        .blksize = BLOCK};
    answer(unique, 0, &out, sizeof out);
}

static void serve(const struct fuse_in_header *in, const void *argument)
{
    switch (in->opcode) {
    case FUSE_INIT: {
        const struct fuse_init_in *init = argument;
        struct fuse_init_out out = {
            .major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION,
            .max_readahead = init->max_readahead, .flags = init->flags & FUSE_ASYNC_READ,
            .max_background = THREADS, .congestion_threshold = THREADS, .max_write = LARGEST};
        answer(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_GETATTR:
    case FUSE_SETATTR:
        answer_attributes(in->unique);
        return;
    case FUSE_OPEN: {
        /* Through the page cache, as any file. */
        struct fuse_open_out out = {0};
        answer(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_READ: {
        const struct fuse_read_in *read = argument;
        wait_if_slow(read->offset, read->size);
        answer(in->unique, 0, zeroes, read->size < LARGEST ? read->size : LARGEST);
        return;
    }
    case FUSE_WRITE: {
        const struct fuse_write_in *write = argument;
        struct fuse_write_out out = {.size = write->size};
        wait_if_slow(write->offset, write->size);
        answer(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_FSYNC:
        nanosleep(&delay, NULL);
        answer(in->unique, 0, NULL, 0);
        return;
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_ACCESS:
        answer(in->unique, 0, NULL, 0);
        return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        return; /* these are not answered */
    default:
        answer(in->unique, ENOSYS, NULL, 0);
    }
}

static void *serving_thread(void *unused)
{
    (void)unused;
    size_t room = LARGEST + FUSE_MIN_READ_BUFFER;
    char *buffer = malloc(room);
    for (;;) {
        ssize_t got = read(device, buffer, room);
        if (got < 0 && errno == ENODEV)
            return NULL; /* unmounted */
        if (got >= (ssize_t)sizeof(struct fuse_in_header))
            serve((void *)buffer, buffer + sizeof(struct fuse_in_header));
    }
}

int main(int count, char **words)
{
    if (count != 4 || atoi(words[3]) < 1) {
        fprintf(stderr, "usage: slowfs FILE MILLISECONDS EVERY\n");
        return 2;
    }
    int milliseconds = atoi(words[2]);
    delay = (struct timespec){milliseconds / 1000, milliseconds % 1000 * 1000000L};
    every = atoi(words[3]);

    /* Threads inherit the mask, so that signals wait for the sigwait below. */
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ends, NULL);

    char options[128];
    device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    snprintf(options, sizeof options, "fd=%d,rootmode=100666,user_id=%u,group_id=%u,allow_other",
             device, getuid(), getgid());
    if (device < 0 || mount("slowfs", words[1], "fuse", MS_NOSUID | MS_NODEV, options) != 0) {
        perror(words[1]);
        return 1;
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serving_thread, NULL) != 0)
            break;
    }
    int caught;
    sigwait(&ends, &caught);
    /* Whoever still has it open gets errors from now on, and nobody hangs. */
    umount2(words[1], MNT_DETACH);
    return 0;
}
