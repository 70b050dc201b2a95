"""GraniteMoe, IBM's sparse mixture-of-experts language model, in one readable file.

A decoder-only transformer whose feed-forward block is E small experts, of which a router picks K
per token: Granite 3.0/3.1 1b-a400m (32 experts), 3b-a800m and PowerMoE-3b (40), all top-8.
Read in order: config, norm and positions, cache, attention, mixture of experts, model,
language model.

Dimension key (one letter, one size; x_ND has shape (N, D)):
    B batch            T new tokens           S cached + new tokens   V vocabulary
    D hidden size      H query heads          G key/value heads       C head_dim = D / H
    E experts          K experts per token    F expert width          P = 2F, packed gate|up
    N = B*T tokens     M = N*K assignments of a token to an expert
    (F is a width in shapes alone; in code it is torch.nn.functional.)

Other symbols: x is the residual stream, a vector of D numbers for each token, to which every block
adds. m_embedding, m_residual and m_attention are the config's embedding_multiplier,
residual_multiplier and attention_multiplier; with logits_scaling they are Granite's four scalars.
The router is a matrix that gives each token E scores. The K largest choose the experts, and the
softmax of these K is w. An expert has three matrices: expert(x) = down(silu(gate x) * up x).

The whole model, for the ids of a sequence. Lines 2 and 3 are one layer, and repeat:

    x = m_embedding * Embedding(ids)
    x = x + m_residual * Attention(RMSNorm(x))      causal, RoPE, scores q.k * m_attention
    x = x + m_residual * Experts(RMSNorm(x))        sum over the K chosen of w_k * expert_k(x)
    logits = Head(RMSNorm(x)) / logits_scaling

What makes Granite Granite. Get one of these wrong and nothing raises an error: the text is wrong,
often fluently.
- embedding_multiplier (12): scales embeddings up, as muP (arXiv 2203.03466) asks for every width.
- attention_multiplier (1/64): 1/head_dim and not 1/sqrt(head_dim), the muP rule for attention.
- residual_multiplier (0.22): damps what a block adds to x, whatever the depth.
- logits_scaling (6): divides the logits. A tied head, the embedding matrix, makes them too large.
- gate|up order: both are stored as one matrix; its first half is the gate, its second the up.
- renormalised softmax: the K routing weights are a softmax over the K chosen scores; they sum to 1.
- RMSNorm's casts: normalise in float32, cast back, and only then multiply by the weight.
- dropless: every token reaches all K experts that it chose; none has a capacity to exceed.

Numerics (as in transformers): everything runs in the dtype of the weights, except
    RMSNorm's mean square      float32, cast back before the weight
    RoPE angles, cos, sin      float32, cast to the activations' dtype
    attention softmax          float32, cast back (the fused kernels do so inside)
    router logits, softmax     matmul in the model's dtype, then float32; weights cast back
    sum over experts           float32, cast back (in the batched forms, inside one product)
    losses                     float32
"""

import threading
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


# ----------------------------------------------------------------------------------------- config
@dataclass
class GraniteMoeConfig:
    """The fields of config.json that the model uses, and two of ours: which forms it runs in."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F, the width of one expert
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G; H / G query heads share one key/value head
    num_local_experts: int  # E
    num_experts_per_tok: int  # K
    max_position_embeddings: int  # the context length; nothing is allocated by it
    rope_theta: float
    rms_norm_eps: float
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    pad_token_id: int | None = None  # its embedding gets no gradient from the input side
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    router_aux_loss_coef: float = 0.001  # this and the next three are for training
    output_router_logits: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: str | None = None  # of the weights on disk
    attention_backend: str = "sdpa"  # ours: a name in ATTENTION
    experts_backend: str = "auto"  # ours: "auto", "batched" or a name in EXPERTS

    def __post_init__(self) -> None:
        """Raises ValueError for fields that would give wrong numbers without any error."""
        D, H, G = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if D % (2 * H) != 0:
            raise ValueError(f"hidden_size / num_attention_heads: must be even, got {D} / {H}")
        if H % G != 0:
            raise ValueError(f"num_attention_heads: {H} is no multiple of num_key_value_heads {G}")
        E, K = self.num_local_experts, self.num_experts_per_tok
        if K > E:
            raise ValueError(f"num_experts_per_tok: {K} is more than num_local_experts {E}")
        attention, experts = self.attention_backend, self.experts_backend
        if attention not in ATTENTION:
            raise ValueError(f"attention_backend: must be in {[*ATTENTION]}, got {attention!a:.60}")
        if experts not in (allowed := ["auto", "batched", *EXPERTS]):
            raise ValueError(f"experts_backend: must be in {allowed}, got {experts!a:.60}")

    @property
    def head_dim(self) -> int:  # C
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: dict) -> "GraniteMoeConfig":
        """Take a parsed config.json as transformers 4 or 5 writes it; unknown keys are ignored.
        Raises ValueError for missing fields and for features that this model does not have. Types
        and ranges are not checked: whoever reads a file does that."""
        data = dict(data)
        refuse_unless(data, "model_type", "granitemoe")
        refuse_unless(data, "attention_bias", False, None)
        refuse_unless(data, "quantization_config", None)
        for name in ("rope_scaling", "rope_parameters"):  # transformers 4's spelling, and 5's
            rope = data.get(name) or {}
            data[name] = rope.get("rope_type", rope.get("type", "default"))
            refuse_unless(data, name, "default")
            if "rope_theta" in rope:
                data["rope_theta"] = rope["rope_theta"]
        data.setdefault("dtype", data.get("torch_dtype"))
        data.setdefault("hidden_act", data.get("activation_function", "silu"))
        refuse_unless(data, "hidden_act", "silu")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in data]
        if missing:
            raise ValueError(f"missing: {', '.join(missing)}")
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def refuse_unless(data: dict, name: str, *allowed: object) -> None:
    if data.get(name) not in allowed:
        raise ValueError(f"{name}: only {allowed[0]!r} is supported, got {data.get(name)!a:.60}")


# ----------------------------------------------------------------------------- norm and positions
class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rope_tables(position_ids: Tensor, config: GraniteMoeConfig, dtype: torch.dtype) -> list:
    """Cosines and sines (B, 1, T, C) of the angles position * theta^(-2i/C) (arXiv 2104.09864)."""
    C, device = config.head_dim, position_ids.device
    exponents = torch.arange(0, C, 2, dtype=torch.float32, device=device) / C
    frequencies = 1.0 / config.rope_theta**exponents
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)  # (B or 1, 1, T, C)
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + C/2}) of x (B, heads, T, C) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ------------------------------------------------------------------------------------------ cache
class KVCache:
    """Keys and values of the tokens seen, (layers, B, G, max_length, C) each, and the tokens' ids,
    (B, max_length), allocated once. A slot is the place of one token along max_length: token t of
    every row is in slot t, padding included. Slots from `length` on are not initialised."""

    def __init__(
        self,
        config: GraniteMoeConfig,
        batch_size: int,
        max_length: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        L, G, C = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys = torch.empty(L, batch_size, G, max_length, C, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.ids = torch.empty(batch_size, max_length, device=device, dtype=torch.long)
        self.length, self.max_length = 0, max_length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple:
        """Write a layer's k and v (B, G, T, C) of new tokens; returns all so far (B, G, S, C).
        `length` stays: it grows once all layers have written."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def visible(slots: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, 1, T, S), True where the query in each of T slots may look: not ahead, not at padding.
    A query before its row's first token sees all: a softmax over nothing would be NaN."""
    causal = torch.arange(attention_mask.shape[1], device=slots.device) <= slots[:, None]
    mask = causal & attention_mask[:, None, None].bool()  # (B, 1, T, S)
    return mask | ~mask.any(dim=-1, keepdim=True)


def documents(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T), True where a query may look when a row holds several documents: a new one
    begins where a position is not the one before plus 1, as in transformers."""
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    number = begins.cumsum(dim=1)  # (B, T)
    return (number[:, None] == number[..., None]).tril()[:, None]


# -------------------------------------------------------------------------------------- attention
Mask = Tensor | None  # (B or 1, 1, T, S), True where a query may look; None: at itself and before
Cache = KVCache | None  # None: nothing was before these tokens, and nothing is kept
SWITCHES = threading.Lock()  # of attend_flash: what it switches is the whole process's


def attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """softmax(q k^T * scale) v, spelled out; query head h reads key/value head h // (H / G).
    q (B, H, T, C); k, v (B, G, S, C); drop: dropout probability. Returns (B, H, T, C)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    if mask is None:  # the last query sees all keys, each query before it one key fewer
        mask = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~mask, -torch.inf)
    probs = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(probs, drop) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, called so that it picks a memory-efficient kernel."""
    T, S = q.shape[2], k.shape[2]
    if T == 1:  # the H / G query heads of a key head become rows: each key is read only once
        rows = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, G, H // G, C)
        if q.device.type == "cuda":
            return attend_one(rows, k, v, mask, scale, drop).view_as(q)
        return F.scaled_dot_product_attention(rows, k, v, mask, drop, scale=scale).reshape(q.shape)
    if mask is None and T < S:  # is_causal would align the triangle with the first key
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # with grouped heads PyTorch would hold all scores here
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    causal, gqa = mask is None, k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, drop, causal, scale=scale, enable_gqa=gqa)


def attend_one(rows: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """Two plain products for one query, whose heads are rows (B, G, H / G, C). For CUDA, where
    cuDNN's kernel makes a plan for each new length, some 60 ms."""
    scores = rows @ k.transpose(-1, -2) * scale  # (B, G, H // G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    probs = scores.softmax(dim=-1, dtype=torch.float32).to(rows.dtype)
    return F.dropout(probs, drop) @ v


def attend_flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """scaled_dot_product_attention by its flash kernel alone; raises ValueError where that cannot
    run. SDPBackend is switched for the whole process, so one thread at a time."""
    T, S = q.shape[2], k.shape[2]
    causal = mask is None and T > 1
    options = {"is_causal": causal, "scale": scale, "enable_gqa": True}
    if causal and T < S:  # is_causal aligns the triangle with the first key: add queries in front
        q = F.pad(q, (0, 0, S - T, 0))
    try:
        if q.device.type not in ("cpu", "cuda"):  # elsewhere the choice of a kernel is ignored
            raise RuntimeError("No available kernel")
        with SWITCHES, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = F.scaled_dot_product_attention(q, k, v, mask, drop, **options)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        where = f"on {q.device} in {q.dtype}, head_dim {q.shape[3]}, dropout {drop}"
        raise ValueError(f"attention_backend: 'flash' cannot run {where}; use 'sdpa'") from None
    return y[:, :, -T:]


ATTENTION = {"eager": attend_eager, "sdpa": attend_sdpa, "flash": attend_flash}  # open: add yours


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads read G key/value heads."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        D, GC = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, GC, bias=False)
        self.v_proj = nn.Linear(D, GC, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, rope: list, mask: Mask, cache: Cache, layer: int) -> Tensor:
        """x (B, T, D) to what attention adds to the stream (B, T, D); layer: which of the cache."""
        config = self.config
        (B, T, _), C = x.shape, config.head_dim
        q = self.q_proj(x).view(B, T, -1, C).transpose(1, 2)  # (B, H, T, C)
        k = self.k_proj(x).view(B, T, -1, C).transpose(1, 2)  # (B, G, T, C)
        v = self.v_proj(x).view(B, T, -1, C).transpose(1, 2)  # (B, G, T, C)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, G, S, C)
        drop = config.attention_dropout if self.training else 0.0
        attend = ATTENTION[config.attention_backend]
        y = attend(q, k, v, mask, config.attention_multiplier, drop).transpose(1, 2).flatten(2)
        return self.o_proj(y)


# ----------------------------------------------------------------------------- mixture of experts
class Router(nn.Module):
    """Scores the experts for each token and chooses K. Like all modules, named as on disk."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.layer = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)

    def forward(self, x_ND: Tensor) -> tuple:
        """The logits (float32), the K routing weights, which sum to 1, and the experts' ids."""
        logits_NE = self.layer(x_ND).float()
        top_logits_NK, expert_ids_NK = logits_NE.topk(self.top_k, dim=-1)
        weights_NK = top_logits_NK.softmax(dim=-1).to(x_ND.dtype)
        return logits_NE, weights_NK, expert_ids_NK


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * up of packed gate|up (..., P); returns (..., F) (arXiv 2002.05202)."""
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def sort_by_expert(expert_ids_NK: Tensor, E: int) -> tuple:
    """Line up the M = N*K assignments by expert.
    Returns order_M (places in the flattened choices), tokens_M (the token of each) and ends_E
    (int32, where each expert's run ends; an expert without tokens has an empty run).

    Three tokens choose two of four experts each. Flattened, the choices are 2 0 0 3 2 1, and
    place p belongs to token p // 2:

    >>> choices_NK = torch.tensor([[2, 0], [0, 3], [2, 1]])
    >>> order_M, tokens_M, ends_E = sort_by_expert(choices_NK, 4)
    >>> order_M.tolist()  # stable: equal choices stay in the order of their tokens
    [1, 2, 5, 0, 4, 3]
    >>> tokens_M.tolist()
    [0, 1, 2, 0, 2, 1]
    >>> counts_E = ends_E.diff(prepend=torch.zeros(1, dtype=torch.int32))
    >>> counts_E.tolist()  # tokens of each expert
    [2, 1, 2, 1]
    >>> ends_E.tolist()
    [2, 3, 5, 6]
    """
    sorted_M, order_M = expert_ids_NK.flatten().sort(stable=True)
    experts_E = torch.arange(E, device=sorted_M.device)
    ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)
    return order_M, order_M // expert_ids_NK.shape[1], ends_E


def experts_loop(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The definition: y = sum_k w_k down_e(silu(gate_e x) * up_e x), where expert e is the k-th
    choice of token x. One expert at a time, on the tokens that chose it. Returns y_ND."""
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    weights_M = weights_NK.flatten()[order_M].to(y_ND.dtype)
    start = 0
    for e, end in enumerate(ends_E.tolist()):  # a GPU's host waits here: synchronises
        if start < end:
            tokens = tokens_M[start:end]
            hidden = swiglu(F.linear(x_ND[tokens], gate_up_EPD[e]))
            rows = F.linear(hidden, down_EDF[e]) * weights_M[start:end, None]
            y_ND.index_add_(0, tokens, rows)
        start = end
    return y_ND.to(x_ND.dtype)


def takes_grouped_mm(x_ND: Tensor, down_EDF: Tensor) -> bool:
    """Whether F.grouped_mm runs on these: rows of whole 16 bytes, as all released sizes are. It
    lacks float64 and MPS, and torch.compile knows it in bfloat16 alone."""
    compiled_otherwise = torch.compiler.is_compiling() and x_ND.dtype != torch.bfloat16
    if compiled_otherwise or x_ND.dtype == torch.float64 or x_ND.device.type == "mps":
        return False
    return all(size * x_ND.element_size() % 16 == 0 for size in down_EDF.shape[1:])


def experts_grouped(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For many tokens: the loop over experts is inside two grouped products, which in bfloat16 on
    compute capability 9 and 10 never synchronise with the host. Where F.grouped_mm cannot run,
    experts_loop does. Returns y_ND."""
    if not takes_grouped_mm(x_ND, down_EDF):
        return experts_loop(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    rows_MP = F.grouped_mm(x_ND[tokens_M], gate_up_EPD.transpose(1, 2), offs=ends_E)
    rows_MD = F.grouped_mm(swiglu(rows_MP), down_EDF.transpose(1, 2), offs=ends_E)
    out_NKD = rows_MD[order_M.argsort()].unflatten(0, weights_NK.shape)  # as before the sorting
    return torch.einsum("nk,nkd->nd", weights_NK, out_NKD)


def experts_gathered(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For a few tokens: gathers each assignment's own matrices, then multiplies them in two batched
    products. Reads the chosen experts alone and never synchronises with the host. Returns y_ND."""
    rows_NKP = torch.einsum("nd,nkpd->nkp", x_ND, gate_up_EPD[expert_ids_NK])
    out_NKD = torch.einsum("nkf,nkdf->nkd", swiglu(rows_NKP), down_EDF[expert_ids_NK])
    return torch.einsum("nk,nkd->nd", weights_NK, out_NKD)


EXPERTS = {"loop": experts_loop, "grouped": experts_grouped, "gathered": experts_gathered}  # open


def auto_experts(device: torch.device) -> str:
    """What "auto" means: "batched" on CUDA, where the loop's synchronising costs most."""
    return "batched" if device.type == "cuda" else "loop"


def choose_experts(backend: str, device: torch.device, assignments: int, E: int) -> str:
    """The name in EXPERTS of what runs for so many assignments of a token to one of E experts.
    "batched" is "gathered" for up to E of them, and "grouped" beyond."""
    if backend == "auto":
        backend = auto_experts(device)
    if backend == "batched":
        backend = "gathered" if assignments <= E else "grouped"
    return backend


class ExpertWeights(nn.Module):
    """One matrix for each expert (E, outputs, inputs), which the functions in EXPERTS use."""

    def __init__(self, experts: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x_ND: Tensor) -> Tensor:
        """All matrices. MoE calls this, with its input, and does not read `weight`: so hooks,
        adapters, sharding and offloading see this module run, as they see every other."""
        return self.weight


class MoE(nn.Module):
    """The sparse feed-forward block: the router decides, the experts compute."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        E, D, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.input_linear = ExpertWeights(E, 2 * width, D)  # gate rows first, then up
        self.output_linear = ExpertWeights(E, D, width)
        self.router = Router(config)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE, weights_NK, expert_ids_NK = self.router(x_ND)
        gate_up_EPD = self.input_linear(x_ND)
        down_EDF = self.output_linear(x_ND)
        backend, assignments = self.config.experts_backend, expert_ids_NK.numel()
        experts = EXPERTS[choose_experts(backend, x_ND.device, assignments, len(down_EDF))]
        y_ND = experts(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
        return y_ND.view_as(x_BTD), logits_NE


# ------------------------------------------------------------------------------------------ model
def initialise(module: nn.Module, std: float) -> None:
    """Random matrices; norms stay 1. Not on the meta device, where nothing has values: drawing
    there would import PyTorch's compiler, a second."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.is_meta:
            nn.init.normal_(parameter, std=std)


class DecoderLayer(nn.Module):
    """Attention, then experts, each on the normalised stream and added back to it, damped."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = MoE(config)

    def forward(self, x: Tensor, rope: list, mask: Mask, cache: Cache, layer: int) -> tuple:
        """x (B, T, D) to x and the router's logits (N, E)."""
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        x = x + y * self.residual_multiplier
        y, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y * self.residual_multiplier, router_logits


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> None:
    """Raises ValueError for ids, a mask or a cache of other shapes."""
    shape = input_ids.shape
    if input_ids.dtype not in (torch.int64, torch.int32) or len(shape) != 2 or 0 in shape:
        raise ValueError(f"input_ids: must be integers (B, T), got {input_ids.dtype}, {shape}")
    B, T = shape
    S = T if cache is None else cache.length + T
    if cache is not None:
        rows, room = cache.ids.shape
        if rows != B or not T <= S <= room:
            raise ValueError(f"cache: {B} rows of {S} tokens do not fit in {rows} of {room}")
    if attention_mask is not None and attention_mask.shape != (B, S):
        raise ValueError(f"attention_mask: must be {[B, S]}, got {attention_mask.shape}")


class GraniteMoeModel(nn.Module):
    """Embedding, layers and final norm, without the head."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size)  # initialise fills it
        self.embed_tokens = nn.Embedding.from_pretrained(empty, False, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple:
        """ids (B, T) to hidden states (B, T, D) and each layer's router logits (N, E).
        See GraniteMoeForCausalLM.forward for the arguments."""
        check_inputs(input_ids, attention_mask, cache)
        start = 0 if cache is None else cache.length
        end = start + input_ids.shape[1]
        slots = torch.arange(start, end, device=input_ids.device)  # (T)
        mask = None
        if attention_mask is not None:
            mask = visible(slots, attention_mask)
            if self.config.attention_backend == "flash":
                raise ValueError("attention_backend: 'flash' takes no padding mask; use 'sdpa'")
        elif position_ids is not None and cache is None:
            mask = documents(position_ids)
        positions = slots[None] if position_ids is None else position_ids
        x = self.embed_tokens(input_ids) * self.config.embedding_multiplier  # (B, T, D)
        rope = rope_tables(positions, self.config, x.dtype)
        router_logits = []
        for i, layer in enumerate(self.layers):
            x, layer_logits = layer(x, rope, mask, cache, i)
            router_logits.append(layer_logits)
        if cache is not None:
            cache.ids[:, start:end] = input_ids
            cache.length = end
        return self.norm(x), tuple(router_logits)


# --------------------------------------------------------------------------------- language model
def load_balancing_loss(
    router_logits: tuple, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """E * sum_e (choices of e per token) * (mean probability of e), over all layers' real tokens.
    router_logits: (N, E) a layer; attention_mask: (B, T), 0 for padding. Perfect balance gives
    exactly K (arXiv 2101.03961, eq. 4-6, with the K choices summed)."""
    probs = torch.cat(router_logits).softmax(dim=-1)  # (layers * N, E)
    if attention_mask is not None:
        probs = probs[attention_mask.bool().flatten().repeat(len(router_logits))]
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
    balance_E = chosen.mean(dim=0) * probs.mean(dim=0)
    return probs.shape[1] * balance_E.sum()


class CausalLMOutput(NamedTuple):
    """What GraniteMoeForCausalLM.forward returns; None is what was not asked for."""

    logits: Tensor  # (B, T, V), or the last logits_to_keep positions
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None  # (N, E) float32 a layer


class GraniteMoeForCausalLM(nn.Module):
    """The language model. A tied head is the embedding itself and no tensor of its own."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = GraniteMoeModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            initialise(self.lm_head, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Predict the token after each of input_ids (B, T).
        attention_mask (B, S): 1 for tokens, 0 for padding on either side; S counts cached tokens.
        position_ids (B or 1, T): 0, 1, ... after the cached tokens if None; left padding needs
        them. Without mask and cache, another document begins where they do not go on by one; with
        either, a row is one document, and positions that start anew in it give wrong numbers.
        labels (B, T): shifted inside, -100 is ignored; the loss is the mean in nats, plus the
        auxiliary loss times its coefficient where router logits are asked for.
        output_router_logits: None is what the config says.
        logits_to_keep: compute only this many last positions; 0 computes all.
        Raises ValueError for ids, a mask or a cache of other shapes."""
        config = self.config
        x, router_logits = self.model(input_ids, attention_mask, position_ids, cache)
        x = x[:, -logits_to_keep:]  # all of them for 0
        if config.tie_word_embeddings:  # reads another module's weight: offloading cannot follow
            logits = F.linear(x, self.model.embed_tokens.weight) / config.logits_scaling
        else:
            logits = self.lm_head(x) / config.logits_scaling
        loss = None
        if labels is not None:
            predicted = logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(predicted, labels[:, 1:].flatten().long())
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        if not output_router_logits:
            return CausalLMOutput(logits, loss)
        real = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        aux_loss = load_balancing_loss(router_logits, config.num_experts_per_tok, real)
        if loss is not None:
            loss = loss + config.router_aux_loss_coef * aux_loss
        return CausalLMOutput(logits, loss, aux_loss, router_logits)

    def num_parameters(self, active: bool = False) -> int:
        """How many numbers the model holds or, active, how many of them one token uses."""
        c, total = self.config, sum(parameter.numel() for parameter in self.parameters())
        idle = c.num_hidden_layers * (c.num_local_experts - c.num_experts_per_tok)
        expert = 3 * c.intermediate_size * c.hidden_size  # gate, up and down
        return total - idle * expert if active else total
