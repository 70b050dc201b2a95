"""GraniteMoe, IBM's sparse mixture-of-experts language model, in one readable file.

A decoder-only transformer whose feed-forward block is E small experts, of which a router picks K
per token: Granite 3.0/3.1 1b-a400m (32 experts), 3b-a800m and PowerMoE-3b (40), all top-8.

The whole model, for the ids of a sequence; lines 2 and 3 are one layer and repeat. The four scalars
are the config's embedding_, residual_ and attention_multiplier (m_*) and logits_scaling:

    x = m_embedding * Embedding(ids)
    x = x + m_residual * Attention(RMSNorm(x))      causal, RoPE, scores q.k * m_attention
    x = x + m_residual * Experts(RMSNorm(x))        sum over the K chosen of w_k * expert_k(x)
    logits = Head(RMSNorm(x)) / logits_scaling

What makes Granite Granite. Break any of these and the text stays fluent, but is wrong:
- embedding_multiplier (12): scales embeddings up to the size at which muP trains every width alike.
- attention_multiplier (1/64): 1/head_dim and not 1/sqrt(head_dim), the muP rule for attention.
- residual_multiplier (0.22): damps each block's output, so that depth does not inflate the stream.
- logits_scaling (6): divides the logits; the head is the embedding itself, which has another scale.
- gate|up order: the first half of an expert's packed rows is the gate, the second is what it gates.
- renormalised softmax: the K routing weights are a softmax over the K chosen logits; they sum to 1.
- RMSNorm's casts: normalise in float32, cast back, and only then multiply by the weight.
- dropless: no capacity, every token reaches all K experts that it chose.

Reading order: GraniteMoeConfig, RMSNorm, rope_tables, rotate, attend_eager, Attention, Router,
experts_one_token, sort_by_expert, experts_loop, experts_grouped, experts_gathered, MoE,
DecoderLayer, KVCache, GraniteMoeModel, load_balancing_loss, GraniteMoeForCausalLM.

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
    sum over experts           float32, cast back
    losses                     float32
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mask = Tensor | None  # (B or 1, 1, T, S), True where a query may look; None: all that came before
Past = tuple[Tensor, Tensor, int | Tensor]  # a layer's cached keys and values; where to write next

POSITIVE = (1e-18, 1e18)  # below 2^63, which a JSON integer may pass and a tensor may not
LIMITS = {  # field: lowest and highest value; integers for a field that is one
    "vocab_size": (1, 2**24), "hidden_size": (2, 2**20), "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**10), "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16), "num_local_experts": (1, 2**16),
    "num_experts_per_tok": (1, 2**16), "max_position_embeddings": (1, 2**31),
    "rope_theta": POSITIVE, "rms_norm_eps": POSITIVE, "embedding_multiplier": POSITIVE,
    "attention_multiplier": POSITIVE, "residual_multiplier": POSITIVE, "logits_scaling": POSITIVE,
    "router_aux_loss_coef": (0.0, 1e18), "attention_dropout": (0.0, 1.0),
    "initializer_range": POSITIVE,
}  # fmt: skip
CHOICES = {
    "hidden_act": ("silu",),
    "dtype": (None, "float32", "float16", "bfloat16"),
    "attention_backend": ("eager", "sdpa", "flash"),
    "experts_backend": ("auto", "loop", "batched"),
    "tie_word_embeddings": (True, False),
    "output_router_logits": (True, False),
}


def require(good: bool | Tensor, message: str) -> None:
    """The one way in which bad input is refused. An assert would vanish under python -O."""
    if not good:
        raise ValueError(message)


@dataclass
class GraniteMoeConfig:
    """The fields of config.json that the model uses, under their names there. Raises ValueError."""

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
    router_aux_loss_coef: float = 0.001  # this and the next three matter in training only
    output_router_logits: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: str | None = None  # of the weights on disk
    attention_backend: str = "sdpa"  # ours: "eager", "sdpa" or "flash"
    experts_backend: str = "auto"  # ours: "auto" (see pick_experts), "loop" or "batched"

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value, whole = getattr(self, name), type(low) is int
            good = type(value) in ((int,) if whole else (int, float)) and low <= value <= high
            kind = "an integer" if whole else "a number"
            require(good, f"{name}: must be {kind} from {low} to {high}, got {value!a:.60}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            good = any(type(value) is type(choice) and value == choice for choice in allowed)
            require(good, f"{name}: must be one of {list(allowed)}, got {value!a:.60}")
        D, H, G = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        even = D % H == 0 and D // H % 2 == 0
        require(even, f"hidden_size / num_attention_heads: must be even, got {D} / {H}")
        require(H % G == 0, f"num_attention_heads: {H} is no multiple of num_key_value_heads {G}")
        E, K = self.num_local_experts, self.num_experts_per_tok
        require(K <= E, f"num_experts_per_tok: {K} is more than num_local_experts {E}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value, last = getattr(self, name), self.vocab_size - 1
            ids = value if name == "eos_token_id" and type(value) is list else [value]
            good = all(i is None or (type(i) is int and 0 <= i <= last) for i in ids)
            require(good, f"{name}: must be null or from 0 to {last}, got {value!a:.60}")

    @property
    def head_dim(self) -> int:  # C
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: dict) -> "GraniteMoeConfig":
        """Take a parsed config.json as transformers 4 or 5 writes it; unknown keys are ignored.

        Raises ValueError for a value that is missing or impossible, and for a feature that would
        change the result and is not implemented.
        """
        data = dict(data)
        for name in ("rope_scaling", "rope_parameters"):  # the older spelling, and the newer
            rope = data.get(name) or {}
            rope = rope if isinstance(rope, dict) else {"type": rope}
            data[name] = rope.get("rope_type", rope.get("type", "default"))
            data["rope_theta"] = rope.get("rope_theta", data.get("rope_theta"))
        for old, new in (("activation_function", "hidden_act"), ("torch_dtype", "dtype")):
            data.setdefault(new, data.get(old, getattr(cls, new)))
        if data["dtype"] is not None:
            data["dtype"] = str(data["dtype"]).removeprefix("torch.")
        for name, only in (
            ("model_type", ["granitemoe"]),
            ("rope_scaling", ["default"]),
            ("rope_parameters", ["default"]),
            ("attention_bias", [None, False]),
            ("quantization_config", [None]),
        ):
            got = data.get(name)
            require(got in only, f"{name}: only {only[-1]!r} is supported, got {got!a:.60}")
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        missing = [f.name for f in fields(cls) if f.name not in known and not hasattr(cls, f.name)]
        require(not missing, f"missing: {', '.join(missing)}")
        config, head_dim = cls(**known), data.get("head_dim")
        good = head_dim in (None, config.head_dim)
        require(good, f"head_dim: only hidden_size / heads is supported, got {head_dim!a:.60}")
        return config


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., inputs) times weight (outputs, inputs).

    Two detours on a CPU: one row alone is taken as a column, which streams the weight up to twice
    as fast; many rows in 16 bits are filled up to a multiple of 16, since oneDNN compiles a kernel
    for each number of rows, which would double the time of a first prompt.
    """
    rows, cpu = x.shape[:-1].numel(), x.device.type == "cpu"
    if torch.compiler.is_compiling():
        return matvec(weight, x) if rows == 1 else F.linear(x, weight)
    if cpu and rows == 1:
        return (weight @ x.reshape(-1, 1)).view(*x.shape[:-1], -1)
    if cpu and rows > 64 and rows % 16 and x.element_size() == 2:
        filled = F.pad(x.flatten(0, -2), (0, 0, 0, -rows % 16))
        return F.linear(filled, weight)[:rows].view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def matvec(weights: Tensor, x: Tensor) -> Tensor:
    """weights (..., outputs, inputs) times x (..., inputs), as (..., outputs)."""
    if torch.compiler.is_compiling():  # a sum of products, into which a fetch of weights fuses
        return (weights.float() * x[..., None, :].float()).sum(dim=-1).to(x.dtype)
    return (weights @ x[..., None])[..., 0]


class Linear(nn.Module):
    """A matrix (outputs, inputs), or with `experts` one for each expert (E, outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, *experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*experts, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def initialise(module: nn.Module, std: float) -> None:
    """Random matrices; norms stay 1, and the meta device, where nothing has values, is left out."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.is_meta:
            nn.init.normal_(parameter, std=std)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

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


def triangle(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S): what T causal queries see of S keys, the last query all of them."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """softmax(q k^T * scale) v, spelled out; query head h reads key/value head h // (H / G).

    q (B, H, T, C); k, v (B, G, S, C); drop: dropout probability. Returns (B, H, T, C).
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    mask = triangle(*scores.shape[-2:], q.device) if mask is None else mask
    scores = scores.masked_fill(~mask, -math.inf)
    return F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), drop) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """The same through the fused kernel that PyTorch chooses."""
    T, S, G = q.shape[2], k.shape[2], k.shape[1]
    if T == 1:  # the query heads of one key head become its rows, so that it is read once
        y = F.scaled_dot_product_attention(
            q.view(len(q), G, -1, q.shape[3]), k, v, mask, drop, scale=scale
        )
        return y.reshape(q.shape)  # on CUDA a kernel may have transposed it
    if mask is None and drop == 0 and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_in_blocks(q, k, v, scale)
    if mask is None and T < S:  # is_causal ties the triangle to the first key, not to the last
        mask = triangle(T, S, q.device)
    options = {"is_causal": mask is None, "scale": scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, mask, drop, **options)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same for 64 queries at a time, whose scores stay in the processor's cache: for a prompt
    in bfloat16 on a CPU, where PyTorch's kernel takes twice as long."""
    T, G, S = q.shape[2], k.shape[1], k.shape[2]
    grouped = q.unflatten(1, (G, -1)).flatten(0, 1)  # the query heads of one key head in a row
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    blocks = []
    for start in range(0, T, 64):
        queries = grouped[:, :, start : start + 64]
        heads, t = queries.shape[1:3]
        end, rows = S - T + start + t, queries.flatten(1, 2)  # the last query sees `end` keys
        scores = torch.baddbmm(q.new_zeros(1), rows, k[:, :, :end], beta=0, alpha=scale)
        own = scores.unflatten(1, (heads, t))[..., end - t :]  # of these queries' own keys
        own += q.new_full((t, t), -math.inf).triu(1)
        blocks.append((scores.softmax(dim=-1) @ v[:, :end]).view_as(queries))
    return torch.cat(blocks, dim=2).view_as(q)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """The same through PyTorch's flash kernel or not at all: else it raises ValueError."""
    device, T, S, aten = q.device.type, q.shape[2], k.shape[2], torch.ops.aten
    half = q.dtype in (torch.float16, torch.bfloat16)
    for good, why in (
        (mask is None, "takes no padding mask"),
        (device in ("cpu", "cuda"), f"does not run on {device}"),
        (device == "cpu" or half, f"needs float16 or bfloat16 on CUDA, not {q.dtype}"),
        (device == "cuda" or drop == 0, "has no dropout on the CPU"),
        (device == "cpu" or q.shape[3] % 8 == 0, "needs a head_dim that 8 divides on CUDA"),
        (device == "cpu" or q.shape[3] <= 256, "needs a head_dim of at most 256 on CUDA"),
    ):
        require(good, f"attention_backend: 'flash' {why}; use 'sdpa' or 'eager'")
    names = {"cpu": "_scaled_dot_product_flash_attention_for_cpu"}
    flash = getattr(aten, names.get(device, "_scaled_dot_product_flash_attention"))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if 1 < T < S:  # here too the triangle starts at the first key: let the queries fill it up
        q = F.pad(q, (0, 0, S - T, 0))
    return flash(q, k, v, drop, is_causal=T > 1, scale=scale)[0][:, :, -T:]


ATTENTION = {"eager": attend_eager, "sdpa": attend_sdpa, "flash": attend_flash}


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads read G key/value heads."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        D, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj, self.o_proj = Linear(D, D), Linear(D, D)
        self.k_proj, self.v_proj = Linear(D, kv), Linear(D, kv)

    def forward(self, x: Tensor, rope: list[Tensor], mask: Mask, past: Past | None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in projections)  # (B, H or G, T, C)
        q, k = rotate(torch.cat((q, k), dim=1), *rope).split((q.shape[1], k.shape[1]), dim=1)
        if past is not None:
            k, v = append(past[0], k, past[2]), append(past[1], v, past[2])  # (B, G, S, C)
        attend = ATTENTION[self.config.attention_backend]
        drop = self.config.attention_dropout if self.training else 0.0
        y = attend(q, k, v, mask, self.config.attention_multiplier, drop)  # (B, H, T, C)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Router(nn.Module):
    """Scores the experts for each token and chooses K of them."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.layer = Linear(config.hidden_size, config.num_local_experts)

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


def experts_one_token(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The equation as it stands, for N = 1: y = sum_k w_k down_e(silu(gate_e x) * up_e x), where
    expert e is the k-th choice. Returns y_ND."""
    experts = expert_ids_NK[0].tolist()  # waits for the device
    rows_KP = torch.cat([gate_up_EPD[e] @ x_ND.T for e in experts]).view(len(experts), -1)
    columns = swiglu(rows_KP)[:, :, None]  # a matrix times a column, as in linear
    outputs = torch.cat([down_EDF[e] @ h for e, h in zip(experts, columns, strict=True)])
    return weights_NK @ outputs.view(len(experts), -1)


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


def combine(rows_MD: Tensor, order_M: Tensor, weights_NK: Tensor) -> Tensor:
    """Undo the sorting, then y_ND: the sum of each token's K rows times its routing weights."""
    out_NKD = rows_MD[order_M.argsort()].view(*weights_NK.shape, -1)
    return (weights_NK[:, None] @ out_NKD)[:, 0]


def experts_loop(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The same for every token: one expert at a time, on the tokens that chose it. Returns y_ND."""
    if len(x_ND) == 1:
        return experts_one_token(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    weights_M = weights_NK.flatten()[order_M]
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    start = 0
    for e, end in enumerate(ends_E.tolist()):  # waits for the device
        if start < end:
            tokens, weights = tokens_M[start:end], weights_M[start:end, None]
            hidden = swiglu(linear(x_ND[tokens], gate_up_EPD[e]))
            y_ND.index_add_(0, tokens, linear(hidden, down_EDF[e]).to(y_ND.dtype) * weights)
        start = end
    return y_ND.to(x_ND.dtype)


def experts_grouped(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The same for many tokens: the loop is inside two grouped products. Returns y_ND."""
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    rows_MP = grouped_product(x_ND[tokens_M], gate_up_EPD, ends_E)
    rows_MD = grouped_product(swiglu(rows_MP), down_EDF, ends_E)
    return combine(rows_MD, order_M, weights_NK)


def grouped_product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's matrix (outputs, inputs) times its own run of rows (M, inputs)."""
    _, outputs, inputs = weights.shape
    odd_out, odd_in = (-size % (16 // rows.element_size()) for size in (outputs, inputs))
    if odd_out or odd_in:  # the kernel wants rows of whole 16 bytes, as all released sizes are
        rows, weights = F.pad(rows, (0, odd_in)), F.pad(weights, (0, odd_in, 0, odd_out))
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends_E)[:, :outputs]


def experts_gathered(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The same for a few tokens: fetch each assignment's own matrices, then two batched products.

    Reads the chosen experts alone; compiled, the fetch fuses into the product. Returns y_ND.
    """
    rows_NKP = matvec(gate_up_EPD[expert_ids_NK], x_ND[:, None])
    out_NKD = matvec(down_EDF[expert_ids_NK], swiglu(rows_NKP))
    return (weights_NK[:, None] @ out_NKD)[:, 0]


def experts_batched(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """No loop, no wait for the device: gathered while assignments are no more than experts.

    PyTorch's grouped product keeps that promise in bfloat16 on compute capability 9 and 10; other
    cards and dtypes wait in it.
    """
    few = expert_ids_NK.numel() <= len(gate_up_EPD)
    experts = experts_gathered if few else experts_grouped
    return experts(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)


EXPERTS = {"loop": experts_loop, "batched": experts_batched}


def pick_experts(backend: str, device: torch.device) -> str:
    """What "auto" means on a device: "batched" on CUDA, where waiting costs most, else "loop"."""
    return backend if backend != "auto" else "batched" if device.type == "cuda" else "loop"


class MoE(nn.Module):
    """The sparse feed-forward block: the router decides, the experts compute."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        E, D, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.input_linear = Linear(D, 2 * width, E)  # gate rows first, then up
        self.output_linear = Linear(width, D, E)
        self.router = Router(config)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE, weights_NK, expert_ids_NK = self.router(x_ND)
        experts = EXPERTS[pick_experts(self.config.experts_backend, x_ND.device)]
        gate_up_EPD, down_EDF = self.input_linear.weight, self.output_linear.weight
        y_ND = experts(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
        return y_ND.view_as(x_BTD), logits_NE


class DecoderLayer(nn.Module):
    """Attention, then experts, each on the normalised stream and added back to it, damped."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = MoE(config)

    def forward(
        self, x: Tensor, rope: list[Tensor], mask: Mask, past: Past | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) to x and the router's logits (N, E)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, past) * self.residual_multiplier
        y, router_logits = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y * self.residual_multiplier, router_logits


class KVCache:
    """Keys and values of the tokens seen, (layers, B, G, max_length, C) each, allocated once.

    `length` counts the slots filled. Memory that no token has filled is not touched.
    """

    def __init__(
        self,
        config: GraniteMoeConfig,
        batch_size: int,
        max_length: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            good = type(value) is int and value > 0
            require(good, f"{name}: must be an integer >= 1, got {value!r:.60}")
        heads = (config.num_key_value_heads, max_length, config.head_dim)
        shape = (config.num_hidden_layers, batch_size, *heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.slots: Tensor | None = None

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def write_at(self, slots: Tensor | None) -> None:
        """Let the next steps write the slots (T,) that a tensor names: as its values change and its
        shape does not, such a step can be captured and replayed. None goes back to `length`."""
        self.slots = slots
        for cached in (self.keys, self.values):
            cached[:, :, :, self.length :] = 0.0  # a mask hides numbers, but not NaN


def append(cached: Tensor, new: Tensor, at: int | Tensor) -> Tensor:
    """Write new (B, G, T, C) into cached (B, G, max_length, C) from slot `at` on.

    Returns what is filled, (B, G, S, C); where `at` is a tensor of T slots, everything.
    """
    if isinstance(at, Tensor):
        return cached.index_copy_(2, at, new)
    end = at + new.shape[2]
    cached[:, :, at:end] = new
    return cached[:, :, :end]


def visible(slots: Tensor, S: int, attention_mask: Tensor | None) -> Tensor:
    """(B or 1, 1, T, S), True where the query in each of the T slots may look: back, at no padding.

    A query before its row's first token would see nothing; it sees everything, since no softmax may
    be empty, and its result means nothing.
    """
    mask = (torch.arange(S, device=slots.device) <= slots[:, None])[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :].bool()
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    return mask


def check_shapes(
    config: GraniteMoeConfig,
    dtype: torch.dtype,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> None:
    """Raises ValueError for inputs that do not fit each other, the model or the cache."""

    def fits(name: str, x: Tensor | None, *shapes: tuple, boolean: bool = False) -> None:
        kinds = (torch.int64, torch.int32) + (torch.bool,) * boolean
        good = x is None or (isinstance(x, Tensor) and x.dtype in kinds and x.shape in shapes)
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        require(good, f"{name}: must be integers of shape {shapes[0]}, got {found}")

    shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else ()
    fits("input_ids", input_ids, shape if len(shape) == 2 and 0 not in shape else ("B", "T"))
    B, T = shape
    S = T + (cache.length if cache else 0)
    if cache:
        require(cache.max_length >= S, f"cache: {S} tokens do not fit in {cache.max_length}")
        found = (*cache.keys.shape[:3], cache.keys.shape[4], cache.keys.dtype)
        kind = (config.num_hidden_layers, B, config.num_key_value_heads, config.head_dim, dtype)
        names = "(layers, batch, heads, head_dim, dtype)"
        require(found == kind, f"cache: {names} must be {kind}, is {found}")
        S = S if cache.slots is None else cache.max_length
    fits("position_ids", position_ids, (B, T), (1, T))
    fits("attention_mask, cached tokens included", attention_mask, (B, S), boolean=True)


def check_values(
    config: GraniteMoeConfig, input_ids: Tensor, attention_mask: Tensor | None, begins: bool
) -> None:
    """Raises ValueError for ids and masks that mean nothing. On the CPU only, where looking is
    free; elsewhere it would wait for the device at every step."""
    low, high = (int(x) for x in input_ids.aminmax())
    good = low >= 0 and high < config.vocab_size
    require(good, f"input_ids: must be from 0 to {config.vocab_size - 1}, got {low} to {high}")
    if attention_mask is not None:
        real = attention_mask.bool()
        require(real.eq(attention_mask).all(), "attention_mask: must be 0 and 1")
        runs = (F.pad(real, (1, 0)).int().diff(dim=1) == 1).sum(dim=1)
        good = (runs <= 1).all() and (runs.all() or not begins)  # a chunk may be all padding
        require(good, "attention_mask: must have one unbroken run of 1 in each row")


class GraniteMoeModel(nn.Module):
    """Embedding, layers and final norm, without the head."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size)  # see initialise
        self.embed_tokens = nn.Embedding(*empty.shape, config.pad_token_id, _weight=empty)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.token_step = DecoderLayer.__call__  # may be replaced by its compiled form
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids (B, T) to hidden states (B, T, D) and each layer's router logits (N, E)."""
        dtype = self.embed_tokens.weight.dtype
        check_shapes(self.config, dtype, input_ids, attention_mask, position_ids, cache)
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_values(self.config, input_ids, attention_mask, begins=cache is None)
        T, start = input_ids.shape[1], cache.length if cache else 0
        slots, at = torch.arange(start, start + T, device=input_ids.device), start
        if fixed := cache is not None and cache.slots is not None:
            slots = at = cache.slots
        x = self.embed_tokens(input_ids) * self.config.embedding_multiplier  # (B, T, D)
        positions = slots[None] if position_ids is None else position_ids
        rope, mask = rope_tables(positions, self.config, dtype), None
        if fixed or attention_mask is not None:
            mask = visible(slots, cache.max_length if fixed else start + T, attention_mask)
        run = self.token_step if T == 1 else DecoderLayer.__call__
        router_logits = []
        for i, layer in enumerate(self.layers):
            past = (cache.keys[i], cache.values[i], at) if cache else None
            x, logits = run(layer, x, rope, mask, past)
            router_logits.append(logits)
        if cache:
            cache.length += T
        return self.norm(x), tuple(router_logits)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """E * sum_e (choices of e per token) * (mean probability of e), over all layers' real tokens.

    router_logits: (N, E) a layer; attention_mask: (B, T), 0 for padding. Perfect balance gives
    exactly K (arXiv 2101.03961, eq. 4-6, with the K slots summed).
    """
    probs = torch.cat(router_logits).softmax(dim=-1)  # (layers * N, E)
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
    real = probs.new_ones(len(probs), 1)
    if attention_mask is not None:
        real = attention_mask.reshape(-1, 1).to(probs).repeat(len(router_logits), 1)
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
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
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
        position_ids (B, T): 0, 1, ... after the cached tokens if None; left padding needs them.
        labels (B, T): shifted inside, -100 is ignored; the loss is the mean in nats, plus the
        auxiliary loss times its coefficient where router logits are asked for.
        logits_to_keep: compute only so many last positions; 0 computes all.
        Raises ValueError for inputs that do not fit each other, the model or the cache.
        """
        require(logits_to_keep >= 0, f"logits_to_keep: must be >= 0, got {logits_to_keep}")
        x, router_logits = self.model(input_ids, attention_mask, position_ids, cache)
        x = x[:, -logits_to_keep:].contiguous()
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        output = CausalLMOutput(linear(x, head.weight) / self.config.logits_scaling)
        if labels is not None:
            shifted = output.logits[:, :-1].float().flatten(0, 1)
            output.loss = F.cross_entropy(
                shifted, labels[:, 1:].flatten().long(), ignore_index=-100
            )
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_router_logits:
            output.router_logits = router_logits
            real = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            top_k = self.config.num_experts_per_tok
            output.aux_loss = load_balancing_loss(router_logits, top_k, real)
            if labels is not None:
                output.loss = output.loss + self.config.router_aux_loss_coef * output.aux_loss
        return output

    def num_parameters(self, active: bool = False) -> int:
        """How many numbers the model holds or, active, how many of them one token uses."""
        c = self.config
        idle_experts = c.num_hidden_layers * (c.num_local_experts - c.num_experts_per_tok)
        idle = idle_experts * 3 * c.intermediate_size * c.hidden_size
        return sum(p.numel() for p in self.parameters()) - (idle if active else 0)
