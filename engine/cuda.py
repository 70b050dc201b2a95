"""The same numbers sooner on a GPU: the captured token step, its cache, compiled layers."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from granitemoe import DecoderLayer, GraniteMoeForCausalLM, KVCache, Past


class FixedPast(Past):
    """A layer's cache in a step of fixed shapes: `at` is a tensor of the T slots to write."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v (B, G, T, C); returns all slots, filled or not, which a mask must hide."""
        return self.keys.index_copy_(2, self.at, k), self.values.index_copy_(2, self.at, v)


class FixedCache(KVCache):
    """A view of another cache for steps whose shapes never change: they write the slots (T,) that a
    tensor names and look at the whole capacity, so that one can be captured and replayed.

    Such a step needs an attention_mask over the capacity. It changes no `length` but its own.
    """

    def __init__(self, cache: KVCache, at: Tensor) -> None:
        self.keys, self.values, self.at = cache.keys, cache.values, at
        self.length, self.max_length = 0, cache.max_length
        for filled in (self.keys, self.values):
            filled[:, :, :, cache.length :] = 0.0  # a mask hides numbers, but not NaN

    def slots(self, T: int) -> Tensor:
        return self.at

    def span(self, T: int) -> int:
        return self.max_length

    def layer(self, i: int) -> FixedPast:
        return FixedPast(self.keys[i], self.values[i], self.at)


def shadow(module: nn.Module) -> nn.Module:
    """A copy of a module and all within it, on the same parameters: what is done to its forward and
    its config is not done to the module."""
    twin = copy.copy(module)
    twin._modules = {name: shadow(child) for name, child in module._modules.items()}
    return twin


def compile_layers(model: GraniteMoeForCausalLM, rows: int, experts: str) -> GraniteMoeForCausalLM:
    """The model with its layers compiled for one token in each of `rows` rows, on the same weights.

    One graph serves all layers and any length of the cache. experts: the form in which they run.
    Needs a C++ compiler, or Triton on CUDA. Raises ValueError if compiling fails.
    """
    weight = model.model.norm.weight
    how = {"mode": "max-autotune-no-cudagraphs"} if weight.is_cuda else {}
    forward = torch.compile(DecoderLayer.forward, fullgraph=True, **how)
    twin, config = shadow(model), replace(model.config, experts_backend=experts)
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = config
    for layer in twin.model.layers:
        layer.forward = functools.partial(forward, layer)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)
    try:
        for length in (2, 3):  # a size that has varied is a symbol: any length will do
            cache = KVCache(config, rows, 2 * length, device=weight.device, dtype=weight.dtype)
            cache.length = length
            mask = torch.ones(rows, length + 1, dtype=torch.bool, device=weight.device)
            twin(ids, attention_mask=mask, cache=cache)
    except RuntimeError as error:  # the compiler's own errors are of this class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compiling failed: {reason:.120}") from None
    return twin


def capture(
    model: GraniteMoeForCausalLM,
    cache: KVCache,
    pads: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
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

    return replay


def token_step(
    model: GraniteMoeForCausalLM,
    cache: KVCache,
    pads: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """The captured step, its layers compiled. Raises ValueError if they cannot be compiled."""
    return capture(compile_layers(model, len(pads), "batched"), cache, pads, choose)
