"""The fast forms of the token step: captured as one CUDA graph, and compiled once for all layers.

Where there is no GPU a recorder stands in for the graph. It keeps every operator of the captured
step and on replay runs them again on the same tensors, into the same results, and no Python. So it
shows on any machine what capturing can get wrong: a length, a position or an id that is frozen at
its first value, and a host that looks at a value in the middle of a step.
"""

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import granitemoe
from engine import cpu
from engine.cuda import FixedCache, capture
from granitemoe import DecoderLayer, GraniteMoeConfig, GraniteMoeForCausalLM, KVCache
from test_granitemoe import (
    LOGITS,
    PROMPTS,
    SAMPLING,
    B,
    T,
    cuda,
    fill,
    one,
    padding,
    pairs,
    random_config,
    random_ids,
    real,
    relative,
)  # fmt: skip

FIXTURES = (one, pairs)  # of parity: found by their names here


class Recorder(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the host waits inside the step"
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


def stand_in(monkeypatch, graph: type, recording: Callable) -> None:
    """Let capturing run without a GPU: `graph` for CUDAGraph, `recording` for what fills it."""
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)


@pytest.fixture(params=("recorded", pytest.param("cuda", marks=cuda)))
def device(request, monkeypatch) -> str:
    if request.param == "cuda":
        return "cuda"
    stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "token_step", capture)  # without a compiler
    return "cpu"


def make_model(device: str, **changes) -> GraniteMoeForCausalLM:
    """One whose blocks matter, with the experts that a captured step needs."""
    data = random_config(2) | {"model_type": "granitemoe"} | changes
    config = GraniteMoeConfig.from_dict(data)
    config.experts_backend = "batched"
    model = GraniteMoeForCausalLM(config).eval()
    fill(model, 2)
    return model.to(device)


GREEDY = {"repetition_penalty": 1.7}  # else a random model soon repeats itself


@pytest.mark.parametrize("sampling", (GREEDY, SAMPLING), ids=("greedy", "sampled"))
@pytest.mark.parametrize("prompts", (PROMPTS, PROMPTS[:1]), ids=("padded", "one"))
def test_captured_steps_equal_plain_ones(device, prompts, sampling):
    model, options = make_model(device), {"seed": 5, **sampling}
    plain = list(generate.generate(model, prompts, 20, **options))
    assert len({row[0] for row in plain}) > 5, "a constant could pass"
    assert list(generate.generate(model, prompts, 20, compiled=True, **options)) == plain


def test_a_conversation_goes_on_after_a_captured_reply(device):
    model = make_model(device)
    caches = [KVCache(model.config, 1, 40, device=device) for _ in range(2)]
    for prompt in ([3, 9, 4], [7, 1]):
        plain, captured = (
            list(generate.generate(model, [prompt], 6, cache=cache, compiled=bool(graph)))
            for graph, cache in enumerate(caches)
        )
        assert plain == captured and caches[0].length == caches[1].length


def test_captured_step_stops_at_what_is_not_finite(device):
    """Inside the graph nothing can be raised; the step's ids carry the news."""
    model = make_model(device)
    steps = generate.generate(model, [[1, 2]], 9, compiled=True)
    next(steps), next(steps)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="logits: not finite at step 2"):
        list(steps)


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """A replay reads the memory of every tensor that the step was given: none may be freed."""
    given: list[weakref.ref] = []
    visible = granitemoe.visible

    def spy(slots, attention_mask):
        given.extend((weakref.ref(slots), weakref.ref(attention_mask)))
        return visible(slots, attention_mask)

    class Graph:  # unlike the recorder, it holds nothing
        def replay(self) -> None:
            """Nothing runs."""

    stand_in(monkeypatch, Graph, lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(granitemoe, "visible", spy)
    model = make_model("cpu")
    cache, pads = KVCache(model.config, 2, 8), torch.tensor([[0], [2]])
    with torch.inference_mode():
        step = capture(model, cache, pads, lambda logits, _: logits.argmax(-1))
    gc.collect()
    assert len(given) >= 2 and all(ref() is not None for ref in given)
    assert callable(step)


def test_one_compiled_layer_serves_all(monkeypatch):
    """In bfloat16, whole, one graph a shape: not one a layer, nor one a length of the cache."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = make_model("cpu", num_hidden_layers=9).bfloat16()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for rows in (1, 4):
        for _ in range(3):
            prompts = [[1, 2, 3]] * rows
            steps = list(generate.generate(model, prompts, 7, compiled=True, **GREEDY))
        assert steps == list(generate.generate(model, prompts, 7, **GREEDY))
    # For each number of rows at most two: the first length, then any length as a symbol.
    assert 1 <= len(graphs) <= 4


@pytest.mark.parametrize("rows, tokens", ((1, 1), (3, 1), (2, 11)))
def test_layer_compiles_whole(rows, tokens):
    """Decoding and prefill, gathered and grouped experts: no break, and the eager numbers."""
    model = make_model("cpu").bfloat16()
    layer, c = model.model.layers[0], model.config
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, tokens, c.hidden_size, generator=rng).bfloat16()
    rope = granitemoe.rope_tables(torch.arange(tokens)[None], c, x.dtype)
    torch.compiler.reset()
    run = torch.compile(DecoderLayer.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        (ours, _), (exact, _) = run(layer, x, rope, None, None), layer(x, rope, None, None)
    assert (ours - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("side", (None, "left"))
@torch.no_grad()
def test_cache_with_fixed_shapes(one, side):
    """FixedCache, in which a captured graph steps, writes and reads as the plain one."""
    config, inputs = one.ours.config, padding(side)
    ids, cache = random_ids(config), KVCache(config, B, 16)
    parts = [one.ours(ids[:, :6], cache=cache, **{k: x[:, :6] for k, x in inputs.items()}).logits]
    fixed = FixedCache(cache, slots := torch.tensor([6]))
    for t in range(6, T):
        slots.fill_(t)
        step = {"attention_mask": torch.ones(B, 16, dtype=torch.long)}
        if side:
            step = {k: x[:, t, None] for k, x in inputs.items()}
            step["attention_mask"] = F.pad(inputs["attention_mask"], (0, 16 - T), value=1)
        parts.append(one.ours(ids[:, t, None], cache=fixed, **step).logits)
    assert cache.length == 6, "a replay runs no Python: who replays counts"
    whole = one.ours(ids, **inputs).logits
    a, b = (x.flatten(0, 1)[real(inputs)] for x in (torch.cat(parts, 1), whole))
    assert relative(a, b) <= LOGITS


# ------------------------------------------------------------------------------------ on a card


def needs_grouped_kernel() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("below compute capability 9.0 PyTorch's grouped product waits for the device")


@cuda
@pytest.mark.parametrize("step", ("prefill", "padded prefill", "decode"))
def test_cuda_never_waits_for_the_device(one, step):
    """The batched path in bfloat16: sorting, grouping and gathering leave the host ahead."""
    needs_grouped_kernel()
    kinds = {"device": "cuda", "dtype": "bfloat16", "experts_backend": "batched"}
    model = generate.load_model(one.folder, **kinds)
    ids = random_ids(model.config)[:1, :1] if step == "decode" else random_ids(model.config)
    ids, inputs = ids.cuda(), padding("left" if step == "padded prefill" else None)
    inputs = {name: x.cuda() for name, x in inputs.items()}
    room = {"device": "cuda", "dtype": torch.bfloat16}
    warm, cache = (KVCache(model.config, len(ids), T, **room) for _ in range(2))
    with torch.no_grad():
        model(ids, cache=warm, **inputs)  # first-time set-up of libraries may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids, cache=cache, **inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda
def test_cuda_replays_every_routing():
    """A captured grouped product keeps no routing of its own: 50 of them, with empty experts and
    with all tokens on one, replay bit for bit what a direct call gives."""
    needs_grouped_kernel()
    E, K, N, D, width = 5, 2, 12, 16, 24
    shapes = ((N, D), (E, 2 * width, D), (E, D, width), (N, K))
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    routings = [torch.stack([torch.randperm(E)[:K] for _ in range(N)]) for _ in range(48)]
    routings += [torch.full((N, K), 3), torch.tensor([[4, 1]] * N)]
    ids, side, graph = routings[0].cuda(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        granitemoe.experts_grouped(*inputs, ids)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        replayed = granitemoe.experts_grouped(*inputs, ids)
    for routing in routings:
        ids.copy_(routing)
        graph.replay()
        assert torch.equal(replayed, granitemoe.experts_grouped(*inputs, ids))
