"""The same numbers sooner: not needed to understand the model.

cpu.py      on a CPU, in C: cpu.c (a step of one token a row), prompt.c (prompts), numbers.h
cuda.py     on CUDA: a step of one token a row, captured as one graph
"""

from collections.abc import Callable

from torch import Tensor

from granitemoe import GraniteMoeForCausalLM, KVCache

Step = Callable[[Tensor], Tensor]


def step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Step:
    """A function that continues the rows of a cache, once a reply: logits = step(ids).

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


def description(model: GraniteMoeForCausalLM) -> str:
    """How the steps of a model run, in words. Raises ValueError as step does."""
    weight = model.model.norm.weight
    if weight.device.type == "cuda":
        return "captured as one graph"
    from fast import cpu

    return "C" if cpu.parallel(weight.dtype) else "C, in one thread (no OpenMP)"


def pays(model: GraniteMoeForCausalLM) -> bool:
    """Whether the model is so large, and this machine such, that steps in C are worth building."""
    from fast import cpu

    weight = model.model.norm.weight
    possible = weight.device.type == "cpu" and weight.dtype in cpu.DTYPES and cpu.has_compiler()
    return possible and model.num_parameters() > 1e8
