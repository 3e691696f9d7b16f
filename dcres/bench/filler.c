/* /init of a guest that fills memory with data that no disk can shorten, and then rests or writes.
 *
 * The kernel hands these words of its command line over in the environment:
 *   fill=MiB     how much to fill; prints FILLED when it is done
 *   dirty=MB/s   then write to so many bytes' worth of pages a second, at random; 0: rest;
 *                a large number: as many as possible. Prints WROTE and the pages written until
 *                now, 50 times a second.
 *   span=MiB     write to the first so many MiB only
 *   reads=N      read a word of so many pages there, at random, before each write
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SLOT_NS = 20000000 };
static uint64_t state = 88172645463325252ull;

static uint64_t next_random(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static uint64_t number(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, 0, 10) : otherwise;
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void keep_writing(volatile uint64_t *memory, uint64_t pages, uint64_t bytes_per_s,
                         uint64_t reads) {
    uint64_t per_slot = bytes_per_s / PAGE * SLOT_NS / 1000000000, total = 0;
    for (uint64_t slot = now();; slot += SLOT_NS) {
        uint64_t written = 0;
        while (written < per_slot && (written % 64 || now() < slot + SLOT_NS)) {
            for (uint64_t n = 0; n < reads; n++) (void)memory[next_random() % pages * (PAGE / 8)];
            memory[next_random() % pages * (PAGE / 8)] = ++total;
            written++;
        }
        printf("WROTE %lu\n", (unsigned long)total);
        uint64_t end = now();
        if (end < slot + SLOT_NS) usleep((slot + SLOT_NS - end) / 1000);
        else slot = end - SLOT_NS;
    }
}

int main(void) {
    uint64_t length = number("fill", 0) << 20;
    uint64_t *memory = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        puts("FILL FAILED");
    } else {
        for (uint64_t at = 0; at < length / 8; at++) {
            memory[at] = next_random();
        }
        printf("FILLED %lu MiB\n", (unsigned long)(length >> 20));
    }
    fflush(stdout);
    setvbuf(stdout, 0, _IOLBF, 0);
    uint64_t span = number("span", length >> 20) << 20, rate = number("dirty", 0) * 1000000;
    if (rate && memory != MAP_FAILED) {
        keep_writing(memory, span / PAGE, rate, number("reads", 0));
    }
    for (;;) pause();
}
