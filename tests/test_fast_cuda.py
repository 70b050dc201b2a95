"""What a GPU runs: the plain model's calls there, and the token step, captured as one CUDA graph.

Where there is no GPU a recorder stands in for the graph. It keeps every operator of the captured
step and on replay runs them again on the same tensors, into the same results, and no Python. So it
shows on any machine what capturing can get wrong: a length, a position or an id that is frozen at
its first value, and a host that looks at a value in the middle of a step. Cards of other kinds are
stood in for by what they say of themselves, and for the plain model a mode in which tensors of the
CPU say that they are on CUDA; tests that only a card can run come last.
"""

import contextlib
import gc
import itertools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fast
import generate
import granitemoe
from fast import cpu, cuda
from files import terminal
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache
from test_granitemoe import (
    CARD,
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


@pytest.fixture(params=("recorded", pytest.param("cuda", marks=CARD)))
def device(request, monkeypatch) -> str:
    if request.param == "recorded":
        stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    return "cpu" if request.param == "recorded" else "cuda"


@pytest.fixture
def door(device, monkeypatch) -> str:
    """compiled=True opens that to CUDA on each device."""
    monkeypatch.setattr(cpu, "step", cuda.step)
    return device


def make_model(device: str, **changes) -> GraniteMoeForCausalLM:
    """One whose blocks matter, with the forms that a GPU runs by default."""
    data = random_config(2) | {"model_type": "granitemoe"} | changes
    config = GraniteMoeConfig.from_dict(data)
    config.attention_backend, config.experts_backend = "sdpa", "batched"
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
    """Inside the graph nothing can be raised; the step's logits carry the news."""
    model = make_model(door)
    steps = generate.generate(model, [[1, 2]], 9, compiled=True)
    next(steps), next(steps)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="logits: not finite at step 2"):
        list(steps)


def test_what_a_captured_step_looks_at(monkeypatch):
    """64 slots of the cache, then twice as many where they are full, and at last all; a graph is
    captured for each, none before the first token is out, and not beside the one before it.
    Nothing asks SDPA. Slots never written may hold anything."""
    graphs, rooms, logits = weakref.WeakSet(), [], cuda.token_logits

    class Seen(Recorder):
        def __init__(self) -> None:
            super().__init__()
            graphs.add(self)

    def spy(*args):
        assert rooms[-1:] == [args[3]] or not graphs
        rooms.append(args[3])
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", None)
            return logits(*args)

    asked = stand_in(monkeypatch, Seen, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "step", cuda.step)
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
    next(generate.generate(model, [[5]], 9, compiled=True))  # a prompt of one token is a prompt
    assert [what for what, _ in asked].count("capture") == 3
    found = [cuda.bucket(n, 200) for n in (1, 64, 65, 128, 129, 256, 999)]
    assert found == [64, 64, 128, 128, 200, 200, 200]


def test_a_stream_for_each_living_graph_on_the_models_card(monkeypatch):
    """Its own, for warming up, capturing and replaying, and again for the next reply when it goes;
    on the card that the model is on, whichever is current."""
    asked = stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "step", cuda.step)
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

    def spy(model, cache, at, room, ids, pads):
        given.extend(map(weakref.ref, (cache.keys, cache.ids, at, ids, pads)))
        return logits(model, cache, at, room, ids, pads)

    class Graph:  # unlike the recorder, it holds nothing
        def replay(self) -> None:
            """Nothing runs."""

    stand_in(monkeypatch, Graph, lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "token_logits", spy)
    model = make_model("cpu")
    cache, pads = KVCache(model.config, 2, 8), torch.tensor([[0], [2]])
    with torch.inference_mode():
        step = cuda.step(model, cache, pads)
        step(torch.ones(2, 3, dtype=torch.long)), step(torch.ones(2, 1, dtype=torch.long))
    del pads, cache
    gc.collect()
    assert len(given) >= 10 and all(ref() is not None for ref in given)
    assert callable(step)


def test_memory_stays_flat_over_replies(monkeypatch):
    """What a reply leaves behind: no graph, no cache, no tensor."""
    stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    monkeypatch.setattr(cpu, "step", cuda.step)
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


@pytest.mark.parametrize("pieces", ([9, 1, 1, 1, 1], [1] * 13, [3, 1, 6, 1, 1, 1]), ids=str)
def test_pieces_of_padded_prompts(device, pieces):
    """One token a row is a captured step only where all rows have begun, and none on an empty
    cache: rows of padding see nothing, which a mask cannot say without NaN."""
    model, pads = make_model(device), torch.tensor([[0], [7], [4], [2]], device=device)
    ids, found = random_ids(model.config, 4).repeat(1, 2)[:, :13].to(device), []
    with torch.inference_mode():
        for make in (cuda.step, generate.plain_step):
            cache = KVCache(model.config, 4, 13, device=device)
            step, logits = make(model, cache, pads), []
            for piece in ids.split(pieces, dim=1):
                logits.append(step(piece).clone())
            assert torch.equal(cache.ids, ids) and cache.length == 13
            found += [torch.stack(logits), cache.keys, cache.values]
    begun = (torch.tensor(pieces).cumsum(0)[:, None] > pads.cpu().T)[..., None].to(device)
    assert relative(found[0] * begun, found[3] * begun) <= LOGITS
    tokens = (torch.arange(13, device=device) >= pads)[:, None, :, None]
    for ours, exact in ((found[1], found[4]), (found[2], found[5])):
        assert relative(ours * tokens, exact * tokens) <= LOGITS
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("rows", (1, 9))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("fast_card", (False, True), ids=("any card", "Hopper"))
def test_a_captured_step_in_any_dtype(rows, dtype, fast_card, monkeypatch):
    """For few assignments and for more than there are experts: the numbers of the plain model."""
    grouped = fast_card and dtype == torch.bfloat16
    monkeypatch.setattr(cuda, "grouped_kernel", lambda *_: grouped)
    stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    model = make_model("cpu").to(dtype)
    form = cuda.experts_grouped if grouped and rows > 1 else cuda.experts_pieces
    assert cuda.pick_experts(model, rows) is form
    cache = KVCache(model.config, rows, 64, dtype=dtype)
    ids = torch.randint(90, (rows, 6), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = model(ids).logits[:, -1].float()
        model(ids[:, :5], cache=cache)
        found = cuda.step(model, cache, torch.zeros(rows, 1, dtype=torch.long))(ids[:, 5:])
    assert cache.length == 6 and found.dtype == torch.float32
    assert relative(found, exact) <= (LOGITS if dtype == torch.float32 else 5e-2)


def test_a_card_that_fails(door, monkeypatch):
    def fail(*_) -> None:
        raise RuntimeError("no kernel\nis there")

    for function, words in ((fail, "no kernel"), (lambda *_: 1 / 0, "division by zero")):
        monkeypatch.setattr(cuda, "token_logits", function)
        with pytest.raises(ValueError, match=f"compiling or capturing failed: {words}$"):
            ids_of(make_model(door), [[5]], 3)


def test_where_no_step_is_compiled():
    """On Apple's MPS there are neither graphs nor the CPU's C."""
    model = make_model("meta")
    cache = KVCache(model.config, 1, 4, device="meta")
    with pytest.raises(ValueError, match="^compiled steps: need CUDA, or a CPU and .* got meta"):
        fast.step(model, cache, torch.zeros(1, 1, device="meta"))


@pytest.mark.parametrize("attention, experts", (
    ("flash", "batched"), ("eager", "auto"), ("sdpa", "grouped"), ("sdpa", "gathered"),
    ("sdpa", "loop"),
))  # fmt: skip
def test_forms_that_have_no_captured_step(attention, experts):
    """Of another name than "auto" may mean: the captured steps would not be them."""
    model = make_model("cpu")
    model.config.attention_backend, model.config.experts_backend = attention, experts
    words = f"^compiled steps: have forms of their own; '{attention}' and '{experts}' were"
    with OnCuda(), pytest.raises(ValueError, match=words):
        fast.step(model, KVCache(model.config, 1, 4), torch.zeros(1, 1, dtype=torch.long))


def test_what_has_no_captured_step():
    """A replay calls no hooks, and a graph writes into the cache as it is."""
    model, pads = make_model("cpu"), torch.zeros(1, 1, dtype=torch.long)
    cache = KVCache(model.config, 1, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="^cache: .* must be .*float32, .*, is .*bfloat16"):
        cuda.step(model, cache, pads)
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="^compiled steps: call no hooks; .*q_proj'"):
        cuda.step(model, KVCache(model.config, 1, 4), pads)


def test_a_full_cache_is_said(door):
    model = make_model(door)
    cache, pads = KVCache(model.config, 1, 4, device=door), torch.zeros(1, 1, dtype=torch.long)
    step, ids = cuda.step(model, cache, pads.to(door)), torch.ones(1, 3, dtype=torch.long)
    ids = ids.to(door)
    with torch.inference_mode():
        step(ids), step(ids[:, :1])
        for more in (ids, ids[:, :1]):
            with pytest.raises(ValueError, match=r"^cache: \d tokens do not fit in 4$"):
                step(more)
    assert cache.length == 4


# ----------------------------------------------------------------------- what the plain model asks


class OnCuda(TorchFunctionMode):
    """In here tensors say that they are on CUDA, and are made on the CPU all the same. Keeps what
    SDPA is asked for, and the names of calls by which a host waits for a card."""

    WAITING = {
        "tolist", "item", "numpy", "cpu", "nonzero", "unique", "masked_select", "__bool__",
        "__int__", "__float__", "__index__", "__contains__",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple] = []
        self.waited: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda")
        args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        if func is F.scaled_dot_product_attention:
            self.asked.append((args, kwargs))
        if func.__name__ in ("__getitem__", "__setitem__"):  # bool: it counts what is True
            places = args[1] if isinstance(args[1], tuple) else args[1:2]
            if any(torch.is_tensor(x) and x.dtype == torch.bool for x in places):
                self.waited.append(func.__name__)
        if func.__name__ in self.WAITING or (func is torch.where and len(args) == 1):
            self.waited.append(func.__name__)
        return func(*args, **kwargs)


CARDS = {  # what a card says of itself, and whether PyTorch's grouped product is a kernel there
    "A100": ((8, 0), False), "4090": ((8, 9), False), "H100": ((9, 0), True),
    "B200": ((10, 0), True), "B300": ((10, 3), True), "5090": ((12, 0), False),
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16), ids=str)
def test_the_form_of_a_captured_step(card, dtype, monkeypatch):
    """More assignments than experts: grouped where that never waits for the host, else pieces."""
    capability, fast = CARDS[card]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = SimpleNamespace(device=torch.device("cuda:1"), dtype=dtype)
    c = SimpleNamespace(num_experts_per_tok=8, num_local_experts=32)
    model = SimpleNamespace(config=c, model=SimpleNamespace(norm=SimpleNamespace(weight=weight)))
    grouped = fast and dtype == torch.bfloat16
    assert cuda.grouped_kernel(weight.device, dtype) == grouped
    for rows in (1, 4):
        assert cuda.pick_experts(model, rows) is cuda.experts_pieces
    wide = cuda.experts_grouped if grouped else cuda.experts_pieces
    assert cuda.pick_experts(model, 5) is wide


def test_what_batched_means_on_each_device():
    """Of "auto", the loop but on CUDA. MPS has no grouped product: one a run there."""
    names = ("cpu", "cuda", "mps")
    few, many, auto = (
        [granitemoe.choose_experts(backend, torch.device(name), M, 32) for name in names]
        for backend, M in (("batched", 32), ("batched", 33), ("auto", 33))
    )
    assert few == ["gathered"] * 3 and many == ["grouped"] * 3
    assert auto == ["loop", "grouped", "loop"]
    weights = torch.zeros(2, 16, 16)
    for name, takes in zip(names, (True, True, False), strict=True):
        rows = SimpleNamespace(
            device=torch.device(name), dtype=torch.float32, element_size=lambda: 4
        )
        assert granitemoe.takes_grouped_mm(rows, weights) == takes


@pytest.mark.parametrize("rows", (1, 2, 3, 11))
def test_expert_forms_of_a_captured_step(rows, monkeypatch):
    """The loop's numbers and gradients; no more experts gathered than there are."""
    E, K, D, width, rng = 5, 2, 12, 7, torch.Generator().manual_seed(rows)
    shapes = ((rows, D), (E, 2 * width, D), (E, D, width), (rows, K))
    leaves = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    ids = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(rows)])
    sizes, gathered = [], granitemoe.experts_gathered
    spy = lambda *args: sizes.append(args[4].numel()) or gathered(*args)  # noqa: E731
    monkeypatch.setattr(cuda, "experts_gathered", spy)
    found, exact = cuda.experts_pieces(*leaves, ids), granitemoe.experts_loop(*leaves, ids)
    assert relative(found, exact) <= LOGITS and found.shape == exact.shape
    both = [torch.autograd.grad(y.sum(), leaves) for y in (found, exact)]
    assert max(map(relative, *both)) <= GRADIENTS
    assert max(sizes) <= E and sum(sizes) == rows * K


ATTENDED = ((1, 5, False), (1, 5, True), (7, 7, False), (7, 7, True), (3, 9, False), (3, 9, True))


@pytest.mark.parametrize("queries, keys, masked", ATTENDED)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16), ids=str)
def test_attention_is_asked_for_as_kernels_take_it(queries, keys, masked, dtype):
    """The definition's numbers and gradients. The kernel that takes masks and float32 takes no
    grouped heads; flash takes them, and no mask. One query asks for no kernel: cuDNN's plans anew
    for each length."""
    G, shared, rng = 3, 2, torch.Generator().manual_seed(0)
    shapes = ((2, shared * G, queries, 8), (2, G, keys, 8), (2, G, keys, 8))
    leaves = [torch.randn(x, generator=rng).to(dtype).requires_grad_() for x in shapes]
    seen = torch.tensor([[1] * keys, [0] * 2 + [1] * (keys - 2)])
    mask = granitemoe.visible(torch.arange(keys - queries, keys), seen) if masked else None
    exact = granitemoe.attend_eager(*leaves, mask, 0.3, 0.0)
    exact = [exact, *torch.autograd.grad(exact.float().square().sum(), leaves)]
    with OnCuda() as mode:
        found = granitemoe.attend_sdpa(*leaves, mask, 0.3, 0.0)
    found = [found, *torch.autograd.grad(found.float().square().sum(), leaves)]
    assert max(map(relative, found, exact)) <= (GRADIENTS if dtype == torch.float32 else 3e-2)
    if queries == 1:
        assert not mode.asked
        return
    (((q, k, v, given, drop, causal), options),) = mode.asked
    assert options["scale"] == 0.3 and not drop
    whole = queries == keys and not masked
    assert causal == whole and (given is None) == whole
    grouped = whole and dtype != torch.float32  # flash, by itself
    assert options["enable_gqa"] == grouped
    assert q.shape[1] == shared * G and k.shape[1] == v.shape[1] == (G if grouped else shared * G)


@pytest.mark.parametrize("queries", (7, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_grouped_heads_stay_on_a_cpu(queries, dtype, monkeypatch):
    """Where PyTorch's kernel takes them with a mask, too: nothing is repeated."""
    q, k = torch.randn(1, 6, queries, 8, dtype=dtype), torch.randn(1, 3, 7, 8, dtype=dtype)
    asked, sdpa = [], F.scaled_dot_product_attention
    note = lambda *args, **options: asked.append((args, options)) or sdpa(*args, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    granitemoe.attend_sdpa(q, k, k, torch.ones(queries, 7, dtype=torch.bool), 1.0, 0.0)
    ((args, options),) = asked
    assert args[1] is k and options["enable_gqa"]


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    "rows, G, shared, C, S", ((1, 1, 1, 2, 1), (2, 3, 2, 8, 5), (3, 2, 7, 10, 90))
)
def test_one_query_equals_the_definition(rows, G, shared, C, S, masked):
    """At grouped heads, with the gradients."""
    rng = torch.Generator().manual_seed(S)
    shapes = ((rows, G * shared, 1, C), (rows, G, S, C), (rows, G, S, C))
    q, k, v = leaves = [torch.randn(x, generator=rng).requires_grad_() for x in shapes]
    mask = None
    if masked:
        seen = torch.arange(S) >= torch.arange(rows)[:, None] * (S // 4)
        mask = granitemoe.visible(torch.tensor([S - 1]), seen)
    exact = granitemoe.attend_eager(q, k, v, mask, 0.3, 0.0)
    found = granitemoe.attend_one(q.view(rows, G, shared, C), k, v, mask, 0.3, 0.0).view_as(q)
    both = [(y, *torch.autograd.grad(y.square().sum(), leaves)) for y in (found, exact)]
    for ours, theirs in zip(*both, strict=True):
        assert relative(ours, theirs) <= 1e-6 or not theirs.any()


def test_one_query_drops_as_much_as_asked():
    rows, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 400, 2)
    torch.manual_seed(0)
    y = granitemoe.attend_one(rows, k, torch.ones_like(k), None, 1.0, 0.5)
    assert y.std() > 0.01 and 0.8 < y.mean() < 1.2


@pytest.mark.parametrize("prompts, padded", (([[*range(9)]], False), (PROMPTS, True)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_plain_default_on_cuda(prompts, padded, dtype, monkeypatch):
    """Prompts, in pieces, ask SDPA once a layer, and as it wants to be asked; steps never. The
    numbers are those of the CPU."""
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 6 * len(prompts))
    model = make_model("cpu").to(dtype)
    plain = ids_of(model, prompts, 6, False)
    with OnCuda() as mode:
        assert model.model.norm.weight.device.type == "cuda"
        found = ids_of(model, prompts, 6, False)
    assert found == plain or dtype == torch.bfloat16  # near-ties may fall either way
    assert len(mode.asked) == 2 * model.config.num_hidden_layers
    for (q, k, _, mask, *_), options in mode.asked:
        repeated = mask is not None or dtype == torch.float32
        assert options["enable_gqa"] != repeated and (k.shape[1] == q.shape[1]) == repeated
        assert q.shape[2] > 1 and (not padded or mask is not None)


@pytest.mark.parametrize("sampling", (GREEDY, SAMPLING), ids=("greedy", "sampled"))
@pytest.mark.parametrize("rows", (1, 9))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "captured"))
def test_a_step_reads_from_the_card_once(compiled, rows, padded, sampling, monkeypatch):
    """The ids, and whether their logits were finite. Where the grouped product is a kernel, that
    is: with "auto", which is "batched" there."""
    stand_in(monkeypatch, Recorder, lambda recorder: recorder)
    monkeypatch.setattr(cuda, "grouped_kernel", lambda *_: True)
    model = make_model("cpu").bfloat16()
    model.config.experts_backend = "auto"
    prompts = [[5] * (1 + row * padded) + [6, 7 + row] for row in range(rows)]
    with OnCuda() as mode:
        options = {"seed": 0, "eos_token_ids": (), "compiled": compiled, **sampling}
        steps = generate.generate(model, prompts, 9, **options)
        for _ in range(4):
            next(steps)
            mode.waited.clear()
            next(steps)
            assert mode.waited == ["tolist"]


@pytest.mark.parametrize("step", (1e-6, 0.125))
def test_top_p_takes_what_top_k_left(step):
    """With several as likely as the K-th, too."""
    V = 999
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    logits = (logits / step).round() * step
    probs = generate.sampling_probs(logits, top_k=20, top_p=0.9)
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
def test_cuda_captures(released, rows, dtype):
    """Captured for real: nearly the logits of the plain model, fed the same ids."""
    model, found = released.to(dtype), []
    ids = torch.randint(90, (rows, 80), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        exact = model(ids).logits.float()
        cache = KVCache(model.config, rows, 128, device="cuda", dtype=dtype)
        step = cuda.step(model, cache, torch.zeros_like(ids[:, :1]))
        step(ids[:, :60])
        for t in range(60, 80):  # over the bound of a bucket
            found.append(step(ids[:, t, None]).clone())
    assert relative(torch.stack(found, dim=1), exact[:, 60:]) <= 5e-2


@on_a_card
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "captured"))
def test_cuda_memory_stays_flat_over_replies(released, compiled):
    kinds = {"device": "cuda", "dtype": torch.bfloat16}
    cache, held = KVCache(released.config, 1, 256, **kinds), []
    for turn in range(8):
        ids_of(released, [[5, turn]], 9, compiled, cache=cache)
        torch.cuda.synchronize()
        gc.collect()
        held.append(torch.cuda.memory_allocated())  # what is reserved is the allocator's to change
    assert len(set(held[2:])) == 1, held


@on_a_card
def test_cuda_two_replies_at_once(released):
    """The first ends while the other's graph goes on: what it frees is not the other's."""
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
def test_cuda_on_the_second_card(released):
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
    make = generate.plain_step if name == "plain" else cuda.step
    step = make(released, cache, pads)
    with torch.inference_mode():
        for _ in range(2):  # a prompt, and what is captured
            new = step(pads).argmax(-1)
        with no_waiting():
            step(new[:, None])


def waits(steps: Iterator) -> int:
    """How often the next step waits for the card, of which the debug mode warns."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len([w for w in said if "synchronizing" in str(w.message)])


@on_a_card
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "captured"))
@pytest.mark.parametrize("rows", (1, 9))
def test_cuda_generate_reads_once_a_step(released, rows, compiled):
    """In bfloat16 with batched experts: the ids, and whether their logits were finite."""
    needs_grouped_kernel()
    prompts = [[5, 6, 7 + row] for row in range(rows)]
    options = {"eos_token_ids": (), "compiled": compiled, **GREEDY}
    steps = generate.generate(released, prompts, 9, **options)
    for _ in range(3):  # libraries' first runs, and what is captured
        next(steps)
    assert [waits(steps) for _ in range(4)] == [1] * 4


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
    inputs["output_router_logits"] = False  # the auxiliary loss counts the tokens of a mask: waits
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
