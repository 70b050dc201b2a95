"""The same numbers sooner: not needed to understand the model.

cpu.py      on a CPU, in C: cpu.c (a step of one token a row), prompt.c (prompts), numbers.h
cuda.py     on CUDA: a step of one token a row, captured as one graph
"""

from collections.abc import Callable

from torch import Tensor

from granitemoe import GraniteMoeForCausalLM, KVCache, auto_experts

Step = Callable[[Tensor], Tensor]


def step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Step:
    """Call this once for each reply. It returns a function that continues the rows of a cache:
    logits = step(ids).

    pads (B, 1): how many slots of the cache each row leaves empty on the left. ids (B, T), int64:
    new tokens. Logits (B, V), float32: after the last of them, on the model's device, valid until
    the next call. The cache is written as the model's forward writes it.
    Raises ValueError that says why, where there is no compiled form for this model, device, dtype
    or machine.
    """
    if cache.keys.device.type == "cuda":
        from fast import cuda as part
    else:
        from fast import cpu as part
    return part.step(model, cache, pads)


def check(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> None:
    """What both parts ask for. Raises ValueError where the steps would not be this model's, or not
    fit this cache."""
    c, weight = model.config, model.model.norm.weight
    compiled = ("auto", "batched", auto_experts(weight.device))
    if c.attention_backend != "sdpa" or c.experts_backend not in compiled:
        forms = f"{c.attention_backend!a:.40} and {c.experts_backend!a:.40}"
        raise ValueError(f"compiled steps: have forms of their own; {forms} were asked for")
    if model.training and c.attention_dropout:
        raise ValueError("compiled steps: have no dropout; call model.eval() before")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"compiled steps: call no hooks; {name!a:.60} has a forward hook")
    sizes = (c.num_hidden_layers, len(pads), c.num_key_value_heads, c.head_dim)
    expected = (*sizes, weight.dtype, weight.device)
    L, B, G, _, C = cache.keys.shape
    got = (L, B, G, C, cache.keys.dtype, cache.keys.device)
    if got != expected:
        raise ValueError(f"cache: (layers, B, G, C, dtype, device) must be {expected}, is {got}")


class Guard:
    """Whether a model is the one that compiled steps compute, and its memory still there."""

    def __init__(self, model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> None:
        check(model, cache, pads)
        self.cache = cache

    def look(self, ids: Tensor) -> bool:
        """Before each step: whether memory has moved. Raises ValueError."""
        end, room = self.cache.length + ids.shape[1], self.cache.max_length
        if end > room:
            raise ValueError(f"cache: {end} tokens do not fit in {room}")
        return False


def description(model: GraniteMoeForCausalLM) -> str:
    """How the steps of a model run, in words, if step takes it."""
    weight = model.model.norm.weight
    if weight.device.type == "cuda":
        return "captured as one graph"
    from fast import cpu

    return "C" if cpu.parallel(weight.dtype) else "C, in one thread (no OpenMP)"


def pays(model: GraniteMoeForCausalLM) -> bool:
    """Whether the model is so large, and this machine such, that steps in C are worth building."""
    from fast import cpu

    weight = model.model.norm.weight
    if model.num_parameters() < 1e8 or weight.device.type != "cpu":
        return False
    return weight.dtype in cpu.DTYPES and cpu.has_compiler()
