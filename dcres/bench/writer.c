/* A guest's memory without a guest: maps a file as QEMU maps its RAM and works on it by order.
 *
 *   writer FILE PAGES
 *
 * Prints the mapping's address, then obeys lines on standard input, one answer line each:
 *   fill          write to every page                        -> filled
 *   run SECONDS   random increments, then verify every page  -> ops N bad M
 *   read STEP N   read N pages, STEP apart (0: at random)    -> ns TOTAL sum S
 *   write STEP N  the same, writing                          -> ns TOTAL sum S
 *   skewed N      touch N pages, few of them often; one touch in eight writes -> ns TOTAL sum S
 *   time STEP N US  read N pages, US microseconds apart, and time each
 *                 -> missed M median_ns A p99_ns B max_ns C  (of those that took a page fault)
 *   causal SECONDS  write 1, 2, 3, ... one page each, in the order of `page_of`   -> ops N
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };
static unsigned char *memory;
static uint64_t *counted, pages, state = 88172645463325252ull;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t random_page(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (state >> 20) % pages;
}

/* Each page keeps its own number at 0 and its count at 8 and at the end: a page that is zero,
 * stale, torn or in another page's place shows. */
static volatile uint64_t *word(uint64_t page, int at) {
    return (volatile uint64_t *)(memory + page * PAGE + at);
}

static void bump(uint64_t page) {
    *word(page, 0) = page;
    (*word(page, 8))++;
    (*word(page, PAGE - 8))++;
    counted[page]++;
}

static uint64_t bad_pages(void) {
    uint64_t bad = 0;
    for (uint64_t page = 0; page < pages; page++)
        bad += *word(page, 0) != (counted[page] ? page : 0) || *word(page, 8) != counted[page] ||
               *word(page, PAGE - 8) != counted[page];
    return bad;
}

static uint64_t run(double seconds) {
    uint64_t ops = 0, end = now() + (uint64_t)(seconds * 1e9);
    while (now() < end)
        for (int k = 0; k < 64; k++, ops++) bump(random_page());
    return ops;
}

static void touch(uint64_t step, uint64_t count, int writing) {
    uint64_t sum = 0, start = now();
    for (uint64_t k = 0; k < count; k++) {
        uint64_t page = step ? k * step % pages : random_page();
        if (writing) bump(page);
        sum += *word(page, 8);
    }
    printf("ns %lu sum %lu\n", now() - start, sum);
}

/* The cube of a number in [0, 1) is below an eighth for half of the touches, and the product
 * scatters the pages that these are over all of memory. */
static void skewed(uint64_t count) {
    uint64_t sum = 0, start = now();
    for (uint64_t k = 0; k < count; k++) {
        double u = (double)random_page() / pages;
        uint64_t page = (uint64_t)(u * u * u * pages) * 2654435761ull % pages;
        if (state >> 61 == 0) bump(page);
        sum += *word(page, 8);
    }
    printf("ns %lu sum %lu\n", now() - start, sum);
}

/* Which page the k-th write goes to: mostly a quarter of the pages, so that they are written
 * again while others travel. Anyone can compute it, so anyone can tell what memory has to look
 * like after k writes. */
static uint64_t page_of(uint64_t k) {
    uint64_t hash = k * 0x9E3779B97F4A7C15ull;
    return (hash >> 20) % ((hash >> 60) ? (pages + 3) / 4 : pages);
}

static uint64_t causal(double seconds) {
    static uint64_t k = 0;
    uint64_t before = k, end = now() + (uint64_t)(seconds * 1e9);
    while (now() < end)
        for (int n = 0; n < 16; n++) {
            uint64_t page = page_of(++k);
            *word(page, 0) = page;
            *word(page, 8) = k;
            *word(page, PAGE / 2) = k;
            *word(page, PAGE - 8) = k;
        }
    return k - before;
}

static int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* A page that is here takes at most a few microseconds (it is mapped on first touch); a page
 * that is brought, ten times as long. */
enum { MISS_NS = 15000 };

static void time_reads(uint64_t step, uint64_t count, unsigned long pause_us) {
    uint64_t *took = malloc((count + 1) * sizeof *took), missed = 0;
    if (!took) exit(1);
    took[0] = 0;
    for (uint64_t k = 0; k < count; k++) {
        uint64_t page = step ? k * step % pages : random_page(), start = now();
        (void)*word(page, 8);
        uint64_t ns = now() - start;
        if (ns >= MISS_NS) took[missed++] = ns;
        if (pause_us) usleep(pause_us);
    }
    qsort(took, missed, sizeof *took, ascending);
    printf("missed %lu median_ns %lu p99_ns %lu max_ns %lu\n", missed, took[missed / 2],
           took[missed - missed / 100 - (missed > 0)], took[missed - (missed > 0)]);
    free(took);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    pages = strtoull(argv[2], 0, 10);
    int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, pages * PAGE)) return 1;
    memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    counted = calloc(pages, sizeof *counted);
    if (memory == MAP_FAILED || !counted) return 1;
    setvbuf(stdout, 0, _IOLBF, 0);
    printf("%p\n", (void *)memory);
    char line[128];
    double seconds;
    unsigned long step, count, pause_us;
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "fill\n")) {
            for (uint64_t page = 0; page < pages; page++) bump(page);
            puts("filled");
        } else if (sscanf(line, "run %lf", &seconds) == 1) {
            uint64_t ops = run(seconds);
            printf("ops %lu bad %lu\n", ops, bad_pages());
        } else if (sscanf(line, "causal %lf", &seconds) == 1) {
            printf("ops %lu\n", causal(seconds));
        } else if (sscanf(line, "read %lu %lu", &step, &count) == 2) {
            touch(step, count, 0);
        } else if (sscanf(line, "write %lu %lu", &step, &count) == 2) {
            touch(step, count, 1);
        } else if (sscanf(line, "skewed %lu", &count) == 1) {
            skewed(count);
        } else if (sscanf(line, "time %lu %lu %lu", &step, &count, &pause_us) == 3) {
            time_reads(step, count, pause_us);
        } else {
            puts("what?");
        }
    }
    return 0;
}
