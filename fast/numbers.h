/* What cpu.c and prompt.c share: two kinds of numbers (bfloat16, or float throughout), registers
   full of them, and loops that threads share. */
#include <math.h>
#include <stdint.h>
typedef int64_t Int;
typedef union { float x; uint32_t bits; } Bits;
#define SHARE(i, n) _Pragma("omp for") for (Int i = 0; i < (n); i++)
#define VECTOR(bytes, of) __attribute__((vector_size(bytes), aligned(sizeof(of)), may_alias)) of

#ifdef WEIGHT /* -DWEIGHT=float: nothing is rounded */
#define narrow(x) (x)
#else
#define WEIGHT uint16_t /* a bfloat16: the upper half of a float */
static inline WEIGHT narrow(float x) { /* to the nearest, ties to even */
    const uint32_t bits = (Bits){x}.bits;
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif
static inline float widened(uint16_t w) { return (Bits){.bits = (uint32_t)w << 16}.x; }
#define wide(w) _Generic(w, float: w, default: widened(w))
static inline float rounded(float x) { return wide(narrow(x)); }

/* What a product takes at a time: Some weights and as many activations (Act), to add to Floats. */
#if !defined narrow && defined __AVX512BF16__ /* its own products: 8 rows in 0.86 of the time */
#include <immintrin.h>
typedef WEIGHT Act;
typedef VECTOR(64, float) Floats;
typedef __attribute__((aligned(2), may_alias)) __m512bh Some;
#define act(x) narrow(x)
#define as_act(w) (w)
#define some_weights(w) (*(const Some *)(w))
typedef __attribute__((aligned(2), may_alias)) int32_t Pair;
#define all_of(w) ((Some)_mm512_set1_epi32(*(const Pair *)(w))) /* two weights, again and again */
#define add(sum, w, x) ((Floats)_mm512_dpbf16_ps((__m512)(sum), w, x))
#else
#define BYTES __BIGGEST_ALIGNMENT__ /* of a register (clang: of the narrowest) */
typedef float Act;
typedef VECTOR(BYTES, float) Floats, Some;
#define act(x) rounded(x)
#define as_act(w) wide(w)
#define all_of(w) ((Some){0} + wide(*(w)))
#define add(sum, w, x) ((sum) + (w) * (x))
#ifndef narrow
typedef VECTOR(BYTES / 2, WEIGHT) Halves; typedef VECTOR(BYTES, uint32_t) Words;
#define some_weights(w) ((Some)(__builtin_convertvector(*(const Halves *)(w), Words) << 16))
#else
#define some_weights(w) (*(const Some *)(w))
#endif
#endif
enum { STEP = sizeof(Some) / sizeof(Act) };

static inline float exponential(float x) { /* 2^n e^r; unlike expf, of whole registers */
    const float in = x < -87 ? -87 : x > 88 ? 88 : x;
    const float n = rintf(in * 1.44269504f), r = in - n * 0.693147181f;
    /* 1 / 6.f and not r / 6: a division takes as long as all of this */
    const float high = 1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f)));
    const float e_r = 1 + r * (1 + r * (1 / 2.f + r * high));
    const float e_x = e_r * (Bits){.bits = (uint32_t)((int32_t)n + 127) << 23}.x;
    return x < -87 ? 0 : x > 88 ? INFINITY : e_x;
}
static inline float swiglu(float gate, float up) {
    return rounded(gate / (1 + exponential(-gate))) * up;
}
