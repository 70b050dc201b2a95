"""Prompts with --compile: prompt.c's forms in granitemoe.py's open tables, a model with them."""

import copy
import ctypes
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.cpu import FLOAT, attend_blocks, check, experts_runs, library, struct, weights_of
from granitemoe import (
    ATTENTION,
    EXPERTS,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Mask,
    sort_by_expert,
)

RUN, KEYS = 256, 96  # as in prompt.c
Experts = struct(("E", "D", "F", "Y", "threads"), (), (
    "gate_up_EPD", "down_EDF", "x_ND", "tokens_M", "ends_E", "weights_M", "y_ND", "x", "hidden",
))  # fmt: skip
Attention = struct(("B", "H", "G", "T", "S", "C", "threads"), ("scale",), ("q", "k", "values", "y"))


def experts_prompt(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_runs in C; gradients are left to that form. Returns y_ND. Raises ValueError as
    token_step does."""
    check(x_ND)
    if torch.is_grad_enabled() or not x_ND.dtype == gate_up_EPD.dtype == down_EDF.dtype:
        return experts_runs(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    (N, D), (E, _, F) = x_ND.shape, down_EDF.shape
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, E)
    y_ND = torch.zeros(
        N, D + 16, **FLOAT
    )  # 16: whole ROWS fit, and rows 4 KB apart meet in the cache
    inputs = (x.contiguous() for x in (gate_up_EPD, down_EDF, x_ND))
    held = [*inputs, tokens_M, ends_E.long(), weights_NK.flatten()[order_M].float(), y_ND,
            torch.empty(RUN * (D + 1), **FLOAT), torch.empty(RUN * (F + 1), **FLOAT)]  # fmt: skip
    p = Experts(E, D, F, D + 16, torch.get_num_threads(), *[x.data_ptr() for x in held])
    library(x_ND.dtype).experts(ctypes.byref(p))
    return y_ND[:, :D].to(x_ND.dtype)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """attend_blocks in C. To that form are left gradients, dropout, masks, one query, dtypes that
    differ and heads too large for a thread's stack. Raises ValueError as token_step does."""
    check(q)
    (B, H, T, C), (_, G, S, _) = q.shape, k.shape
    other = drop or mask is not None or T == 1 or C > 512 or not q.dtype == k.dtype == v.dtype
    if other or torch.is_grad_enabled():
        return attend_blocks(q, k, v, mask, scale, drop)
    values = F.pad(v, (0, 0, 0, -S % KEYS)).unflatten(2, (-1, KEYS)).transpose(-1, -2)
    y = q.new_empty(B, T, H, C)
    held = [q.contiguous(), k.contiguous(), values.contiguous(), y]
    a = Attention(B, H, G, T, S, C, torch.get_num_threads(), scale, *[x.data_ptr() for x in held])
    library(q.dtype).attention(ctypes.byref(a))
    return y.transpose(1, 2)


ATTENTION["prompt"], EXPERTS["prompt"] = attend_prompt, experts_prompt


def with_config(module: nn.Module, config: GraniteMoeConfig) -> nn.Module:
    """A shallow copy with another config wherever a module has one; all else is shared."""
    twin = copy.copy(module)
    twin._modules = {name: with_config(child, config) for name, child in module._modules.items()}
    if hasattr(twin, "config"):
        twin.config = config
    return twin


def for_prompts(model: GraniteMoeForCausalLM) -> GraniteMoeForCausalLM:
    """The model for inference, its attention and experts in C, on the same parameters: prompts in
    0.85 of the time. Forms other than "auto" may mean stay. On CUDA the model itself. Raises
    ValueError as token_step does."""
    weight = model.model.norm.weight
    if weight.device.type == "cuda":
        return model
    check(weight)
    weights_of(model)  # for its errors
    c = model.config
    attention = "prompt" if c.attention_backend in ("sdpa", "blocks") else c.attention_backend
    experts = "prompt" if c.experts_backend in ("auto", "runs") else c.experts_backend
    forms = {"attention_backend": attention, "experts_backend": experts}
    return with_config(model, dataclasses.replace(c, **forms))
