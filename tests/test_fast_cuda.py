"""CUDA: how the plain model calls PyTorch there, and where no step is compiled.

Without a GPU, a mode stands in for it in which tensors of the CPU say that they are on CUDA. The
kernels and their launches are tested in test_kernels.py. Tests that only a card can run come last.
"""

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import command, forked, on_linux, problem
from torch.overrides import TorchFunctionMode

import fast
import generate
import granitemoe
from fast import cpu, cuda
from files import terminal
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache
from test_granitemoe import (
    GRADIENTS,
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

needs_triton = pytest.mark.skipif(cuda.kernels is None, reason="triton is not installed")
FIXTURES = (one, pairs)  # of parity: found by their names here


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


def test_where_no_step_is_compiled():
    """On Apple's MPS there are neither graphs nor the CPU's C."""
    model = make_model("cpu")
    words = "^compiled steps: need CUDA, or a CPU and .* got mps"
    with OnCuda("mps"), pytest.raises(ValueError, match=words):
        fast.step(model, KVCache(model.config, 1, 4), torch.zeros(1, 1, dtype=torch.long))


@needs_triton
@pytest.mark.parametrize("attention, experts", (
    ("flash", "batched"), ("eager", "auto"), ("sdpa", "grouped"), ("sdpa", "gathered"),
    ("sdpa", "loop"),
))  # fmt: skip
def test_forms_that_have_no_compiled_step(attention, experts):
    """Of another name than "auto" may mean: the captured steps would not be them."""
    model = make_model("cpu")
    model.config.attention_backend, model.config.experts_backend = attention, experts
    words = f"^compiled steps: have forms of their own; '{attention}' and '{experts}' were"
    with OnCuda(), pytest.raises(ValueError, match=words):
        fast.step(model, KVCache(model.config, 1, 4), torch.zeros(1, 1, dtype=torch.long))


def refused(model: GraniteMoeForCausalLM, rows: int = 1) -> str:
    """Why a model on CUDA has no compiled step, in one line."""
    cache = KVCache(model.config, rows, 4, dtype=model.model.norm.weight.dtype)
    with OnCuda(), pytest.raises(ValueError) as caught:
        fast.step(model, cache, torch.zeros(rows, 1, dtype=torch.long))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160
    return str(caught.value)


def test_without_triton(monkeypatch):
    """Windows, macOS and PyTorch's build for CPUs bring none."""
    monkeypatch.setattr(cuda, "kernels", None)
    assert refused(make_model("cpu")) == (
        "compiled steps: need Triton on a GPU (pip install triton)"
    )


@on_linux
def test_the_command_without_triton(folder, monkeypatch):
    """It ends with the line that says so."""
    monkeypatch.setattr(cuda, "kernels", None)
    monkeypatch.setattr(cpu, "step", cuda.step)
    line = command("--model", str(folder), "--compile", "ab 12")
    outcome = forked(line)
    assert "need Triton on a GPU" in outcome.err
    assert not problem(outcome, 1), outcome.err


@needs_triton
def test_what_the_kernels_do_not_take():
    assert refused(make_model("cpu").double()).endswith("float32, got torch.float64")
    head = {"hidden_size": 516, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert refused(make_model("cpu", **head)).endswith("head_dim must be at most 256, got 258")
    experts = {"num_local_experts": 257}
    assert refused(make_model("cpu", **experts)).endswith("must be at most 256, got 257")
    config = make_model("cpu").config
    for rows in (2**16, 2**20):
        with pytest.raises(ValueError, match=f"^compiled steps: {rows} rows are too many"):
            cuda.check_sizes(config, rows)
    wide = dataclasses.replace(config, vocab_size=2**26)
    with pytest.raises(ValueError, match="^compiled steps: vocab_size 67108864, hidden_size"):
        cuda.check_sizes(wide, 1)


# ----------------------------------------------------------------------- what the plain model asks


class OnCuda(TorchFunctionMode):
    """In here tensors say that they are on CUDA, and are made on the CPU all the same. Keeps what
    SDPA is asked for, and the names of calls by which a host waits for a card."""

    WAITING = {
        "tolist", "item", "numpy", "cpu", "nonzero", "unique", "masked_select", "__bool__",
        "__int__", "__float__", "__index__", "__contains__",
    }  # fmt: skip

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind = kind
        self.asked: list[tuple] = []
        self.waited: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device(self.kind)
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
def test_a_step_reads_from_the_card_once(rows, padded, sampling):
    """The ids, and whether their logits were finite. Where the grouped product is a kernel, that
    is: with "auto", which is "batched" there."""
    model = make_model("cpu").bfloat16()
    model.config.experts_backend = "auto"
    prompts = [[5] * (1 + row * padded) + [6, 7 + row] for row in range(rows)]
    with OnCuda() as mode:
        options = {"seed": 0, "eos_token_ids": (), **sampling}
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
def test_cuda_needs_no_kernel_that_holds_all_scores(released, dtype, monkeypatch):
    """A prompt, its further pieces, padding and steps, none of which SDPA's last resort runs; nine
    rows are more assignments than experts, in each dtype."""
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 36)
    model, before = released.to(dtype), torch.backends.cuda.math_sdp_enabled()
    torch.backends.cuda.enable_math_sdp(False)
    try:
        for prompts in ([[5] * 90], (PROMPTS * 9)[:9]):
            assert len(ids_of(model, prompts, 5, False)) == 5
    finally:
        torch.backends.cuda.enable_math_sdp(before)


@on_a_card
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "compiled"))
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
@pytest.mark.parametrize("prompts", (PROMPTS, PROMPTS[:1]), ids=("padded", "one"))
def test_cuda_compiled_replies_equal_plain_ones(prompts):
    """In float32, where no near-tie falls the other way."""
    model = make_model("cuda", **RELEASED)
    plain = ids_of(model, prompts, 30, False, **GREEDY)
    assert len({row[0] for row in plain}) > 5, "a constant could pass"
    assert ids_of(model, prompts, 30, **GREEDY) == plain


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
@pytest.mark.parametrize("name", ("plain", "compiled"))
@pytest.mark.parametrize("rows", (1, 9))
def test_cuda_steps_never_wait_for_the_device(released, name, rows):
    if name == "plain":
        needs_grouped_kernel()
    pads = torch.zeros(rows, 1, dtype=torch.long, device="cuda")
    cache = KVCache(released.config, rows, 64, device="cuda", dtype=torch.bfloat16)
    make = generate.plain_step if name == "plain" else cuda.step
    step = make(released, cache, pads)
    with torch.inference_mode():
        for _ in range(3):  # what is compiled, and what is captured
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
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "compiled"))
@pytest.mark.parametrize("rows", (1, 9))
def test_cuda_generate_reads_once_a_step(released, rows, compiled):
    """In bfloat16 with batched experts: the ids, and whether their logits were finite."""
    if not compiled:
        needs_grouped_kernel()
    prompts = [[5, 6, 7 + row] for row in range(rows)]
    options = {"eos_token_ids": (), "compiled": compiled, **GREEDY}
    steps = generate.generate(released, prompts, 9, **options)
    for _ in range(3):  # libraries' first runs, and what is captured
        next(steps)
    assert [waits(steps) for _ in range(4)] == [1] * 4


def needs_grouped_kernel() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
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
