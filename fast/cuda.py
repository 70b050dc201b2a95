"""The same numbers sooner on a GPU: forms for granitemoe.py's open tables, and the step of one
token a row, compiled and captured as one CUDA graph.

No figure here was measured: bench/RESULTS.md says what stands in for a card, bench/gpu.sh measures.
"""

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from granitemoe import (
    ATTENTION,
    EXPERTS,
    SWITCHES,
    DecoderLayer,
    GraniteMoeForCausalLM,
    KVCache,
    Mask,
    attend_sdpa,
    experts_gathered,
    rope_tables,
    rotate,
    swiglu,
)

Step = Callable[[Tensor, Tensor], Tensor]  # see generate.plain_step

# Whether decoding on CUDA captures without being asked to: not before a run of bench/gpu.sh on a
# card has shown captured steps right and faster. By arithmetic they are 3 to 4 times as fast.
CAPTURE_ALWAYS = False
OPTIONS = {  # of the compiler, for few kernels that read each weight once
    "max_autotune": True,
    "coordinate_descent_tuning": True,  # one row times a matrix becomes a sum, which fuses
    "combo_kernels": True,  # the three projections, and both writes to the cache, are one launch
}


# ---------------------------------------------------------------------------------------- attention
@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keeps SDPA from cuDNN's kernel, which makes a plan, of some 30 ms, for each new length."""
    backends = torch.backends.cuda
    with SWITCHES:
        before = backends.cudnn_sdp_enabled()
        backends.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            backends.enable_cudnn_sdp(before)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to scores, 0 or -inf. Kept on the mask: all layers share one.

    Its rows begin at whole 16 numbers, as the kernel wants them, or each layer would copy it.
    """
    if not hasattr(mask, "added"):
        S = mask.shape[-1]
        room = torch.zeros(*mask.shape[:-1], S // 16 * 16 + 16, dtype=dtype, device=mask.device)
        mask.added = room[..., :S].masked_fill_(~mask, -math.inf)
    return mask.added


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """scaled_dot_product_attention, so called that a kernel takes it which holds few scores.

    On CUDA it falls back to one that holds all T * S of them where grouped heads meet a mask or
    float32. For more than one query the heads of keys and values are therefore repeated.
    """
    T, S, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is None and T == S > 1 and q.dtype != torch.float32:
        return attend_sdpa(q, k, v, None, scale, drop)  # flash takes grouped heads
    mask = mask if mask is None else added(mask, q.dtype)
    with without_cudnn():
        if T == 1:
            return attend_sdpa(q, k, v, mask, scale, drop)
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        if mask is None:  # imported here: it brings PyTorch's compiler, a second
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(T, S)  # no T x S matrix
        return F.scaled_dot_product_attention(q, k, v, mask, drop, scale=scale)


# ------------------------------------------------------------------------------------------ experts
def grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the grouped product never synchronises with the host: Hopper (9) and the Blackwell of
    data centres (10), in bfloat16. Elsewhere, as on a GeForce (12), it cannot be captured."""
    fast = device.type == "cuda" and dtype == torch.bfloat16
    return fast and torch.cuda.get_device_capability(device)[0] in (9, 10)


def experts_pieces(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_gathered for so many rows at a time that it gathers no more than E experts, whose
    memory a batch does not multiply. Never synchronises with the host. Returns y_ND."""
    rows = max(1, len(gate_up_EPD) // expert_ids_NK.shape[1])
    parts = zip(x_ND.split(rows), weights_NK.split(rows), expert_ids_NK.split(rows), strict=True)
    return torch.cat([experts_gathered(x, gate_up_EPD, down_EDF, w, ids) for x, w, ids in parts])


def experts_summed(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_gathered as sums of products, into which a compiler fuses the gathering: else the
    gathered matrices are written out and read again. For compiled steps. Returns y_ND."""

    def products(weights: Tensor, x: Tensor) -> Tensor:
        return (weights.float() * x[..., None, :].float()).sum(dim=-1)

    rows_NKP = products(gate_up_EPD[expert_ids_NK], x_ND[:, None]).to(x_ND.dtype)
    out_NKD = products(down_EDF[expert_ids_NK], swiglu(rows_NKP)).to(x_ND.dtype)
    return (weights_NK[..., None].float() * out_NKD).sum(dim=1).to(x_ND.dtype)


ATTENTION["fused"] = attend_fused
EXPERTS |= {"pieces": experts_pieces, "summed": experts_summed}


def step_form(model: GraniteMoeForCausalLM, rows: int, compiled: bool = True) -> str:
    """The form of the experts in a captured step of so many rows, which may not synchronise."""
    c, weight = model.config, model.model.norm.weight
    many = rows * c.num_experts_per_tok > c.num_local_experts
    if many and grouped_kernel(weight.device, weight.dtype):
        return "grouped"
    return "summed" if compiled else "pieces"


# -------------------------------------------------------------------------- one token, fixed shapes
def token_layer(
    layer: DecoderLayer, x: Tensor, rope: list[Tensor], mask: Tensor, past: list[Tensor], form: str
) -> Tensor:
    """DecoderLayer.forward for one token a row, in an order that compiles to few kernels.

    x (B, 1, D); mask (B, 1, 1, S), to be added: of the S slots to look at, it hides those that are
    not filled; past: keys and values (B, G, max_length, C), and the slot to write (1,), a tensor,
    so that shapes and code stay the same for any length. form: in EXPERTS. Returns (B, 1, D)."""
    attention, moe, (keys, values, at) = layer.self_attn, layer.block_sparse_moe, past
    c, h = attention.config, layer.input_layernorm(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (proj(h).view(len(x), -1, 1, c.head_dim) for proj in projections)
    q, k = rotate(q, *rope), rotate(k, *rope)
    k = keys.index_copy_(2, at, k)[:, :, : mask.shape[3]]
    v = values.index_copy_(2, at, v)[:, :, : mask.shape[3]]
    q = q.view(len(x), c.num_key_value_heads, -1, c.head_dim)  # heads as rows: see attend_sdpa
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=c.attention_multiplier)
    x = x + attention.o_proj(y.reshape(x.shape)) * layer.residual_multiplier
    h_ND = layer.post_attention_layernorm(x)[:, 0]
    logits_NE, expert_ids_NE = moe.router.layer(h_ND).float().sort(dim=-1, descending=True)
    weights_NK = logits_NE[:, : c.num_experts_per_tok].softmax(dim=-1).to(x.dtype)
    expert_ids_NK = expert_ids_NE[:, : c.num_experts_per_tok]  # a sort fuses, topk does not
    weights = (moe.input_linear.weight, moe.output_linear.weight)
    y_ND = EXPERTS[form](h_ND, *weights, weights_NK, expert_ids_NK)
    return x + y_ND[:, None] * layer.residual_multiplier


def token_logits(
    model: GraniteMoeForCausalLM, run: Callable, cache: KVCache, at: Tensor, room: int,
    ids: Tensor, pads: Tensor,
) -> Tensor:  # fmt: skip
    """Logits (B, V) after ids (B, 1), which go to slot `at` (1,) of the cache.

    run: token_layer, or what it compiles to; room: how many slots to look at; pads (B, 1): how many
    of them each row leaves empty on the left."""
    c = model.config
    cache.ids.index_copy_(1, at, ids)
    x = model.model.embed_tokens(ids) * c.embedding_multiplier
    rope = rope_tables(at - pads, c, x.dtype)
    slots = torch.arange(room, device=x.device)
    mask = added(((slots >= pads) & (slots <= at))[:, None, None], x.dtype)
    if len(mask) == 1:  # strides that a compiler knows to be aligned, or each layer copies it
        mask = mask.as_strided(mask.shape, (0, 0, 0, 1))
    for i, layer in enumerate(model.model.layers):
        x = run(layer, x, rope, mask, [cache.keys[i], cache.values[i], at])
    head = model.model.embed_tokens if c.tie_word_embeddings else model.lm_head
    return F.linear(model.model.norm(x)[:, -1], head.weight) / c.logits_scaling


# ---------------------------------------------------------------------------------------- capturing
# Streams that no living graph is on, by device. Libraries keep a workspace for each stream seen,
# so that a new stream for each reply would leak; and PyTorch 2.13 frees a stream's workspaces with
# any graph captured on it (pytorch#193402), so that two living graphs may not share one.
IDLE: dict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


@contextmanager
def aside(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """On a stream of the model's card, whichever is current, after what was launched before."""
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)


@contextmanager
def one_line() -> Iterator[None]:
    """Whatever a compiler or a capture raises, of dozens of classes, to ValueError in a line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compiling or capturing failed: {reason:.120}") from None


def bucket(length: int, most: int) -> int:
    """How many slots a graph looks at that has to look at `length`: 64, then doubling."""
    return min(64 << ((length - 1) // 64).bit_length(), most)


def captured(
    model: GraniteMoeForCausalLM, run: Callable, cache: KVCache, pads: Tensor, choose: Step
) -> Step:
    """The step that replays a CUDA graph of token_logits and choose: one launch a step. It is
    captured at the first call, on a part of the cache, and anew when that is full.
    See generate.plain_step for the arguments."""
    ids, at, uniform = torch.zeros_like(pads), torch.zeros_like(pads[0]), pads.double()
    room, graph, new, idle = 0, None, None, IDLE[pads.device]
    stream = idle.pop() if idle else torch.cuda.Stream(pads.device)

    def step() -> Tensor:
        return choose(token_logits(model, run, cache, at, room, ids, pads).float(), uniform)

    def record() -> None:
        nonlocal room, graph, new
        graph = new = None  # frees its memory for the next
        room = bucket(cache.length + 1, cache.max_length)
        for filled in (cache.keys, cache.values):
            filled[:, :, :, cache.length : room] = 0.0  # a mask hides numbers, but not NaN
        with one_line(), without_cudnn():
            for _ in range(2):  # libraries allocate and compile at their first runs
                step()
            graph = torch.cuda.CUDAGraph()  # other threads may go on allocating meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                new = step()

    def replay(new_ids: Tensor, new_uniform: Tensor) -> Tensor:
        ids.copy_(new_ids)
        uniform.copy_(new_uniform)
        at.fill_(cache.length)
        with aside(stream, pads.device):
            if cache.length >= room:
                record()
            graph.replay()
        cache.length += 1
        return new

    weakref.finalize(replay, idle.append, stream)
    return replay


def capture(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """The captured step, not compiled: the ids are those of the same kernels run one by one."""
    run = functools.partial(token_layer, form=step_form(model, len(pads), compiled=False))
    return captured(model, run, cache, pads, choose)


def token_step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """The captured step, its layer compiled, one graph for all layers, prompts and lengths.

    Needs Triton and a C++ compiler; its first call raises ValueError if they cannot compile it.
    """
    if model.config.attention_backend == "flash":
        raise ValueError("attention_backend: a compiled step takes masks, 'flash' none; use 'sdpa'")
    form = step_form(model, len(pads))
    compiled = torch.compile(token_layer, fullgraph=True, options=OPTIONS)

    def run(layer: DecoderLayer, x: Tensor, rope: list, mask: Tensor, past: list) -> Tensor:
        for tensor, dim in ((mask, 3), (past[0], 2), (past[1], 2)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)  # or each bucket compiles anew
        return compiled(layer, x, rope, mask, past, form)

    return captured(model, run, cache, pads, choose)


def remark(model: GraniteMoeForCausalLM, rows: int) -> str:
    """For the command: how compiled steps of so many rows run, if there are any, and whether a
    prompt's experts wait for the device."""
    weight = model.model.norm.weight
    steps = f", compiled steps: captured, {step_form(model, rows)}" if rows else ""
    return " (synchronises)" * (not grouped_kernel(weight.device, weight.dtype)) + steps
