/*
 * Descriptors moved between two processes, as fast as sendmsg(2) and recvmsg(2) go: 253 a message, with a record of
 * 256 bytes each, which both sides copy. Prints the nanoseconds from the first message to the acknowledgement of the
 * last. Usage: descriptors COUNT
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 253, RECORD = 256, BUFFER = 4 << 20 };

static char payload[BATCH * RECORD];
static union { char bytes[CMSG_SPACE(BATCH * sizeof(int))]; struct cmsghdr align; } rights;

static void fail(const char *what) { perror(what); exit(1); }

static void receive(int channel, int count, int *descriptors, char *records)
{
    for (int at = 0; at < count;) {
        struct iovec part = { payload, sizeof payload };
        struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1,
                                  .msg_control = rights.bytes, .msg_controllen = sizeof rights.bytes };
        ssize_t got = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (got <= 0 || header == NULL || message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) fail("recvmsg");
        int came = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(descriptors + at, CMSG_DATA(header), came * sizeof(int));
        memcpy(records + (size_t)at * RECORD, payload, got);
        at += came;
    }
    if (write(channel, "a", 1) != 1) fail("write");
}

static void give(int channel, int count, const int *descriptors, const char *records)
{
    for (int at = 0; at < count;) {
        int rows = count - at < BATCH ? count - at : BATCH;
        struct iovec part = { payload, (size_t)rows * RECORD };
        struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = rights.bytes,
                                  .msg_controllen = CMSG_SPACE(rows * sizeof(int)) };
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(rows * sizeof(int));
        memcpy(CMSG_DATA(header), descriptors + at, rows * sizeof(int));
        memcpy(payload, records + (size_t)at * RECORD, part.iov_len);
        if (sendmsg(channel, &message, MSG_NOSIGNAL) < 0) fail("sendmsg");
        at += rows;
    }
}

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(int argc, char **argv)
{
    int count = argc > 1 ? atoi(argv[1]) : 0, ends[2], size = BUFFER;
    char byte, *records = malloc((size_t)count * RECORD);
    int *descriptors = malloc(count * sizeof(int));
    if (count < 1 || records == NULL || descriptors == NULL) return 2;
    memset(records, 'r', (size_t)count * RECORD); /* no page of either array is met first while the clock runs */
    memset(descriptors, 0, count * sizeof(int));
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) < 0) fail("socketpair");
    for (int end = 0; end < 2; end++)
        if (setsockopt(ends[end], SOL_SOCKET, SO_SNDBUF, &size, sizeof size) < 0) fail("setsockopt");
    pid_t receiver = fork();
    if (receiver < 0) fail("fork");
    if (receiver == 0) {
        memset(records, 0, (size_t)count * RECORD); /* its own copy of the pages */
        memset(descriptors, 0, count * sizeof(int));
        if (write(ends[1], "r", 1) != 1) fail("write");
        receive(ends[1], count, descriptors, records);
        _exit(0);
    }
    int client = socket(AF_INET, SOCK_STREAM, 0);
    for (int at = 0; at < count; at++)
        if ((descriptors[at] = dup(client)) < 0) fail("dup");
    if (read(ends[0], &byte, 1) != 1) fail("read");
    long long began_ns = now_ns();
    give(ends[0], count, descriptors, records);
    if (read(ends[0], &byte, 1) != 1) fail("read");
    printf("%lld\n", now_ns() - began_ns);
    int status;
    waitpid(receiver, &status, 0);
    return status != 0;
}
