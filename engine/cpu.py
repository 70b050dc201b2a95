"""The same numbers sooner on a CPU: forms for granitemoe.py's open tables, and the compiled step.

Reasons with a figure are of two cores of an AMD EPYC with AVX-512 (bench/RESULTS.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import cuda
from engine.cuda import Step
from granitemoe import (
    ATTENTION,
    EXPERTS,
    GraniteMoeForCausalLM,
    KVCache,
    Mask,
    attend_sdpa,
    rope_tables,
    sort_by_expert,
    swiglu,
)

BLOCK = 64  # queries


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """attend_eager for 64 queries at a time, whose scores stay in the processor's cache.

    In bfloat16, a prompt takes half the time of PyTorch's kernel. One query is left to attend_sdpa.
    A mask, where there is one, must be causal too, as the model's is.
    """
    T, G, S = q.shape[2], k.shape[1], k.shape[2]
    if T == 1:
        return attend_sdpa(q, k, v, mask, scale, drop)
    grouped = q.unflatten(1, (G, -1)).flatten(0, 1)  # the query heads of one key head in a row
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    blocks = []
    for start in range(0, T, BLOCK):
        queries = grouped[:, :, start : start + BLOCK]
        heads, t = queries.shape[1:3]
        end, rows = S - T + start + t, queries.flatten(1, 2)  # the last query sees `end` keys
        scores = torch.baddbmm(q.new_zeros(1), rows, k[:, :, :end], beta=0, alpha=scale)
        by_head = scores.view(-1, G, heads, t, end)
        if mask is None:  # only these queries' own keys are hidden from some of them
            by_head[..., end - t :] += q.new_full((t, t), -math.inf).triu(1)
        else:
            by_head.masked_fill_(~mask[:, :, None, start : start + t, :end], -math.inf)
        probs = F.dropout(scores.softmax(dim=-1), drop)
        blocks.append((probs @ v[:, :end]).view_as(queries))
    return torch.cat(blocks, dim=2).view_as(q)


def experts_runs(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_loop with the assignments sorted once: each expert's are one run. Returns y_ND.

    Many rows in 16 bits are filled up to a multiple of 16, since oneDNN compiles a kernel for each
    number of rows, half a millisecond each: it would double the time of a process's first prompt.
    """
    if len(x_ND) == 1:
        return experts_one_token(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    weights_M = weights_NK.flatten()[order_M]
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if start < end:
            tokens, count = tokens_M[start:end], end - start
            rows = x_ND[tokens]
            if count > 64 and count % 16 and rows.element_size() == 2:
                rows = F.pad(rows, (0, 0, 0, -count % 16))
            rows = F.linear(swiglu(F.linear(rows, gate_up_EPD[e])), down_EDF[e])[:count]
            y_ND.index_add_(0, tokens, rows.to(y_ND.dtype) * weights_M[start:end, None])
        start = end
    return y_ND.to(x_ND.dtype)


def experts_one_token(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For N = 1 there is nothing to sort, and one swiglu serves all K experts. Returns y_ND."""
    experts = expert_ids_NK[0].tolist()
    rows_KP = torch.cat([F.linear(x_ND, gate_up_EPD[e]) for e in experts])
    hidden_KF = swiglu(rows_KP)
    rows_KD = torch.cat(
        [F.linear(h, down_EDF[e]) for e, h in zip(experts, hidden_KF.split(1), strict=True)]
    )
    return weights_NK @ rows_KD


def experts_fused(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_gathered as sums of products, into which a compiler fuses the gathering: else the
    gathered matrices are written out and read again. For compiled steps. Returns y_ND."""

    def products(weights: Tensor, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (weights.to(wide) * x[..., None, :].to(wide)).sum(dim=-1).to(x.dtype)

    rows_NKP = products(gate_up_EPD[expert_ids_NK], x_ND[:, None])
    out_NKD = products(down_EDF[expert_ids_NK], swiglu(rows_NKP))
    return (weights_NK[:, None] @ out_NKD)[:, 0]


ATTENTION["blocks"] = attend_blocks
EXPERTS |= {"runs": experts_runs, "fused": experts_fused}


def step_form(model: GraniteMoeForCausalLM, rows: int) -> str:
    """The form of the experts in a compiled step of so many rows: grouping compiles in bfloat16."""
    grouped = cuda.step_form(model, rows) == "grouped"
    return "grouped" if grouped and model.model.norm.weight.dtype == torch.bfloat16 else "fused"


def token_step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """The step of one token a row, its layers compiled; see generate.plain_step for the arguments.

    Raises ValueError if they cannot be compiled.
    """
    compiled, rows = cuda.compile_layers(model, step_form(model, len(pads))), len(pads)
    padded = bool(pads.any())
    mask = torch.arange(cache.max_length, device=pads.device) >= pads  # (B, S)

    def inputs(at: int) -> dict[str, Tensor]:
        return {"attention_mask": mask[:, : at + 1], "position_ids": at - pads} if padded else {}

    def step(ids: Tensor, uniform: Tensor) -> Tensor:
        logits = compiled(ids, cache=cache, **inputs(cache.length)).logits
        return choose(logits[:, -1].float(), uniform)

    with cuda.compiling():
        for room in (3, 4):  # a size that has varied is a symbol: any length will do
            try_layer(compiled, room, rows, padded)
    return step


def try_layer(compiled: GraniteMoeForCausalLM, room: int, rows: int, padded: bool) -> None:
    """Run the first of the layers on zeros, as in a step that then has `room` tokens."""
    weight, c, T = compiled.model.norm.weight, compiled.config, 1
    like = {"dtype": weight.dtype, "device": weight.device}
    cache, x = KVCache(c, rows, 2 * room, **like), torch.zeros(rows, T, c.hidden_size, **like)
    cache.length = room - T
    positions = cache.slots(T).expand(rows if padded else 1, T)
    mask = torch.ones(rows, 1, T, room, dtype=torch.bool, device=weight.device) if padded else None
    compiled.model.layers[0](x, rope_tables(positions, c, x.dtype), mask, cache.layer(0))
