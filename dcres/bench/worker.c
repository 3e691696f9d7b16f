/* /init of a guest that works on records in its memory and says how far it is.
 *
 * Kernel parameters, handed over in the environment:
 *   data=MiB     how much memory its records fill, one page each; prints READY when they are there
 *
 * Then for ever, one after the other:
 *   192 records chosen by YCSB's scrambled Zipfian distribution (constant 0.99: a few are wanted
 *       very often, most now and then); one in twenty is updated, the others are read
 *   a scan of the next 64 records, in order, going round
 * Reading a record adds up all of its 512 words; a record whose sum is not what it should be ends
 * the guest. Prints WORKED and the number of records until now about 20 times a second.
 *
 * J. Gray et al., Quickly generating billion-record synthetic databases, 1994, for the choice.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 512, CHOSEN = 192, SCANNED = 64, UPDATES = 20, SLOT_NS = 50000000 };
static uint64_t (*records)[WORDS], count, state = 88172645463325252ull;
static double zeta_count, eta, alpha;
static const double theta = 0.99;

static uint64_t next_random(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void prepare_choice(void) {
    for (uint64_t n = 1; n <= count; n++) zeta_count += pow(1.0 / n, theta);
    alpha = 1 / (1 - theta);
    eta = (1 - pow(2.0 / count, 1 - theta)) / (1 - (1 + pow(0.5, theta)) / zeta_count);
}

static uint64_t choose(void) {
    double u = (next_random() >> 11) * 0x1p-53, z = u * zeta_count;
    uint64_t rank = z < 1 ? 0 : z < 1 + pow(0.5, theta) ? 1
                  : (uint64_t)(count * pow(eta * u - eta + 1, alpha));
    return rank * 0x9E3779B97F4A7C15ull % count; /* scattered over all of memory */
}

/* The words of a record always add up to its number. */
static void check(uint64_t record) {
    uint64_t sum = 0;
    for (int n = 0; n < WORDS; n++) sum += records[record][n];
    if (sum == record) return;
    printf("WRONG record %lu\n", (unsigned long)record);
    exit(1);
}

static void update(uint64_t record) {
    uint64_t *words = records[record], word = next_random(), n = word % (WORDS - 1);
    words[WORDS - 1] += words[n] - word;
    words[n] = word;
}

static void fill(uint64_t record) {
    uint64_t sum = 0;
    for (int n = 0; n < WORDS - 1; n++) sum += records[record][n] = next_random();
    records[record][WORDS - 1] = record - sum;
}

int main(void) {
    const char *data = getenv("data");
    count = (data ? strtoull(data, 0, 10) : 0) * 256;
    records = mmap(0, count * sizeof *records, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    setvbuf(stdout, 0, _IOLBF, 0);
    if (!count || records == MAP_FAILED) return 1;
    for (uint64_t n = 0; n < count; n++) fill(n);
    prepare_choice();
    puts("READY");
    for (uint64_t worked = 0, scanned = 0, told = now();;) {
        for (int n = 0; n < CHOSEN; n++) {
            uint64_t record = choose();
            if (next_random() % UPDATES) check(record);
            else update(record);
        }
        for (int n = 0; n < SCANNED; n++) check(scanned++ % count);
        worked += CHOSEN + SCANNED;
        if (now() - told < SLOT_NS) continue;
        printf("WORKED %lu\n", (unsigned long)worked);
        told = now();
    }
}
