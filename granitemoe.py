"""GraniteMoe, IBM's sparse mixture-of-experts language model, in one readable file.

A decoder-only transformer whose feed-forward block is E small experts, of which a router picks K
per token: Granite 3.0/3.1 1b-a400m (32 experts), 3b-a800m and PowerMoE-3b (40), all top-8.
Read in order: config, norm and positions, attention, mixture of experts, model, language model.

The whole model, for the ids of a sequence; lines 2 and 3 are one layer and repeat. The four scalars
are the config's embedding_, residual_ and attention_multiplier (m_*) and logits_scaling. The router
is a matrix: the K largest of its scores choose experts, and their softmax is w. An expert
is three matrices: expert(x) = down(silu(gate x) * up x).

    x = m_embedding * Embedding(ids)
    x = x + m_residual * Attention(RMSNorm(x))      causal, RoPE, scores q.k * m_attention
    x = x + m_residual * Experts(RMSNorm(x))        sum over the K chosen of w_k * expert_k(x)
    logits = Head(RMSNorm(x)) / logits_scaling

What makes Granite Granite. Break any of these and nothing fails: the text is wrong, often fluently.
- embedding_multiplier (12): scales embeddings up, as muP (arXiv 2203.03466) asks for every width.
- attention_multiplier (1/64): 1/head_dim and not 1/sqrt(head_dim), the muP rule for attention.
- residual_multiplier (0.22): damps what a block adds to x, the residual stream, whatever the depth.
- logits_scaling (6): divides the logits, which a tied head, the embedding matrix, makes too large.
- gate|up order: both are stored as one matrix; its first half is the gate, its second the up.
- renormalised softmax: the K routing weights are a softmax over the K chosen logits; they sum to 1.
- RMSNorm's casts: normalise in float32, cast back, and only then multiply by the weight.
- dropless: every token reaches all K experts that it chose; none has a capacity to exceed.

Dimension key (one letter, one size; x_ND has shape (N, D)):
    B batch            T new tokens           S cached + new tokens   V vocabulary
    D hidden size      H query heads          G key/value heads       C head_dim = D / H
    E experts          K experts per token    F expert width          P = 2F, packed gate|up
    N = B*T tokens     M = N*K assignments of a token to an expert
    (F is a width in shapes alone; in code it is torch.nn.functional.)

Numerics (as in transformers): everything runs in the dtype of the weights, except
    RMSNorm's mean square      float32, cast back before the weight
    RoPE angles, cos, sin      float32, cast to the activations' dtype
    attention softmax          float32, cast back (eager; the fused kernels do so inside)
    router logits, softmax     matmul in the model's dtype, then float32; weights cast back
    sum over experts           float32, cast back (loop; products accumulate so inside)
    losses                     float32
"""

import math
import threading
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


# ----------------------------------------------------------------------------------------- config
@dataclass
class GraniteMoeConfig:
    """Fields of config.json that the model uses. Raises ValueError (skip the checks at first)."""

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
        for field in fields(self):  # whose annotations above say what they take
            name, kind, value = field.name, field.type, getattr(self, field.name)
            if kind in (int, float):
                other = {"attention_dropout": (0, 1), "router_aux_loss_coef": (0, 1e18)}
                low, high = other.get(name, (1, 2**31) if kind is int else (1e-18, 1e18))
                if type(value) not in (int, kind) or not low <= value <= high:
                    what = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
                    raise ValueError(f"{name}: must be {what}, got {value!a:.60}")
            if kind is bool and type(value) is not bool:
                raise ValueError(f"{name}: must be true or false, got {value!a:.60}")
        for name, allowed in {
            "hidden_act": ["silu"], "dtype": [None, "float32", "float16", "bfloat16"],
            "attention_backend": [*ATTENTION], "experts_backend": ["auto", "batched", *EXPERTS],
        }.items():  # fmt: skip
            if (got := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: must be one of {allowed}, got {got!a:.60}")
        D, H, G = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if D % (2 * H):
            raise ValueError(f"hidden_size / num_attention_heads: must be even, got {D} / {H}")
        if H % G:
            raise ValueError(f"num_attention_heads: {H} is no multiple of num_key_value_heads {G}")
        E, K = self.num_local_experts, self.num_experts_per_tok
        if K > E:
            raise ValueError(f"num_experts_per_tok: {K} is more than num_local_experts {E}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value, last = getattr(self, name), self.vocab_size - 1
            ids = value if name == "eos_token_id" and type(value) is list else [value]
            if not all(i is None or (type(i) is int and 0 <= i <= last) for i in ids):
                raise ValueError(f"{name}: must be null or from 0 to {last}, got {value!a:.60}")

    @property
    def head_dim(self) -> int:  # C
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: dict) -> "GraniteMoeConfig":
        """Take a parsed config.json as transformers 4 or 5 writes it; unknown keys are ignored.
        Raises ValueError, also for features that change the result and are not implemented."""
        data = dict(data)
        for name in ("rope_scaling", "rope_parameters"):  # the older spelling, and the newer
            rope = data.get(name) or {}
            rope = rope if isinstance(rope, dict) else {"type": rope}
            data[name] = rope.get("rope_type", rope.get("type", "default"))
            data["rope_theta"] = rope.get("rope_theta", data.get("rope_theta"))
        for old, new in (("activation_function", "hidden_act"), ("torch_dtype", "dtype")):
            data.setdefault(new, data.get(old, getattr(cls, new)))
        data["dtype"] = data["dtype"] and str(data["dtype"]).removeprefix("torch.")
        for name, only in {
            "attention_bias": [None, False], "rope_parameters": ["default"],
            "model_type": ["granitemoe"], "quantization_config": [None], "rope_scaling": ["default"]
        }.items():  # fmt: skip
            if (got := data.get(name)) not in only:
                raise ValueError(f"{name}: only {only[-1]!r} is supported, got {got!a:.60}")
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        missing = [f.name for f in fields(cls) if f.name not in known and not hasattr(cls, f.name)]
        if missing:
            raise ValueError(f"missing: {', '.join(missing)}")
        config = cls(**known)
        if (got := data.get("head_dim")) not in (None, config.head_dim):
            raise ValueError(f"head_dim: must be hidden_size / heads, got {got!a:.60}")
        return config


# ----------------------------------------------------------------------------- norm and positions
class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_tables(position_ids: Tensor, config: GraniteMoeConfig, dtype: torch.dtype) -> list[Tensor]:
    """Cosines and sines (B, 1, T, C) of the angles position * theta^(-2i/C) (arXiv 2104.09864)."""
    C = config.head_dim
    even = torch.arange(0, C, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, None, :, None].float() * (1.0 / config.rope_theta ** (even / C))
    angles = torch.cat((angles, angles), dim=-1)
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + C/2}) of x (B, heads, T, C) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# -------------------------------------------------------------------------------------- attention
SWITCHES = threading.Lock()  # of attend_flash: what it switches is the whole process's
Mask = Tensor | None  # (B or 1, 1, T, S), True where a query may look; None: at itself and before


def attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """softmax(q k^T * scale) v, spelled out; query head h reads key/value head h // (H / G).
    q (B, H, T, C); k, v (B, G, S, C); drop: dropout probability. Returns (B, H, T, C)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    if mask is None:  # the last query sees all keys, each query before it one key fewer
        mask = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~mask, -math.inf)
    return F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), drop) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, whose fused kernels hold few scores at a time."""
    T, S, G = q.shape[2], k.shape[2], k.shape[1]
    if T == 1:  # the H / G query heads of a key head become rows: it is read only once
        rows = q.view(len(q), G, -1, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v, mask, drop, scale=scale).reshape(q.shape)
    if mask is None and T < S:  # is_causal would align the triangle with the first key
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    options = {"is_causal": mask is None, "scale": scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, mask, drop, **options)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """scaled_dot_product_attention by its flash kernel alone, or else it raises ValueError."""
    T, S, causal = q.shape[2], k.shape[2], mask is None and q.shape[2] > 1
    if causal and T < S:  # for the same reason, queries are added in front until there are S
        q = F.pad(q, (0, 0, S - T, 0))
    options = {"is_causal": causal, "scale": scale, "enable_gqa": True}
    try:
        if q.device.type not in ("cpu", "cuda"):  # elsewhere the choice of a kernel is ignored
            raise RuntimeError("No available kernel")
        with SWITCHES, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, mask, drop, **options)[:, :, -T:]
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        where = f"on {q.device} in {q.dtype}, head_dim {q.shape[3]}, dropout {drop}"
        where += ", with a mask" * (mask is not None)
        raise ValueError(f"attention_backend: 'flash' cannot run {where}; use 'sdpa'") from None


ATTENTION = {"eager": attend_eager, "sdpa": attend_sdpa, "flash": attend_flash}  # open: add yours


class Past(NamedTuple):
    """What one layer keeps of earlier tokens: slots for keys and values (B, G, max_length, C)."""

    keys: Tensor
    values: Tensor
    at: int  # the slot of the next token

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, C) of new tokens; returns all so far (B, G, S, C)."""
        end = self.at + k.shape[2]
        self.keys[:, :, self.at : end] = k
        self.values[:, :, self.at : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads read G key/value heads."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        D, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, kv, bias=False)
        self.v_proj = nn.Linear(D, kv, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, rope: list[Tensor], mask: Mask, past: Past | None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        c, heads = self.config, (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in projections)  # (B, H or G, T, C)
        q, k = rotate(torch.cat((q, k), dim=1), *rope).split((q.shape[1], k.shape[1]), dim=1)
        if past is not None:
            k, v = past.append(k, v)  # (B, G, S, C)
        drop = c.attention_dropout if self.training else 0.0
        y = ATTENTION[c.attention_backend](q, k, v, mask, c.attention_multiplier, drop)
        return self.o_proj(y.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------- mixture of experts
class Router(nn.Module):
    """Scores the experts for each token and chooses K. Like all modules, named as on disk."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.layer = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits (float32), the K routing weights, which sum to 1, and the experts' ids."""
        logits_NE = self.layer(x_ND).float()
        top_logits_NK, expert_ids_NK = logits_NE.topk(self.top_k, dim=-1)
        weights_NK = top_logits_NK.softmax(dim=-1).to(x_ND.dtype)
        return logits_NE, weights_NK, expert_ids_NK


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * up of packed gate|up (..., P); returns (..., F) (arXiv 2002.05202)."""
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def experts_loop(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The definition: y = sum_k w_k down_e(silu(gate_e x) * up_e x), where expert e is the k-th
    choice of token x. One expert at a time, on the tokens that chose it. Returns y_ND."""
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    for e in expert_ids_NK.unique().tolist():  # a GPU's host waits: synchronises
        tokens, choices = (expert_ids_NK == e).nonzero(as_tuple=True)
        hidden = swiglu(F.linear(x_ND[tokens], gate_up_EPD[e]))
        rows = F.linear(hidden, down_EDF[e]).to(y_ND.dtype)
        y_ND.index_add_(0, tokens, rows * weights_NK[tokens, choices, None])
    return y_ND.to(x_ND.dtype)


def sort_by_expert(expert_ids_NK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
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


def grouped_product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's matrix (outputs, inputs) times its own run of rows (M, inputs)."""
    if rows.dtype == torch.float64 or rows.device.type == "mps":
        raise ValueError(f"experts_backend: 'grouped' cannot run on {rows.device} in {rows.dtype}")
    _, outputs, inputs = weights.shape
    pad_out, pad_in = (-size % (16 // rows.element_size()) for size in (outputs, inputs))
    if pad_out or pad_in:  # the kernel wants rows of whole 16 bytes, as all released sizes are
        rows, weights = F.pad(rows, (0, pad_in)), F.pad(weights, (0, pad_in, 0, pad_out))
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends_E)[:, :outputs]


def experts_grouped(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For many tokens: the loop over experts is inside two grouped products, which in bfloat16 on
    compute capability 9 and 10 never synchronise with the host. Returns y_ND."""
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    rows_MP = grouped_product(x_ND[tokens_M], gate_up_EPD, ends_E)
    rows_MD = grouped_product(swiglu(rows_MP), down_EDF, ends_E)
    out_NKD = rows_MD[order_M.argsort()].view(*weights_NK.shape, -1)  # as before the sorting
    return (weights_NK[:, None] @ out_NKD)[:, 0]


def experts_gathered(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For a few tokens: gathers each assignment's own matrices, then multiplies them in two batched
    products. Reads the chosen experts alone and never synchronises with the host. Returns y_ND."""
    rows_NKP = (gate_up_EPD[expert_ids_NK] @ x_ND[:, None, :, None])[..., 0]
    out_NKD = (down_EDF[expert_ids_NK] @ swiglu(rows_NKP)[..., None])[..., 0]
    return (weights_NK[:, None] @ out_NKD)[:, 0]


EXPERTS = {"loop": experts_loop, "grouped": experts_grouped, "gathered": experts_gathered}  # open


def choose_experts(backend: str, device: torch.device, assignments: int, E: int) -> str:
    """The name in EXPERTS of what runs. "auto" is "batched" on CUDA, where the loop's synchronising
    costs most, else "loop"; "batched" is "gathered" for up to E assignments, "grouped" beyond."""
    if backend == "batched" or (backend == "auto" and device.type == "cuda"):
        many = "loop" if device.type == "mps" else "grouped"  # which MPS lacks in PyTorch 2.11
        return "gathered" if assignments <= E else many
    return "loop" if backend == "auto" else backend


class ExpertWeights(nn.Module):
    """One matrix for each expert (E, outputs, inputs), which the functions in EXPERTS use."""

    def __init__(self, experts: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


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
        x_ND, backend = x_BTD.flatten(0, 1), self.config.experts_backend
        logits_NE, weights_NK, expert_ids_NK = self.router(x_ND)
        name = choose_experts(backend, x_ND.device, weights_NK.numel(), logits_NE.shape[1])
        weights = (self.input_linear.weight, self.output_linear.weight)
        y_ND = EXPERTS[name](x_ND, *weights, weights_NK, expert_ids_NK)
        return y_ND.view_as(x_BTD), logits_NE


# ------------------------------------------------------------------------------------------ model
def initialise(module: nn.Module, std: float) -> None:
    """Random matrices; norms stay 1. The meta device, where nothing has values, is left out."""
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

    def forward(self, x: Tensor, rope: list, mask: Mask, past: Past | None) -> tuple[Tensor, ...]:
        """x (B, T, D) to x and the router's logits (N, E)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, past) * self.residual_multiplier
        y, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y * self.residual_multiplier, router_logits


class KVCache:
    """Keys and values of the tokens seen, (layers, B, G, max_length, C) each, and the tokens' ids,
    (B, max_length), allocated once. Slots from `length` on are not initialised."""

    def __init__(
        self, config: GraniteMoeConfig, batch_size: int, max_length: int,
        *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if not all(type(size) is int and size > 0 for size in (batch_size, max_length)):
            got = f"{batch_size!r:.30} and {max_length!r:.30}"
            raise ValueError(f"batch_size, max_length: must be integers >= 1, got {got}")
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length)
        self.keys = torch.empty(*shape, config.head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.ids = torch.empty(batch_size, max_length, device=device, dtype=torch.long)
        self.length, self.max_length = 0, max_length

    def slots(self, T: int) -> Tensor:  # (T,): where the next T tokens go
        return torch.arange(self.length, self.length + T, device=self.keys.device)

    def layer(self, i: int) -> Past:
        return Past(self.keys[i], self.values[i], self.length)


def visible(slots: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, 1, T, S), True where the query in each of T slots may look: not ahead, not at padding.
    A query before its row's first token sees all: a softmax over nothing would be NaN."""
    causal = torch.arange(attention_mask.shape[1], device=slots.device) <= slots[:, None]
    mask = causal[None, None] & attention_mask[:, None, None, :].bool()
    return mask | ~mask.any(dim=-1, keepdim=True)


def check_inputs(model: nn.Module, input_ids, attention_mask, position_ids, cache) -> None:
    """Raises ValueError for what GraniteMoeModel.forward cannot take, or only ambiguously."""
    B, T = input_ids.shape if isinstance(input_ids, Tensor) and input_ids.dim() == 2 else (0, 0)
    S = T if cache is None else cache.length + T
    for name, x, shapes, extra in (
        ("input_ids", input_ids, [(B, T)] * (B * T > 0), []),
        ("position_ids", position_ids, [(B, T), (1, T)], []),
        ("attention_mask", attention_mask, [(B, S)], [torch.bool]),  # cached tokens included
    ):
        tensor = isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32, *extra)
        if (x is not None or B * T == 0) and not (tensor and tuple(x.shape) in shapes):
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: must be integers {shapes or '(B, T)'}, got {got}")
    if cache is not None:
        c, dtype = model.config, model.embed_tokens.weight.dtype
        expected = (c.num_hidden_layers, B, c.num_key_value_heads, c.head_dim, dtype)
        got = (*cache.keys.shape[:3], cache.keys.shape[4], cache.keys.dtype)
        if got != expected:
            raise ValueError(f"cache: (layers, B, G, C, dtype) must be {expected}, is {got}")
        if cache.max_length < S:
            raise ValueError(f"cache: {S} tokens do not fit in {cache.max_length}")
    if attention_mask is not None and model.config.attention_backend == "flash":
        raise ValueError("attention_backend: 'flash' takes no padding mask; use 'sdpa' or 'eager'")
    ambiguous = position_ids is not None and not (cache is None and attention_mask is None)
    if ambiguous and T > 1 and not torch.compiler.is_compiling():  # synchronises with the host
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -T:]
        real, now = real.bool().cpu(), position_ids.cpu()
        if (real[:, 1:] & (now[:, 1:] <= now.where(real, -1).cummax(dim=1).values[:, :-1])).any():
            raise ValueError("position_ids: start anew in a row with an attention_mask or a cache")


class GraniteMoeModel(nn.Module):
    """Embedding, layers and final norm, without the head."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size)  # initialise fills it
        self.embed_tokens = nn.Embedding(*empty.shape, config.pad_token_id, _weight=empty)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        initialise(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: KVCache | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """ids (B, T) to hidden states (B, T, D) and each layer's router logits (N, E)."""
        check_inputs(self, input_ids, attention_mask, position_ids, cache)
        T = input_ids.shape[1]
        slots = torch.arange(T, device=input_ids.device) if cache is None else cache.slots(T)
        x = self.embed_tokens(input_ids) * self.config.embedding_multiplier  # (B, T, D)
        positions = slots[None] if position_ids is None else position_ids
        rope = rope_tables(positions, self.config, x.dtype)
        mask = None if attention_mask is None else visible(slots, attention_mask)
        if position_ids is not None and attention_mask is None and cache is None:
            # packed: a document begins where positions do not go on by one, as in transformers
            number = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=1)
            mask = (number[:, :, None] == number[:, None]).tril()[:, None]  # (B, 1, T, T)
        router_logits = []
        for i, layer in enumerate(self.layers):
            x, logits = layer(x, rope, mask, None if cache is None else cache.layer(i))
            router_logits.append(logits)
        if cache is not None:
            cache.ids[:, slots] = input_ids.long()
            cache.length += T
        return self.norm(x), tuple(router_logits)


# --------------------------------------------------------------------------------- language model
def load_balancing_loss(
    router_logits: tuple[Tensor, ...], top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """E * sum_e (choices of e per token) * (mean probability of e), over all layers' real tokens.
    router_logits: (N, E) a layer; attention_mask: (B, T), 0 for padding. Perfect balance gives
    exactly K (arXiv 2101.03961, eq. 4-6, with the K choices summed)."""
    probs = torch.cat(router_logits).softmax(dim=-1)  # (layers * N, E)
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
    real = probs.new_ones(len(probs), 1)
    if attention_mask is not None:
        real = attention_mask.bool().reshape(-1, 1).to(probs).repeat(len(router_logits), 1)
    choices_E, mean_probs_E = ((x * real).sum(dim=0) / real.sum() for x in (chosen, probs))
    return probs.shape[1] * (choices_E * mean_probs_E).sum()


@dataclass
class CausalLMOutput:
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
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: KVCache | None = None,
        labels: Tensor | None = None, output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:  # fmt: skip
        """Predict the token after each of input_ids (B, T).
        attention_mask (B, S): 1 for tokens, 0 for padding on either side; S counts cached tokens.
        position_ids (B, T): 0, 1, ... after the cached tokens if None; left padding needs them.
        Without mask and cache, another document begins where they do not go on by one.
        labels (B, T): shifted inside, -100 is ignored; the loss is the mean in nats, plus the
        auxiliary loss times its coefficient where router logits are asked for.
        logits_to_keep: compute only this many last positions; 0 computes all. Raises ValueError."""
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: must be >= 0, got {logits_to_keep}")
        c, asked = self.config, output_router_logits
        x, router_logits = self.model(input_ids, attention_mask, position_ids, cache)
        head = self.model.embed_tokens if c.tie_word_embeddings else self.lm_head
        logits = F.linear(x[:, -logits_to_keep:], head.weight) / c.logits_scaling
        output = CausalLMOutput(logits)
        if labels is not None:
            shifted = logits[:, :-1].float().flatten(0, 1)
            output.loss = F.cross_entropy(shifted, labels[:, 1:].flatten().long())
        if asked or (asked is None and c.output_router_logits):
            output.router_logits = router_logits
            real = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            output.aux_loss = load_balancing_loss(router_logits, c.num_experts_per_tok, real)
            if labels is not None:
                output.loss = output.loss + c.router_aux_loss_coef * output.aux_loss
        return output

    def num_parameters(self, active: bool = False) -> int:
        """How many numbers the model holds or, active, how many of them one token uses."""
        c = self.config
        idle_experts = c.num_hidden_layers * (c.num_local_experts - c.num_experts_per_tok)
        idle = idle_experts * 3 * c.intermediate_size * c.hidden_size
        return sum(p.numel() for p in self.parameters()) - (idle if active else 0)
