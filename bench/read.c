/* The bare read: all bytes of a memory once, by all threads; bench.py builds it. */
#include <stdint.h>

typedef int64_t Words __attribute__((vector_size(64)));

int64_t read_all(const Words *memory, int64_t bytes, int threads) {
    int64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : all)
    for (int64_t i = 0; i < bytes / 256; i++) {
        const Words *p = memory + 4 * i, four = p[0] ^ p[1] ^ p[2] ^ p[3];
        all ^= four[0] ^ four[1] ^ four[2] ^ four[3] ^ four[4] ^ four[5] ^ four[6] ^ four[7];
    }
    return all;
}
