/* The experts of granitemoe.py for the many tokens of a prompt, sorted so that each expert's are a
   run. A step (cpu.c) waits for its weights to be read; here arithmetic takes the time. So numbers
   lie the other way: a register holds one number of LANES tokens, or PAIR numbers of each where
   the processor multiplies pairs, and meets a weight that fills another register. ROWS of weights
   by TOKENS are summed at a time, in registers. cpu.py fills in a Prompt and calls the last
   function. */
#include "numbers.h"

enum {
    LANES = sizeof(Floats) / sizeof(float), PAIR = STEP / LANES, TOKENS = 2 * LANES,
#if defined __x86_64__ && !defined __AVX512F__
    ROWS = 6, /* of 16 registers 12 hold sums */
#else
    ROWS = 12, /* of 32 registers 24 */
#endif
    RUN = 256 /* tokens of one expert at a time, which stay in the second cache */
};

typedef struct { /* engine/cpu.py has the same fields in the same order; Y: the stride of y_ND */
    Int E, D, F, Y, threads;
    const WEIGHT *gate_up_EPD, *down_EDF, *x_ND;
    const Int *tokens_M, *ends_E;
    const float *weights_M;
    float *y_ND; /* of zeros at first; Y is at least D + ROWS - 1 */
    Act *x, *hidden; /* (RUN / TOKENS, D or F, TOKENS), of PAIR numbers */
} Prompt;

/* y (ROWS, TOKENS) = w (ROWS, n) . x (n, TOKENS), of which the first V registers full. The rows
   that come next, `ahead` of these, are fetched meanwhile. */
static inline __attribute__((always_inline)) void
tile(const WEIGHT *const *w, Int n, Int ahead, const Act *x, float (*y)[TOKENS], const int V) {
    const WEIGHT *rows[ROWS];
    Floats sum[ROWS][2] = {0};
    for (int r = 0; r < ROWS; r++) rows[r] = w[r];
    for (Int i = 0; i + PAIR <= n; i += PAIR, x += TOKENS * PAIR) {
        if (i % 32 == 0)
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(rows[r] + i + ahead, 0, 2);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++)
                sum[r][v] = add(sum[r][v], all_of(rows[r] + i), *(const Some *)(x + v * STEP));
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < V; v++) {
            const WEIGHT last[2] = {rows[r][n - 1]};
            if (n % PAIR) sum[r][v] = add(sum[r][v], all_of(last), *(const Some *)(x + v * STEP));
            *(Floats *)(y[r] + v * LANES) = sum[r][v];
        }
}
static void tile_of(const WEIGHT *const *w, Int n, Int ahead, const Act *x, Int tokens,
                    float (*y)[TOKENS]) { /* rounded, as a product is */
    if (tokens > LANES) tile(w, n, ahead, x, y, 2);
    else tile(w, n, ahead, x, y, 1);
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < TOKENS; j++) y[r][j] = rounded(y[r][j]);
}

/* p->x = the rows of x_ND that M tokens name, turned. What fills up TOKENS may be anything. */
static void turn(const Prompt *p, const Int *tokens, Int M, Int even) {
    SHARE(t, (M + LANES - 1) / LANES * LANES) {
        const WEIGHT *row = p->x_ND + tokens[t < M ? t : M - 1] * p->D;
        Act *to = p->x + t / TOKENS * TOKENS * even + t % TOKENS * PAIR;
        for (Int i = 0; i + PAIR <= p->D; i += PAIR, row += PAIR, to += TOKENS * PAIR)
            for (int j = 0; j < PAIR; j++) to[j] = as_act(row[j]);
        if (p->D % PAIR) to[0] = to[1] = as_act(row[0]);
    }
}

/* p->hidden = swiglu of gate_up (2 F, D) . p->x, half of ROWS for the gate and half for up */
static void gate_and_up(const Prompt *p, const WEIGHT *gate_up, Int M, Int even_D, Int even_F) {
    const Int D = p->D, F = p->F, half = ROWS / 2;
    SHARE(b, (F + half - 1) / half) {
        const WEIGHT *w[ROWS];
        float y[ROWS][TOKENS];
        for (Int r = 0, f = b * half; r < half; r++, f += f < F - 1)
            w[r] = gate_up + f * D, w[r + half] = gate_up + (F + f) * D;
        for (Int t = 0; t < M; t += TOKENS) {
            Act *to = p->hidden + t * even_F + b * half * TOKENS;
            tile_of(w, D, half * D, p->x + t * even_D, M - t, y);
            for (int r = 0; r < half; r++)
                for (int j = 0; j < TOKENS; j++) y[r][j] = swiglu(y[r][j], y[r + half][j]);
            for (Int r = 0; r < half && b * half + r < even_F; r += PAIR, to += TOKENS * PAIR)
                for (int j = 0; j < TOKENS; j++)
                    for (int k = 0; k < PAIR; k++) to[j * PAIR + k] = act(y[r + k][j]);
        }
    }
}

/* y_ND += weights * (down (D, F) . p->hidden), token by token */
static void down(const Prompt *p, const WEIGHT *down_DF, Int start, Int M, Int even_F) {
    const Int D = p->D, F = p->F, *tokens = p->tokens_M + start;
    SHARE(b, (D + ROWS - 1) / ROWS) {
        const WEIGHT *w[ROWS];
        float y[ROWS][TOKENS];
        for (Int r = 0, d = b * ROWS; r < ROWS; r++, d += d < D - 1) w[r] = down_DF + d * F;
        for (Int t = 0; t < M; t += TOKENS) {
            tile_of(w, F, ROWS * F, p->hidden + t * even_F, M - t, y);
            for (Int j = t; j < t + TOKENS && j < M; j++) {
                float *sums = p->y_ND + tokens[j] * p->Y + b * ROWS;
                for (int r = 0; r < ROWS; r++) sums[r] += p->weights_M[start + j] * y[r][j - t];
            }
        }
    }
}

void experts(const Prompt *p) {
    const Int even_D = (p->D + PAIR - 1) / PAIR * PAIR, even_F = (p->F + PAIR - 1) / PAIR * PAIR;
#pragma omp parallel num_threads(p->threads)
    for (Int e = 0, start = 0; e < p->E; e++)
        for (Int M; start < p->ends_E[e]; start += M) {
            M = p->ends_E[e] - start < RUN ? p->ends_E[e] - start : RUN;
            turn(p, p->tokens_M + start, M, even_D);
            gate_and_up(p, p->gate_up_EPD + e * 2 * p->F * p->D, M, even_D, even_F);
            down(p, p->down_EDF + e * p->D * p->F, start, M, even_F);
        }
}
