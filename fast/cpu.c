/* The token step of granitemoe.py once more, in plain C: B rows, one new token each, ids to logits.
   Sections, names, order and dimension key are granitemoe.py's; L layers, S slots of the cache and
   N = B tokens. Weights and cache are read where PyTorch keeps them, and written there. cpu.py
   builds this, fills in a Model and calls the last function. Each thread runs all of it, but its
   SHARE of a loop, and then waits. bfloat16 is rounded where PyTorch rounds it. */
#include "numbers.h"

/* ------------------------------------------------------------------------------------ products */
/* y[t] (outputs) = w (outputs, n) . x[t] (n) for T rows x, which share the reading of w */
static inline __attribute__((always_inline)) void
dot(const WEIGHT *w, Int outputs, const Act *const *x, Int n, float *const *y, const int T) {
    for (Int o = 0, i; o < outputs; o++, w += n) {
        Floats sum[4][2] = {0}; /* in two parts: an addition waits for the one before it */
        for (i = 0; i + 2 * STEP <= n; i += 2 * STEP)
            for (int p = 0; p < 2; p++) {
                const Some some = some_weights(w + i + p * STEP);
                for (int t = 0; t < T; t++)
                    sum[t][p] = add(sum[t][p], some, *(const Some *)(x[t] + i + p * STEP));
            }
        for (int t = 0; t < T; t++) {
            const Floats all = sum[t][0] + sum[t][1];
            y[t][o] = 0;
            for (unsigned j = 0; j < sizeof all / sizeof **y; j++) y[t][o] += all[j];
        }
        for (; i < n; i++)
            for (int t = 0; t < T; t++) y[t][o] += wide(w[i]) * wide(x[t][i]);
    }
}

/* dot for the next rows, T of those left: from[t] of x (., n), to[t] of y (., stride) */
static int dots(const WEIGHT *w, Int outputs, const Act *x, const Int *from, Int left, Int n,
                float *y, const Int *to, Int stride) {
    const int T = left < 4 ? left : 4;
    const Act *rows[4]; float *sums[4];
    for (int t = 0; t < T; t++) rows[t] = x + from[t] * n, sums[t] = y + to[t] * stride;
    if (T == 1) dot(w, outputs, rows, n, sums, 1); /* constants: sums have to be in registers */
    if (T == 2) dot(w, outputs, rows, n, sums, 2);
    if (T == 3) dot(w, outputs, rows, n, sums, 3);
    if (T == 4) dot(w, outputs, rows, n, sums, 4);
    return T;
}

/* -------------------------------------------------------------------------------------- config */
typedef struct { /* fast/cpu.py has the same fields in the same order */
    Int V, D, F, L, H, G, C, E, K, B, S, at, threads; /* at: the slot of the new tokens */
    float eps, embedding_multiplier, attention_multiplier, residual_multiplier, logits_scaling;
    const struct { /* a layer's weights, (outputs, inputs) each, by their names on disk */
        WEIGHT *input_layernorm, *q_proj, *k_proj, *v_proj, *o_proj, *post_attention_layernorm;
        WEIGHT *input_linear, *output_linear, *router; /* (E, P, D), (E, D, F), (E, D) */
    } *layers;
    const WEIGHT *embed_tokens, *norm, *head, *cos, *sin; /* (V, D), (D), (V, D), (S, C) twice */
    WEIGHT *keys, *values;                                /* (L, B, G, S, C) */
    const Int *ids, *pads, *every; /* (B); (B), each row's first slot; 0, 1, 2, ...: all rows */
    float *x, *q, *k, *v, *scores, *y, *logits_NE, *weights_NK, *rows_MP, *rows_MD, *logits;
    Act *normed, *mixed, *hidden_MF;
    Int *expert_ids_NK, *order_M, *tokens_M, *ends_E, *tied;
} Model;

/* --------------------------------------------------------------------------- norm and positions */
static void rms_norm(const Model *m, const WEIGHT *weight) { /* normed, of the residual stream x */
    SHARE(b, m->B) {
        const float *x = m->x + b * m->D;
        float squares = 0;
        for (Int d = 0; d < m->D; d++) squares += x[d] * x[d];
        const float scale = 1 / sqrtf(squares / m->D + m->eps);
        for (Int d = 0; d < m->D; d++)
            m->normed[b * m->D + d] = act(wide(weight[d]) * rounded(x[d] * scale));
    }
}
static void rotate(const Model *m, Int b, float *x) {
    const WEIGHT *cos = m->cos + (m->at - m->pads[b]) * m->C, *sin = m->sin + (cos - m->cos);
    for (Int i = 0, j = m->C / 2; j < m->C; i++, j++) {
        const float first = x[i], second = x[j];
        x[i] = rounded(rounded(first * wide(cos[i])) - rounded(second * wide(sin[i])));
        x[j] = rounded(rounded(second * wide(cos[j])) + rounded(first * wide(sin[j])));
    }
}

/* ----------------------------------------------------------------------------------- attention */
static void softmax(float *x, Int n) {
    float top = x[0], sum = 0;
    for (Int i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
    for (Int i = 0; i < n; i++) sum += x[i] = exponential(x[i] - top);
    for (Int i = 0; i < n; i++) x[i] /= sum;
}

/* For the query heads of row b that read key head g. The new key and value go into the cache. */
static void attend(const Model *m, Int layer, Int b, Int g) {
    const Int C = m->C, heads = m->H / m->G, start = m->pads[b], at = m->at, room = m->S + 3;
    const Int head = b * m->G + g, slots = (layer * m->B * m->G + head) * m->S;
    WEIGHT *keys = m->keys + slots * C, *values = m->values + slots * C;
    float *q = m->q + head * heads * C, *scores = m->scores + head * heads * room;
    Act *mixed = m->mixed + head * heads * C; /* holds the queries, then what comes of them */
    rotate(m, b, m->k + head * C);
    for (Int c = 0, new = at * C; c < C; c++, new++)
        keys[new] = narrow(m->k[head * C + c]), values[new] = narrow(m->v[head * C + c]);
    for (Int h = 0; h < heads; h++) rotate(m, b, q + h * C);
    for (Int i = 0; i < heads * C; q[i++] = 0) mixed[i] = act(q[i]);
    for (Int h = 0; h < heads; h += 4)
        dots(keys + start * C, at + 1 - start, mixed, m->every + h, heads - h, C, scores + start,
             m->every + h, room);
    for (Int h = 0; h < heads; h++) {
        float *p = scores + h * room, *y = q + h * C;
        for (Int s = start; s <= at; s++) p[s] *= m->attention_multiplier;
        softmax(p + start, at + 1 - start);
        p[at + 1] = p[at + 2] = p[at + 3] = 0;
        for (Int s = start; s <= at; s += 4) { /* by fours, so that y is read and written less */
            const WEIGHT *v = values + s * C, *v1 = s < at ? v + C : v;
            const WEIGHT *v2 = s + 1 < at ? v1 + C : v, *v3 = s + 2 < at ? v2 + C : v;
            for (Int c = 0; c < C; c++)
                y[c] += p[s] * wide(v[c]) + p[s + 1] * wide(v1[c]) + p[s + 2] * wide(v2[c]) +
                        p[s + 3] * wide(v3[c]);
        }
        for (Int c = 0; c < C; c++) mixed[h * C + c] = act(y[c]);
    }
}

/* y (M, outputs) = x (., n) . w (E, outputs, n): each expert has a run of the rows, which two lists
   name, in x and in y. All threads share each expert, and wait at the end. */
static void product(const WEIGHT *w, Int E, const Int *ends_E, const Act *x, const Int *from, Int n,
                    Int outputs, float *y, const Int *to) {
    for (Int e = 0, start = 0; e < E; start = ends_E[e++])
#pragma omp for nowait
        for (Int o = 0; o < outputs; o += 8) /* few, which other rows then find near */
            for (Int i = start, T; i < ends_E[e]; i += T) {
                const Int few = outputs - o < 8 ? outputs - o : 8, M = ends_E[e] - i;
                T = dots(w + (e * outputs + o) * n, few, x, from + i, M, n, y + o, to + i, outputs);
                for (Int t = i; t < i + T; t++)
                    for (float *sum = y + to[t] * outputs + o, *end = sum + few; sum < end; sum++)
                        *sum = rounded(*sum);
            }
#pragma omp barrier
}

/* --------------------------------------------------------------------------- mixture of experts */
static void router(const Model *m, Int layer) { /* the K experts of each token, and their weights */
    for (Int n = 0; n < m->B; n++) {
        const float *logits_E = m->logits_NE + n * m->E;
        Int *ids_K = m->expert_ids_NK + n * m->K, chosen = 0;
        for (Int e = 0, better = 0; e < m->E; e++, better = 0) {
            for (Int i = 0; i < m->E; i++) better += logits_E[i] > logits_E[e];
            if (better < m->K && chosen++ < m->K) ids_K[chosen - 1] = e;
        }
        for (Int k = 0; k < m->K; k++) m->weights_NK[n * m->K + k] = logits_E[ids_K[k]];
        softmax(m->weights_NK + n * m->K, m->K);
        if (chosen > m->K) *m->tied = layer; /* the K-th is as good as others */
    }
}
static void sort_by_expert(const Model *m) {
    for (Int e = 0, place = 0; e < m->E; m->ends_E[e++] = place)
        for (Int i = 0; i < m->B * m->K; i++)
            if (m->expert_ids_NK[i] == e) m->order_M[place] = i, m->tokens_M[place++] = i / m->K;
}

static void experts(const Model *m, const WEIGHT *gate_up_EPD, const WEIGHT *down_EDF) {
    const Int D = m->D, F = m->F, K = m->K, *order_M = m->order_M;
    product(gate_up_EPD, m->E, m->ends_E, m->normed, m->tokens_M, D, 2 * F, m->rows_MP, order_M);
    SHARE(i, m->B * K) {
        const float *gate = m->rows_MP + i * 2 * F, *up = gate + F;
        for (Int f = 0; f < F; f++)
            m->hidden_MF[i * F + f] = act(swiglu(gate[f], up[f]));
    }
    product(down_EDF, m->E, m->ends_E, m->hidden_MF, order_M, F, D, m->rows_MD, order_M);
    SHARE(n, m->B) {
        for (Int d = 0; d < D; d++) m->y[n * D + d] = 0;
        for (Int i = n * K; i < n * K + K; i++)
            for (Int d = 0; d < D; d++)
                m->y[n * D + d] += rounded(m->weights_NK[i]) * m->rows_MD[i * D + d];
    }
}

/* --------------------------------------------------------------------------------------- model */
static void add_to_stream(const Model *m) { /* x + y * residual_multiplier */
    SHARE(i, m->B * m->D)
        m->x[i] = rounded(m->x[i] + rounded(rounded(m->y[i]) * m->residual_multiplier));
}

/* From ids to logits (B, V). Where a K-th expert is as good as the next, the choice is PyTorch's,
   by its algorithm: then `tied` is the layer, not -1. Put in ids and weights, and call again. */
void step(const Model *m) {
    const Int D = m->D, kv = m->G * m->C, *B = &m->B, *all = m->every, tied = *m->tied;
    *m->tied = -1;
#pragma omp parallel num_threads(m->threads)
    {
        SHARE(i, tied < 0 ? m->B * D : 0)
            m->x[i] = rounded(m->embedding_multiplier *
                              wide(m->embed_tokens[m->ids[i / D] * D + i % D]));
        for (Int i = tied < 0 ? 0 : tied; i < m->L; i++) {
            if (i != tied) {
                rms_norm(m, m->layers[i].input_layernorm);
                product(m->layers[i].q_proj, 1, B, m->normed, all, D, D, m->q, all);
                product(m->layers[i].k_proj, 1, B, m->normed, all, D, kv, m->k, all);
                product(m->layers[i].v_proj, 1, B, m->normed, all, D, kv, m->v, all);
                SHARE(j, m->B * m->G) attend(m, i, j / m->G, j % m->G);
                product(m->layers[i].o_proj, 1, B, m->mixed, all, D, D, m->y, all);
                add_to_stream(m);
                rms_norm(m, m->layers[i].post_attention_layernorm);
                product(m->layers[i].router, 1, B, m->normed, all, D, m->E, m->logits_NE, all);
                SHARE(once, 1) router(m, i);
                if (*m->tied >= 0) break;
            }
            SHARE(once, 1) sort_by_expert(m);
            experts(m, m->layers[i].input_linear, m->layers[i].output_linear);
            add_to_stream(m);
        }
        if (*m->tied < 0) {
            rms_norm(m, m->norm);
            product(m->head, 1, B, m->normed, all, D, m->V, m->logits, all);
            SHARE(i, m->B * m->V) m->logits[i] = rounded(m->logits[i] / m->logits_scaling);
        }
    }
}
