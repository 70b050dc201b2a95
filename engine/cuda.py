"""The same numbers sooner on a GPU: the captured token step, its cache; layers compiled for it and,
while engine/cpu.py has no step of its own, for a CPU."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from granitemoe import (
    DecoderLayer,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    KVCache,
    Past,
    choose_experts,
)  # fmt: skip

Step = Callable[[Tensor, Tensor], Tensor]  # see generate.plain_step


class FixedPast(Past):
    """A layer's cache in a step of fixed shapes: `at` is a tensor of the T slots to write."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v (B, G, T, C); returns all slots, filled or not, which a mask must hide."""
        return self.keys.index_copy_(2, self.at, k), self.values.index_copy_(2, self.at, v)


class FixedCache(KVCache):
    """A view of another cache for steps whose shapes never change: they write the slots (T,) that a
    tensor names and look at the whole capacity, so that one can be captured and replayed.

    Such a step is of one token a row, and needs an attention_mask over the capacity.
    """

    length = property(lambda self: self.max_length - 1, lambda self, length: None)  # all count

    def __init__(self, cache: KVCache, at: Tensor) -> None:
        self.keys, self.values, self.ids, self.at = cache.keys, cache.values, cache.ids, at
        self.max_length = cache.max_length
        for filled in (self.keys, self.values):
            filled[:, :, :, cache.length :] = 0.0  # a mask hides numbers, but not NaN

    def slots(self, T: int) -> Tensor:
        return self.at

    def layer(self, i: int) -> FixedPast:
        return FixedPast(self.keys[i], self.values[i], self.at)


def shadow(module: nn.Module, config: GraniteMoeConfig) -> nn.Module:
    """A copy of a module and all within it, under another config, on the same parameters."""
    twin = copy.copy(module)
    twin._modules = {name: shadow(child, config) for name, child in module._modules.items()}
    if hasattr(twin, "config"):
        twin.config = config
    return twin


def compile_layers(model: GraniteMoeForCausalLM, experts: str) -> GraniteMoeForCausalLM:
    """The model with layers that are compiled when they first run, one graph for all of them.

    The model itself is left as it is. experts: the form in which they run. Needs a C++ compiler, or
    Triton on CUDA.
    """
    if model.config.attention_backend == "flash":
        raise ValueError("attention_backend: a compiled step takes masks, 'flash' none; use 'sdpa'")
    how = {"mode": "max-autotune-no-cudagraphs"} if model.model.norm.weight.is_cuda else {}
    forward = torch.compile(DecoderLayer.forward, fullgraph=True, **how)
    twin = shadow(model, replace(model.config, experts_backend=experts))
    layers = twin.model._modules.pop("layers")
    twin.model.layers = [functools.partial(forward, layer) for layer in layers.children()]
    return twin


@contextmanager
def compiling() -> Iterator[None]:
    """For first runs: whatever a compiler raises, of dozens of classes, to ValueError in a line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compiling failed: {reason:.120}") from None


def capture(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """The step of one token a row as a CUDA graph, sampling included: one launch a step.

    See generate.plain_step for the arguments. The ids are those of the same kernels run one by one.
    """
    ids, at = torch.zeros_like(pads), torch.full_like(pads[0], cache.length)
    uniform = torch.zeros_like(pads, dtype=torch.float64)
    fixed = FixedCache(cache, at)
    mask = torch.arange(cache.max_length, device=pads.device) >= pads  # (B, S)

    def step() -> Tensor:
        logits = model(ids, attention_mask=mask, position_ids=at - pads, cache=fixed).logits
        return choose(logits[:, -1].float(), uniform)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate and compile at their first runs
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new = step()

    def replay(new_ids: Tensor, new_uniform: Tensor) -> Tensor:
        ids.copy_(new_ids)
        uniform.copy_(new_uniform)
        at.fill_(cache.length)
        graph.replay()
        cache.length += 1
        return new

    replay.reads = step  # a graph does not keep alive what it reads
    return replay


def step_form(model: GraniteMoeForCausalLM, rows: int) -> str:
    """The form of the experts in a compiled step of so many rows."""
    c, device = model.config, model.model.norm.weight.device
    return choose_experts("batched", device, rows * c.num_experts_per_tok, c.num_local_experts)


def token_step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """The captured step, its layers compiled. Raises ValueError if they cannot be compiled."""
    compiled = compile_layers(model, step_form(model, len(pads)))
    with compiling():
        return capture(compiled, cache, pads, choose)
