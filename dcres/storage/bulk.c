/* What is done to every page of a batch, with the interpreter's lock released.
 *
 *   sums     XXH3 of each page
 *   gather   runs of pages of a file, one after the other, into memory, and their sums
 *   scatter  pages in memory to their places in a file
 *
 * dcres/storage/bulk.py does the same in Python without this module, and the tests hold both to
 * the same results; docs/decisions/memory-format.md has what the difference is.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Pages are summed after so many calls' worth at most: while they are in the processor's cache. */
enum { PAGE = 4096, PIECES = 256, AT_ONCE = 128 * PAGE };

/* XXH3 with 64 bits and seed 0, for inputs of exactly one page: three blocks of 16 stripes, 15
 * stripes more, and the last 64 bytes again. Names are those of its specification,
 * https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md */
enum { STRIPE = 64, STRIPES = PAGE / STRIPE, IN_BLOCK = 16, LANES = 8, SECRET_BYTES = 192 };
#define SCRAMBLE_KEY (secret + SECRET_BYTES - STRIPE)
#define LAST_KEY (secret + SECRET_BYTES - STRIPE - 7)

static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F;
static const uint64_t PRIME64_3 = 0x165667B19E3779F9, PRIME64_4 = 0x85EBCA77C2B2AE63;
static const uint64_t PRIME64_5 = 0x27D4EB2F165667C5, PRIME_MX1 = 0x165667919E3779F9;

static const uint8_t secret[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint64_t word(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static void accumulate(uint64_t *acc, const uint8_t *stripe, const uint8_t *key) {
    for (int n = 0; n < LANES; n++) {
        uint64_t keyed = word(stripe + 8 * n) ^ word(key + 8 * n);
        acc[n ^ 1] += word(stripe + 8 * n);
        acc[n] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
}

static void accumulate_page(uint64_t *acc, const uint8_t *page) {
    for (int stripe = 0; stripe < STRIPES - 1; stripe++) {
        accumulate(acc, page + stripe * STRIPE, secret + stripe % IN_BLOCK * 8);
        if (stripe % IN_BLOCK != IN_BLOCK - 1) continue;
        for (int n = 0; n < LANES; n++)
            acc[n] = (acc[n] ^ acc[n] >> 47 ^ word(SCRAMBLE_KEY + 8 * n)) * PRIME32_1;
    }
    accumulate(acc, page + PAGE - STRIPE, LAST_KEY);
}

#if defined(__x86_64__)
/* The same, three times as fast, for processors since 2013. */
typedef struct {
    __m256i low, high;
} Lanes;

#define AVX2 __attribute__((target("avx2")))

AVX2 static __m256i four(const void *from) { return _mm256_loadu_si256(from); }

AVX2 static __m256i added(__m256i acc, __m256i in, __m256i key) {
    __m256i keyed = _mm256_xor_si256(in, key);
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, _mm256_shuffle_epi32(in, 0x4E)));
}

AVX2 static Lanes add_stripe(Lanes acc, const uint8_t *stripe, const uint8_t *key) {
    return (Lanes){added(acc.low, four(stripe), four(key)),
                   added(acc.high, four(stripe + 32), four(key + 32))};
}

AVX2 static __m256i scrambled(__m256i acc, __m256i key) {
    __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), key);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

AVX2 static void accumulate_page_avx2(uint64_t *acc, const uint8_t *page) {
    Lanes lanes = {four(acc), four(acc + 4)};
    for (int stripe = 0; stripe < STRIPES - 1; stripe++) {
        lanes = add_stripe(lanes, page + stripe * STRIPE, secret + stripe % IN_BLOCK * 8);
        if (stripe % IN_BLOCK != IN_BLOCK - 1) continue;
        lanes.low = scrambled(lanes.low, four(SCRAMBLE_KEY));
        lanes.high = scrambled(lanes.high, four(SCRAMBLE_KEY + 32));
    }
    lanes = add_stripe(lanes, page + PAGE - STRIPE, LAST_KEY);
    _mm256_storeu_si256((__m256i *)acc, lanes.low);
    _mm256_storeu_si256((__m256i *)(acc + 4), lanes.high);
}
#endif

typedef void (*Accumulate)(uint64_t *, const uint8_t *);

static Accumulate fastest(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return accumulate_page_avx2;
#endif
    return accumulate_page;
}

static uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t xxh3_of_page(const uint8_t *page, Accumulate add_page) {
    uint64_t acc[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                           PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    add_page(acc, page);
    uint64_t hash = PAGE * PRIME64_1;
    for (int n = 0; n < LANES; n += 2) {
        const uint8_t *key = secret + 11 + 8 * n;
        hash += folded(acc[n] ^ word(key), acc[n + 1] ^ word(key + 8));
    }
    hash = (hash ^ hash >> 37) * PRIME_MX1;
    return hash ^ hash >> 32;
}

/* Whether all `count` pages lie within `data`. */
static int within(const int64_t *slots, Py_ssize_t count, const Py_buffer *data) {
    for (Py_ssize_t n = 0; n < count; n++)
        if (slots[n] < 0 || slots[n] >= data->len / PAGE) return 0;
    return 1;
}

static PyObject *sums_by(PyObject *arguments, Accumulate add_page) {
    Py_buffer data, slots, found;
    if (!PyArg_ParseTuple(arguments, "y*y*w*", &data, &slots, &found)) return NULL;
    Py_ssize_t count = slots.len / sizeof(int64_t);
    const int64_t *slot = slots.buf;
    uint64_t *sum = found.buf;
    int good = found.len == slots.len && within(slot, count, &data);
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = 0; n < count; n++)
            sum[n] = xxh3_of_page((const uint8_t *)data.buf + slot[n] * PAGE, add_page);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "a slot for every sum, and its page in the data");
    }
    PyBuffer_Release(&data), PyBuffer_Release(&slots), PyBuffer_Release(&found);
    if (!good) return NULL;
    Py_RETURN_NONE;
}

static PyObject *sums(PyObject *self, PyObject *arguments) {
    return sums_by(arguments, fastest());
}

static PyObject *sums_portable(PyObject *self, PyObject *arguments) {
    return sums_by(arguments, accumulate_page);
}

/* Pages of `runs`, and room for the widest gap between two; -1 if they are no ascending runs. */
static int64_t room_for(const int64_t (*runs)[2], Py_ssize_t count, int64_t *pages) {
    int64_t gap = 0;
    *pages = 0;
    for (Py_ssize_t n = 0; n < count; n++) {
        int64_t before = n ? runs[n][0] - runs[n - 1][1] : 0;
        if (runs[n][0] < 0 || runs[n][1] <= runs[n][0] || before < 0) return -1;
        *pages += runs[n][1] - runs[n][0];
        gap = before > gap ? before : gap;
    }
    return *pages + gap;
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
    Accumulate add_page;
} Reading;

/* Read what was collected and sum it. As `read_pieces`. */
static int flush(Reading *reading) {
    int whole = read_pieces(reading->fd, reading->pieces, reading->used, &reading->offset);
    if (whole != 1) return whole;
    for (; reading->summed < reading->to; reading->summed += PAGE)
        *reading->sum++ = xxh3_of_page((const uint8_t *)reading->summed, reading->add_page);
    reading->used = 0;
    return 1;
}

static int read_runs(Reading *reading, char *end, const int64_t (*runs)[2], Py_ssize_t count) {
    reading->offset = runs[0][0] * PAGE;
    for (Py_ssize_t n = 0; n < count; n++) {
        size_t gap = n ? (runs[n][0] - runs[n - 1][1]) * PAGE : 0;
        if (gap) reading->pieces[reading->used++] = (struct iovec){end - gap, gap};
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
    int64_t pages, room = room_for(extents.buf, count, &pages);
    int good = count && room >= 0 && room <= buffer.len / PAGE &&
               pages == found.len / (Py_ssize_t)sizeof(uint64_t);
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        Reading reading = {.fd = fd, .to = buffer.buf, .summed = buffer.buf, .sum = found.buf,
                           .add_page = fastest()};
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
    {"sums_portable", sums_portable, METH_VARARGS, "The same as on processors without AVX2."},
    {"gather", gather, METH_VARARGS, "gather(fd, buffer, extents, found): whether all could be read."},
    {"scatter", scatter, METH_VARARGS, "scatter(fd, data, pages, slots)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "dcres.storage._bulk", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__bulk(void) { return PyModule_Create(&module); }
