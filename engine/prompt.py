"""Prompts with --compile: prompt.c's forms for granitemoe.py's open tables, and a model of them."""

import copy
import ctypes
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.cpu import FLOAT, attend_blocks, check, experts_runs, library, struct, weights_of
from granitemoe import (
    ATTENTION,
    EXPERTS,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Mask,
    sort_by_expert,
)

RUN, KEYS = 256, 96  # as in prompt.c
Prompt = struct(("E", "D", "F", "Y", "threads"), (), (
    "gate_up_EPD", "down_EDF", "x_ND", "tokens_M", "ends_E", "weights_M", "y_ND", "x", "hidden",
))  # fmt: skip
Attention = struct(("B", "H", "G", "T", "S", "C", "threads"), ("scale",), ("q", "k", "values", "y"))


def experts_prompt(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_runs in C, which has no gradients. Returns y_ND. Raises ValueError as token_step."""
    check(x_ND)
    if torch.is_grad_enabled():
        return experts_runs(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    (N, D), (E, _, F) = x_ND.shape, down_EDF.shape
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, E)
    y_ND = torch.zeros(N, D + 16, **FLOAT)  # rows 4 KB apart would be one set of the cache
    inputs = (x.contiguous() for x in (gate_up_EPD, down_EDF, x_ND))
    held = [*inputs, tokens_M, ends_E.long(), weights_NK.flatten()[order_M].float(), y_ND,
            torch.empty(RUN * (D + 1), **FLOAT), torch.empty(RUN * (F + 1), **FLOAT)]  # fmt: skip
    p = Prompt(E, D, F, D + 16, torch.get_num_threads(), *[x.data_ptr() for x in held])
    library(x_ND.dtype).experts(ctypes.byref(p))
    return y_ND[:, :D].to(x_ND.dtype)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """attend_blocks in C, without what it is left to it: gradients, dropout, masks, one query, and
    heads too large for a thread's stack. Raises ValueError as token_step does."""
    check(q)
    (B, H, T, C), (_, G, S, _) = q.shape, k.shape
    if torch.is_grad_enabled() or drop or mask is not None or T == 1 or C > 512:
        return attend_blocks(q, k, v, mask, scale, drop)
    values = F.pad(v, (0, 0, 0, -S % KEYS)).unflatten(2, (-1, KEYS)).transpose(-1, -2)
    y = q.new_empty(B, T, H, C)
    held = [q.contiguous(), k.contiguous(), values.contiguous(), y]
    a = Attention(B, H, G, T, S, C, torch.get_num_threads(), scale, *[x.data_ptr() for x in held])
    library(q.dtype).attention(ctypes.byref(a))
    return y.transpose(1, 2)


ATTENTION["prompt"], EXPERTS["prompt"] = attend_prompt, experts_prompt


def with_config(module: nn.Module, config: GraniteMoeConfig) -> nn.Module:
    """The same modules, parameters and hooks but for another config, wherever they have one."""
    twin = copy.copy(module)
    twin._modules = {name: with_config(child, config) for name, child in module._modules.items()}
    if hasattr(twin, "config"):
        twin.config = config
    return twin


def for_prompts(model: GraniteMoeForCausalLM) -> GraniteMoeForCausalLM:
    """The model for inference, its attention and experts in C, on the same parameters: prompts in
    0.8 of the time; a form that was asked for stays. On CUDA the model itself. Raises ValueError as
    token_step does."""
    weight = model.model.norm.weight
    if weight.device.type == "cuda":
        return model
    check(weight)
    weights_of(model)
    c = model.config
    attention = "prompt" if c.attention_backend in ("sdpa", "blocks") else c.attention_backend
    experts = "prompt" if c.experts_backend in ("auto", "runs") else c.experts_backend
    forms = {"attention_backend": attention, "experts_backend": experts}
    return with_config(model, dataclasses.replace(c, **forms))
