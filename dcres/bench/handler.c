/* The pager's page-in and the memory server's answer in C and nothing else: a yardstick.
 *
 *   handler serve STORE                  a memory server: prints its port, serves one client
 *   handler page UFFD BASE PAGES PORT RUN   answers faults of a process whose pages it has not
 *
 * The same work as dcres does for the same fault: a fault message, a request of one page, after
 * it (RUN > 1) one for the pages behind it up to RUN in all, pages read from a file on tmpfs and
 * sent over TCP on loopback, UFFDIO_COPY (write-protected, which wakes), and releases, told in
 * batches of 512 pages, that punch the file. Not the same: who may connect, whose page it is,
 * where else it may be, history, page-out, and what is to be done when somebody dies.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE = 4096, MOST_PAGES = 256, RELEASE_PAGES = 512, BUFFER = 2 << 20, FAULTS = 16 };
enum { PAGE_IN = 1, RELEASE = 2 };
struct message { uint64_t kind, first, stop; };

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void send_all(int fd, struct iovec *parts, int count) {
    struct msghdr whole = {.msg_iov = parts, .msg_iovlen = count};
    while (whole.msg_iovlen) {
        ssize_t sent = sendmsg(fd, &whole, MSG_NOSIGNAL);
        if (sent <= 0) fail("send");
        while (whole.msg_iovlen && (size_t)sent >= whole.msg_iov->iov_len)
            sent -= whole.msg_iov->iov_len, whole.msg_iov++, whole.msg_iovlen--;
        if (sent) {
            whole.msg_iov->iov_base = (char *)whole.msg_iov->iov_base + sent;
            whole.msg_iov->iov_len -= sent;
        }
    }
}

static void serve(const char *store) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    int file = open(store, O_RDWR), listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    char *data = aligned_alloc(PAGE, MOST_PAGES * PAGE), *in = malloc(BUFFER);
    if (file < 0 || bind(listener, (void *)&at, sizeof at) || listen(listener, 1) || !data || !in)
        fail(store);
    getsockname(listener, (void *)&at, &length);
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    int peer = accept(listener, 0, 0);
    setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    for (size_t have = 0, used;;) {
        ssize_t got = recv(peer, in + have, BUFFER - have, 0);
        if (got <= 0) exit(0);
        have += got;
        for (used = 0; have - used >= sizeof(struct message); used += sizeof(struct message)) {
            struct message asked;
            memcpy(&asked, in + used, sizeof asked);
            off_t from = asked.first * PAGE, bytes = (asked.stop - asked.first) * PAGE;
            if (asked.kind == RELEASE) {
                if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, bytes))
                    fail("punch");
                continue;
            }
            if (pread(file, data, bytes, from) != bytes) fail("read");
            struct iovec parts[] = {{&asked, sizeof asked}, {data, bytes}};
            send_all(peer, parts, 2);
        }
        memmove(in, in + used, have -= used);
    }
}

static int uffd, server;
static uint64_t base, pages, run;
static unsigned char *asked;

static void ask(uint64_t kind, uint64_t first, uint64_t stop) {
    struct message message = {kind, first, stop};
    struct iovec part = {&message, sizeof message};
    send_all(server, &part, 1);
}

static void want(uint64_t first, uint64_t stop) {
    memset(asked + first, 1, stop - first);
    ask(PAGE_IN, first, stop);
}

static void answer_faults(void) {
    struct uffd_msg faults[FAULTS];
    ssize_t got = read(uffd, faults, sizeof faults);
    for (int n = 0; n < (int)(got / (ssize_t)sizeof *faults); n++) {
        uint64_t page = (faults[n].arg.pagefault.address - base) / PAGE, stop = page + 1;
        if (asked[page]) continue;
        want(page, stop);
        while (stop < page + run && stop < pages && !asked[stop]) stop++;
        if (stop > page + 1) want(page + 1, stop);
    }
}

static void put(uint64_t first, uint64_t stop, char *data) {
    struct uffdio_copy copy = {.dst = base + first * PAGE, .src = (uint64_t)data,
                               .len = (stop - first) * PAGE, .mode = UFFDIO_COPY_MODE_WP};
    while (ioctl(uffd, UFFDIO_COPY, &copy)) {
        if (errno != EAGAIN) fail("UFFDIO_COPY");
        if (copy.copy > 0) copy.dst += copy.copy, copy.src += copy.copy, copy.len -= copy.copy;
    }
}

static void page_in(void) {
    static struct message waiting[RELEASE_PAGES];
    size_t have = 0, used, released = 0, count = 0;
    char *in = aligned_alloc(PAGE, BUFFER);
    struct pollfd wait[] = {{uffd, POLLIN, 0}, {server, POLLIN, 0}};
    for (;;) {
        int ready = poll(wait, 2, count ? 20 : -1);
        if (ready < 0) fail("poll");
        if (wait[0].revents & POLLIN) answer_faults();
        if (wait[1].revents) {
            ssize_t got = recv(server, in + have, BUFFER - have, 0);
            if (got <= 0) exit(0);
            have += got;
        }
        for (used = 0; have - used >= sizeof(struct message);) {
            struct message *told = (void *)(in + used);
            size_t bytes = sizeof *told + (told->stop - told->first) * PAGE;
            if (have - used < bytes) break;
            put(told->first, told->stop, in + used + sizeof *told);
            waiting[count++] = *told;
            released += told->stop - told->first;
            used += bytes;
        }
        memmove(in, in + used, have -= used);
        if (released < RELEASE_PAGES && ready) continue;
        for (size_t n = 0; n < count; n++) ask(RELEASE, waiting[n].first, waiting[n].stop);
        released = count = 0;
    }
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "serve")) serve(argv[2]);
    if (argc != 7 || strcmp(argv[1], "page")) return 2;
    uffd = atoi(argv[2]), base = strtoull(argv[3], 0, 10), pages = strtoull(argv[4], 0, 10);
    run = strtoull(argv[6], 0, 10), asked = calloc(pages, 1);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons(atoi(argv[5]))};
    int one = 1;
    server = socket(AF_INET, SOCK_STREAM, 0);
    if (!asked || connect(server, (void *)&at, sizeof at)) fail("connect");
    setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    puts("ready");
    fflush(stdout);
    page_in();
}
