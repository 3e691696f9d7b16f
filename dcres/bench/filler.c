/* /init of a guest that only fills memory: with data that no disk can shorten, and then rests.
 *
 * The kernel hands `fill=MiB` of its command line over in the environment. Prints one line to
 * the console when it is done.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void) {
    const char *wanted = getenv("fill");
    uint64_t length = (wanted ? strtoull(wanted, 0, 10) : 0) << 20, state = 88172645463325252ull;
    uint64_t *memory = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        puts("FILL FAILED");
    } else {
        for (uint64_t at = 0; at < length / 8; at++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            memory[at] = state;
        }
        printf("FILLED %lu MiB\n", (unsigned long)(length >> 20));
    }
    fflush(stdout);
    for (;;) pause();
}
