"""The same numbers sooner: not needed to understand the model.

guard.py    whether a model is the one that the compiled steps compute
cpu.py      on a CPU, in C: cpu.c (a step of one token a row), prompt.c (prompts), numbers.h
cuda.py     on CUDA, in Triton: kernels.py, captured as one graph for each number of new tokens
"""

from collections.abc import Callable

from torch import Tensor

from granitemoe import GraniteMoeForCausalLM, KVCache

Step = Callable[[Tensor], Tensor]


def step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Step:
    """Call this once for each reply. It returns a function that continues the rows of a cache:
    logits = step(ids).

    pads (B, 1): how many slots of the cache each row leaves empty on the left. ids (B, T), int64:
    new tokens. Logits (B, V), float32: after the last of them, on the model's device, valid until
    the next call. The cache is written as the model's forward writes it.
    Raises ValueError that says why, where there is no compiled form for this model, device, dtype
    or machine. So does each step, where the model has changed in a way that it would not follow.
    """
    if cache.keys.device.type == "cuda":
        from fast import cuda as part
    else:
        from fast import cpu as part
    return part.step(model, cache, pads)


def trial(model: GraniteMoeForCausalLM, rows: int) -> list[list[int]]:
    """Prompts for a first reply, in which all is compiled: of two lengths, since several prompts
    are seldom of one. A context of 1 has no room for the second token."""
    longest = [0, 0][: model.config.max_position_embeddings]
    return [longest] + [[0]] * (rows - 1)


def description(model: GraniteMoeForCausalLM) -> str:
    """How the steps of a model run, in words, if step takes it."""
    weight = model.model.norm.weight
    if weight.device.type == "cuda":
        return "Triton kernels, in one graph"
    from fast import cpu

    return "C" if cpu.parallel(weight.dtype) else "C, in one thread (no OpenMP)"


def pays(model: GraniteMoeForCausalLM) -> bool:
    """Whether the model is so large, and this machine such, that steps in C are worth building."""
    from fast import cpu

    weight = model.model.norm.weight
    if model.num_parameters() < 1e8 or weight.device.type != "cpu":
        return False
    return weight.dtype in cpu.DTYPES and cpu.has_compiler()
