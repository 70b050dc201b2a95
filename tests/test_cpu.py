"""The forms that a CPU runs sooner, against the definitions; what "auto" names; compiled steps."""

import functools
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, collect, write_files

import generate
import granitemoe
from engine import cpu
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM
from test_granitemoe import GRADIENTS, LOGITS, PROMPTS, fill, random_config, relative

WORDS = {"model_type": "granitemoe"}


# ------------------------------------------------------------------------------------ the forms


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("T, past", ((1, 5), (2, 0), (64, 0), (65, 3), (150, 70)))
def test_attention_in_blocks(T, past, masked):
    """Equals the definition, with the gradients, for a whole block, a part of one, and padding."""
    G, S, rng = 3, past + T, torch.Generator().manual_seed(0)
    shapes = ((2, 2 * G, T, 8), (2, G, S, 8), (2, G, S, 8), (2, 2 * G, T, 8))
    *leaves, upstream = (torch.randn(x, generator=rng) for x in shapes)
    for leaf in leaves:
        leaf.requires_grad_()
    mask = None
    if masked:  # the second row ends in padding
        seen = torch.tensor([[1] * S, [1] * (S - S // 3) + [0] * (S // 3)])
        mask = granitemoe.visible(torch.arange(past, S), seen)
    blocks = cpu.attend_blocks(*leaves, mask, 0.3, 0.0)
    eager = granitemoe.attend_eager(*leaves, mask, 0.3, 0.0)
    both = [(y, *torch.autograd.grad(y, leaves, upstream)) for y in (blocks, eager)]
    for ours, exact in zip(*both, strict=True):
        assert relative(ours, exact) <= LOGITS


def test_blocks_drop_as_much_as_asked():
    q, k = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4)
    torch.manual_seed(0)
    y = cpu.attend_blocks(q, k, torch.ones(1, 1, 200, 4), None, 1.0, 0.5)
    assert (y[0, 0, 0] == 0).all() or (y[0, 0, 0] == 2).all()  # one key: dropped, or made up for
    assert 0.9 < y.mean() < 1.1 and y.std() > 0.01


@pytest.mark.parametrize("rows", (1, 2, 64, 65, 80, 90))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_runs_of_any_length(rows, dtype):
    """All tokens on one expert: runs that are filled up to sixteens, and runs that are not."""
    rng, E, D, width = torch.Generator().manual_seed(rows), 3, 24, 10
    shapes = ((rows, D), (E, 2 * width, D), (E, D, width), (rows, 1))
    leaves = [torch.randn(n, generator=rng).to(dtype).requires_grad_() for n in shapes]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ids = torch.ones(rows, 1, dtype=torch.long)
    found, exact = cpu.experts_runs(*leaves, ids), granitemoe.experts_loop(*wide, ids)
    bound = 2e-2 if dtype == torch.bfloat16 else GRADIENTS
    grads = [torch.autograd.grad(y.sum(), x) for y, x in ((found, leaves), (exact, wide))]
    for ours, theirs in zip((found, *grads[0]), (exact, *grads[1]), strict=True):
        assert ours.dtype == dtype and relative(ours, theirs) <= bound


# ------------------------------------------------------------------------ what runs is what is said


@pytest.fixture
def called(monkeypatch) -> set[str]:
    """The names in the open tables of the forms that ran."""
    names: set[str] = set()
    for table in (granitemoe.ATTENTION, granitemoe.EXPERTS):
        for name, form in [*table.items()]:
            spy = lambda *args, name=name, form=form: names.add(name) or form(*args)  # noqa: E731
            monkeypatch.setitem(table, name, spy)
    return names


@pytest.mark.parametrize("dtype, forms", (
    ("bfloat16", {"blocks", "runs"}), ("float32", {"sdpa", "runs"}), ("float16", {"sdpa", "runs"}),
))  # fmt: skip
def test_auto_names_what_runs(dtype, forms, called, folder):
    model = generate.load_model(folder, dtype=dtype)
    assert {model.config.attention_backend, model.config.experts_backend} == forms
    collect(model, [[5, 6, 7], [8]], 3)
    assert called == forms


@pytest.mark.parametrize("attention", ("eager", "sdpa", "flash", "blocks"))
@pytest.mark.parametrize("experts, forms", (
    ("loop", {"loop"}), ("runs", {"runs"}), ("grouped", {"grouped"}), ("gathered", {"gathered"}),
    ("batched", {"grouped", "gathered"}),  # a prompt, and a step of one token
))  # fmt: skip
def test_what_is_asked_for_runs(attention, experts, forms, called, folder):
    """And nothing else: no fallback, in bfloat16 on a CPU as elsewhere."""
    how = {"attention_backend": attention, "experts_backend": experts}
    collect(generate.load_model(folder, dtype="bfloat16", **how), [[5, 6, 7]], 3)
    if attention == "blocks":  # leaves one query to the other, by a call and not by its name
        called.discard("sdpa")
    assert called == {attention} | forms


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_sdpa_is_scaled_dot_product_attention(dtype, folder, monkeypatch):
    """For a prompt, a further piece of one, padding and a single token: one call a layer, and no
    softmax of our own beside it."""
    model, calls = generate.load_model(folder, dtype=dtype, attention_backend="sdpa"), []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0]) or sdpa(*a, **k)
    )
    monkeypatch.setattr(granitemoe, "attend_eager", None)
    monkeypatch.setattr(torch, "baddbmm", None)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 6)
    collect(model, [[5, 6, 7, 8, 9], [8]], 4)
    pieces, steps, layers = 2, 3, model.config.num_hidden_layers
    assert len(calls) == (pieces + steps) * layers


def test_a_form_that_cannot_run_is_named(folder, monkeypatch):
    """With the device and the dtype, before a weight is read."""

    def fail(*_, **__) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    monkeypatch.setattr(generate.checkpoint, "read_tensors", None)
    with pytest.raises(ValueError, match="'flash' cannot run on cpu in torch.float16"):
        generate.load_model(folder, dtype="float16", attention_backend="flash")
    monkeypatch.undo()
    q = torch.zeros(1, 2, 3, 8, device="meta")
    with pytest.raises(ValueError, match="'flash' cannot run on meta in torch.float32"):
        granitemoe.attend_flash(q, q, q, None, 1.0, 0.0)
    model = generate.load_model(folder, experts_backend="grouped").double()
    with pytest.raises(ValueError, match="'grouped' cannot run on cpu in torch.float64"):
        model(torch.tensor([[5, 6]]))


def test_flash_leaves_the_process_its_kernels():
    """PyTorch's switches are the whole process's: threads that step on each other would leave it
    with flash alone, and then nothing with a mask or dropout runs."""
    q = torch.randn(1, 2, 3, 8)

    def act() -> None:
        for _ in range(500):
            granitemoe.attend_flash(q, q, q, None, 1.0, 0.0)

    threads = [threading.Thread(target=act) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    backends = torch.backends.cuda
    assert backends.math_sdp_enabled() and backends.mem_efficient_sdp_enabled()


def test_an_own_form(folder):
    """The tables are open; a name that is in none is refused with those that are."""
    granitemoe.EXPERTS["mine"] = granitemoe.experts_loop
    try:
        mine = generate.load_model(folder, experts_backend="mine")
        assert collect(mine, PROMPTS, 5) == collect(generate.load_model(folder), PROMPTS, 5)
    finally:
        del granitemoe.EXPERTS["mine"]
    with pytest.raises(ValueError, match="experts_backend: must be one of .*'loop'.*got 'mine'"):
        generate.load_model(folder, experts_backend="mine")


# --------------------------------------------------------------------------------- compiled steps


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("prompts", (PROMPTS, PROMPTS[:1]), ids=("padded", "one"))
def test_compiled_steps_equal_plain_ones(prompts, attention, monkeypatch):
    """Traced whole, but not compiled: the ids of the eager model, which is left as it was."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    data = random_config(2) | WORDS | {"attention_backend": attention}
    model = GraniteMoeForCausalLM(GraniteMoeConfig.from_dict(data)).eval()
    fill(model, 2)
    before = vars(model.config).copy(), [vars(m).copy() for m in model.modules()]
    options = {"repetition_penalty": 1.7}
    compiled = collect(model, prompts, 12, compiled=True, **options)
    assert (vars(model.config), [vars(m) for m in model.modules()]) == before
    assert compiled == collect(model, prompts, 12, **options)
    calls = []  # a user's hooks see the user's tokens, and nothing else
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    collect(model, prompts, 5, compiled=True)
    hook.remove()
    assert len(calls) == 5
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)  # the compiled steps are on the same weights
    with pytest.raises(ValueError, match="not finite"):
        collect(model, prompts, 2, compiled=True)


def test_flash_has_no_compiled_step(folder):
    model = generate.load_model(folder, attention_backend="flash")
    with pytest.raises(ValueError, match="attention_backend: .*'flash' .* use 'sdpa'"):
        collect(model, [[5]], 3, compiled=True)


def test_a_compiled_model_goes_when_it_is_let_go(monkeypatch, folder):
    """At once, and not when the collector of cycles comes by: it is the weights' memory."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = generate.load_model(folder)
    collect(model, [[5]], 3, compiled=True)
    weight = weakref.ref(model.model.layers[1].block_sparse_moe.input_linear.weight)
    torch.compiler.reset()  # the compiler's own caches may hold what they saw
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    model = generate.load_model(write_files(tmp_path / "m", checkpoint()))

    def fail(*_) -> None:
        raise RuntimeError("no compiler\nis there")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(ValueError, match="compiling failed: no compiler$"):
        collect(model, [[5]], 2, compiled=True)
