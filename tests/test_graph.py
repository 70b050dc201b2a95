"""The fast forms of the token step: captured as one CUDA graph, and compiled once for all layers.

Where there is no GPU a recorder stands in for the graph. It keeps every operator of the captured
step and on replay runs them again on the same tensors, into the same results, and no Python. So it
shows on any machine what capturing can get wrong: a length, a position or an id that is frozen at
its first value, and a host that looks at a value in the middle of a step.
"""

import contextlib
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate  # noqa: E402
import granitemoe  # noqa: E402
from engine import cpu  # noqa: E402
from engine import cuda as cuda_room  # noqa: E402
from granitemoe import DecoderLayer, GraniteMoeConfig, GraniteMoeForCausalLM, KVCache  # noqa: E402
from test_granitemoe import PROMPTS, SAMPLING, cuda, fill, random_config  # noqa: E402


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


@pytest.fixture(params=("recorded", pytest.param("cuda", marks=cuda)))
def device(request, monkeypatch) -> str:
    if request.param == "cuda":
        return "cuda"
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda recorder: recorder)
    monkeypatch.setattr(cpu, "token_step", cuda_room.capture)  # without a compiler
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
