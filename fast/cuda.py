"""The step of one token a row on CUDA, captured as one graph: one launch a step.

What a card measured is in bench/RESULTS.md.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fast import check
from granitemoe import (
    DecoderLayer,
    GraniteMoeForCausalLM,
    KVCache,
    attend_one,
    experts_gathered,
    experts_grouped,
    rope_tables,
    rotate,
)


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


def pick_experts(model: GraniteMoeForCausalLM, rows: int) -> Callable:
    """The form of the experts in a captured step of so many rows, which may not synchronise."""
    c, weight = model.config, model.model.norm.weight
    many = rows * c.num_experts_per_tok > c.num_local_experts
    if many and grouped_kernel(weight.device, weight.dtype):
        return experts_grouped
    return experts_pieces


# -------------------------------------------------------------------------- one token, fixed shapes
def token_layer(
    layer: DecoderLayer, x: Tensor, rope: list, mask: Tensor, past: list, experts: Callable
) -> Tensor:
    """DecoderLayer.forward for one token a row.

    x (B, 1, D); mask (B, 1, 1, S): of the S slots to look at, it hides those that are not filled;
    past: keys and values (B, G, max_length, C), and the slot to write (1,), a tensor, so that
    shapes stay the same for any length. Returns (B, 1, D)."""
    attention, moe, (keys, values, at) = layer.self_attn, layer.block_sparse_moe, past
    c, h = attention.config, layer.input_layernorm(x)
    q = attention.q_proj(h).view(len(x), -1, 1, c.head_dim)
    k = attention.k_proj(h).view(len(x), -1, 1, c.head_dim)
    v = attention.v_proj(h).view(len(x), -1, 1, c.head_dim)
    k = keys.index_copy_(2, at, rotate(k, *rope))[:, :, : mask.shape[3]]
    v = values.index_copy_(2, at, v)[:, :, : mask.shape[3]]
    rows = rotate(q, *rope).view(len(x), c.num_key_value_heads, -1, c.head_dim)
    y = attend_one(rows, k, v, mask, c.attention_multiplier, 0.0)
    x = x + attention.o_proj(y.reshape(x.shape)) * layer.residual_multiplier
    h_ND = layer.post_attention_layernorm(x)[:, 0]
    _, weights_NK, expert_ids_NK = moe.router(h_ND)
    matrices = (moe.input_linear.weight, moe.output_linear.weight)
    y_ND = experts(h_ND, *matrices, weights_NK, expert_ids_NK)
    return x + y_ND[:, None] * layer.residual_multiplier


def token_logits(
    model: GraniteMoeForCausalLM, cache: KVCache, at: Tensor, room: int, ids: Tensor, pads: Tensor
) -> Tensor:
    """Logits (B, V) after ids (B, 1), which go to slot `at` (1,) of the cache.

    room: how many slots to look at; pads (B, 1): how many of them each row leaves empty on the
    left."""
    c, experts = model.config, pick_experts(model, len(ids))
    cache.ids.index_copy_(1, at, ids)
    x = model.model.embed_tokens(ids) * c.embedding_multiplier
    rope = rope_tables(at - pads, c, x.dtype)
    slots = torch.arange(room, device=x.device)
    mask = ((slots >= pads) & (slots <= at))[:, None, None]
    for i, layer in enumerate(model.model.layers):
        past = [cache.keys[i], cache.values[i], at]
        x = token_layer(layer, x, rope, mask, past, experts)
    head = model.model.embed_tokens if c.tie_word_embeddings else model.lm_head
    return (F.linear(model.model.norm(x)[:, -1], head.weight) / c.logits_scaling).float()


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


def captured(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Callable:
    """The step that replays a CUDA graph of token_logits. It is captured at the first call, on a
    part of the cache, and anew when that is full."""
    ids, at = torch.zeros_like(pads), torch.zeros_like(pads[0])
    room, graph, logits, idle = 0, None, None, IDLE[pads.device]
    stream = idle.pop() if idle else torch.cuda.Stream(pads.device)

    def record() -> None:
        nonlocal room, graph, logits
        graph = logits = None  # frees its memory for the next
        room = bucket(cache.length + 1, cache.max_length)
        for filled in (cache.keys, cache.values):
            filled[:, :, :, cache.length : room] = 0.0  # a mask hides numbers, but not NaN
        with one_line():
            for _ in range(2):  # libraries allocate at their first runs
                token_logits(model, cache, at, room, ids, pads)
            graph = torch.cuda.CUDAGraph()  # other threads may go on allocating meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                logits = token_logits(model, cache, at, room, ids, pads)

    def replay(new_ids: Tensor) -> Tensor:
        ids.copy_(new_ids)
        at.fill_(cache.length)
        with aside(stream, pads.device):
            if cache.length >= room:
                record()
            graph.replay()
        cache.length += 1
        return logits

    weakref.finalize(replay, idle.append, stream)
    return replay


# ------------------------------------------------------------------------------------------- both
def step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Callable:
    """See fast.step. Prompts run as in granitemoe.py."""
    check(model, cache, pads)
    one_token, last_pad = captured(model, cache, pads), int(pads.max())
    slots = torch.arange(cache.max_length, device=pads.device)
    mask = slots >= pads

    @torch.no_grad()
    def advance(ids: Tensor) -> Tensor:
        start, end = cache.length, cache.length + ids.shape[1]
        if end > cache.max_length:
            raise ValueError(f"cache: {end} tokens do not fit in {cache.max_length}")
        if end - start == 1 and start >= max(1, last_pad):
            return one_token(ids)
        inputs = {}
        if last_pad:
            positions = (slots[start:end] - pads).clamp(min=0)
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions}
        return model(ids, cache=cache, logits_to_keep=1, **inputs).logits[:, -1].float()

    return advance
