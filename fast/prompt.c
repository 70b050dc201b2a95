/* Attention and experts of granitemoe.py for the many tokens of a prompt. A step (cpu.c) waits for
   its weights to be read, and a register holds numbers that follow each other in one row. Here
   arithmetic takes the time, and a register holds the same number of LANES tokens, or the same
   PAIR of numbers where the processor multiplies pairs, which meet one weight, or pair, copied to
   all lanes of another. ROWS of weights by TOKENS are summed at a time, in registers. cpu.py fills
   in an Experts or an Attention and calls the function that takes it. */
#include "numbers.h"

enum {
    TOKENS = 2 * LANES,
#if defined __x86_64__ && !defined __AVX512F__
    ROWS = 6, /* of 16 registers 12 hold sums */
#else
    ROWS = 12, /* of 32 registers 24 */
#endif
    RUN = 256,   /* tokens of one expert at a time, which stay in the L2 cache; whole TOKENS */
    KEYS = 96,   /* of attention at a time, whose scores stay in L1; whole ROWS */
    MOST_C = 128 /* or a thread's arrays exceed 64 KB; cpu.py leaves larger heads to PyTorch */
};

/* ------------------------------------------------------------------------------------ products */
/* y (ROWS, TOKENS) = w (ROWS, n) . x (n, TOKENS), the first V registers of each row of y. The rows
   that come next, `ahead` of these, are fetched meanwhile. */
static inline __attribute__((always_inline)) void tile(const WEIGHT *const *w, Int n, Int ahead,
                                                       const Activation *x, float (*y)[TOKENS],
                                                       const int V) {
    const WEIGHT *rows[ROWS];
    Floats sum[ROWS][2] = {0};
    for (int r = 0; r < ROWS; r++)
        rows[r] = w[r];
    for (Int i = 0; i + PAIR <= n; i += PAIR) {
        if (i % 32 == 0) {
            for (int r = 0; r < ROWS; r++)
                __builtin_prefetch(rows[r] + i + ahead, 0, 2);
        }
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            for (int v = 0; v < V; v++)
                sum[r][v] =
                    multiply_add(sum[r][v], broadcast(rows[r] + i), load_activations(x + v * STEP));
        }
        x += TOKENS * PAIR;
    }
    for (int r = 0; r < ROWS; r++) {
        const WEIGHT last[2] = {rows[r][n - 1]}; /* without a second one: 0 */
        for (int v = 0; v < V; v++) {
            if (n % PAIR)
                sum[r][v] =
                    multiply_add(sum[r][v], broadcast(last), load_activations(x + v * STEP));
            *(Floats *)(y[r] + v * LANES) = sum[r][v];
        }
    }
}

/* tile for so many tokens; beyond them y may be anything. */
static void tile_of(const WEIGHT *const *w, Int n, Int ahead, const Activation *x, Int tokens,
                    float (*y)[TOKENS]) {
    if (tokens > LANES)
        tile(w, n, ahead, x, y, 2);
    else
        tile(w, n, ahead, x, y, 1);
}

/* w = rows of a matrix (count, n), from the i-th on; where it ends, its last again */
static void rows_of(const WEIGHT *matrix, Int count, Int n, Int i, int rows, const WEIGHT **w) {
    for (int r = 0; r < rows; r++) {
        const Int row = i + r < count ? i + r : count - 1;
        w[r] = matrix + row * n;
    }
}

/* As PyTorch rounds a product */
static void round_all(float (*y)[TOKENS]) {
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < TOKENS; j++)
            y[r][j] = rounded(y[r][j]);
    }
}

/* One token's n numbers, to their places among those of TOKENS; 0 makes up a pair. */
static void turn(const WEIGHT *row, Int n, Activation *to) {
    for (Int i = 0; i + PAIR <= n; i += PAIR) {
        for (int k = 0; k < PAIR; k++)
            to[k] = weight_to_activation(row[i + k]);
        to += TOKENS * PAIR;
    }
    if (n % PAIR) {
        to[0] = weight_to_activation(row[n - 1]);
        to[1] = 0;
    }
}

/* ----------------------------------------------------------------------------------- attention */
/* fast/cpu.py has the same fields in the same order. */
typedef struct {
    Int B, H, G, T, S, C, threads;
    float scale;
    const WEIGHT *q, *k, *values; /* (B, H, T, C), (B, G, S, C), (B, G, S / KEYS, C, KEYS) */
    WEIGHT *y;                    /* (B, T, H, C) */
    const Int *pads;              /* (B), each row's first slot */
} Attention;

/* Of TOKENS queries, over the keys so far */
typedef struct {
    float top[TOKENS], sum[TOKENS], shrink[TOKENS];
} Softmax;

/* p (M / PAIR, TOKENS, PAIR) = e^(scores - top), where top is the highest so far. If it has grown,
   what was summed before has to shrink. Of M keys the first query sees those from `first` to
   `seen`, the next 1 more. */
static void softmax(float (*scores)[TOKENS], int M, int first, int seen, float scale,
                    Softmax *so_far, Activation *p) {
    Softmax now = *so_far;
    /* attend_eager: "scores = q @ k.transpose(-1, -2) * scale", "scores.masked_fill(~mask, ...)" */
    for (int s = 0; s < M; s++) {
        for (int j = 0; j < TOKENS; j++) {
            scores[s][j] = first <= s && s < seen + j ? scores[s][j] * scale : -INFINITY;
            now.top[j] = scores[s][j] > now.top[j] ? scores[s][j] : now.top[j];
        }
    }
    for (int j = 0; j < TOKENS; j++) {
        now.shrink[j] = exponential(so_far->top[j] - now.top[j]);
        now.sum[j] *= now.shrink[j];
    }
    for (int s = 0; s < M; s++) {
        for (int j = 0; j < TOKENS; j++) {
            scores[s][j] = exponential(scores[s][j] - now.top[j]);
            now.sum[j] += scores[s][j];
        }
    }
    for (int s = 0; s < M; s += PAIR) {
        for (int j = 0; j < TOKENS; j++) {
            for (int k = 0; k < PAIR; k++)
                p[j * PAIR + k] = to_activation(scores[s + k][j]);
        }
        p += TOKENS * PAIR;
    }
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
    float scores[KEYS][TOKENS], y[MOST_C + ROWS][TOKENS], part[ROWS][TOKENS];
    Activation q[(MOST_C + 1) * TOKENS], p[KEYS * TOKENS];
    Softmax soft = {0};
    for (Int c = 0; c < C + ROWS; c++) {
        for (int j = 0; j < TOKENS; j++)
            y[c][j] = 0;
    }
    for (int j = 0; j < TOKENS; j++) {
        const Int query = j < few ? j : few - 1;
        turn(a->q + (head * T + t + query) * C, C, q + j * PAIR);
        soft.top[j] = -__FLT_MAX__; /* not -inf, which a score may be */
    }
    for (Int s = begin * KEYS; s < all; s += KEYS) {
        const Int M = all - s < KEYS ? (all - s + ROWS - 1) / ROWS * ROWS : KEYS;
        /* attend_eager: "scores = q @ k.transpose(-1, -2)" */
        for (Int i = 0; i < M; i += ROWS) {
            rows_of(keys, S, C, s + i, ROWS, w);
            tile_of(w, C, ROWS * C, q, few, scores + i);
        }
        softmax(scores, M, first - s, seen - s, a->scale, &soft, p);
        /* attend_eager: "return F.dropout(probs, drop) @ v" */
        for (Int c = 0; c < C; c += ROWS) {
            rows_of(values, C, KEYS, c, ROWS, w);
            tile_of(w, M, ROWS * KEYS, p, few, part);
            for (int r = 0; r < ROWS; r++) {
                for (int j = 0; j < TOKENS; j++)
                    y[c + r][j] = y[c + r][j] * soft.shrink[j] + part[r][j];
            }
        }
        values += C * KEYS;
    }
    for (Int c = 0; c < C; c++) {
        for (int j = 0; j < TOKENS; j++)
            y[c][j] /= soft.sum[j];
    }
    for (int j = 0; j < few; j++) {
        WEIGHT *to = a->y + ((head / a->H * T + t + j) * a->H + head % a->H) * C;
        for (Int c = 0; c < C; c++)
            to[c] = seen + j > first ? to_weight(y[c][j]) : 0;
    }
}

/* attend_eager */
void attention(const Attention *a) {
    const Int heads = a->B * a->H, blocks = (a->T + TOKENS - 1) / TOKENS;
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (Int i = heads * blocks - 1; i >= 0; i--) /* those that see most go first */
        attend(a, i % heads, i / heads * TOKENS);
}

/* --------------------------------------------------------------------------- mixture of experts */
/* fast/cpu.py has the same fields in the same order. Tokens are sorted: each expert's are a run. */
typedef struct {
    Int E, D, F;
    Int Y; /* from row to row of y_ND; D + ROWS - 1 or more, for whole ROWS */
    Int threads;
    const WEIGHT *gate_up_EPD, *down_EDF, *x_ND;
    const Int *tokens_M, *ends_E;
    const float *weights_M;
    float *y_ND;            /* of zeros at first */
    Activation *x, *hidden; /* (RUN / TOKENS, D or F filled up to PAIR, TOKENS) */
} Experts;

/* "hidden = swiglu(F.linear(x_ND[tokens], gate_up_EPD[e]))": p->hidden of gate_up (2 F, D) and
   p->x, half of ROWS for the gate and half for up. 0 makes up a pair: an infinite number would
   be NaN with the weight 0. */
static void gate_and_up(const Experts *p, const WEIGHT *gate_up, Int M, Int even_D, Int even_F) {
    const Int D = p->D, F = p->F, half = ROWS / 2;
    SHARE (b, (F + half - 1) / half) {
        const WEIGHT *w[ROWS];
        float y[ROWS][TOKENS];
        const Int begin = b * half, rest = F - begin, rows = half < rest ? half : rest;
        rows_of(gate_up, F, D, begin, half, w);
        rows_of(gate_up + F * D, F, D, begin, half, w + half);
        for (Int t = 0; t < M; t += TOKENS) {
            Activation *to = p->hidden + t * even_F + begin * TOKENS;
            tile_of(w, D, half * D, p->x + t * even_D, M - t, y);
            round_all(y);
            for (int r = 0; r < half; r++) {
                for (int j = 0; j < TOKENS; j++)
                    y[r][j] = r < rows ? swiglu(y[r][j], y[r + half][j]) : 0;
            }
            for (Int r = 0; r < rows; r += PAIR) {
                for (int j = 0; j < TOKENS; j++) {
                    for (int k = 0; k < PAIR; k++)
                        to[j * PAIR + k] = to_activation(y[r + k][j]);
                }
                to += TOKENS * PAIR;
            }
        }
    }
}

/* "rows = F.linear(hidden, down_EDF[e]) * weights_M[start:end, None]" and
   "y_ND.index_add_(0, tokens, rows)", token by token */
static void down(const Experts *p, const WEIGHT *down_DF, Int start, Int M, Int even_F) {
    const Int D = p->D, F = p->F, *tokens = p->tokens_M + start;
    SHARE (b, (D + ROWS - 1) / ROWS) {
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
                for (int r = 0; r < ROWS; r++)
                    sums[r] += weight * y[r][j - t];
            }
        }
    }
}

/* "x_ND[tokens]" of M tokens from `start` on, turned; the last again fills up a register */
static void gather(const Experts *p, Int start, Int M, Int even_D) {
    SHARE (t, (M + LANES - 1) / LANES * LANES) {
        const Int token = p->tokens_M[start + (t < M ? t : M - 1)];
        const Int block = t / TOKENS * TOKENS, place = t % TOKENS;
        turn(p->x_ND + token * p->D, p->D, p->x + block * even_D + place * PAIR);
    }
}

/* experts_loop: "for e, end in enumerate(ends_E.tolist()):", RUN tokens of an expert at a time */
void experts(const Experts *p) {
    const Int even_D = (p->D + PAIR - 1) / PAIR * PAIR, even_F = (p->F + PAIR - 1) / PAIR * PAIR;
#pragma omp parallel num_threads(p->threads)
    {
        Int start = 0;
        for (Int e = 0; e < p->E; e++) {
            const WEIGHT *gate_up = p->gate_up_EPD + e * 2 * p->F * p->D;
            while (start < p->ends_E[e]) {
                const Int left = p->ends_E[e] - start, M = left < RUN ? left : RUN;
                gather(p, start, M, even_D);
                gate_and_up(p, gate_up, M, even_D, even_F);
                down(p, p->down_EDF + e * p->D * p->F, start, M, even_F);
                start += M;
            }
        }
    }
}
