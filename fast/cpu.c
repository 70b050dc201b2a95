/* The token step of granitemoe.py once more, in plain C: B rows, one new token each, ids to logits.
   Sections, names, order and dimension key are granitemoe.py's; L layers, S slots of the cache and
   N = B tokens. Weights and cache are read where PyTorch keeps them, and written there. cpu.py
   builds this, fills in a Model and calls the last function. Each thread runs all of it, but its
   SHARE of a loop, and then waits. bfloat16 is rounded where PyTorch rounds it. A comment in
   "quotes" is the line of granitemoe.py that the code after it is. */
#include "numbers.h"

/* -------------------------------------------------------------------------------------- config */
/* fast/cpu.py has the same fields in the same order. */
typedef struct {
    Int V, D, F, L, H, G, C, E, K, B, S;
    Int at; /* the slot of the new tokens */
    Int threads;
    float eps, embedding_multiplier, attention_multiplier, residual_multiplier, logits_scaling;
    const struct { /* a layer's weights, (outputs, inputs) each, by their names on disk */
        WEIGHT *input_layernorm, *q_proj, *k_proj, *v_proj, *o_proj, *post_attention_layernorm;
        WEIGHT *input_linear, *output_linear, *router; /* (E, P, D), (E, D, F), (E, D) */
    } *layers;
    const WEIGHT *embed_tokens, *norm, *head, *cos, *sin; /* (V, D), (D), (V, D), (S, C) twice */
    WEIGHT *keys, *values;                                /* (L, B, G, S, C) */
    const Int *ids, *pads, *every; /* (B); (B), each row's first slot; 0, 1, 2, ...: all rows */
    float *x, *q, *k, *v, *scores, *y, *logits_NE, *weights_NK, *rows_MP, *rows_MD, *logits;
    Activation *normed, *mixed, *hidden_MF;
    Int *expert_ids_NK, *order_M, *tokens_M, *ends_E, *tied;
} Model;

/* ------------------------------------------------------------------------------------ products */
/* y[t] (outputs) = w (outputs, n) . x[t] (n) for T rows x, which share the reading of w */
static inline __attribute__((always_inline)) void
dot(const WEIGHT *w, Int outputs, const Activation *const *x, Int n, float *const *y, const int T) {
    for (Int o = 0; o < outputs; o++) {
        Floats sum[4][2] = {0}; /* in two parts: an addition waits for the one before it */
        Int i = 0;
        for (; i + 2 * STEP <= n; i += 2 * STEP) {
            for (int part = 0; part < 2; part++) {
                const Register weights = load_weights(w + i + part * STEP);
                for (int t = 0; t < T; t++) {
                    const Register row = load_activations(x[t] + i + part * STEP);
                    sum[t][part] = multiply_add(sum[t][part], weights, row);
                }
            }
        }
        for (int t = 0; t < T; t++)
            y[t][o] = sum_of_lanes(sum[t][0] + sum[t][1]);
        for (; i < n; i++) {
            for (int t = 0; t < T; t++)
                y[t][o] += to_float(w[i]) * to_float(x[t][i]);
        }
        w += n;
    }
}

/* dot for the next rows, T of those left: from[t] of x (., n), to[t] of y (., stride) */
static int dots(const WEIGHT *w, Int outputs, const Activation *x, const Int *from, Int left, Int n,
                float *y, const Int *to, Int stride) {
    const int T = left < 4 ? left : 4;
    const Activation *rows[4];
    float *sums[4];
    for (int t = 0; t < T; t++) {
        rows[t] = x + from[t] * n;
        sums[t] = y + to[t] * stride;
    }
    if (T == 1) /* constants: sums have to be in registers */
        dot(w, outputs, rows, n, sums, 1);
    if (T == 2)
        dot(w, outputs, rows, n, sums, 2);
    if (T == 3)
        dot(w, outputs, rows, n, sums, 3);
    if (T == 4)
        dot(w, outputs, rows, n, sums, 4);
    return T;
}

/* One expert's part of product: y = x . w, for the rows from `start` to `end` of two lists */
static void product_of_one(const WEIGHT *w, Int start, Int end, const Activation *x,
                           const Int *from, Int n, Int outputs, float *y, const Int *to) {
#pragma omp for nowait
    for (Int o = 0; o < outputs; o += 8) { /* few, which other rows then find near */
        const Int few = outputs - o < 8 ? outputs - o : 8;
        for (Int i = start; i < end;) {
            const Int T = dots(w + o * n, few, x, from + i, end - i, n, y + o, to + i, outputs);
            for (Int t = i; t < i + T; t++) {
                float *sums = y + to[t] * outputs + o;
                for (Int j = 0; j < few; j++)
                    sums[j] = rounded(sums[j]);
            }
            i += T;
        }
    }
}

/* y (M, outputs) = x (., n) . w (E, outputs, n): each expert has a run of the rows, which two lists
   name, in x and in y. All threads share each expert, and wait at the end. */
static void product(const WEIGHT *w, Int E, const Int *ends_E, const Activation *x, const Int *from,
                    Int n, Int outputs, float *y, const Int *to) {
    Int start = 0;
    for (Int e = 0; e < E; e++) {
        product_of_one(w + e * outputs * n, start, ends_E[e], x, from, n, outputs, y, to);
        start = ends_E[e];
    }
#pragma omp barrier
}

/* nn.Linear: y (B, outputs) = x (B, n) . w (outputs, n) */
static void linear(const Model *m, const WEIGHT *w, const Activation *x, Int n, Int outputs,
                   float *y) {
    product(w, 1, &m->B, x, m->every, n, outputs, y, m->every);
}

/* --------------------------------------------------------------------------- norm and positions */
/* RMSNorm.forward: normed, of the residual stream x */
static void norm(const Model *m, const WEIGHT *weight) {
    SHARE (b, m->B) {
        const float *x = m->x + b * m->D;
        Activation *normed = m->normed + b * m->D;
        /* "normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)" */
        const float scale = 1 / sqrtf(sum_of_products(x, x, m->D) / m->D + m->eps);
        /* "return self.weight * normed.to(x.dtype)" */
        for (Int d = 0; d < m->D; d++)
            normed[d] = to_activation(to_float(weight[d]) * rounded(x[d] * scale));
    }
}

/* rotate: one head x (C) of row b, to the angle of its position */
static void rotate(const Model *m, Int b, float *x) {
    const Int position = m->at - m->pads[b], half = m->C / 2;
    const WEIGHT *cos = m->cos + position * m->C, *sin = m->sin + position * m->C;
    /* "return x * cos + torch.cat((-second, first), dim=-1) * sin" */
    for (Int i = 0; i < half; i++) {
        const Int j = half + i;
        const float first = x[i], second = x[j];
        x[i] = rounded(rounded(first * to_float(cos[i])) - rounded(second * to_float(sin[i])));
        x[j] = rounded(rounded(second * to_float(cos[j])) + rounded(first * to_float(sin[j])));
    }
}

/* ----------------------------------------------------------------------------------- attention */
static void softmax(float *x, Int n) {
    float top = x[0];
    for (Int i = 1; i < n; i++)
        top = x[i] > top ? x[i] : top;
    for (Int i = 0; i < n; i++)
        x[i] = exponential(x[i] - top);
    const float sum = sum_of(x, n);
    for (Int i = 0; i < n; i++)
        x[i] /= sum;
}

/* y (C) += p (slots) . values (slots, C), by fours, so that y is read and written less. p has three
   zeros after its last. */
static void mix(const float *p, Int slots, const WEIGHT *values, Int C, float *y) {
    for (Int s = 0; s < slots; s += 4) {
        const WEIGHT *v = values + s * C; /* beyond the last slot: this one again, times 0 */
        const WEIGHT *v1 = s + 1 < slots ? v + C : v;
        const WEIGHT *v2 = s + 2 < slots ? v + 2 * C : v;
        const WEIGHT *v3 = s + 3 < slots ? v + 3 * C : v;
        for (Int c = 0; c < C; c++)
            y[c] += p[s] * to_float(v[c]) + p[s + 1] * to_float(v1[c]) +
                    p[s + 2] * to_float(v2[c]) + p[s + 3] * to_float(v3[c]);
    }
}

/* Attention.forward between its projections, for the query heads of row b that read key head g */
static void attend(const Model *m, Int layer, Int b, Int g) {
    const Int C = m->C, heads = m->H / m->G, start = m->pads[b], at = m->at, room = m->S + 3;
    const Int head = b * m->G + g, slots = at + 1 - start;
    WEIGHT *keys = m->keys + (layer * m->B * m->G + head) * m->S * C;
    WEIGHT *values = m->values + (layer * m->B * m->G + head) * m->S * C;
    float *k = m->k + head * C, *v = m->v + head * C, *q = m->q + head * heads * C;
    float *scores = m->scores + head * heads * room;
    Activation *mixed = m->mixed + head * heads * C; /* the queries, then what comes of them */
    /* "q = rotate(q, *rope)", "k = rotate(k, *rope)" */
    rotate(m, b, k);
    for (Int h = 0; h < heads; h++)
        rotate(m, b, q + h * C);
    /* "k, v = cache.append(layer, k, v)" */
    for (Int c = 0; c < C; c++) {
        keys[at * C + c] = to_weight(k[c]);
        values[at * C + c] = to_weight(v[c]);
    }
    /* attend_eager: "scores = q @ k.transpose(-1, -2) * scale" */
    for (Int i = 0; i < heads * C; i++)
        mixed[i] = to_activation(q[i]);
    for (Int h = 0; h < heads; h += 4)
        dots(keys + start * C, slots, mixed, m->every + h, heads - h, C, scores + start,
             m->every + h, room);
    for (Int h = 0; h < heads; h++) {
        float *p = scores + h * room + start, *y = q + h * C;
        for (Int s = 0; s < slots; s++)
            p[s] *= m->attention_multiplier;
        /* "probs = scores.softmax(dim=-1, ...)", "return F.dropout(probs, drop) @ v" */
        softmax(p, slots);
        for (Int s = slots; s < slots + 3; s++)
            p[s] = 0;
        for (Int c = 0; c < C; c++)
            y[c] = 0;
        mix(p, slots, values + start * C, C, y);
        for (Int c = 0; c < C; c++)
            mixed[h * C + c] = to_activation(y[c]);
    }
}

/* Attention.forward */
static void attention(const Model *m, Int layer) {
    const Int D = m->D, kv = m->G * m->C;
    /* "q = self.q_proj(x)", "k = self.k_proj(x)", "v = self.v_proj(x)" */
    linear(m, m->layers[layer].q_proj, m->normed, D, D, m->q);
    linear(m, m->layers[layer].k_proj, m->normed, D, kv, m->k);
    linear(m, m->layers[layer].v_proj, m->normed, D, kv, m->v);
    SHARE (i, m->B * m->G) {
        attend(m, layer, i / m->G, i % m->G);
    }
    /* "return self.o_proj(y)" */
    linear(m, m->layers[layer].o_proj, m->mixed, D, D, m->y);
}

/* --------------------------------------------------------------------------- mixture of experts */
/* Router.forward for one token: its K experts, and their weights. Returns whether the K-th is as
   good as others that are left out. */
static int choose(const Model *m, Int n) {
    const float *logits_E = m->logits_NE + n * m->E;
    Int *ids_K = m->expert_ids_NK + n * m->K, chosen = 0;
    float *weights_K = m->weights_NK + n * m->K;
    /* "top_logits_NK, expert_ids_NK = logits_NE.topk(self.top_k, dim=-1)" */
    for (Int e = 0; e < m->E; e++) {
        Int better = 0;
        for (Int i = 0; i < m->E; i++)
            better += logits_E[i] > logits_E[e];
        if (better < m->K) {
            if (chosen < m->K)
                ids_K[chosen] = e;
            chosen++;
        }
    }
    /* "weights_NK = top_logits_NK.softmax(dim=-1).to(x_ND.dtype)" */
    for (Int k = 0; k < m->K; k++)
        weights_K[k] = logits_E[ids_K[k]];
    softmax(weights_K, m->K);
    return chosen > m->K;
}

/* Router.forward; where a choice is ambiguous, cpu.py makes it as topk does. */
static void router(const Model *m, Int layer) {
    /* "logits_NE = self.layer(x_ND).float()" */
    linear(m, m->layers[layer].router, m->normed, m->D, m->E, m->logits_NE);
    SHARE (once, 1) {
        for (Int n = 0; n < m->B; n++) {
            if (choose(m, n))
                *m->tied = layer;
        }
    }
}

/* sort_by_expert: order_M, tokens_M and ends_E */
static void sort_by_expert(const Model *m) {
    Int place = 0;
    for (Int e = 0; e < m->E; e++) {
        for (Int i = 0; i < m->B * m->K; i++) {
            if (m->expert_ids_NK[i] != e)
                continue;
            m->order_M[place] = i;
            m->tokens_M[place] = i / m->K;
            place++;
        }
        m->ends_E[e] = place;
    }
}

/* experts_loop */
static void experts(const Model *m, const WEIGHT *gate_up_EPD, const WEIGHT *down_EDF) {
    const Int D = m->D, F = m->F, K = m->K, *order_M = m->order_M;
    SHARE (once, 1) {
        sort_by_expert(m);
    }
    /* "hidden = swiglu(F.linear(x_ND[tokens], gate_up_EPD[e]))" */
    product(gate_up_EPD, m->E, m->ends_E, m->normed, m->tokens_M, D, 2 * F, m->rows_MP, order_M);
    SHARE (i, m->B * K) {
        const float *gate = m->rows_MP + i * 2 * F, *up = gate + F;
        for (Int f = 0; f < F; f++)
            m->hidden_MF[i * F + f] = to_activation(swiglu(gate[f], up[f]));
    }
    /* "rows = F.linear(hidden, down_EDF[e]) * weights_M[start:end, None]" */
    product(down_EDF, m->E, m->ends_E, m->hidden_MF, order_M, F, D, m->rows_MD, order_M);
    /* "y_ND.index_add_(0, tokens, rows)" */
    SHARE (n, m->B) {
        float *y = m->y + n * D;
        for (Int d = 0; d < D; d++)
            y[d] = 0;
        for (Int i = n * K; i < n * K + K; i++) {
            const float weight = rounded(m->weights_NK[i]);
            for (Int d = 0; d < D; d++)
                y[d] += weight * m->rows_MD[i * D + d];
        }
    }
}

/* --------------------------------------------------------------------------------------- model */
/* GraniteMoeModel.forward: "x = self.embed_tokens(input_ids) * self.config.embedding_multiplier" */
static void embed(const Model *m) {
    SHARE (i, m->B * m->D) {
        const Int b = i / m->D, d = i % m->D;
        const float embedded = to_float(m->embed_tokens[m->ids[b] * m->D + d]);
        m->x[i] = rounded(m->embedding_multiplier * embedded);
    }
}

/* DecoderLayer.forward: "x = x + y * self.residual_multiplier" */
static void add_to_stream(const Model *m) {
    SHARE (i, m->B * m->D) {
        const float damped = rounded(rounded(m->y[i]) * m->residual_multiplier);
        m->x[i] = rounded(m->x[i] + damped);
    }
}

/* DecoderLayer.forward, its first half: attention, and the router of the second half */
static void attention_and_router(const Model *m, Int layer) {
    norm(m, m->layers[layer].input_layernorm);
    attention(m, layer);
    add_to_stream(m);
    norm(m, m->layers[layer].post_attention_layernorm);
    router(m, layer);
}

/* GraniteMoeForCausalLM.forward: "logits = self.lm_head(x) / config.logits_scaling" */
static void head(const Model *m) {
    norm(m, m->norm);
    linear(m, m->head, m->normed, m->D, m->V, m->logits);
    SHARE (i, m->B * m->V) {
        m->logits[i] = rounded(m->logits[i] / m->logits_scaling);
    }
}

/* The whole step. Where a layer's choice of experts is ambiguous, it ends with that layer in
   `tied`. cpu.py then fills in the choice and calls again, and it goes on from there. */
void step(const Model *m) {
    const Int tied = *m->tied;
    const Int first = tied < 0 ? 0 : tied;
    *m->tied = -1;
#pragma omp parallel num_threads(m->threads)
    {
        if (tied < 0)
            embed(m);
        for (Int layer = first; layer < m->L; layer++) {
            if (layer != tied)
                attention_and_router(m, layer);
            if (*m->tied >= 0)
                break;
            experts(m, m->layers[layer].input_linear, m->layers[layer].output_linear);
            add_to_stream(m);
        }
        if (*m->tied < 0)
            head(m);
    }
}
