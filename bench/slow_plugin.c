/* A delayed storage, as a plugin for nbdkit; bench/slow.py is the same for nbdlink.
 *
 *     nbdkit ./slow_plugin.so milliseconds=100 every=16
 *
 * Every so-manieth block of 4 KiB takes a while to read, and so does a flush; everything else is
 * there at once. It reads as zeroes. nbdkit may call it from many threads.
 */

#define NBDKIT_API_VERSION 2
#include <errno.h>
#include <nbdkit-plugin.h>
#include <stdlib.h>
#include <string.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define SIZE (256 << 20)

static unsigned milliseconds = 100, every = 16;

static int slow_config(const char *key, const char *value)
{
    if (strcmp(key, "milliseconds") == 0)
        return nbdkit_parse_unsigned(key, value, &milliseconds);
    if (strcmp(key, "every") == 0)
        return nbdkit_parse_unsigned(key, value, &every);
    nbdkit_error("unknown parameter %s", key);
    return -1;
}

static void *slow_open(int read_only)
{
    (void)read_only;
    return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t slow_get_size(void *handle)
{
    (void)handle;
    return SIZE;
}

static int wait(void)
{
    return nbdkit_nanosleep(milliseconds / 1000, milliseconds % 1000 * 1000000);
}

static int slow_pread(void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
    (void)handle;
    (void)flags;
    memset(buffer, 0, count);
    return offset / 4096 % every == 0 ? wait() : 0;
}

static int slow_pwrite(void *handle, const void *buffer, uint32_t count, uint64_t offset,
                       uint32_t flags)
{
    (void)handle;
    (void)buffer;
    (void)count;
    (void)flags;
    return offset / 4096 % every == 0 ? wait() : 0;
}

static int slow_flush(void *handle, uint32_t flags)
{
    (void)handle;
    (void)flags;
    return wait();
}

static struct nbdkit_plugin plugin = {
    .name = "slow",
    .config = slow_config,
    .open = slow_open,
    .get_size = slow_get_size,
    .pread = slow_pread,
    .pwrite = slow_pwrite,
    .flush = slow_flush,
};

NBDKIT_REGISTER_PLUGIN(plugin)
