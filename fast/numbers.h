/* What cpu.c and prompt.c share: the numbers (bfloat16, or float throughout), the registers that
   hold several of them, and loops that threads share. */
#include <math.h>
#include <stdint.h>

typedef int64_t Int; /* sizes, ids and addresses, as PyTorch has them */

/* A loop of which each thread takes a part; then all wait for each other. */
#define SHARE(i, n) _Pragma("omp for") for (Int i = 0; i < (n); i++)
#define VECTOR(bytes, of) __attribute__((vector_size(bytes), aligned(sizeof(of)), may_alias)) of

/* ------------------------------------------------------------------ one weight, and one float */
typedef union {
    float number;
    uint32_t bits;
} Bits;

#ifdef WEIGHT /* -DWEIGHT=float: nothing is rounded */
#define to_weight(x) (x)
#else
#define WEIGHT uint16_t /* a bfloat16: the upper half of a float */
/* To the nearest, ties to even, as PyTorch rounds. */
static inline WEIGHT to_weight(float x) {
    const uint32_t bits = (Bits){x}.bits;
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif
static inline float bfloat16_to_float(uint16_t w) {
    return (Bits){.bits = (uint32_t)w << 16}.number;
}
#define to_float(w) _Generic(w, float: w, default: bfloat16_to_float(w))
static inline float rounded(float x) {
    return to_float(to_weight(x));
}

/* -------------------------------------------------------------------------- registers of them */
/* A product takes a Register of weights and one of activations, and adds to a register of Floats.
   Activations are kept so that they need no conversion there. */
#if !defined to_weight && defined __AVX512BF16__ /* bfloat16 products: 8 rows in 0.86 of the time */
#include <immintrin.h>
typedef WEIGHT Activation;
typedef VECTOR(64, float) Floats;
typedef __attribute__((aligned(2), may_alias)) __m512bh Register;
typedef __attribute__((aligned(2), may_alias)) int32_t TwoWeights;
#define to_activation(x) to_weight(x)
#define weight_to_activation(w) (w)
#define load_weights(w) (*(const Register *)(w))
/* two weights, again and again */
#define broadcast(w) ((Register)_mm512_set1_epi32(*(const TwoWeights *)(w)))
#define multiply_add(sum, w, x) ((Floats)_mm512_dpbf16_ps((__m512)(sum), w, x))
#else
#define BYTES __BIGGEST_ALIGNMENT__ /* of a register (clang: of the narrowest) */
typedef float Activation;
typedef VECTOR(BYTES, float) Floats, Register;
#define to_activation(x) rounded(x)
#define weight_to_activation(w) to_float(w)
#define broadcast(w) ((Register){0} + to_float(*(w)))
#define multiply_add(sum, w, x) ((sum) + (w) * (x))
#ifndef to_weight
typedef VECTOR(BYTES / 2, WEIGHT) Halves;
typedef VECTOR(BYTES, uint32_t) Words;
#define load_weights(w) ((Register)(__builtin_convertvector(*(const Halves *)(w), Words) << 16))
#else
#define load_weights(w) (*(const Register *)(w))
#endif
#endif
#define load_activations(x) (*(const Register *)(x))

enum {
    LANES = sizeof(Floats) / sizeof(float),       /* sums in a register */
    STEP = sizeof(Register) / sizeof(Activation), /* numbers that a product takes at a time */
    PAIR = STEP / LANES                           /* of these go into one sum: 1 or 2 */
};

/* Sums whose order a compiler may change, as it likes. Only these: where it may change the order of
   everything, w * (x * s) becomes (w * x) * s, which can overflow where the first does not. */
static inline float sum_of_lanes(Floats x) {
#if !defined to_weight && defined __AVX512BF16__
    return _mm512_reduce_add_ps((__m512)x); /* 8 rows in 0.9 of the time that the loop takes */
#else
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < LANES; j++)
        sum += x[j];
    return sum;
#endif
}
static inline float sum_of_products(const float *x, const float *y, Int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Int i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}
static inline float sum_of(const float *x, Int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Int i = 0; i < n; i++)
        sum += x[i];
    return sum;
}

/* ------------------------------------------------------------------------------- two functions */
/* e^x = 2^n e^r. Unlike expf it is made for whole registers. NaN gives NaN. */
static inline float exponential(float x) {
    const float from_below = x > -87 ? x : -87; /* NaN becomes -87 here, and n an integer */
    const float n = rintf((from_below < 88 ? from_below : 88) * 1.44269504f);
    const float r = x - n * 0.693147181f;
    /* 1 / 6.f and not r / 6: a division takes as long as all of this */
    const float high = 1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f)));
    const float e_r = 1 + r * (1 + r * (1 / 2.f + r * high));
    const float e_x = e_r * (Bits){.bits = (uint32_t)((int32_t)n + 127) << 23}.number;
    return x < -87 ? 0 : x > 88 ? INFINITY : e_x;
}

/* granitemoe.py's swiglu: F.silu(gate) * up */
static inline float swiglu(float gate, float up) {
    return rounded(gate / (1 + exponential(-gate))) * up;
}
