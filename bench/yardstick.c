/* The yardstick: as little of an NBD server as does the work, for benchmarks to measure against.
 *
 *     yardstick FILE -U SOCKET | -p PORT
 *
 * One thread per connection, blocking. One recv takes whatever has arrived, every complete request
 * in it is served, and the replies leave together in one send: the fewest system calls that the
 * work can be done with. Reads land behind their reply header in the buffer that is sent; large
 * ones leave as was found fastest. On TCP they are sent out of a mapping of the file, which saves a
 * copy; sendfile, which saves both, goes 64 KiB at a time there and wakes the client each time. On
 * Unix sockets sendfile pays for the largest, and for the others one send of many. Simple replies
 * only, no threads beyond the connections', no limits to speak of and no TLS: it is no server to
 * use, it is what the kernel's share of the work costs.
 *
 * It speaks enough of the handshake for libnbd: EXPORT_NAME, LIST, INFO, GO, ABORT, and "not
 * supported" to everything else. A request that it cannot serve is answered with an errno; what
 * cannot be answered any more ends the connection.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_LIST = 3, OPT_INFO = 6, OPT_GO = 7,
    REP_ACK = 1, REP_SERVER = 2, REP_INFO = 3,
    CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3,
    CMD_FLAG_FUA = 1,
    FLAG_C_NO_ZEROES = 2,
    HEADER = 28, REPLY = 16,
    SKEW = 64 - HEADER,          /* where requests begin, so that a payload behind is aligned */
    OPTION_LIMIT = 64 << 10,     /* bytes of data that an option may have */
    PAYLOAD_LIMIT = 32 << 20,    /* bytes that a read or a write may have, as others have it */
    RECEIVE = 1 << 20,           /* bytes that one recv takes at most */
    FLUSH_REPLIES = 256 << 10,   /* replies are sent when they reach this */
    MAPPED_FROM = 32 << 10,      /* on TCP, reads of this size and more leave the mapping */
    SENDFILE_FROM = 128 << 10,   /* on Unix sockets, these leave by sendfile */
};

#define REP_ERR_UNSUP 0x80000001u
/* HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN: one page cache is behind all connections. */
#define TRANSMISSION_FLAGS (1 | 4 | 8 | 256)

static int image;
static uint64_t image_size;
static uint8_t *mapping;
static bool tcp;

/* Transport: all or nothing. */

static bool receive(int sock, void *buffer, size_t length)
{
    char *at = buffer;
    while (length) {
        ssize_t got = recv(sock, at, length, MSG_WAITALL);
        if (got <= 0)
            return false;
        at += got;
        length -= got;
    }
    return true;
}

static bool transmit(int sock, const void *buffer, size_t length, int flags)
{
    const char *at = buffer;
    while (length) {
        ssize_t put = send(sock, at, length, flags | MSG_NOSIGNAL);
        if (put <= 0)
            return false;
        at += put;
        length -= put;
    }
    return true;
}

static uint16_t take16(const uint8_t *at) { uint16_t v; memcpy(&v, at, 2); return be16toh(v); }
static uint32_t take32(const uint8_t *at) { uint32_t v; memcpy(&v, at, 4); return be32toh(v); }
static uint64_t take64(const uint8_t *at) { uint64_t v; memcpy(&v, at, 8); return be64toh(v); }
static void put16(uint8_t *at, uint16_t v) { v = htobe16(v); memcpy(at, &v, 2); }
static void put32(uint8_t *at, uint32_t v) { v = htobe32(v); memcpy(at, &v, 4); }
static void put64(uint8_t *at, uint64_t v) { v = htobe64(v); memcpy(at, &v, 8); }

/* Handshake. */

static bool answer(int sock, uint32_t option, uint32_t type, const void *data, uint32_t length)
{
    uint8_t reply[20 + 16];
    put64(reply, 0x3e889045565a9ULL);
    put32(reply + 8, option);
    put32(reply + 12, type);
    put32(reply + 16, length);
    memcpy(reply + 20, data, length);
    return transmit(sock, reply, 20 + length, 0);
}

/* True if the client has chosen the export (there is one, whatever it is called). */
static bool negotiate(int sock, uint8_t *data)
{
    uint8_t word[16], info[12], chosen[134] = {0};
    if (!transmit(sock, "NBDMAGICIHAVEOPT\0\3", 18, 0) || !receive(sock, word, 4))
        return false;
    bool no_zeroes = take32(word) & FLAG_C_NO_ZEROES;
    put16(info, 0); /* NBD_INFO_EXPORT */
    put64(info + 2, image_size);
    put16(info + 10, TRANSMISSION_FLAGS);
    memcpy(chosen, info + 2, 10);
    for (;;) {
        if (!receive(sock, word, 16) || memcmp(word, "IHAVEOPT", 8) != 0)
            return false;
        uint32_t option = take32(word + 8), length = take32(word + 12);
        if (length > OPTION_LIMIT || !receive(sock, data, length))
            return false;
        switch (option) {
        case OPT_EXPORT_NAME:
            return transmit(sock, chosen, no_zeroes ? 10 : sizeof chosen, 0);
        case OPT_ABORT:
            answer(sock, option, REP_ACK, "", 0);
            return false;
        case OPT_LIST:
            /* One export, whose name is empty: a length of 0. */
            if (!answer(sock, option, REP_SERVER, "\0\0\0\0", 4)
                || !answer(sock, option, REP_ACK, "", 0))
                return false;
            break;
        case OPT_INFO:
        case OPT_GO:
            if (!answer(sock, option, REP_INFO, info, sizeof info)
                || !answer(sock, option, REP_ACK, "", 0))
                return false;
            if (option == OPT_GO)
                return true;
            break;
        default:
            if (!answer(sock, option, REP_ERR_UNSUP, "", 0))
                return false;
        }
    }
}

/* Transmission. */

static uint32_t wire_errno(int error)
{
    switch (error) {
    case EPERM: case EIO: case ENOMEM: case EINVAL: case ENOSPC:
        return error;
    default:
        return EIO;
    }
}

/* 0, or the errno; a file that ends early is an I/O error. */
static int load(uint8_t *to, size_t length, off_t offset)
{
    while (length) {
        ssize_t got = pread(image, to, length, offset);
        if (got <= 0)
            return got ? errno : EIO;
        to += got;
        offset += got;
        length -= got;
    }
    return 0;
}

static int store(const uint8_t *from, size_t length, off_t offset)
{
    while (length) {
        ssize_t put = pwrite(image, from, length, offset);
        if (put <= 0)
            return put ? errno : EIO;
        from += put;
        offset += put;
        length -= put;
    }
    return 0;
}

/* What is pending, and behind it a part of the mapping. */
static bool send_from_mapping(int sock, const uint8_t *pending, size_t count, size_t length,
                              off_t offset)
{
    struct iovec parts[] = {{(void *)pending, count}, {mapping + offset, length}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t put = sendmsg(sock, &message, MSG_NOSIGNAL);
    if (put < 0)
        return false;
    if ((size_t)put < count)
        return transmit(sock, pending + put, count - put, MSG_MORE)
               && transmit(sock, mapping + offset, length, 0);
    return transmit(sock, mapping + offset + (put - count), count + length - put, 0);
}

static bool send_from_file(int sock, size_t length, off_t offset)
{
    while (length) {
        ssize_t put = sendfile(sock, image, &offset, length);
        if (put <= 0)
            return false;
        length -= put;
    }
    return true;
}

struct connection {
    int sock;
    /* Requests: received up to `end`, served up to `begin`. Room for the largest write and what
     * one recv may bring behind it. */
    uint8_t *in;
    size_t begin, end;
    /* Replies that have not been sent, and their length. Room for the largest read. */
    uint8_t *out;
    size_t pending;
};

static bool send_replies(struct connection *c, int flags)
{
    size_t length = c->pending;
    c->pending = 0;
    return !length || transmit(c->sock, c->out, length, flags);
}

static uint8_t *begin_reply(struct connection *c, const uint8_t *cookie, int error)
{
    uint8_t *reply = c->out + c->pending;
    put32(reply, 0x67446698);
    put32(reply + 4, error ? wire_errno(error) : 0);
    memcpy(reply + 8, cookie, 8);
    c->pending += REPLY;
    return reply;
}

/* Serve the request at `begin`, whose payload is complete; false ends the connection. */
static bool serve_one(struct connection *c)
{
    const uint8_t *request = c->in + c->begin;
    uint16_t flags = take16(request + 4), command = take16(request + 6);
    uint64_t offset = take64(request + 16);
    uint32_t length = take32(request + 24);
    bool fits = offset <= image_size && length <= image_size - offset;
    int error = 0;

    c->begin += HEADER;
    switch (command) {
    case CMD_READ:
        if (!fits || length > PAYLOAD_LIMIT) {
            begin_reply(c, request + 8, EINVAL);
        } else if (length >= SENDFILE_FROM && !tcp) {
            begin_reply(c, request + 8, 0);
            if (!send_replies(c, MSG_MORE) || !send_from_file(c->sock, length, offset))
                return false;
        } else if (length >= MAPPED_FROM && tcp) {
            begin_reply(c, request + 8, 0);
            size_t pending = c->pending;
            c->pending = 0;
            if (!send_from_mapping(c->sock, c->out, pending, length, offset))
                return false;
        } else {
            uint8_t *reply = begin_reply(c, request + 8, 0);
            error = load(reply + REPLY, length, offset);
            if (error)
                put32(reply + 4, wire_errno(error));
            else
                c->pending += length;
        }
        break;
    case CMD_WRITE:
        c->begin += length;
        error = fits ? store(request + HEADER, length, offset) : ENOSPC;
        if (!error && (flags & CMD_FLAG_FUA) && fdatasync(image) != 0)
            error = errno;
        begin_reply(c, request + 8, error);
        break;
    case CMD_FLUSH:
        begin_reply(c, request + 8, fdatasync(image) ? errno : 0);
        break;
    case CMD_DISC:
        send_replies(c, 0);
        return false;
    default:
        begin_reply(c, request + 8, EINVAL);
    }
    return c->pending < FLUSH_REPLIES || send_replies(c, 0);
}

/* How long the request at `begin` is, or 0 if its header is not complete, or -1 if it is none. */
static ssize_t request_length(const struct connection *c)
{
    const uint8_t *request = c->in + c->begin;
    if (c->end - c->begin < HEADER)
        return 0;
    if (take32(request) != 0x25609513)
        return -1;
    if (take16(request + 6) != CMD_WRITE)
        return HEADER;
    uint32_t length = take32(request + 24);
    return length > PAYLOAD_LIMIT ? -1 : (ssize_t)HEADER + length;
}

static void converse(struct connection *c)
{
    for (;;) {
        ssize_t length;
        while ((length = request_length(c)) > 0 && c->begin + length <= c->end)
            if (!serve_one(c))
                return;
        if (length < 0 || !send_replies(c, 0))
            return;
        /* What is left is the beginning of a request: it moves to the front. */
        memmove(c->in, c->in + c->begin, c->end - c->begin);
        c->end -= c->begin;
        c->begin = 0;
        if (length > RECEIVE) {
            /* The rest of a large write, and no more: what follows begins a fresh receive. */
            if (!receive(c->sock, c->in + c->end, length - c->end))
                return;
            c->end = length;
        } else {
            ssize_t got = recv(c->sock, c->in + c->end, RECEIVE, 0);
            if (got <= 0)
                return;
            c->end += got;
        }
    }
}

/* Memory is given by the kernel as it is touched, so room for the largest request is free. */
static uint8_t *room(size_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void *connection_thread(void *argument)
{
    size_t in_size = SKEW + HEADER + PAYLOAD_LIMIT + RECEIVE;
    size_t out_size = FLUSH_REPLIES + REPLY + SENDFILE_FROM;
    uint8_t *in = room(in_size), *out = room(out_size);
    struct connection c = {.sock = (intptr_t)argument, .in = in + SKEW, .out = out};
    if (in && out && negotiate(c.sock, c.in))
        converse(&c);
    close(c.sock);
    if (in)
        munmap(in, in_size);
    if (out)
        munmap(out, out_size);
    return NULL;
}

/* Listening. */

static int listen_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    return bind(sock, (struct sockaddr *)&address, sizeof address) ? -1 : sock;
}

static int listen_tcp(int port)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int sock = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    return bind(sock, (struct sockaddr *)&address, sizeof address) ? -1 : sock;
}

int main(int count, char **words)
{
    if (count != 4 || (strcmp(words[2], "-U") && strcmp(words[2], "-p"))) {
        fprintf(stderr, "usage: yardstick FILE -U SOCKET | -p PORT\n");
        return 2;
    }
    tcp = strcmp(words[2], "-p") == 0;
    image = open(words[1], O_RDWR | O_CLOEXEC);
    off_t end = image < 0 ? -1 : lseek(image, 0, SEEK_END);
    if (end < 0) {
        perror(words[1]);
        return 1;
    }
    image_size = end;
    mapping = mmap(NULL, image_size, PROT_READ, MAP_SHARED, image, 0);
    if (mapping == MAP_FAILED) {
        perror(words[1]);
        return 1;
    }
    int listener = tcp ? listen_tcp(atoi(words[3])) : listen_unix(words[3]);
    if (listener < 0 || listen(listener, 128) != 0) {
        perror(words[3]);
        return 1;
    }
    signal(SIGPIPE, SIG_IGN); /* sendfile has no MSG_NOSIGNAL */
    for (;;) {
        int sock = accept(listener, NULL, NULL), on = 1;
        if (sock < 0)
            continue;
        if (tcp)
            setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        pthread_t thread;
        if (pthread_create(&thread, NULL, connection_thread, (void *)(intptr_t)sock) == 0)
            pthread_detach(thread);
        else
            close(sock);
    }
}
