/* Attention and experts of granitemoe.py for the many tokens of a prompt. A step (cpu.c) waits for
   its weights to be read, and a register holds numbers that follow each other in one row. Here
   arithmetic takes the time, and a register holds the same number of LANES tokens, or the same
   PAIR of numbers where the processor multiplies pairs, which meet one weight, or pair, copied to
   all lanes of another. ROWS of weights by TOKENS are summed at a time, in registers. cpu.py fills
   in an Experts or an Attention and calls the function that takes it. */
#include "numbers.h"
#include <string.h>

enum {
    LANES = sizeof(Floats) / sizeof(float), PAIR = STEP / LANES, TOKENS = 2 * LANES,
#if defined __x86_64__ && !defined __AVX512F__
    ROWS = 6, /* of 16 registers 12 hold sums */
#else
    ROWS = 12, /* of 32 registers 24 */
#endif
    RUN = 256, /* tokens of one expert at a time, which stay in the L2 cache; whole TOKENS */
    KEYS = 96  /* of attention at a time, whose scores stay in L1; whole ROWS */
};

/* y (ROWS, TOKENS) = w (ROWS, n) . x (n, TOKENS), the first V registers of each row of y. The rows
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
                    float (*y)[TOKENS]) { /* beyond `tokens` y may be anything */
    if (tokens > LANES) tile(w, n, ahead, x, y, 2);
    else tile(w, n, ahead, x, y, 1);
}
/* w = rows of a matrix (count, n), from the i-th on; where it ends, its last again */
static void rows_of(const WEIGHT *matrix, Int count, Int n, Int i, int rows, const WEIGHT **w) {
    for (int r = 0; r < rows; r++, i += i < count - 1) w[r] = matrix + i * n;
}
static void round_all(float (*y)[TOKENS]) { /* as PyTorch rounds a product */
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < TOKENS; j++) y[r][j] = rounded(y[r][j]);
}

/* One token's n numbers, to their places among those of TOKENS */
static void turn(const WEIGHT *row, Int n, Act *to) {
    for (Int i = 0; i + PAIR <= n; i += PAIR, row += PAIR, to += TOKENS * PAIR)
        for (int j = 0; j < PAIR; j++) to[j] = as_act(row[j]);
    if (n % PAIR) to[0] = as_act(row[0]), to[1] = 0;
}

/* ----------------------------------------------------------------------------------- attention */
typedef struct { /* fast/cpu.py has the same fields in the same order */
    Int B, H, G, T, S, C, threads;
    float scale;
    const WEIGHT *q, *k, *values; /* (B, H, T, C), (B, G, S, C), (B, G, S / KEYS, C, KEYS) */
    WEIGHT *y;                    /* (B, T, H, C) */
    const Int *pads;              /* (B), each row's first slot */
} Attention;

typedef struct { float top[TOKENS], sum[TOKENS], shrink[TOKENS]; } Softmax; /* so far */

/* p (M / PAIR, TOKENS, PAIR) = e^(scores - top), where top is the highest so far. If it has grown,
   what was summed before has to shrink. Of M keys the first query sees those from `first` to
   `seen`, the next 1 more. */
static void softmax(float (*scores)[TOKENS], int M, int first, int seen, float scale,
                    Softmax *so_far, Act *p) {
    Softmax now = *so_far;
    for (int s = 0; s < M; s++)
        for (int j = 0; j < TOKENS; j++) {
            scores[s][j] = first <= s && s < seen + j ? scores[s][j] * scale : -INFINITY;
            now.top[j] = scores[s][j] > now.top[j] ? scores[s][j] : now.top[j];
        }
    for (int j = 0; j < TOKENS; j++)
        now.sum[j] *= now.shrink[j] = exponential(so_far->top[j] - now.top[j]);
    for (int s = 0; s < M; s++)
        for (int j = 0; j < TOKENS; j++)
            now.sum[j] += scores[s][j] = exponential(scores[s][j] - now.top[j]);
    for (int s = 0; s < M; s += PAIR, p += TOKENS * PAIR)
        for (int j = 0; j < TOKENS; j++)
            for (int k = 0; k < PAIR; k++) p[j * PAIR + k] = act(scores[s + k][j]);
    *so_far = now;
}

/* What TOKENS queries of one head see, from query t on; KEYS at a time (arXiv 2205.14135). Queries
   of padding, which see nothing, get zeros. */
static void attend(const Attention *a, Int head, Int t) {
    const Int C = a->C, T = a->T, S = a->S, few = T - t < TOKENS ? T - t : TOKENS;
    const Int key_head = head / (a->H / a->G), seen = S - T + t + 1, all = seen + few - 1;
    const Int first = a->pads[head / a->H], begin = first / KEYS, blocks = (S + KEYS - 1) / KEYS;
    const WEIGHT *keys = a->k + key_head * S * C, *w[ROWS];
    const WEIGHT *values = a->values + (key_head * blocks + begin) * C * KEYS;
    float scores[KEYS][TOKENS], y[C + ROWS][TOKENS], part[ROWS][TOKENS];
    Act q[(C + 1) * TOKENS], p[KEYS * TOKENS];
    Softmax soft = {0};
    memset(y, 0, sizeof y);
    for (int j = 0; j < TOKENS; j++) {
        turn(a->q + (head * T + t + (j < few ? j : few - 1)) * C, C, q + j * PAIR);
        soft.top[j] = -__FLT_MAX__; /* not -inf, which a score may be */
    }
    for (Int s = begin * KEYS; s < all; s += KEYS, values += C * KEYS) {
        const Int M = all - s < KEYS ? (all - s + ROWS - 1) / ROWS * ROWS : KEYS;
        for (Int i = 0; i < M; i += ROWS) {
            rows_of(keys, S, C, s + i, ROWS, w);
            tile_of(w, C, ROWS * C, q, few, scores + i);
        }
        softmax(scores, M, first - s, seen - s, a->scale, &soft, p);
        for (Int c = 0; c < C; c += ROWS) {
            rows_of(values, C, KEYS, c, ROWS, w);
            tile_of(w, M, ROWS * KEYS, p, few, part);
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < TOKENS; j++)
                    y[c + r][j] = y[c + r][j] * soft.shrink[j] + part[r][j];
        }
    }
    for (Int c = 0; c < C; c++)
        for (int j = 0; j < TOKENS; j++) y[c][j] /= soft.sum[j];
    for (int j = 0; j < few; j++) {
        WEIGHT *to = a->y + ((head / a->H * T + t + j) * a->H + head % a->H) * C;
        for (Int c = 0; c < C; c++) to[c] = seen + j > first ? narrow(y[c][j]) : 0;
    }
}

void attention(const Attention *a) {
    const Int heads = a->B * a->H, blocks = (a->T + TOKENS - 1) / TOKENS;
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (Int i = heads * blocks - 1; i >= 0; i--) /* those that see most go first */
        attend(a, i % heads, i / heads * TOKENS);
}

/* --------------------------------------------------------------------------- mixture of experts */
typedef struct { /* the same; tokens are sorted, so that each expert's are a run */
    Int E, D, F, Y, threads; /* Y: from row to row of y_ND; D + ROWS - 1 or more, for whole ROWS */
    const WEIGHT *gate_up_EPD, *down_EDF, *x_ND;
    const Int *tokens_M, *ends_E;
    const float *weights_M;
    float *y_ND;     /* of zeros at first */
    Act *x, *hidden; /* (RUN / TOKENS, D or F filled up to PAIR, TOKENS) */
} Experts;

/* p->hidden = swiglu of gate_up (2 F, D) . p->x, half of ROWS for the gate and half for up */
static void gate_and_up(const Experts *p, const WEIGHT *gate_up, Int M, Int even_D, Int even_F) {
    const Int D = p->D, F = p->F, half = ROWS / 2;
    SHARE(b, (F + half - 1) / half) {
        const WEIGHT *w[ROWS];
        float y[ROWS][TOKENS];
        rows_of(gate_up, F, D, b * half, half, w);
        rows_of(gate_up + F * D, F, D, b * half, half, w + half);
        for (Int t = 0; t < M; t += TOKENS) {
            Act *to = p->hidden + t * even_F + b * half * TOKENS;
            tile_of(w, D, half * D, p->x + t * even_D, M - t, y);
            round_all(y);
            for (int r = 0; r < half; r++)
                for (int j = 0; j < TOKENS; j++) y[r][j] = swiglu(y[r][j], y[r + half][j]);
            for (Int r = 0; r < half && b * half + r < even_F; r += PAIR, to += TOKENS * PAIR)
                for (int j = 0; j < TOKENS; j++)
                    for (int k = 0; k < PAIR; k++) to[j * PAIR + k] = act(y[r + k][j]);
        }
    }
}

/* y_ND += weights * (down (D, F) . p->hidden), token by token */
static void down(const Experts *p, const WEIGHT *down_DF, Int start, Int M, Int even_F) {
    const Int D = p->D, F = p->F, *tokens = p->tokens_M + start;
    SHARE(b, (D + ROWS - 1) / ROWS) {
        const WEIGHT *w[ROWS];
        float y[ROWS][TOKENS];
        rows_of(down_DF, D, F, b * ROWS, ROWS, w);
        for (Int t = 0; t < M; t += TOKENS) {
            const Int end = t + TOKENS < M ? t + TOKENS : M;
            for (Int j = t; j < end; j++)
                __builtin_prefetch(p->y_ND + tokens[j] * p->Y + b * ROWS, 1);
            tile_of(w, F, ROWS * F, p->hidden + t * even_F, M - t, y);
            round_all(y);
            for (Int j = t; j < end; j++) {
                float *sums = p->y_ND + tokens[j] * p->Y + b * ROWS;
                const float weight = p->weights_M[start + j];
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) sums[r] += weight * y[r][j - t];
            }
        }
    }
}

void experts(const Experts *p) {
    const Int even_D = (p->D + PAIR - 1) / PAIR * PAIR, even_F = (p->F + PAIR - 1) / PAIR * PAIR;
#pragma omp parallel num_threads(p->threads)
    for (Int e = 0, start = 0; e < p->E; e++)
        for (Int M; start < p->ends_E[e]; start += M) {
            M = p->ends_E[e] - start < RUN ? p->ends_E[e] - start : RUN;
            SHARE(t, (M + LANES - 1) / LANES * LANES)
                turn(p->x_ND + p->tokens_M[start + (t < M ? t : M - 1)] * p->D, p->D,
                     p->x + t / TOKENS * TOKENS * even_D + t % TOKENS * PAIR);
            gate_and_up(p, p->gate_up_EPD + e * 2 * p->F * p->D, M, even_D, even_F);
            down(p, p->down_EDF + e * p->D * p->F, start, M, even_F);
        }
}
