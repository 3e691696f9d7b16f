/* What is done to every page of a batch, with the interpreter's lock released.
 *
 *   sums     XXH3 of each page
 *   gather   runs of pages of a file, one after the other, into memory, and their sums
 *   scatter  pages in memory to their places in a file
 *
 * dcres/storage/engine/bulk.py does the same in Python without this module, and the tests hold both to
 * the same results; docs/decisions/memory-format.md has what the difference is.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define XXH_INLINE_ALL /* the library's header has all of it: for 4 KiB a call would cost a tenth */
#include <xxhash.h>

/* Pages are summed after so many calls' worth at most: while they are in the processor's cache.
 * A gap that is not wider than NEAR is read along, which takes less than another call. */
enum { PAGE = 4096, PIECES = 256, AT_ONCE = 128 * PAGE, NEAR = PAGE };

/* Whether all `count` pages lie within `data`. */
static int within(const int64_t *slots, Py_ssize_t count, const Py_buffer *data) {
    for (Py_ssize_t n = 0; n < count; n++)
        if (slots[n] < 0 || slots[n] >= data->len / PAGE) return 0;
    return 1;
}

static PyObject *sums(PyObject *self, PyObject *arguments) {
    Py_buffer data, slots, found;
    if (!PyArg_ParseTuple(arguments, "y*y*w*", &data, &slots, &found)) return NULL;
    Py_ssize_t count = slots.len / sizeof(int64_t);
    const int64_t *slot = slots.buf;
    uint64_t *sum = found.buf;
    int good = found.len == slots.len && within(slot, count, &data);
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = 0; n < count; n++)
            sum[n] = XXH3_64bits((const char *)data.buf + slot[n] * PAGE, PAGE);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "a slot for every sum, and its page in the data");
    }
    PyBuffer_Release(&data), PyBuffer_Release(&slots), PyBuffer_Release(&found);
    if (!good) return NULL;
    Py_RETURN_NONE;
}

/* Pages of `runs`; -1 if they are no ascending runs. */
static int64_t pages_of(const int64_t (*runs)[2], Py_ssize_t count) {
    int64_t pages = 0;
    for (Py_ssize_t n = 0; n < count; n++) {
        if (runs[n][0] < (n ? runs[n - 1][1] : 0) || runs[n][1] <= runs[n][0]) return -1;
        pages += runs[n][1] - runs[n][0];
    }
    return pages;
}

/* 1: all was read; 0: not all, because of a signal or the end of the file; -1: see errno. */
static int read_pieces(int fd, const struct iovec *pieces, int count, int64_t *offset) {
    ssize_t wanted = 0;
    for (int n = 0; n < count; n++) wanted += pieces[n].iov_len;
    ssize_t got = preadv(fd, pieces, count, *offset);
    *offset += wanted;
    return got < 0 && errno != EINTR ? -1 : got == wanted;
}

typedef struct {
    int fd, used;
    struct iovec pieces[PIECES];
    int64_t offset;
    char *to, *summed; /* where the next page goes, and the first without its sum */
    uint64_t *sum;
} Reading;

/* Read what was collected and sum it. As `read_pieces`. */
static int flush(Reading *reading) {
    int whole = read_pieces(reading->fd, reading->pieces, reading->used, &reading->offset);
    if (whole != 1) return whole;
    for (; reading->summed < reading->to; reading->summed += PAGE)
        *reading->sum++ = XXH3_64bits(reading->summed, PAGE);
    reading->used = 0;
    return 1;
}

static int read_runs(Reading *reading, char *end, const int64_t (*runs)[2], Py_ssize_t count) {
    for (Py_ssize_t n = 0; n < count; n++) {
        int64_t gap = n ? (runs[n][0] - runs[n - 1][1]) * PAGE : 0;
        if (gap > NEAR && reading->used) {
            int whole = flush(reading);
            if (whole != 1) return whole;
        }
        if (!reading->used) reading->offset = runs[n][0] * PAGE;
        else if (gap) reading->pieces[reading->used++] = (struct iovec){end - gap, gap};
        for (size_t left = (runs[n][1] - runs[n][0]) * PAGE, length; left; left -= length) {
            length = left < AT_ONCE ? left : AT_ONCE;
            reading->pieces[reading->used++] = (struct iovec){reading->to, length};
            reading->to += length;
            if (reading->used < PIECES - 1 && reading->to - reading->summed < AT_ONCE) continue;
            int whole = flush(reading);
            if (whole != 1) return whole;
        }
    }
    return reading->used ? flush(reading) : 1;
}

static PyObject *gather(PyObject *self, PyObject *arguments) {
    int fd, whole = -1;
    Py_buffer buffer, extents, found;
    if (!PyArg_ParseTuple(arguments, "iw*y*w*", &fd, &buffer, &extents, &found)) return NULL;
    Py_ssize_t count = extents.len / (2 * sizeof(int64_t));
    int64_t pages = pages_of(extents.buf, count);
    int good = pages > 0 && pages + NEAR / PAGE <= buffer.len / PAGE &&
               pages == found.len / (Py_ssize_t)sizeof(uint64_t);
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        Reading reading = {.fd = fd, .to = buffer.buf, .summed = buffer.buf, .sum = found.buf};
        whole = read_runs(&reading, reading.to + buffer.len, extents.buf, count);
        Py_END_ALLOW_THREADS
        if (whole < 0) PyErr_SetFromErrno(PyExc_OSError);
    } else {
        PyErr_SetString(PyExc_ValueError, "ascending runs, a buffer for them and a gap, and a sum for each page");
    }
    PyBuffer_Release(&buffer), PyBuffer_Release(&extents), PyBuffer_Release(&found);
    return whole < 0 ? NULL : PyBool_FromLong(whole);
}

static int write_all(int fd, const char *data, size_t length, int64_t offset) {
    while (length) {
        ssize_t done = pwrite(fd, data, length, offset);
        if (done < 0 && errno != EINTR) return -1;
        if (done > 0) data += done, length -= done, offset += done;
    }
    return 0;
}

static int write_runs(int fd, const char *data, const int64_t *pages, const int64_t *slots,
                      Py_ssize_t count) {
    for (Py_ssize_t low = 0, high; low < count; low = high) {
        for (high = low + 1; high < count; high++)
            if (pages[high] != pages[high - 1] + 1 || slots[high] != slots[high - 1] + 1) break;
        if (write_all(fd, data + slots[low] * PAGE, (high - low) * PAGE, pages[low] * PAGE))
            return -1;
    }
    return 0;
}

static PyObject *scatter(PyObject *self, PyObject *arguments) {
    int fd, failed = 1;
    Py_buffer data, pages, slots;
    if (!PyArg_ParseTuple(arguments, "iy*y*y*", &fd, &data, &pages, &slots)) return NULL;
    Py_ssize_t count = slots.len / sizeof(int64_t);
    if (pages.len == slots.len && within(slots.buf, count, &data)) {
        Py_BEGIN_ALLOW_THREADS
        failed = write_runs(fd, data.buf, pages.buf, slots.buf, count);
        Py_END_ALLOW_THREADS
        if (failed) PyErr_SetFromErrno(PyExc_OSError);
    } else {
        PyErr_SetString(PyExc_ValueError, "a slot for every page, and its page in the data");
    }
    PyBuffer_Release(&data), PyBuffer_Release(&pages), PyBuffer_Release(&slots);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"sums", sums, METH_VARARGS, "sums(data, slots, found): XXH3 of the pages at `slots`."},
    {"gather", gather, METH_VARARGS, "gather(fd, buffer, extents, found): whether all could be read."},
    {"scatter", scatter, METH_VARARGS, "scatter(fd, data, pages, slots)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "dcres.storage.engine._bulk", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__bulk(void) { return PyModule_Create(&module); }
