"""GraniteMoe's forward pass as Triton kernels. Not needed to understand the model.

Letters and names are granitemoe.py's: B rows of T new tokens, N = B*T, M = N*K assignments, S slots
of the cache, and D, H, G, C, E, K, F, V. R = H / G query heads share a key head. A letter with a P
is that size padded to a power of two; a block size is BM (tokens or rows), BN (outputs), BK (how
deep a product goes at a time), BS (slots), BE (experts). `n` is a token, `b` a row, `e` an expert.

There are two forms of the layer, in the order in which their kernels run:

    few rows     attn_in, attend, attn_out, route, gate_up, down                      then head
    many tokens  add_norm, attn_in_many, attend or attend_many, attn_out_many, route or route_many,
                 sort_by_expert, gate_up_many, down_many                              then head_many

embed goes first in both. With few rows, one new token each, a step is bound by reading weights: a
program owns some outputs, and asks for all of their weights at once, before it waits for what the
kernel before it computes. With many tokens, tensor cores multiply, and weights are read once for
all tokens of a block.

What changes from call to call is in memory, so that one CUDA graph serves every position: `at` is
the slot of the first of the T tokens, `live` says how many of the T are tokens and not padding on
the right, `start` is each row's first slot that is not padding on the left. A token is real if it
is live and not before its row's start. Tokens that are not real choose no experts.

Sums are float32, and results are rounded to the model's dtype where granitemoe.py's are.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

VARIES = ["N", "T", "S", "B", "blocks", "tiles"]  # numbers for whose values nothing is compiled


# ------------------------------------------------------------------------------------------ order
# Programmatic dependent launch (PDL, NVIDIA's compute capability 9 and later): a kernel starts
# while the one before it still runs, and waits inside.
@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernel before has ended. Each kernel calls it before it touches anything that an
    earlier kernel writes, and each one must: else order is lost two kernels on."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Lets the next kernel's programs start. Comes after this one's loads: they go first."""
    if PDL:
        gdc_launch_dependents()


# ----------------------------------------------------------------------------------------- pieces
@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as dtype would keep it, in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def load_row(ptr, d, D: tl.constexpr):
    """The numbers d of D at ptr; 0 from D on."""
    return tl.load(ptr + d, mask=d < D, other=0.0)


@triton.jit
def load_rows(ptr, n, N, d, D: tl.constexpr):
    """Rows n of a matrix (N, D), as (n, d)."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    return tl.load(ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def product(weight, x):
    """weight (n, D) times x (D,), without tensor cores, for one row."""
    return tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)


@triton.jit
def load_deep(ptr, rows, depth, D: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a product by tensor cores. Its place `depth` along the D numbers that are summed
    is looked at only where BLOCK does not divide D."""
    if D % BLOCK == 0:
        block = tl.load(ptr, mask=rows, other=0.0)
    else:
        block = tl.load(ptr, mask=rows & (depth < D), other=0.0)
    return block


@triton.jit
def dot(x, weight, total):
    """total + x weight by tensor cores; float32 in full and not as TF32."""
    return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit
def many_product(x_ptr, n, n_mask, weight_ptr, i, i_mask, D: tl.constexpr, BK: tl.constexpr):
    """Rows n of x (N, D) times rows i of a weight (outputs, D), by tensor cores: (n, i)."""
    total = tl.zeros([n.shape[0], i.shape[0]], tl.float32)
    for depth in range(0, D, BK):
        d = depth + tl.arange(0, BK)
        x_place = x_ptr + n[:, None] * D + d[None, :]
        x = load_deep(x_place, n_mask[:, None], d[None, :], D, BK)
        place = weight_ptr + i[None, :] * D + d[:, None]
        total = dot(x, load_deep(place, i_mask[None, :], d[:, None], D, BK), total)
    return total


@triton.jit
def two_products(x_ptr, n, n_mask, weight_ptr, i, i_mask, apart, D: tl.constexpr, BK: tl.constexpr):
    """many_product with rows i of a weight, and with those that come `apart` rows later: x is read
    once for both."""
    first = tl.zeros([n.shape[0], i.shape[0]], tl.float32)
    second = tl.zeros([n.shape[0], i.shape[0]], tl.float32)
    for depth in range(0, D, BK):
        d = depth + tl.arange(0, BK)
        x_place = x_ptr + n[:, None] * D + d[None, :]
        x = load_deep(x_place, n_mask[:, None], d[None, :], D, BK)
        place = weight_ptr + i[None, :] * D + d[:, None]
        first = dot(x, load_deep(place, i_mask[None, :], d[:, None], D, BK), first)
        later = load_deep(place + apart * D, i_mask[None, :], d[:, None], D, BK)
        second = dot(x, later, second)
    return first, second


@triton.jit
def rms_norm(x, weight, eps, D: tl.constexpr):
    """RMSNorm.forward for x of D numbers, and zeros behind them."""
    x = x.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x) / D + eps)
    return (rounded(normed, weight.dtype) * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def rotate(first, second, cos, sin, dtype: tl.constexpr):
    """granitemoe.rotate for pairs (first, second); returns both."""
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    first = rounded(first, dtype)
    second = rounded(second, dtype)
    turned = rounded(first * cos, dtype) - rounded(second * sin, dtype)
    return turned, rounded(second * cos, dtype) + rounded(first * sin, dtype)


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up."""
    gate = rounded(gate, dtype)
    return rounded(gate / (1.0 + tl.exp(-gate)), dtype) * rounded(up, dtype)


@triton.jit
def added(x, y, multiplier):
    """x + y * m_residual, as DecoderLayer.forward adds what a block gives; float32."""
    return x.to(tl.float32) + rounded(rounded(y, x.dtype) * multiplier, x.dtype)


# -------------------------------------------------------------------------------------- embedding
@triton.jit
def embed(
    ids_ptr,
    weight_ptr,
    x_ptr,
    multiplier,
    D: tl.constexpr,
    DP: tl.constexpr,
    PDL: tl.constexpr,
):
    """x = m_embedding * Embedding(ids). Grid: (N,), a token each."""
    n = tl.program_id(0)
    d = tl.arange(0, DP)
    wait(PDL)
    row = load_row(weight_ptr + tl.load(ids_ptr + n) * D, d, D)
    launch_next(PDL)
    tl.store(x_ptr + n * D + d, row.to(tl.float32) * multiplier, mask=d < D)


# ---------------------------------------------------------------------------- attention, few rows
@triton.jit(do_not_specialize=VARIES)
def attn_in(
    x_ptr,
    norm_ptr,
    q_weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    cos_ptr,
    sin_ptr,
    at_ptr,
    start_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    eps,
    S,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """q, k, v = projections of RMSNorm(x); q and k rotated; k and v to slot `at` of the cache.
    Grid: (C/2/BN, H + 2G, B). A program owns BN pairs (i, i + C/2) of a head of a row."""
    head = tl.program_id(1)
    b = tl.program_id(2)
    half: tl.constexpr = C // 2
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    weight_ptr = q_weight_ptr + head * C * D
    if head >= H:
        weight_ptr = k_weight_ptr + (head - H) * C * D
    if head >= H + G:
        weight_ptr = v_weight_ptr + (head - H - G) * C * D
    first_weight = load_rows(weight_ptr, c, half, d, D)
    second_weight = load_rows(weight_ptr + half * D, c, half, d, D)
    norm = load_row(norm_ptr, d, D)
    wait(PDL)
    x = load_row(x_ptr + b * D, d, D)
    at = tl.load(at_ptr)
    angle = (at - tl.load(start_ptr + b)) * C + c
    cos = tl.load(cos_ptr + angle, mask=c < half, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=c < half, other=0.0)
    launch_next(PDL)
    h = rms_norm(x, norm, eps, D)
    first = product(first_weight, h)
    second = product(second_weight, h)
    if head < H + G:
        first, second = rotate(first, second, cos, sin, h.dtype)
    out_ptr = q_ptr + (b * H + head) * C
    if head >= H:
        out_ptr = keys_ptr + ((b * G + head - H).to(tl.int64) * S + at) * C
    if head >= H + G:
        out_ptr = values_ptr + ((b * G + head - H - G).to(tl.int64) * S + at) * C
    tl.store(out_ptr + c, first, mask=c < half)
    tl.store(out_ptr + half + c, second, mask=c < half)


@triton.jit(do_not_specialize=VARIES)
def attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    at_ptr,
    start_ptr,
    shares_ptr,
    ended_ptr,
    y_ptr,
    scale,
    S,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = softmax(q k^T * scale) v of one new token a row. Grid: (SPLITS, G, B). A program looks
    with the R heads of a key head at a share of the slots; the last one to end adds the shares."""
    split = tl.program_id(0)
    g = tl.program_id(1)
    b = tl.program_id(2)
    r = tl.arange(0, RP)
    c = tl.arange(0, CP)
    mask = (r < R)[:, None] & (c < C)[None, :]
    heads = (b * H + g * R + r[:, None]) * C + c[None, :]
    launch_next(PDL)  # at once: attn_out's weights come while this attends
    wait(PDL)
    start = tl.load(start_ptr + b)
    end = tl.load(at_ptr) + 1
    share = tl.cdiv(tl.cdiv(end - start, SPLITS), BS) * BS
    low = start + split * share
    high = tl.minimum(low + share, end)
    q = tl.load(q_ptr + heads, mask=mask, other=0.0)
    base = (b * G + g).to(tl.int64) * S * C
    top = tl.full([RP], -1e30, tl.float32)  # no infinity: it would make NaN of an empty share
    total = tl.zeros([RP], tl.float32)
    y = tl.zeros([RP, CP], tl.float32)
    last = tl.full([RP], high - 1, tl.int32)
    y, top, total = look(
        q, last, low, high, keys_ptr + base, values_ptr + base, scale, y, top, total, C, CP, BS
    )
    if SPLITS == 1:
        tl.store(y_ptr + heads, y / or_one(total)[:, None], mask=mask)
    else:
        row = ((b * G + g) * SPLITS + split) * R + r
        tl.store(shares_ptr + row[:, None] * (C + 2) + c[None, :], y, mask=mask)
        tl.store(shares_ptr + row * (C + 2) + C, top, mask=r < R)
        tl.store(shares_ptr + row * (C + 2) + C + 1, total, mask=r < R)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(ended_ptr + b * G + g, 1, sem="acq_rel") == SPLITS - 1:
            add_shares(shares_ptr, y_ptr, b * G + g, C, CP, R, SPLITS)
            tl.store(ended_ptr + b * G + g, 0)


@triton.jit
def look(
    q,
    last,
    low,
    high,
    keys_ptr,
    values_ptr,
    scale,
    y,
    top,
    total,
    C: tl.constexpr,
    CP: tl.constexpr,
    BS: tl.constexpr,
):
    """Attention's sums over those of the slots low..high that a query sees: up to its `last`.
    y: the sum of exp(score - top) times values; top: the largest score so far; total: the sum of
    exp(score - top)."""
    c = tl.arange(0, CP)[None, :]
    for first in range(low, high, BS):
        s = first + tl.arange(0, BS)
        mask = (s < high)[:, None] & (c < C)
        k = tl.load(keys_ptr + s[:, None] * C + c, mask=mask, other=0.0)
        v = tl.load(values_ptr + s[:, None] * C + c, mask=mask, other=0.0)
        scores = scaled_scores(q, k, scale)
        scores = tl.where(s[None, :] <= last[:, None], scores, -float("inf"))
        y, top, total = add_block(scores, v, y, top, total)
    return y, top, total


@triton.jit
def scaled_scores(q, k, scale):
    """q k^T * scale / ln 2: 2^x is quicker than e^x."""
    zeros = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    return dot(q, tl.trans(k), zeros) * (scale * 1.4426950408889634)


@triton.jit
def add_block(scores, v, y, top, total):
    """One block of slots more: what was summed fades where the largest score grows."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, axis=1)
    y = dot(p.to(v.dtype), v, y * fade[:, None])
    return y, new_top, total


@triton.jit
def or_one(total):
    """1 where nothing was summed: a token before its row's start then has y = 0, and no NaN."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def add_shares(
    shares_ptr,
    y_ptr,
    key_head,
    C: tl.constexpr,
    CP: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y of the R heads of a key head, from all programs' shares. What other programs wrote is read
    past this one's own cache (.cg)."""
    c = tl.arange(0, CP)
    for r in tl.static_range(R):
        rows = (key_head * SPLITS + tl.arange(0, SPLITS)) * R + r
        tops = tl.load(shares_ptr + rows * (C + 2) + C, cache_modifier=".cg")
        totals = tl.load(shares_ptr + rows * (C + 2) + C + 1, cache_modifier=".cg")
        places = shares_ptr + rows[:, None] * (C + 2) + c[None, :]
        shares = tl.load(places, mask=(c < C)[None, :], other=0.0, cache_modifier=".cg")
        fade = tl.exp2(tops - tl.max(tops, axis=0))
        y = tl.sum(shares * fade[:, None], axis=0)
        total = or_one(tl.sum(fade * totals))
        tl.store(y_ptr + (key_head * R + r) * C + c, y / total, mask=c < C)


@triton.jit
def attn_out(
    y_ptr,
    weight_ptr,
    x_ptr,
    multiplier,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += m_residual * o_proj(y). Grid: (D/BN, B). A program owns BN outputs of a row."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    d = tl.arange(0, DP)
    weight = load_rows(weight_ptr, n, D, d, D)
    wait(PDL)
    y = load_row(y_ptr + b * D, d, D)
    x = load_row(x_ptr + b * D, n, D)
    launch_next(PDL)
    tl.store(x_ptr + b * D + n, added(x, product(weight, y), multiplier), mask=n < D)


# ------------------------------------------------------------------------------ experts, few rows
@triton.jit
def route(
    x_ptr,
    norm_ptr,
    weight_ptr,
    h_ptr,
    scores_ptr,
    ended_ptr,
    chosen_ptr,
    w_ptr,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BE: tl.constexpr,
    PDL: tl.constexpr,
):
    """h = RMSNorm(x); Router of h: the K experts chosen, and their weights w. Grid: (E/BE, N). A
    program owns BE scores of a token, and the first one h; the last one to end chooses."""
    block = tl.program_id(0)
    n = tl.program_id(1)
    e = block * BE + tl.arange(0, BE)
    d = tl.arange(0, DP)
    weight = load_rows(weight_ptr, e, E, d, D)
    norm = load_row(norm_ptr, d, D)
    wait(PDL)
    x = load_row(x_ptr + n * D, d, D)
    launch_next(PDL)
    h = rms_norm(x, norm, eps, D)
    if block == 0:
        tl.store(h_ptr + n * D + d, h, mask=d < D)
    tl.store(scores_ptr + n * E + e, rounded(product(weight, h), h.dtype), mask=e < E)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(ended_ptr + n, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        choose(scores_ptr + n * E, chosen_ptr + n * K, w_ptr + n * K, E, EP, K)
        tl.store(ended_ptr + n, 0)


@triton.jit
def choose(scores_ptr, chosen_ptr, w_ptr, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr):
    """The K largest of a token's scores, the softmax of which is w. A score's place is how many
    come before it: larger ones, and equal ones of a lower index. A NaN counts as the least score,
    so that no index leaves its matrix; numbers that follow from it are NaN all the same."""
    e = tl.arange(0, EP)
    scores = tl.load(scores_ptr + e, mask=e < E, other=-float("inf"), cache_modifier=".cg")
    scores = tl.where(scores == scores, scores, -float("inf"))
    mine = scores[None, :]
    other = scores[:, None]
    before = (other > mine) | ((other == mine) & (e[:, None] < e[None, :]))
    place = tl.sum(before.to(tl.int32), axis=0)
    w = tl.where(place < K, tl.exp(scores - tl.max(scores, axis=0)), 0.0)
    tl.store(chosen_ptr + place, e, mask=place < K)
    tl.store(w_ptr + place, w / tl.sum(w, axis=0), mask=place < K)


@triton.jit
def gate_up(
    h_ptr,
    chosen_ptr,
    weight_ptr,
    hidden_ptr,
    D: tl.constexpr,
    DP: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden = silu(gate_e h) * up_e h of the chosen experts. Grid: (F/BN, K, B). A program owns BN
    outputs of a row's k-th expert."""
    k = tl.program_id(1)
    b = tl.program_id(2)
    f = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    wait(PDL)
    e = tl.load(chosen_ptr + b * K + k, cache_modifier=".cg").to(tl.int64)
    gate_weight = load_rows(weight_ptr + e * 2 * F * D, f, F, d, D)
    up_weight = load_rows(weight_ptr + (e * 2 + 1) * F * D, f, F, d, D)
    h = load_row(h_ptr + b * D, d, D)
    launch_next(PDL)
    hidden = swiglu(product(gate_weight, h), product(up_weight, h), h.dtype)
    tl.store(hidden_ptr + (b * K + k) * F + f, hidden, mask=f < F)


@triton.jit
def down(
    hidden_ptr,
    chosen_ptr,
    w_ptr,
    weight_ptr,
    x_ptr,
    multiplier,
    D: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += m_residual * sum over the K chosen of w_k * down_k(hidden). Grid: (D/BN, B). A program
    owns BN outputs of a row, and reads them of all K experts at once. route wrote the choice, and
    gate_up let this start after route's end: so choice and weights are read before the wait, past
    the processor's own cache (.cg), which may hold those of the layer before."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    k = tl.arange(0, KP)
    f = tl.arange(0, FP)
    e = tl.load(chosen_ptr + b * K + k, mask=k < K, other=0, cache_modifier=".cg").to(tl.int64)
    w = tl.load(w_ptr + b * K + k, mask=k < K, other=0.0, cache_modifier=".cg").to(tl.float32)
    rows = (e[:, None] * D + n[None, :]) * F
    mask = ((k < K)[:, None] & (n < D)[None, :])[:, :, None] & (f < F)[None, None, :]
    weight = tl.load(weight_ptr + rows[:, :, None] + f[None, None, :], mask=mask, other=0.0)
    wait(PDL)
    hidden = load_rows(hidden_ptr + b * K * F, k, K, f, F)
    x = load_row(x_ptr + b * D, n, D)
    launch_next(PDL)
    out = tl.sum(weight.to(tl.float32) * hidden.to(tl.float32)[:, None, :], axis=2)
    out = tl.sum(rounded(out, x.dtype) * w[:, None], axis=0)
    tl.store(x_ptr + b * D + n, added(x, out, multiplier), mask=n < D)


# --------------------------------------------------------------------------------- head, few rows
@triton.jit
def head(
    x_ptr,
    norm_ptr,
    weight_ptr,
    logits_ptr,
    eps,
    divisor,
    V: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits = Head(RMSNorm(x)) / logits_scaling. Grid: (V/BN, B). A program owns BN logits."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    d = tl.arange(0, DP)
    weight = load_rows(weight_ptr, n, V, d, D)
    norm = load_row(norm_ptr, d, D)
    wait(PDL)
    x = load_row(x_ptr + b * D, d, D)
    launch_next(PDL)
    h = rms_norm(x, norm, eps, D)
    logits = rounded(rounded(product(weight, h), h.dtype) / divisor, h.dtype)
    tl.store(logits_ptr + b * V + n, logits, mask=n < V)


# ------------------------------------------------------------------------- attention, many tokens
@triton.jit
def past_live(first, BM: tl.constexpr, N, T, live):
    """Whether the BM tokens from `first` on are all of one row and past its live ones."""
    last = tl.minimum(first + BM, N) - 1
    return (first // T == last // T) & (first % T >= live)


@triton.jit(do_not_specialize=VARIES)
def attn_in_many(
    h_ptr,
    q_weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    cos_ptr,
    sin_ptr,
    at_ptr,
    start_ptr,
    live_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    N,
    T,
    S,
    D: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """attn_in for live tokens of h; q to (N, H, C). Grid: (blocks of pairs, of q, then k, then v;
    N/BM). A program owns BN pairs (i, i + C/2), of one head or several, of BM tokens."""
    half: tl.constexpr = C // 2
    of_q: tl.constexpr = (H * half + BN - 1) // BN
    of_k: tl.constexpr = (G * half + BN - 1) // BN
    block = tl.program_id(0)
    first_token = tl.program_id(1) * BM
    wait(PDL)
    live = tl.load(live_ptr)
    if past_live(first_token, BM, N, T, live):
        return
    is_q = block < of_q
    is_v = block >= of_q + of_k
    weight_ptr = q_weight_ptr
    out_ptr = q_ptr
    if block >= of_q:
        weight_ptr = k_weight_ptr
        out_ptr = keys_ptr
    if is_v:
        weight_ptr = v_weight_ptr
        out_ptr = values_ptr
    block -= tl.where(is_q, 0, tl.where(is_v, of_q + of_k, of_q))
    pair = block * BN + tl.arange(0, BN)
    pairs = tl.where(is_q, H * half, G * half)
    heads = pair // half
    c = pair % half
    n = first_token + tl.arange(0, BM)
    known = pair < pairs
    first, second = two_products(h_ptr, n, n < N, weight_ptr, heads * C + c, known, half, D, BK)
    launch_next(PDL)
    b = n // T
    new = n % T
    at = tl.load(at_ptr)
    start = tl.load(start_ptr + b, mask=n < N, other=0)
    mask = ((n < N) & (new < live))[:, None] & known[None, :]
    if not is_v:
        angle = tl.maximum(at + new - start, 0)[:, None] * C + c[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        first, second = rotate(first, second, cos, sin, h_ptr.dtype.element_ty)
    slots = b.to(tl.int64) * G * S + at + new
    rows = tl.where(is_q, n.to(tl.int64) * H, slots)[:, None] * C
    places = rows + (heads.to(tl.int64) * tl.where(is_q, 1, S) * C + c)[None, :]
    tl.store(out_ptr + places, first, mask=mask)
    tl.store(out_ptr + places + half, second, mask=mask)


@triton.jit(do_not_specialize=VARIES)
def attend_many(
    q_ptr,
    keys_ptr,
    values_ptr,
    at_ptr,
    start_ptr,
    live_ptr,
    y_ptr,
    scale,
    T,
    S,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = softmax(q k^T * scale) v over the slots from a row's start to the query's own. Grid:
    (B*G, T/tokens), the longest first. A program owns BM // R tokens, whose R heads that share a
    key head are rows of one block: row m is head m % R of token m // R."""
    tokens: tl.constexpr = BM // R
    b = tl.program_id(0) // G
    g = tl.program_id(0) % G
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * tokens
    wait(PDL)
    live = tl.load(live_ptr)
    if first >= live:
        return
    at = tl.load(at_ptr)
    start = tl.load(start_ptr + b)
    m = tl.arange(0, BM)
    c = tl.arange(0, CP)
    new = first + m // R
    mask = ((m < tokens * R) & (new < live))[:, None] & (c < C)[None, :]
    heads = ((b * T + new) * H + g * R + m % R)[:, None] * C + c[None, :]
    q = tl.load(q_ptr + heads, mask=mask, other=0.0)
    base = (b * G + g).to(tl.int64) * S * C
    keys_ptr = keys_ptr + base
    values_ptr = values_ptr + base
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    y = tl.zeros([BM, CP], tl.float32)
    edge = start + tl.maximum(at + first + 1 - start, 0) // BS * BS  # before it, all see all slots
    y, top, total = look_whole(
        q, start, edge, keys_ptr, values_ptr, scale, y, top, total, C, CP, BS
    )
    end = at + tl.minimum(first + tokens, live)
    y, top, total = look(
        q, at + new, edge, end, keys_ptr, values_ptr, scale, y, top, total, C, CP, BS
    )
    tl.store(y_ptr + heads, y / or_one(total)[:, None], mask=mask)
    launch_next(PDL)


@triton.jit
def look_whole(
    q,
    low,
    high,
    keys_ptr,
    values_ptr,
    scale,
    y,
    top,
    total,
    C: tl.constexpr,
    CP: tl.constexpr,
    BS: tl.constexpr,
):
    """look where BS divides high - low: no slot needs a mask."""
    c = tl.arange(0, CP)[None, :]
    for first in range(low, high, BS):
        s = first + tl.arange(0, BS)[:, None]
        k = load_deep(keys_ptr + s * C + c, True, c, C, CP)
        v = load_deep(values_ptr + s * C + c, True, c, C, CP)
        y, top, total = add_block(scaled_scores(q, k, scale), v, y, top, total)
    return y, top, total


@triton.jit(do_not_specialize=VARIES)
def attn_out_many(
    y_ptr,
    weight_ptr,
    x_ptr,
    live_ptr,
    multiplier,
    N,
    T,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += m_residual * o_proj(y). Grid: (D/BN, N/BM). A program owns BN outputs of BM tokens."""
    first = tl.program_id(1) * BM
    wait(PDL)
    if past_live(first, BM, N, T, tl.load(live_ptr)):
        return
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    n = first + tl.arange(0, BM)
    total = many_product(y_ptr, n, n < N, weight_ptr, i, i < D, D, BK)
    launch_next(PDL)
    places = x_ptr + n[:, None] * D + i[None, :]
    mask = (n < N)[:, None] & (i < D)[None, :]
    x = tl.load(places, mask=mask, other=0.0)
    tl.store(places, added(x, total, multiplier), mask=mask)


# --------------------------------------------------------------------------- experts, many tokens
@triton.jit(do_not_specialize=VARIES)
def route_many(
    x_ptr,
    norm_ptr,
    weight_ptr,
    at_ptr,
    start_ptr,
    live_ptr,
    h_ptr,
    chosen_ptr,
    w_ptr,
    counts_ptr,
    eps,
    N,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """h = RMSNorm(x); Router: the K largest scores of h, of equal ones the lower index first, and
    the softmax of these K; and how many of the block's tokens chose each expert. Grid: (N/BM,).
    Tokens that are not real choose expert -1. A NaN counts as the least score, as in choose."""
    block = tl.program_id(0)
    e = tl.arange(0, EP)
    n = block * BM + tl.arange(0, BM)
    rows = (n < N)[:, None]
    wait(PDL)
    start = tl.load(start_ptr + n // T, mask=n < N, other=0)
    real = (n < N) & (n % T < tl.load(live_ptr)) & (tl.load(at_ptr) + n % T >= start)
    squares = tl.zeros([BM], tl.float32)
    for depth in range(0, D, BK):
        d = depth + tl.arange(0, BK)[None, :]
        x = load_deep(x_ptr + n[:, None] * D + d, rows, d, D, BK).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    scores = tl.zeros([BM, EP], tl.float32)
    for depth in range(0, D, BK):
        d = depth + tl.arange(0, BK)
        x = load_deep(x_ptr + n[:, None] * D + d[None, :], rows, d[None, :], D, BK)
        norm = load_row(norm_ptr, d, D).to(tl.float32)
        h = (rounded(x.to(tl.float32) * scale, x.dtype) * norm[None, :]).to(x.dtype)
        tl.store(h_ptr + n[:, None] * D + d[None, :], h, mask=rows & (d < D)[None, :])
        place = weight_ptr + e[None, :] * D + d[:, None]
        scores = dot(h, load_deep(place, (e < E)[None, :], d[:, None], D, BK), scores)
    scores = rounded(scores, h_ptr.dtype.element_ty)
    scores = tl.where(scores == scores, scores, -float("inf"))
    chosen, w, taken = largest(scores, E, EP, K, KP, BM)
    k = tl.arange(0, KP)
    places = n[:, None] * K + k[None, :]
    mask = rows & (k < K)[None, :]
    tl.store(chosen_ptr + places, tl.where(real[:, None], chosen, -1), mask=mask)
    tl.store(w_ptr + places, w, mask=mask)
    counts = tl.sum(tl.where(real[:, None], taken, 0), axis=0)
    tl.store(counts_ptr + block * E + e, counts, mask=e < E)
    launch_next(PDL)


@triton.jit
def largest(
    scores,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
):
    """The K largest of each row of scores (BM, EP), one after the other: their indices and softmax
    (BM, KP), and 1 where an expert was taken (BM, EP)."""
    e = tl.arange(0, EP)[None, :]
    k = tl.arange(0, KP)[None, :]
    taken = tl.zeros([BM, EP], tl.int32)
    chosen = tl.zeros([BM, KP], tl.int32)
    w = tl.zeros([BM, KP], tl.float32)
    first = tl.max(tl.where(e < E, scores, -float("inf")), axis=1)
    for j in tl.static_range(K):
        free = (taken == 0) & (e < E)
        left = tl.where(free, scores, -float("inf"))
        best = tl.max(left, axis=1)
        index = tl.min(tl.where(free & (left == best[:, None]), e, EP), axis=1)
        taken = tl.where(e == index[:, None], 1, taken)
        chosen = tl.where(k == j, index[:, None], chosen)
        w = tl.where(k == j, tl.exp(best - first)[:, None], w)
    return chosen, w / tl.sum(w, axis=1)[:, None], taken


@triton.jit(do_not_specialize=VARIES)
def sort_by_expert(
    chosen_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    N,
    blocks,
    tiles,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    BX: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A stable counting sort of the real assignments a = n*K + k by expert. order (M,): the
    assignments in order. tiles (3, tiles): which expert a tile is of (-1: none), its first place in
    the order, and where that expert's places end; a tile has at most ROWS of them. Grid: (N/BM,). A
    program places its BM tokens behind those of the blocks before it, adding up all blocks' counts
    itself, and writes BX tiles. Without counts (not COUNTED: route wrote none) it is the only
    one."""
    block = tl.program_id(0)
    e = tl.arange(0, EP)
    n = block * BM + tl.arange(0, BM)
    wait(PDL)
    mine = tl.zeros([BM, EP], tl.int32)
    choice = tl.zeros([BM, EP], tl.int32)
    for k in tl.static_range(K):
        chosen = tl.load(chosen_ptr + n * K + k, mask=n < N, other=-1)
        hit = chosen[:, None] == e[None, :]
        mine = tl.where(hit, 1, mine)
        choice = tl.where(hit, k, choice)
    before = tl.zeros([EP], tl.int32)
    if COUNTED:
        total = tl.zeros([EP], tl.int32)
        for i in range(0, blocks, 32):
            other = i + tl.arange(0, 32)[:, None]
            places = counts_ptr + other * E + e[None, :]
            mask = (other < blocks) & (e < E)[None, :]
            counts = tl.load(places, mask=mask, other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where(other < block, counts, 0), axis=0)
    else:
        total = tl.sum(mine, axis=0)
    launch_next(PDL)
    ends = tl.cumsum(total, axis=0)
    place = (ends - total + before)[None, :] + tl.cumsum(mine, axis=0) - 1
    tl.store(order_ptr + place, n[:, None] * K + choice, mask=mine == 1)
    write_tiles(tiles_ptr, total, ends, block * BX + tl.arange(0, BX), tiles, E, EP, ROWS)


@triton.jit
def write_tiles(
    tiles_ptr,
    total,
    ends,
    tile,
    tiles,
    E: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sort_by_expert's tiles, from each expert's assignments `total` and their `ends`."""
    e = tl.arange(0, EP)
    many = (total + ROWS - 1) // ROWS  # tiles of each expert
    last = tl.cumsum(many, axis=0)
    passed = (last[None, :] <= tile[:, None]) & (e < E)[None, :]
    owner = tl.sum(passed.to(tl.int32), axis=1)
    own = owner[:, None] == e[None, :]
    origin = ends - total - (last - many) * ROWS
    first = tl.sum(tl.where(own, origin[None, :], 0), axis=1) + tile * ROWS
    end = tl.sum(tl.where(own, ends[None, :], 0), axis=1)
    tl.store(tiles_ptr + tile, tl.where(owner < E, owner, -1), mask=tile < tiles)
    tl.store(tiles_ptr + tiles + tile, first, mask=tile < tiles)
    tl.store(tiles_ptr + 2 * tiles + tile, end, mask=tile < tiles)


@triton.jit(do_not_specialize=VARIES)
def gate_up_many(
    h_ptr,
    order_ptr,
    tiles_ptr,
    weight_ptr,
    hidden_ptr,
    tiles,
    D: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden = silu(gate_e h) * up_e h, a row an assignment, in the order of experts. Grid: (F/BN,
    tiles). A program owns BN outputs of a tile: of at most BM assignments to one expert."""
    tile = tl.program_id(1)
    wait(PDL)
    e = tl.load(tiles_ptr + tile).to(tl.int64)
    if e < 0:
        return
    m = tl.load(tiles_ptr + tiles + tile) + tl.arange(0, BM)
    rows = m < tl.load(tiles_ptr + 2 * tiles + tile)
    n = tl.load(order_ptr + m, mask=rows, other=0) // K
    f = tl.program_id(0) * BN + tl.arange(0, BN)
    weight_ptr += e * 2 * F * D
    gate, up = two_products(h_ptr, n, rows, weight_ptr, f, f < F, F, D, BK)
    launch_next(PDL)
    places = hidden_ptr + m[:, None] * F + f[None, :]
    mask = rows[:, None] & (f < F)[None, :]
    tl.store(places, swiglu(gate, up, h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARIES)
def down_many(
    hidden_ptr,
    order_ptr,
    tiles_ptr,
    weight_ptr,
    rows_ptr,
    tiles,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows = down_e(hidden), back in the assignments' own order. Grid: (D/BN, tiles). A program
    owns BN outputs of a tile, as in gate_up_many."""
    tile = tl.program_id(1)
    wait(PDL)
    e = tl.load(tiles_ptr + tile).to(tl.int64)
    if e < 0:
        return
    m = tl.load(tiles_ptr + tiles + tile) + tl.arange(0, BM)
    rows = m < tl.load(tiles_ptr + 2 * tiles + tile)
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    weight_ptr += e * D * F
    total = many_product(hidden_ptr, m, rows, weight_ptr, i, i < D, F, BK)
    launch_next(PDL)
    a = tl.load(order_ptr + m, mask=rows, other=0)
    mask = rows[:, None] & (i < D)[None, :]
    tl.store(rows_ptr + a[:, None] * D + i[None, :], total, mask=mask)


@triton.jit
def add_norm(
    rows_ptr,
    chosen_ptr,
    w_ptr,
    x_ptr,
    norm_ptr,
    h_ptr,
    eps,
    multiplier,
    D: tl.constexpr,
    DP: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += m_residual * sum over the K chosen of w_k * row_k, but not before the FIRST layer; then
    h = RMSNorm(x) with the next layer's norm or the last one. Grid: (N,), a token each."""
    n = tl.program_id(0)
    d = tl.arange(0, DP)
    norm = load_row(norm_ptr, d, D)
    wait(PDL)
    x = load_row(x_ptr + n * D, d, D)
    if not FIRST:
        if tl.load(chosen_ptr + n * K) < 0:  # not real: no rows
            return
        total = tl.zeros([DP], tl.float32)
        for k in tl.static_range(K):
            w = tl.load(w_ptr + n * K + k).to(tl.float32)
            total += w * load_row(rows_ptr + (n * K + k) * D, d, D).to(tl.float32)
        x = added(x, total, multiplier).to(x.dtype)
        tl.store(x_ptr + n * D + d, x, mask=d < D)
    launch_next(PDL)
    tl.store(h_ptr + n * D + d, rms_norm(x, norm, eps, D), mask=d < D)


# ------------------------------------------------------------------------------ head, many tokens
@triton.jit(do_not_specialize=VARIES)
def head_many(
    h_ptr,
    weight_ptr,
    live_ptr,
    logits_ptr,
    divisor,
    B,
    T,
    V: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits = Head(h) / logits_scaling of each row's last live token. Grid: (V/BN, B/BM). A
    program owns BN logits of BM rows."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1) * BM + tl.arange(0, BM)
    wait(PDL)
    n = b * T + tl.load(live_ptr) - 1
    total = many_product(h_ptr, n, b < B, weight_ptr, i, i < V, D, BK)
    launch_next(PDL)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    logits = rounded(rounded(total, dtype) / divisor, dtype)
    mask = (b < B)[:, None] & (i < V)[None, :]
    tl.store(logits_ptr + b[:, None] * V + i[None, :], logits, mask=mask)
