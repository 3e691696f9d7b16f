/* The page-fault path: what a guest waits for, and nothing else. See docs/decisions/page-fault-path.md.
 *
 * `Hot.turn` is select.epoll.poll, except that it does at once what would wait for Python:
 *
 *   a fault for a page that a connected host holds   -> PAGE_IN of that page, sent
 *   PAGES that came                                  -> UFFDIO_COPY, owner MAIN
 *   PAGE_IN that came to a memory server             -> the pages, read and sent
 *
 * and `carry` (the system calls of a page-out) and `attend` (in the middle of a memory server's
 * work) do so between other things. What they did, the next `turn` tells. It is done
 * only in its simple form: one run of pages, asked for under that very number, everything
 * where it should be, the socket with room. Whatever else comes is left for Python exactly as it
 * came, and what was done is told to Python. Python alone does the same without this module
 * (dcres/paging/pager/faults.py, transport/link.py, server/service.py); the tests hold both to it.
 *
 * Of the transitions of a page's life (docs/protocol.md, and PageBook in dcres/paging/pager/book.py,
 * whose twin this is) it makes one, and only its first half:
 *
 *   page-in     host i -> MAIN, by `put` once UFFDIO_COPY is done, if `wanted` has found each page
 *               of the run with that host and asked for under the answer's number
 *
 * It writes the owner and nothing else. That the page is here now, that a host still fetches it
 * (then it is recalled) and that it has changed, the book notes when Python hears of it
 * (`heard_page_in`), in its next turn, before any page leaves. All other owners it only reads.
 *
 * Shared with Python: `owners` (a byte a page), `asked` (a page's request number or 0), `here`
 * (a memory server's existence map), and for each connection `shared`, six uint64: start and
 * stop of what the buffer holds, the number of the last request, whether C may send (nothing
 * waits to be sent before it; half sent: C has begun a frame whose rest Python has to send before
 * anything else), pages served, when a page was last put in place (monotonic ns).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h> /* defines _GNU_SOURCE */

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_PAGES = 256, VERSION = 4, PAGE_IN = 18, PAGES = 19, MAIN = 1 };
enum { HEADER = 16, RUN = 20, FAULTS = 16, UNTOLD = 256, EVENTS = 16, PEERS = 512 };
enum { SOON_NS = 100000, HOLD_NS = 20000000, GUEST_NS = 20000 };
enum { BY_ITSELF = 64, OFTEN_LATE = 3, AGAIN_AFTER = 16 };
enum { PIECE_PAGES = 16, LOOK_EVERY = 4 };
enum { FRAME = HEADER + 4 + MAX_PAGES * (16 + PAGE) + MAX_PAGES / 8 };
enum { PARTS = 3 };
enum { FILL, PUNCH, EMPTY }; /* ways to carry: file to pipe, a hole, pipe to file */
enum { START, STOP, NUMBER, MAY_SEND, SERVED, PUT_AT, SHARED };
enum { NOT_NOW, NOW, HALF_SENT }; /* values of MAY_SEND */
enum { RECEIVED = 1 << 24 }; /* beside epoll's event bits: the data is in the buffer already */

/* A frame that carries one run; x86-64 is little-endian as the protocol is. */
typedef struct __attribute__((packed)) {
    char magic[4];
    uint8_t version, kind;
    uint16_t zero;
    uint32_t number, length, count;
    uint64_t first, stop;
} Frame;

typedef struct {
    int fd, code, store, express; /* store: -1 for a client */
    Py_buffer buffer, shared, here;
} Peer;

typedef struct {
    uint64_t page;
    uint32_t number; /* of the request for it, or 0 */
    int sent, code;
    int64_t at_ns;
} Fault;

typedef struct {
    PyObject_HEAD
    int epoll, uffd;
    int alone; /* no other thread of Python's could want the interpreter's lock */
    int all_asked, put_missed; /* of the last events */
    int late; /* answers in a row that took long */
    int not_held, not_yielded; /* so often neither is tried, since it took long */
    uint64_t base, pages;
    int untold; /* faults, and `told`: what Python has not heard of yet */
    Fault faults[UNTOLD];
    PyObject *told;
    Py_buffer owners, asked;
    int used; /* peers, vacant places among them */
    Peer peers[PEERS];
    char *page_data;
} Hot;

static uint64_t *shared(Peer *peer) { return peer->shared.buf; }

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static Peer *peer_of(Hot *hot, int fd) {
    for (int n = 0; n < hot->used; n++)
        if (hot->peers[n].fd == fd) return &hot->peers[n];
    return NULL;
}

/* Whom to ask for pages of a host: its express connection, if there is one. */
static Peer *holder(Hot *hot, int code) {
    Peer *found = NULL;
    for (int n = 0; n < hot->used && !(found && found->express); n++) {
        Peer *peer = &hot->peers[n];
        if (peer->fd >= 0 && peer->store < 0 && peer->code == code && (!found || peer->express))
            found = peer;
    }
    return found;
}

static void put_head(Frame *frame, int kind, uint32_t number, uint64_t first, uint64_t stop,
                     size_t data_bytes) {
    *frame = (Frame){"DCRP", VERSION, kind, 0, number, RUN + data_bytes, 1, first, stop};
    memcpy(frame->magic, "DCRP", 4);
}

/* Ask for a page that was missed. Sent bytes; 0 when Python has to see to it. */
static int ask(Hot *hot, uint64_t page, int code, uint32_t *number) {
    uint32_t *asked = hot->asked.buf;
    Peer *peer = holder(hot, code);
    Frame frame;
    if (!peer || shared(peer)[MAY_SEND] != NOW || asked[page]) return 0;
    *number = shared(peer)[NUMBER] % 0xFFFFFFFF + 1;
    put_head(&frame, PAGE_IN, *number, page, page + 1, 0);
    ssize_t sent = send(peer->fd, &frame, sizeof frame, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent <= 0) return *number = 0;
    shared(peer)[NUMBER] = asked[page] = *number;
    shared(peer)[MAY_SEND] = sent == sizeof frame ? NOW : HALF_SENT;
    return sent;
}

static int append(PyObject *list, PyObject *item) {
    int failed = item ? PyList_Append(list, item) : -1;
    Py_XDECREF(item);
    return failed;
}

/* Notes each, for Python. What is not read yet waits in the kernel. */
static int answer_faults(Hot *hot) {
    struct uffd_msg faults[FAULTS];
    if (hot->untold > UNTOLD - FAULTS) return 0;
    ssize_t got = read(hot->uffd, faults, sizeof faults);
    if (got < 0 && errno != EAGAIN)  /* Python meets the same error, and knows what it means */
        return append(hot->told, Py_BuildValue("iI", hot->uffd, (unsigned)EPOLLIN));
    int64_t at_ns = now_ns();
    hot->all_asked = got > 0;
    for (int n = 0; n < (int)(got / (ssize_t)sizeof *faults); n++) {
        uint64_t page = (faults[n].arg.pagefault.address - hot->base) / PAGE;
        uint32_t number = 0;
        if (faults[n].event != UFFD_EVENT_PAGEFAULT || page >= hot->pages) continue;
        int code = ((uint8_t *)hot->owners.buf)[page];
        int sent = ask(hot, page, code, &number);
        if (sent != sizeof(Frame)) hot->all_asked = 0; /* the rest is Python's to send */
        hot->faults[hot->untold++] = (Fault){page, number, sent, code, at_ns};
    }
    return 0;
}

/* A list of (page, number or 0, bytes sent, owner code, when) for Python. */
static PyObject *told_faults(Hot *hot) {
    PyObject *list = PyList_New(0);
    for (Fault *fault = hot->faults; list && fault < hot->faults + hot->untold; fault++)
        if (append(list, Py_BuildValue("KIiiL", fault->page, fault->number, fault->sent,
                                       fault->code, (long long)fault->at_ns)))
            Py_CLEAR(list);
    hot->untold = 0;
    return list;
}

/* Receive behind what is there. 0: nothing came, or Python has to look. */
static ssize_t receive(Peer *peer) {
    uint64_t *at = shared(peer), size = peer->buffer.len;
    char *buffer = peer->buffer.buf;
    if (at[START] == at[STOP]) {
        at[START] = at[STOP] = 0;
    } else if (size - at[START] < FRAME) {
        memmove(buffer, buffer + at[START], at[STOP] - at[START]);
        at[STOP] -= at[START], at[START] = 0;
    }
    ssize_t got = recv(peer->fd, buffer + at[STOP], size - at[STOP], MSG_DONTWAIT);
    if (got <= 0) return 0;
    at[STOP] += got;
    return got;
}

/* The whole frame at `at` if there is one of ours, else NULL. */
static Frame *whole(Peer *peer, uint64_t at) {
    Frame *frame = (Frame *)((char *)peer->buffer.buf + at);
    uint64_t have = shared(peer)[STOP] - at;
    if (have < sizeof *frame || memcmp(frame->magic, "DCRP", 4) || frame->version != VERSION ||
        frame->zero || frame->length > FRAME - HEADER || have - HEADER < frame->length)
        return NULL;
    return frame;
}

/* Whether all that is left is the beginning of a frame, or nothing. */
static int unfinished(Peer *peer) {
    uint64_t have = shared(peer)[STOP] - shared(peer)[START];
    Frame *frame = (Frame *)((char *)peer->buffer.buf + shared(peer)[START]);
    return have < HEADER || (!memcmp(frame->magic, "DCRP", 4) && frame->version == VERSION &&
                             !frame->zero && frame->length <= FRAME - HEADER &&
                             have - HEADER < frame->length);
}

static int one_run(Frame *frame, int kind, uint64_t pages) {
    return frame->kind == kind && frame->length >= RUN && frame->count == 1 &&
           frame->first < frame->stop && frame->stop <= pages &&
           frame->stop - frame->first <= MAX_PAGES;
}

/* One bit a page: all zeros, and not sent. Such pages are left to Python. */
static const char no_flags[MAX_PAGES / 8];
static size_t flags_bytes(uint64_t pages) { return (pages + 7) / 8; }

/* Pages that were asked for under this number, and that the table has with this host. */
static int wanted(Hot *hot, Peer *peer, Frame *frame) {
    uint8_t *owners = hot->owners.buf;
    uint32_t *asked = hot->asked.buf;
    uint64_t count = frame->stop - frame->first;
    if (frame->length != RUN + flags_bytes(count) + count * PAGE ||
        memcmp(frame + 1, no_flags, flags_bytes(count)))
        return 0;
    for (uint64_t page = frame->first; page < frame->stop; page++)
        if (owners[page] != peer->code || asked[page] != frame->number) return 0;
    return 1;
}

/* Page-in: first the guest's memory, then the table. What fails in the middle (0), Python does once more. */
static int put(Hot *hot, Peer *peer, Frame *frame) {
    uint64_t count = frame->stop - frame->first, bytes = count * PAGE, done = 0;
    char *data = (char *)(frame + 1) + flags_bytes(count);
    while (done < bytes) {
        struct uffdio_copy copy = {.dst = hot->base + frame->first * PAGE + done,
                                   .src = (uint64_t)data + done, .len = bytes - done,
                                   .mode = UFFDIO_COPY_MODE_WP};
        if (!ioctl(hot->uffd, UFFDIO_COPY, &copy)) break;
        if (errno != EAGAIN) return 0;
        if (copy.copy > 0) done += copy.copy;
    }
    hot->put_missed |= count == 1; /* what was missed comes by itself */
    shared(peer)[PUT_AT] = now_ns();
    memset((uint8_t *)hot->owners.buf + frame->first, MAIN, frame->stop - frame->first);
    return 1;
}

/* Tells (fd, (number, first, stop, when)) of each that is in place, and takes it from the buffer
 * unless Python has to see to one before it. */
static int put_arrived(Hot *hot, Peer *peer) {
    uint64_t *have = shared(peer), at = have[START];
    for (Frame *frame; (frame = whole(peer, at)); at += HEADER + frame->length) {
        int in_place = one_run(frame, PAGES, hot->pages) && wanted(hot, peer, frame) &&
                       put(hot, peer, frame);
        if (in_place && at == have[START]) {
            have[START] += HEADER + frame->length;
            PyObject *entry = Py_BuildValue("i(IKKL)", peer->fd, frame->number, frame->first,
                                            frame->stop, (long long)have[PUT_AT]);
            if (append(hot->told, entry)) return -1;
        }
    }
    return 0;
}

static int some_are_zero(const char *data, uint64_t pages) {
    for (uint64_t n = 0; n < pages; n++, data += PAGE)
        if (!data[0] && !memcmp(data, data + 1, PAGE - 1)) return 1;
    return 0;
}

/* Sends what of the parts was not sent yet into *rest (a new bytes, or NULL if all was). */
static int send_parts(int fd, struct iovec *parts, PyObject **rest) {
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = PARTS};
    size_t bytes = 0;
    for (int n = 0; n < PARTS; n++) bytes += parts[n].iov_len;
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    *rest = NULL;
    if (sent < 0) sent = 0; /* Python tries again and meets the same error */
    if ((size_t)sent == bytes) return 0;
    *rest = PyBytes_FromStringAndSize(NULL, bytes - sent);
    if (!*rest) return -1;
    char *to = PyBytes_AS_STRING(*rest);
    for (int n = 0; n < PARTS; n++) {
        size_t skip = (size_t)sent < parts[n].iov_len ? (size_t)sent : parts[n].iov_len;
        memcpy(to, (char *)parts[n].iov_base + skip, parts[n].iov_len - skip);
        to += parts[n].iov_len - skip, sent -= skip;
    }
    return 0;
}

/* Answers PAGE_INs until one is not simple. Tells (fd, rest) if the socket is full. */
static int serve(Hot *hot, Peer *peer) {
    uint64_t *at = shared(peer), pages = peer->here.len;
    Frame *asked, head;
    while (at[MAY_SEND] == NOW && (asked = whole(peer, at[START])) &&
           one_run(asked, PAGE_IN, pages) && asked->length == RUN) {
        uint64_t count = asked->stop - asked->first, bytes = count * PAGE;
        if (memchr((char *)peer->here.buf + asked->first, 0, count) ||
            pread(peer->store, hot->page_data, bytes, asked->first * PAGE) != (ssize_t)bytes ||
            some_are_zero(hot->page_data, count))
            break;
        put_head(&head, PAGES, asked->number, asked->first, asked->stop,
                 flags_bytes(count) + bytes);
        struct iovec parts[PARTS] = {{&head, sizeof head},
                                     {(char *)no_flags, flags_bytes(count)},
                                     {hot->page_data, bytes}};
        PyObject *rest;
        if (send_parts(peer->fd, parts, &rest)) return -1;
        at[START] += HEADER + RUN;
        at[SERVED] += count;
        if (rest) {
            at[MAY_SEND] = HALF_SENT;
            return append(hot->told, Py_BuildValue("iN", peer->fd, rest));
        }
    }
    return 0;
}

/* What is left of an event for Python goes to `told`. */
static int handle(Hot *hot, struct epoll_event *event) {
    int fd = event->data.fd;
    Peer *peer = peer_of(hot, fd);
    if (fd == hot->uffd && event->events == EPOLLIN) return answer_faults(hot);
    if (!peer || event->events != EPOLLIN || !receive(peer))
        return append(hot->told, Py_BuildValue("iI", fd, event->events));
    if (peer->store < 0 ? put_arrived(hot, peer) : serve(hot, peer)) return -1;
    if (unfinished(peer)) return 0;
    return append(hot->told, Py_BuildValue("iI", fd, (unsigned)RECEIVED));
}

/* Answer express connections now. Python is in the middle of what another one wants, so nothing
 * else is looked at; what is left for it waits for its next turn. */
static PyObject *attend(Hot *hot, PyObject *Py_UNUSED(ignored)) {
    if (!hot->told && !(hot->told = PyList_New(0))) return NULL;
    for (int n = 0; n < hot->used; n++) {
        Peer *peer = &hot->peers[n];
        if (peer->fd < 0 || peer->store < 0 || !peer->express || !receive(peer)) continue;
        if (serve(hot, peer)) return NULL;
        if (!unfinished(peer) &&
            append(hot->told, Py_BuildValue("iI", peer->fd, (unsigned)RECEIVED)))
            return NULL;
    }
    Py_RETURN_NONE;
}

static int wait_ns(Hot *hot, struct epoll_event *events, int64_t ns) {
    struct timespec timeout = {ns / 1000000000, ns % 1000000000};
    if (!ns) return epoll_wait(hot->epoll, events, EVENTS, 0);
    /* Letting go of a lock that nobody wants, and taking it, is 2 µs each time. */
    PyThreadState *python = hot->alone ? NULL : PyEval_SaveThread();
    /* epoll_pwait2, which glibc names from 2.35 on: Linux 5.11 */
    int ready = syscall(SYS_epoll_pwait2, hot->epoll, events, EVENTS, &timeout, NULL, 0);
    int error = errno;
    if (python) PyEval_RestoreThread(python);
    errno = error;
    return ready;
}

/* Wait for events once and do what is simple of them. How many there were; -1: an exception. */
static int look(Hot *hot, int64_t timeout_ns) {
    struct epoll_event events[EVENTS];
    if (!hot->told && !(hot->told = PyList_New(0))) return -1;
    int ready = wait_ns(hot, events, timeout_ns);
    if (ready < 0) {
        if (errno == EINTR) return PyErr_CheckSignals();
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    hot->put_missed = hot->all_asked = 0;
    for (int n = 0; n < ready; n++)
        if (handle(hot, &events[n])) return -1;
    return ready;
}

static Py_ssize_t unheard(Hot *hot) {
    return hot->untold + (hot->told ? PyList_GET_SIZE(hot->told) : 0);
}

/* Wait for the answer to a request before Python hears of it, which takes as long; unless answers
 * take longer, when it may as well be told meanwhile. From time to time that is tried again.
 * The time allowed is beyond the kernel's next tick: an earlier timer is 10 µs of work for it. */
static int look_for_answer(Hot *hot) {
    int64_t since = now_ns();
    int ready = look(hot, HOLD_NS);
    if (now_ns() - since > SOON_NS) hot->late++;
    else if (hot->put_missed) hot->late = 0;
    if (hot->late < OFTEN_LATE) return ready;
    hot->late = OFTEN_LATE - 1; /* after the pause one more is enough */
    hot->not_held = AGAIN_AFTER;
    return ready;
}

/* Python's bookkeeping for a page in place takes longer than the guest's next step, which the
 * kernel may want to make on this very processor. It may hand it to others as well, for a whole
 * slice; where it does we sleep, after which we are due at once. */
static int look_after_guest(Hot *hot) {
    if (hot->not_yielded) return hot->not_yielded--, look(hot, GUEST_NS);
    int64_t since = now_ns();
    sched_yield();
    if (now_ns() - since > SOON_NS) hot->not_yielded = AGAIN_AFTER;
    return look(hot, 0);
}

/* Wait for events, and do what is simple, until Python has to hear of it. -1: an exception. */
static int work(Hot *hot, int64_t timeout_ns) {
    int ready = look(hot, timeout_ns);
    if (ready > 0 && hot->all_asked && !PyList_GET_SIZE(hot->told)) {
        if (hot->not_held) hot->not_held--;
        else ready = look_for_answer(hot);
    }
    if (ready > 0 && hot->put_missed) ready = look_after_guest(hot);
    return ready;
}

static PyObject *turn(Hot *hot, PyObject *arguments) {
    double timeout_s;
    if (!PyArg_ParseTuple(arguments, "d", &timeout_s)) return NULL;
    int64_t timeout_ns = timeout_s * 1e9;
    hot->alone = !PyThreadState_Next(PyInterpreterState_ThreadHead(PyInterpreterState_Get()));
    if (timeout_s < 0 || unheard(hot)) {
        if (look(hot, 0) < 0) return NULL;
    } else {
        for (int n = 0, ready = 1; n < BY_ITSELF && ready && !unheard(hot); n++)
            if ((ready = work(hot, timeout_ns)) < 0) return NULL;
    }
    /* Faults first: Python counts requests in the order in which they were sent, and may send some
     * for whatever else it is told. */
    PyObject *told = hot->told;
    hot->told = NULL;
    if (hot->untold) {
        PyObject *entry = Py_BuildValue("iN", hot->uffd, told_faults(hot));
        if (!entry || PyList_Insert(told, 0, entry)) Py_CLEAR(told);
        Py_XDECREF(entry);
    }
    return told;
}

/* One system call on at most `bytes` at `at`: how many it did, or -1. */
static ssize_t carry(int way, int from, int to, off_t at, size_t bytes) {
    if (way == PUNCH)
        return fallocate(to, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, bytes) ? -1
                                                                                    : (ssize_t)bytes;
    return splice(from, way == FILL ? &at : NULL, to, way == FILL ? NULL : &at, bytes, 0);
}

/* carry(way, from, to, runs): as many bytes of the runs (pairs of int64) as could be carried.
 *
 * A page-out is hundreds of system calls; faults that come meanwhile are answered between them.
 * Python hears of those in its next turn, and must send nothing before. */
static PyObject *carry_runs(Hot *hot, PyObject *arguments) {
    int way, from, to, calls = 0;
    long long carried = 0;
    Py_buffer runs;
    if (!PyArg_ParseTuple(arguments, "iiiy*", &way, &from, &to, &runs)) return NULL;
    const int64_t *run = runs.buf, *end = run + runs.len / sizeof *run;
    for (; run + 1 < end; run += 2) {
        off_t at = run[0] * PAGE, stop = run[1] * PAGE;
        while (at < stop) {
            size_t most = stop - at < PIECE_PAGES * PAGE ? stop - at : PIECE_PAGES * PAGE;
            ssize_t done = carry(way, from, to, at, most);
            if (done < 0 && errno == EINTR) continue;
            if (done < 0) PyErr_SetFromErrno(PyExc_OSError);
            if (done <= 0) goto out;
            at += done, carried += done;
            if (++calls % LOOK_EVERY == 0 && look(hot, 0) < 0) goto out;
        }
    }
out:
    PyBuffer_Release(&runs);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(carried);
}

static PyObject *watch(Hot *hot, PyObject *arguments) {
    int uffd;
    if (!PyArg_ParseTuple(arguments, "iKw*w*", &uffd, &hot->base, &hot->owners, &hot->asked))
        return NULL;
    hot->pages = hot->owners.len, hot->uffd = uffd;
    if (hot->asked.len != (Py_ssize_t)hot->pages * 4) {
        hot->uffd = -1;
        PyErr_SetString(PyExc_ValueError, "four bytes of `asked` for each page are needed");
        return NULL;
    }
    Py_RETURN_NONE;
}

static void forget_peer(Peer *peer) {
    PyBuffer_Release(&peer->buffer);
    PyBuffer_Release(&peer->shared);
    PyBuffer_Release(&peer->here);
    *peer = (Peer){.fd = -1};
}

static PyObject *enlist(Hot *hot, Peer *made) {
    Peer *place = peer_of(hot, -1);
    if (!place && hot->used < PEERS) place = &hot->peers[hot->used++];
    /* Of a buffer only where and how long it is outlives the copy, and that is all we use. */
    if (place && made->shared.len == SHARED * 8 && made->buffer.len >= FRAME) {
        *place = *made;
        Py_RETURN_NONE;
    }
    forget_peer(made);
    PyErr_SetString(PyExc_ValueError, "too many connections, or too little memory for one");
    return NULL;
}

static PyObject *client(Hot *hot, PyObject *arguments) {
    Peer made = {.store = -1};
    if (!PyArg_ParseTuple(arguments, "iiw*w*p", &made.fd, &made.code, &made.buffer, &made.shared,
                          &made.express))
        return NULL;
    return enlist(hot, &made);
}

static PyObject *server(Hot *hot, PyObject *arguments) {
    Peer made = {0};
    if (!PyArg_ParseTuple(arguments, "iiw*w*y*p", &made.fd, &made.store, &made.buffer,
                          &made.shared, &made.here, &made.express))
        return NULL;
    return enlist(hot, &made);
}

/* What Python has not heard of yet about a connection that has ended concerns nobody. */
static int forget_told(Hot *hot, int fd) {
    for (Py_ssize_t n = hot->told ? PyList_GET_SIZE(hot->told) : 0; n-- > 0;) {
        long of = PyLong_AsLong(PyTuple_GET_ITEM(PyList_GET_ITEM(hot->told, n), 0));
        if (of == fd && PyList_SetSlice(hot->told, n, n + 1, NULL)) return -1;
    }
    return 0;
}

static PyObject *forget(Hot *hot, PyObject *arguments) {
    int fd;
    if (!PyArg_ParseTuple(arguments, "i", &fd)) return NULL;
    Peer *peer = fd < 0 ? NULL : peer_of(hot, fd);
    if (peer) forget_peer(peer);
    if (forget_told(hot, fd)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *hot_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    int epoll;
    if (!PyArg_ParseTuple(arguments, "i", &epoll)) return NULL;
    Hot *hot = (Hot *)type->tp_alloc(type, 0); /* zeroed */
    if (!hot) return NULL;
    hot->epoll = epoll, hot->uffd = -1;
    prctl(PR_SET_TIMERSLACK, 1000ul, 0, 0, 0); /* 50 µs else: longer than GUEST_NS */
    for (int n = 0; n < PEERS; n++) hot->peers[n].fd = -1;
    hot->page_data = PyMem_Malloc(MAX_PAGES * PAGE);
    if (!hot->page_data) {
        Py_DECREF(hot);
        return PyErr_NoMemory();
    }
    return (PyObject *)hot;
}

static void hot_free(Hot *hot) {
    for (int n = 0; n < PEERS; n++) forget_peer(&hot->peers[n]);
    PyBuffer_Release(&hot->owners);
    PyBuffer_Release(&hot->asked);
    Py_XDECREF(hot->told);
    PyMem_Free(hot->page_data);
    Py_TYPE(hot)->tp_free(hot);
}

static PyMethodDef methods[] = {
    {"turn", (PyCFunction)turn, METH_VARARGS,
     "turn(timeout_s): wait, do what is simple, tell; below 0: only what is due. It may wait 20 ms\n"
     "longer for an answer, and keeps the GIL when no other thread state exists: not for a process\n"
     "in which threads that are not Python's call into it."},
    {"carry", (PyCFunction)carry_runs, METH_VARARGS, "carry(way, from, to, runs): bytes carried."},
    {"watch", (PyCFunction)watch, METH_VARARGS, "watch(uffd, base, owners, asked)"},
    {"client", (PyCFunction)client, METH_VARARGS,
     "client(fd, code, buffer, shared, express)"},
    {"server", (PyCFunction)server, METH_VARARGS,
     "server(fd, store, buffer, shared, here, express)"},
    {"attend", (PyCFunction)attend, METH_NOARGS, "attend(): answer express connections now."},
    {"forget", (PyCFunction)forget, METH_VARARGS, "forget(fd)"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject hot_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "dcres.paging._hot.Hot",
    .tp_basicsize = sizeof(Hot),
    .tp_dealloc = (destructor)hot_free,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = methods,
    .tp_new = hot_new,
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "dcres.paging._hot", .m_size = -1};

PyMODINIT_FUNC PyInit__hot(void) {
    PyObject *made = PyModule_Create(&module);
    if (!made) return NULL;
    if (PyModule_AddType(made, &hot_type) || PyModule_AddIntConstant(made, "RECEIVED", RECEIVED) ||
        PyModule_AddIntConstant(made, "VERSION", VERSION) ||
        PyModule_AddIntConstant(made, "FILL", FILL) ||
        PyModule_AddIntConstant(made, "PUNCH", PUNCH) ||
        PyModule_AddIntConstant(made, "EMPTY", EMPTY) ||
        PyModule_AddIntConstant(made, "NOT_NOW", NOT_NOW) ||
        PyModule_AddIntConstant(made, "NOW", NOW) ||
        PyModule_AddIntConstant(made, "HALF_SENT", HALF_SENT)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
