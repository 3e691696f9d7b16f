/* A guest's memory without a guest: maps a file as QEMU maps its RAM and works on it by order.
 *
 *   writer FILE PAGES
 *
 * Prints the mapping's address, then obeys lines on standard input, one answer line each:
 *   fill          write to every page                        -> filled
 *   run SECONDS   random increments, then verify every page  -> ops N bad M
 *   read STEP N   read N pages, STEP apart (0: at random)    -> ns TOTAL sum S
 *   write STEP N  the same, writing                          -> ns TOTAL sum S
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
    unsigned long step, count;
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "fill\n")) {
            for (uint64_t page = 0; page < pages; page++) bump(page);
            puts("filled");
        } else if (sscanf(line, "run %lf", &seconds) == 1) {
            uint64_t ops = run(seconds);
            printf("ops %lu bad %lu\n", ops, bad_pages());
        } else if (sscanf(line, "read %lu %lu", &step, &count) == 2) {
            touch(step, count, 0);
        } else if (sscanf(line, "write %lu %lu", &step, &count) == 2) {
            touch(step, count, 1);
        } else {
            puts("what?");
        }
    }
    return 0;
}
