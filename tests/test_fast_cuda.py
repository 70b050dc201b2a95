"""The fast forms on a GPU: attention, experts, and the token step, captured as one CUDA graph.

Where there is no GPU a recorder stands in for the graph. It keeps every operator of the captured
step and on replay runs them again on the same tensors, into the same results, and no Python. So it
shows on any machine what capturing can get wrong: a length, a position or an id that is frozen at
its first value, and a host that looks at a value in the middle of a step. Cards of other kinds are
stood in for by what they say of themselves; tests that only a card can run come last.
"""

import contextlib
import functools
import gc
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import granitemoe
from fast import cpu, cuda
from files import terminal
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache
from test_granitemoe import (
    GRADIENTS,
    LOGITS,
    PROMPTS,
    SAMPLING,
    T,
    fill,
    one,
    padding,
    pairs,
    random_config,
    random_ids,
    relative,
)  # fmt: skip
from test_granitemoe import cuda as on_a_card

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


def stand_in(monkeypatch, graph: type, recording: Callable) -> list[tuple]:
    """Let capturing run without a GPU: `graph` for CUDAGraph, `recording` for what fills it.
    Returns what is asked for, as it comes, by name, and with which device or stream."""
    asked: list[tuple] = []

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            asked.append(("new stream", device))

        def wait_stream(self, other) -> None:
            """Nothing runs elsewhere."""

    def note(name: str) -> Callable:
        return lambda x: asked.append((name, x)) or contextlib.nullcontext()

    def record(made, stream, **_):
        asked.append(("capture", stream))  # and not the graph, which would then live on
        return recording(made)

    default = Stream()
    asked.clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "stream", note("on stream"))
    monkeypatch.setattr(torch.cuda, "device", note("device"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(cuda, "IDLE", defaultdict(list))
    return asked


@pytest.fixture(params=("recorded", pytest.param("cuda", marks=on_a_card)))
def device(request, monkeypatch) -> str:
    if request.param == "recorded":
        stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    return "cpu" if request.param == "recorded" else "cuda"


@pytest.fixture(params=("captured", "compiled"))
def door(request, device, monkeypatch) -> str:
    """What compiled=True opens. A recorder is a dispatch mode, which no compiler takes: without a
    card the compiled step runs as it is written."""
    step = cuda.capture if request.param == "captured" else cuda.token_step
    monkeypatch.setattr(cpu, "token_step", step)
    monkeypatch.setattr(cuda, "token_step", step)
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return device


def make_model(device: str, **changes) -> GraniteMoeForCausalLM:
    """One whose blocks matter, with the forms that a GPU runs by default."""
    data = random_config(2) | {"model_type": "granitemoe"} | changes
    config = GraniteMoeConfig.from_dict(data)
    config.attention_backend, config.experts_backend = "fused", "batched"
    model = GraniteMoeForCausalLM(config).eval()
    fill(model, 2)
    return model.to(device)


# Of released shape: odd sizes never reach the kernels that real ones do.
RELEASED = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 301,
    "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
    "max_position_embeddings": 400,
}  # fmt: skip
GREEDY = {"repetition_penalty": 1.7}  # else a random model soon repeats itself


def ids_of(model, prompts, n, compiled=True, **options) -> list[list[int]]:
    return list(generate.generate(model, prompts, n, compiled=compiled, **options))


# ---------------------------------------------------------------------------- the captured step


@pytest.mark.parametrize("sampling", (GREEDY, SAMPLING), ids=("greedy", "sampled"))
@pytest.mark.parametrize("prompts", (PROMPTS, PROMPTS[:1], [[5]]), ids=("padded", "one", "short"))
def test_captured_steps_equal_plain_ones(door, prompts, sampling):
    model, options = make_model(door), {"seed": 5, **sampling}
    plain = ids_of(model, prompts, 20, False, **options)
    assert len({row[0] for row in plain}) > 5, "a constant could pass"
    assert ids_of(model, prompts, 20, **options) == plain


@pytest.mark.parametrize("prompts", (PROMPTS, [[*range(90)]]), ids=("padded", "long"))
def test_rows_of_released_shape_end_and_outgrow_their_graph(door, prompts):
    """Nine rows in all, more assignments than experts; each ends at its own time."""
    model, options = make_model(door, **RELEASED), {"seed": 5, **SAMPLING}
    prompts = (prompts * 9)[:9] if len(prompts) > 1 else prompts
    plain = ids_of(model, prompts, 150, False, **options)
    early, late = ({row[0] for row in part} for part in (plain[:70], plain[70:]))
    options["eos_token_ids"] = late - early
    plain = ids_of(model, prompts, 150, False, **options)
    assert len(plain) > 70 and (len(prompts) == 1 or None in plain[60])
    assert ids_of(model, prompts, 150, **options) == plain


def test_a_conversation_goes_on_after_a_captured_reply(door):
    model = make_model(door)
    caches = [KVCache(model.config, 1, 40, device=door) for _ in range(2)]
    for prompt in ([3, 9, 4], [7, 1], [2]):
        plain, captured = (
            ids_of(model, [prompt], 6, bool(graph), cache=cache)
            for graph, cache in enumerate(caches)
        )
        assert plain == captured and caches[0].length == caches[1].length
        held = [cache.ids[0, : cache.length].tolist() for cache in caches]
        assert held[0] == held[1]


def test_captured_step_stops_at_what_is_not_finite(door):
    """Inside the graph nothing can be raised; the step's ids carry the news."""
    model = make_model(door)
    steps = generate.generate(model, [[1, 2]], 9, compiled=True)
    next(steps), next(steps)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="logits: not finite at step 2"):
        list(steps)


def test_what_a_captured_step_looks_at(monkeypatch):
    """64 slots of the cache, then twice as many where they are full, and at last all; a graph is
    captured for each, none before the first token is out, and not beside the one before it. cuDNN
    is out. Slots never written may hold anything."""
    graphs, rooms, logits = weakref.WeakSet(), [], cuda.token_logits

    class Seen(Recorder):
        def __init__(self) -> None:
            super().__init__()
            graphs.add(self)

    def spy(*args):
        assert rooms[-1:] == [args[4]] or not graphs
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        rooms.append(args[4])
        return logits(*args)

    asked = stand_in(monkeypatch, Seen, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "token_step", cuda.capture)
    monkeypatch.setattr(cuda, "token_logits", spy)
    model = make_model("cpu", max_position_embeddings=400)
    caches = [KVCache(model.config, 1, 150) for _ in range(2)]
    for cache in caches:
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    steps = generate.generate(model, [PROMPTS[0]], 140, cache=caches[0], compiled=True, **GREEDY)
    first = next(steps)
    assert not rooms
    assert [first, *steps] == ids_of(model, [PROMPTS[0]], 140, False, cache=caches[1], **GREEDY)
    assert [room for room, _ in itertools.groupby(rooms)] == [64, 128, 150]
    assert [what for what, _ in asked].count("capture") == 3
    found = [cuda.bucket(n, 200) for n in (1, 64, 65, 128, 129, 256, 999)]
    assert found == [64, 64, 128, 128, 200, 200, 200]


def test_a_stream_for_each_living_graph_on_the_models_card(monkeypatch):
    """Its own, for warming up, capturing and replaying, and again for the next reply when it goes;
    on the card that the model is on, whichever is current."""
    asked = stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "token_step", cuda.capture)
    model, here = make_model("cpu"), torch.device("cpu")
    for _ in range(3):
        ids_of(model, [[1, 2, 3]], 5)
    assert asked.pop(0) == ("new stream", here)
    names = [what for what, _ in asked]
    assert names == (["device", "on stream", "capture"] + ["device", "on stream"] * 3) * 3
    assert {x for what, x in asked if what == "device"} == {here}
    assert len({id(x) for what, x in asked if what != "device"}) == 1
    asked.clear()
    two = [generate.generate(model, [[1, 2, 3]], 5, compiled=True) for _ in range(2)]
    for _ in zip(*two, strict=True):  # in turn
        pass
    used = [id(x) for what, x in asked if what == "on stream"]
    assert used[:2] * 4 == used and used[0] != used[1]
    assert [what for what, _ in asked].count("new stream") == 1
    assert len(cuda.IDLE[here]) == 2


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """A replay reads the memory of every tensor that the step was given: none may be freed."""
    given: list[weakref.ref] = []
    logits = cuda.token_logits

    def spy(model, run, cache, at, room, ids, pads):
        given.extend(map(weakref.ref, (cache.keys, cache.ids, at, ids, pads)))
        return logits(model, run, cache, at, room, ids, pads)

    class Graph:  # unlike the recorder, it holds nothing
        def replay(self) -> None:
            """Nothing runs."""

    stand_in(monkeypatch, Graph, lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "token_logits", spy)
    model = make_model("cpu")
    cache, pads = KVCache(model.config, 2, 8), torch.tensor([[0], [2]])
    seen = torch.ones(2, 3)
    given.append(weakref.ref(seen))
    with torch.inference_mode():
        step = cuda.capture(model, cache, pads, functools.partial(pick, seen=seen))
        step(torch.ones(2, 1, dtype=torch.long), torch.zeros(2, 1))
    del seen, pads, cache
    gc.collect()
    assert len(given) >= 11 and all(ref() is not None for ref in given)
    assert callable(step)


def pick(logits, _, seen):
    return logits.argmax(-1) * seen[:, 0].long()


def test_memory_stays_flat_over_replies(monkeypatch):
    """What a reply leaves behind: no graph, no cache, no tensor."""
    stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "token_step", cuda.capture)
    model, alive = make_model("cpu"), []
    cache = KVCache(model.config, 1, 64)
    gc.collect()
    gc.disable()  # at once, and not when the collector of cycles comes by
    try:
        for turn in range(8):
            ids_of(model, [[5, turn]], 5, cache=cache)
            alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    finally:
        gc.enable()
    assert len(set(alive[1:])) == 1, alive


# ----------------------------------------------------------------------------------- compiling


def compile_by(monkeypatch, backend) -> None:
    """A compiler other than the one that needs a card; graphs then hold nothing and run nothing."""

    class Graph:
        def replay(self) -> None:
            """Nothing runs."""

    stand_in(monkeypatch, Graph, lambda graph: contextlib.nullcontext())
    torch.compiler.reset()
    monkeypatch.setattr(cuda, "OPTIONS", None)
    monkeypatch.setattr(cpu, "token_step", cuda.token_step)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def test_one_compiled_layer_serves_all(monkeypatch):
    """One graph for one row and one for many: not one a layer, a length, a capacity or a prompt."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_by(monkeypatch, backend)
    model = make_model("cpu", num_hidden_layers=9, max_position_embeddings=400).bfloat16()
    for count, rows in enumerate((1, 4), 1):
        for prompt, new in (([1, 2, 3], 7), ([1], 7), ([5] * 70, 9), ([5] * 100, 40), ([5], 300)):
            ids_of(model, [prompt] * rows, new)
            assert len(graphs) == count, (rows, len(prompt), new)


@pytest.mark.parametrize("rows, known", ((1, (0, 0, 0, 1)), (3, (80, 80, 80, 1))))
def test_strides_of_a_steps_mask(rows, known):
    """Of one row, aligned whatever the length: of a symbol Inductor cannot know it, and would copy
    the mask in each layer. Of more, whole 16 numbers."""
    model, seen = make_model("cpu"), []
    cache = KVCache(model.config, rows, 70)
    at, ids = torch.zeros(1, dtype=torch.long), torch.zeros(rows, 1, dtype=torch.long)
    for filled in (cache.keys, cache.values):
        filled.zero_()

    def run(layer, x, rope, mask, past):
        seen.append(mask.stride())
        return cuda.token_layer(layer, x, rope, mask, past, "pieces")

    with torch.inference_mode():
        logits = cuda.token_logits(model, run, cache, at, 64, ids, ids)
        assert relative(logits, model(ids).logits[:, 0]) <= LOGITS
    assert seen == [known] * model.config.num_hidden_layers


@pytest.mark.parametrize("rows", (1, 9))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("fast", (False, True), ids=("any card", "Hopper"))
def test_the_layer_compiles_whole(rows, dtype, fast, monkeypatch):
    """In any dtype, for few assignments and for more than there are experts: no break, and the
    numbers of the eager layer."""
    found, grouped = [], fast and dtype == torch.bfloat16
    monkeypatch.setattr(cuda, "grouped_kernel", lambda *_: grouped)
    compile_by(monkeypatch, "aot_eager")
    model = make_model("cpu").to(dtype)
    assert cuda.step_form(model, rows) == ("grouped" if grouped and rows > 1 else "summed")
    cache = KVCache(model.config, rows, 64, dtype=dtype)
    ids = torch.randint(90, (rows, 6), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = model(ids).logits[:, -1].float()
        model(ids[:, :5], cache=cache)
        note = lambda logits, _: found.append(logits) or logits.argmax(-1)  # noqa: E731
        step = cuda.token_step(model, cache, torch.zeros(rows, 1, dtype=torch.long), note)
        step(ids[:, 5:], torch.zeros(rows, 1))
        assert cache.length == 6
    assert relative(found[-1], exact) <= (LOGITS if dtype == torch.float32 else 5e-2)


def test_a_compiler_or_a_card_that_fails(monkeypatch):
    def fail(*_) -> None:
        raise RuntimeError("no compiler\nis there")

    compile_by(monkeypatch, "eager")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(ValueError, match="compiling or capturing failed: no compiler$"):
        ids_of(make_model("cpu"), [[5]], 3)
    monkeypatch.setattr(cuda, "token_logits", lambda *_: 1 / 0)
    monkeypatch.setattr(cpu, "token_step", cuda.capture)
    with pytest.raises(ValueError, match="compiling or capturing failed: division by zero$"):
        ids_of(make_model("cpu"), [[5]], 3)


def test_where_no_step_is_compiled():
    """On Apple's MPS there are neither graphs nor the CPU's C."""
    model = make_model("meta")
    cache = KVCache(model.config, 1, 4, device="meta")
    with pytest.raises(ValueError, match="^compiled steps: need CUDA, or a CPU and .* got meta"):
        cpu.token_step(model, cache, torch.zeros(1, 1, device="meta"), None)


def test_flash_has_no_captured_step():
    model = make_model("cpu")
    model.config.attention_backend = "flash"
    with pytest.raises(ValueError, match="attention_backend: .*'flash' .* use 'sdpa'"):
        cuda.token_step(model, None, torch.zeros(1, 1), None)


# ----------------------------------------------------------------------------------- the forms

CARDS = {  # what a card says of itself, and whether PyTorch's grouped product is a kernel there
    "A100": ((8, 0), False), "4090": ((8, 9), False), "H100": ((9, 0), True),
    "B200": ((10, 0), True), "B300": ((10, 3), True), "5090": ((12, 0), False),
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16), ids=str)
def test_the_form_of_a_captured_step(card, dtype, monkeypatch):
    """More assignments than experts: grouped where that never synchronises, else in pieces."""
    capability, fast = CARDS[card]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = SimpleNamespace(device=torch.device("cuda:1"), dtype=dtype)
    c = SimpleNamespace(num_experts_per_tok=8, num_local_experts=32)
    model = SimpleNamespace(config=c, model=SimpleNamespace(norm=SimpleNamespace(weight=weight)))
    grouped = fast and dtype == torch.bfloat16
    assert cuda.grouped_kernel(weight.device, dtype) == grouped
    for rows in (1, 4):
        assert [cuda.step_form(model, rows, x) for x in (True, False)] == ["summed", "pieces"]
    wide = ["grouped", "grouped"] if grouped else ["summed", "pieces"]
    assert [cuda.step_form(model, 5, x) for x in (True, False)] == wide


def test_what_batched_means_on_each_device():
    """A grouped product that is missing is not named; PyTorch 2.11 has none on MPS."""
    names = ("cpu", "cuda", "mps")
    few, many = (
        [granitemoe.choose_experts("batched", torch.device(name), M, 32) for name in names]
        for M in (32, 33)
    )
    assert few == ["gathered"] * 3 and many == ["grouped", "grouped", "loop"]


@pytest.mark.parametrize("name", ("pieces", "summed"))
@pytest.mark.parametrize("rows", (1, 2, 3, 11))
def test_expert_forms_of_a_captured_step(name, rows, monkeypatch):
    """The loop's numbers and gradients; of `pieces`, no more experts gathered than there are."""
    E, K, D, width, rng = 5, 2, 12, 7, torch.Generator().manual_seed(rows)
    shapes = ((rows, D), (E, 2 * width, D), (E, D, width), (rows, K))
    leaves = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    ids = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(rows)])
    sizes, gathered = [], granitemoe.experts_gathered
    spy = lambda *args: sizes.append(args[4].numel()) or gathered(*args)  # noqa: E731
    monkeypatch.setattr(cuda, "experts_gathered", spy)
    found, exact = granitemoe.EXPERTS[name](*leaves, ids), granitemoe.experts_loop(*leaves, ids)
    assert relative(found, exact) <= LOGITS and found.shape == exact.shape
    both = [torch.autograd.grad(y.sum(), leaves) for y in (found, exact)]
    assert max(map(relative, *both)) <= GRADIENTS
    assert name == "summed" or (max(sizes) <= E and sum(sizes) == rows * K)


ATTENDED = ((1, 5, False), (1, 5, True), (7, 7, False), (7, 7, True), (3, 9, False), (3, 9, True))


@pytest.mark.parametrize("queries, keys, masked", ATTENDED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_attention_is_asked_for_as_kernels_take_it(queries, keys, masked, dtype, monkeypatch):
    """The definition's numbers and gradients. The kernel that takes masks and float32 takes no
    grouped heads, and masks only of the scores' dtype with rows at whole 16 bytes; flash takes no
    mask. cuDNN, which plans anew for each length, is out but for a whole prompt."""
    G, shared, rng = 3, 2, torch.Generator().manual_seed(0)
    shapes = ((2, shared * G, queries, 8), (2, G, keys, 8), (2, G, keys, 8))
    leaves = [torch.randn(x, generator=rng).to(dtype).requires_grad_() for x in shapes]
    seen = torch.tensor([[1] * keys, [0] * 2 + [1] * (keys - 2)])
    mask = granitemoe.visible(torch.arange(keys - queries, keys), seen) if masked else None
    exact = granitemoe.attend_eager(*leaves, mask, 0.3, 0.0)
    exact = [exact, *torch.autograd.grad(exact.float().square().sum(), leaves)]
    calls, sdpa = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, drop=0.0, **options):
        calls.append((q, k, attn_mask, options, torch.backends.cuda.cudnn_sdp_enabled()))
        monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)  # which the bias asks for
        return sdpa(q, k, v, attn_mask, drop, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.backends.cuda.enable_cudnn_sdp(True)  # as it is by default
    found = granitemoe.ATTENTION["fused"](*leaves, mask, 0.3, 0.0)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    found = [found, *torch.autograd.grad(found.float().square().sum(), leaves)]
    assert max(map(relative, found, exact)) <= (GRADIENTS if dtype == torch.float32 else 3e-2)
    ((q, k, bias, options, cudnn),) = calls
    whole = queries == keys and not masked
    if not (whole and dtype == torch.bfloat16):  # else flash, by itself
        assert q.shape[1] == k.shape[1] and not options.get("enable_gqa") and not cudnn
    if masked:
        steps = [n * bias.element_size() for n in bias.stride()[:-1]]
        assert bias.dtype == dtype and not any(step % 16 for step in steps)
    elif queries not in (1, keys):
        assert type(bias).__name__ == "CausalBias", "a matrix of queries and keys was made"


class Counter(TorchDispatchMode):
    """The shapes of what each operator was given first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and torch.is_tensor(args[0]):
            self.seen.append((func.overloadpacket.__name__, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


def test_a_mask_is_converted_once_for_all_layers(device):
    model = make_model(device, num_hidden_layers=5)
    ids = random_ids(model.config).to(device)
    inputs = {name: x.to(device) for name, x in padding("left").items()}
    with torch.no_grad(), Counter() as counter:
        model(ids, **inputs)
    filled = [shape for name, shape in counter.seen if name == "masked_fill_"]
    assert filled == [(len(ids), 1, T, T)]


@pytest.mark.parametrize("step", (1e-6, 0.125))
def test_top_p_sorts_what_top_k_left(step):
    """The same ids as of the whole vocabulary, with several as likely as the K-th, too."""
    V = 999
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    logits = (logits / step).round() * step
    with Counter() as counter:
        probs = generate.sampling_probs(logits, top_k=20, top_p=0.9)
    assert not [name for name, shape in counter.seen if name == "sort" and V in shape]
    top = logits.topk(20, dim=-1).values[:, -1:]
    alone = generate.sampling_probs(logits.masked_fill(logits < top, -torch.inf), top_p=0.9)
    assert torch.equal(probs > 0, alone > 0) and torch.allclose(probs, alone)
    assert (probs > 0).sum() > 1 and ((logits == top).sum(dim=-1) > 1).any() == (step > 0.1)


def test_what_is_out_of_memory_and_what_is_not():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ):  # fmt: skip
        assert terminal.out_of_memory(error), error
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not terminal.out_of_memory(fault)


# ------------------------------------------------------------------------------------ on a card


@pytest.fixture
def released() -> GraniteMoeForCausalLM:
    return make_model("cuda", **RELEASED).bfloat16()


@on_a_card
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "captured"))
def test_cuda_needs_no_kernel_that_holds_all_scores(released, dtype, compiled, monkeypatch):
    """A prompt, its further pieces, padding and steps, none of which SDPA's last resort runs; nine
    rows are more assignments than experts, in each dtype."""
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 36)
    monkeypatch.setattr(cuda, "token_step", cuda.capture)  # compiling is not what this is about
    model, before = released.to(dtype), torch.backends.cuda.math_sdp_enabled()
    torch.backends.cuda.enable_math_sdp(False)
    try:
        for prompts in ([[5] * 90], (PROMPTS * 9)[:9]):
            assert len(ids_of(model, prompts, 5, compiled)) == 5
    finally:
        torch.backends.cuda.enable_math_sdp(before)


@on_a_card
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rows", (1, 9))
def test_cuda_compiles(released, rows, dtype):
    """Compiled for real: nearly the logits of the plain step, fed the same ids."""
    model, found = released.to(dtype), []
    ids = torch.randint(90, (rows, 80), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        exact = model(ids).logits.float()
        cache = KVCache(model.config, rows, 128, device="cuda", dtype=dtype)
        model(ids[:, :60], cache=cache)
        pads, unused = torch.zeros_like(ids[:, :1]), torch.zeros(rows, 1, device="cuda")
        step = cuda.token_step(model, cache, pads, lambda logits, _: logits)
        for t in range(60, 80):  # over the bound of a bucket
            found.append(step(ids[:, t, None], unused).clone())
    assert relative(torch.stack(found, dim=1), exact[:, 60:]) <= 5e-2


@on_a_card
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "captured"))
def test_cuda_memory_stays_flat_over_replies(released, compiled, monkeypatch):
    monkeypatch.setattr(cuda, "token_step", cuda.capture)
    kinds = {"device": "cuda", "dtype": torch.bfloat16}
    cache, held = KVCache(released.config, 1, 256, **kinds), []
    for turn in range(8):
        ids_of(released, [[5, turn]], 9, compiled, cache=cache)
        torch.cuda.synchronize()
        gc.collect()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held[2:])) == 1, held


@on_a_card
def test_cuda_two_replies_at_once(released, monkeypatch):
    """The first ends while the other's graph goes on: what it frees is not the other's."""
    monkeypatch.setattr(cuda, "token_step", cuda.capture)
    a, b = [[1, 2, 3]], [[4, 5, 6, 7]]
    alone = [ids_of(released, a, 8), ids_of(released, b, 60)]
    first, second = (generate.generate(released, x, n, compiled=True) for x, n in ((a, 8), (b, 60)))
    rows = [next(second), next(second)]
    assert list(first) == alone[0]
    del first
    junk = [torch.full((2**22,), 1e9, device="cuda") for _ in range(8)]
    assert [*rows, *second] == alone[1] and junk


@on_a_card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_cuda_on_the_second_card(released, monkeypatch):
    monkeypatch.setattr(cuda, "token_step", cuda.capture)
    there = released.to("cuda:1")
    assert ids_of(there, [[1, 2]], 9) == ids_of(there, [[1, 2]], 9, False)
    assert torch.cuda.current_device() == 0


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_card
@pytest.mark.parametrize("name", ("plain", "captured"))
@pytest.mark.parametrize("rows", (1, 9))
def test_cuda_steps_never_wait_for_the_device(released, name, rows):
    if not cuda.grouped_kernel(torch.device("cuda"), torch.bfloat16) and name == "plain":
        pytest.skip("the grouped product of this card waits")
    pads = torch.zeros(rows, 1, dtype=torch.long, device="cuda")
    cache = KVCache(released.config, rows, 64, device="cuda", dtype=torch.bfloat16)
    make = generate.plain_step if name == "plain" else cuda.capture
    step = make(released, cache, pads, lambda logits, _: logits.argmax(-1))
    unused = torch.zeros(rows, 1, device="cuda")
    with torch.inference_mode():
        new = step(pads, unused)
        with no_waiting():
            step(new[:, None], unused)


def needs_grouped_kernel() -> None:
    if not cuda.grouped_kernel(torch.device("cuda"), torch.bfloat16):
        pytest.skip("PyTorch's grouped product waits for this card")


@on_a_card
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
        with no_waiting():
            model(ids, cache=cache, **inputs)


@on_a_card
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
