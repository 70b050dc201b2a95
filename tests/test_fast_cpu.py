"""What "auto" names and what runs; the model in C on a CPU, against granitemoe.py."""

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TESTS, audited, collect, needs_compiler, representing
from torch import Tensor

import fast
import generate
import granitemoe
from fast import cpu
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache
from test_granitemoe import (
    CHECKPOINTS,
    PROMPTS,
    consult,
    fill,
    random_config,
    relative,
)  # fmt: skip

pytestmark = needs_compiler
WORDS = {"model_type": "granitemoe"}


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


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float16"))
def test_auto_names_what_runs(dtype, called, folder):
    model, forms = generate.load_model(folder, dtype=dtype), {"sdpa", "loop"}
    assert {model.config.attention_backend, model.config.experts_backend} == forms
    collect(model, [[5, 6, 7], [8]], 3)
    assert called == forms


@pytest.mark.parametrize("attention", ("eager", "sdpa", "flash"))
@pytest.mark.parametrize("experts, forms", (
    ("loop", {"loop"}), ("grouped", {"grouped"}), ("gathered", {"gathered"}),
    ("batched", {"grouped", "gathered"}),  # a prompt, and a step of one token
))  # fmt: skip
def test_what_is_asked_for_runs(attention, experts, forms, called, folder):
    """And nothing else: no fallback, in bfloat16 on a CPU as elsewhere."""
    how = {"attention_backend": attention, "experts_backend": experts}
    collect(generate.load_model(folder, dtype="bfloat16", **how), [[5, 6, 7]], 3)
    assert called == {attention} | forms


def test_compiled_runs_are_in_c_alone(folder, monkeypatch):
    """Prompts and steps, padded or not: no form of granitemoe.py runs beside it."""
    model = generate.load_model(folder)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    monkeypatch.setattr(granitemoe, "swiglu", None)
    for prompts in ([[5, 6, 7]], PROMPTS):
        collect(model, prompts, 3, compiled=True)


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
    monkeypatch.setattr(granitemoe, "attend_one", None)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 6)
    collect(model, [[5, 6, 7, 8, 9], [8]], 4)
    pieces, steps, layers = 2, 3, model.config.num_hidden_layers
    assert len(calls) == (pieces + steps) * layers


def test_a_form_that_cannot_run_is_named(folder, monkeypatch):
    """With the device and the dtype, before a weight is read."""

    def fail(*_, **__) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    monkeypatch.setattr(generate.checkpoint, "read", None)
    with pytest.raises(ValueError, match="'flash' cannot run on cpu in torch.float16"):
        generate.load_model(folder, dtype="float16", attention_backend="flash")
    monkeypatch.undo()
    q = torch.zeros(1, 2, 3, 8, device="meta")
    with pytest.raises(ValueError, match="'flash' cannot run on meta in torch.float32"):
        granitemoe.attend_flash(q, q, q, None, 1.0, 0.0)


@torch.no_grad()
def test_grouped_runs_where_there_is_no_grouped_product(folder, monkeypatch):
    """In float64, which it lacks: as one product a run."""
    model = generate.load_model(folder).double()
    exact = model(ids := torch.tensor([[5, 6, 7, 8]])).logits
    monkeypatch.setattr(F, "grouped_mm", None)
    model.config.experts_backend = "grouped"
    assert relative(model(ids).logits, exact) <= 1e-12


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
    with pytest.raises(ValueError, match="experts_backend: must be in .*'loop'.*got 'mine'"):
        generate.load_model(folder, experts_backend="mine")


# ------------------------------------------------------------------------------------------- in C

SEEDS = [seed for seed, _ in CHECKPOINTS.values()]
TINY = {"intermediate_size": 5, "vocab_size": 3, "pad_token_id": None, "num_local_experts": 1,
        "num_experts_per_tok": 1, "num_hidden_layers": 1}  # fmt: skip
SHAPES = {  # changes of a random config, of which some sizes fill no register, and some many
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2, **TINY},
    "as many key heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 42},
    "one key head": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 70},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * 134},
    "odd experts": {"intermediate_size": 67, "num_local_experts": 11, "num_experts_per_tok": 5},
    "all experts": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "one expert each": {"num_experts_per_tok": 1},
    "registers": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 128},
}  # fmt: skip


def build(seed: int, dtype: torch.dtype = torch.float32, **changes) -> GraniteMoeForCausalLM:
    """A model of a random checkpoint's sizes or, changed, of others; every block matters."""
    config = GraniteMoeConfig.from_dict(random_config(seed) | WORDS | changes)
    model = GraniteMoeForCausalLM(config).eval()
    fill(model, seed)
    return model.to(dtype)


def random_rows(model: GraniteMoeForCausalLM, rows: int, length: int) -> Tensor:
    rng = torch.Generator().manual_seed(rows)
    return torch.randint(model.config.vocab_size, (rows, length), generator=rng)


def no_pads(rows: int) -> Tensor:
    return torch.zeros(rows, 1, dtype=torch.long)


def empty_cache(model: GraniteMoeForCausalLM, rows: int, room: int) -> KVCache:
    """In which nothing may be read that was not written."""
    cache = KVCache(model.config, rows, room, dtype=model.model.norm.weight.dtype)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


@torch.inference_mode()
def both(model: GraniteMoeForCausalLM, ids: Tensor, first: int, pads: Tensor | None = None):
    """Logits (B, steps, V) of the C step and of the plain one for ids (B, T), which fill the cache,
    after a prompt of the `first`."""
    B, T = ids.shape
    pads, found = no_pads(B) if pads is None else pads, []
    for make in (cpu.step, generate.plain_step):
        cache = empty_cache(model, B, T)
        generate.plain_step(model, cache, pads)(ids[:, :first])
        step = make(model, cache, pads)
        found.append(torch.stack([step(ids[:, t, None]) for t in range(first, T)], 1))
        assert torch.equal(cache.ids, ids) and cache.length == T
    return found


@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 8, 17))
@pytest.mark.parametrize("seed", SEEDS)
def test_c_equals_the_plain_step(seed, rows):
    model = build(seed)
    ours, plain = both(model, random_rows(model, rows, 19), 4)
    assert relative(ours, plain) <= 1e-5


@pytest.mark.parametrize("rows", (1, 6))
@pytest.mark.parametrize("shape", SHAPES)
def test_c_takes_any_shape(shape, rows):
    model = build(4, **SHAPES[shape])
    ours, plain = both(model, random_rows(model, rows, 11), 1)
    assert relative(ours, plain) <= 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_c_takes_padded_rows(seed):
    """Each row begins at a slot of its own, one of them at the last before the steps."""
    model, pads = build(seed), torch.tensor([[0], [5], [2], [0], [4]])
    ours, plain = both(model, random_rows(model, 5, 16), 6, pads)
    assert relative(ours, plain) <= 1e-5


def test_c_after_many_tokens():
    """Every number of slots in the last of the fours that attention takes at a time."""
    model = build(2)
    ours, plain = both(model, random_rows(model, 2, 700), 600)
    assert relative(ours, plain) <= 1e-5


def test_steps_alternate_on_one_cache():
    model = build(3)
    ids, cache = random_rows(model, 2, 12), KVCache(model.config, 2, 12)
    with torch.inference_mode():
        steps = [make(model, cache, no_pads(2)) for make in (cpu.step, generate.plain_step)]
        found = [steps[t % 2](ids[:, t, None]) for t in range(12)]
        assert relative(torch.stack(found, 1), model(ids).logits) <= 1e-5
        with pytest.raises(ValueError, match="cache: 13 tokens do not fit in 12"):
            steps[0](ids[:, :1])
        cache.length = 7  # a conversation goes back
        again = torch.stack([steps[t % 2](ids[:, t, None]) for t in range(7, 12)], 1)
        assert relative(again, torch.stack(found[7:], 1)) <= 1e-5


@pytest.mark.parametrize("experts", (4, 150))
def test_c_breaks_ties_as_topk_does(experts):
    """Pairs of experts with the same router rows: of one pair, only one is among the chosen. topk
    has no rule for which, and goes about it otherwise where there are many."""
    changes = {"num_local_experts": experts, "num_experts_per_tok": 2 + experts % 2 + 1}
    model = build(5, **changes)
    for layer in model.model.layers:
        weight = layer.block_sparse_moe.router.layer.weight.data
        weight[1::2] = weight[::2]
    ours, plain = both(model, random_rows(model, 5, 13), 2)
    assert relative(ours, plain) <= 1e-5


def test_c_with_every_token_on_one_expert():
    """And with all experts as good as each other, in the last layer too."""
    model = build(6, num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.block_sparse_moe.router.layer.weight.data.zero_()
    ours, plain = both(model, random_rows(model, 9, 8), 2)
    assert relative(ours, plain) <= 1e-5


@pytest.mark.parametrize("portable", (False, True), ids=("native", "portable"))
def test_c_in_bfloat16(portable, fresh, monkeypatch):
    """To the float64 oracle at most 1.1 x the plain step's error. Every expert is chosen here: else
    a near-tie may fall either way, and luck hides what is measured."""
    if portable:
        monkeypatch.setattr(cpu, "FLAGS", [*cpu.FLAGS, "-U__AVX512BF16__"])
    squares = torch.zeros(2)
    for seed in SEEDS * 3:
        E = random_config(seed)["num_local_experts"]
        model = build(seed, torch.bfloat16, num_experts_per_tok=E)
        ids = random_rows(model, 24, 11)
        exact = consult(model, ids)[0][:, 1:]
        squares += torch.tensor([relative(x, exact) ** 2 for x in both(model, ids, 1)])
    ours, plain = squares.sqrt()
    assert ours <= 1.1 * plain


@pytest.mark.parametrize("seed", SEEDS)
def test_c_in_bfloat16_chooses_as_the_plain_step(seed):
    """Most tokens' experts, so that their logits differ by roundings only."""
    model = build(seed, torch.bfloat16)
    ours, plain = both(model, random_rows(model, 32, 9), 1)
    errors = (ours - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert errors.median() <= 0.03


FAULTS = {  # each in a copy of the C text
    "gate and up swapped": ("*gate = m->rows_MP + i * 2 * F, *up = gate + F",
                            "*up = m->rows_MP + i * 2 * F, *gate = up + F"),
    "a scalar dropped": (" * m->residual_multiplier", ""),
    "logits not scaled": ("m->logits[i] / m->logits_scaling", "m->logits[i]"),
    "scores not scaled": ("p[s] *= m->attention_multiplier", "p[s] *= 1"),
    "one head too far": ("*p = scores + h * room", "*p = scores + (h + 1) % heads * room"),
    "one expert short": ("i < n * K + K; i++", "i < n * K + K - 1; i++"),
    "the tail of a vector left out": ("for (; i < n; i++) {", "for (; i < n && n < 0; i++) {"),
    "the last slot left out": ("s < slots; s += 4", "s < slots - 1; s += 4"),
    "a slot of another row": ("start = m->pads[b]", "start = m->pads[0]"),
    "turned by the slot": ("m->at - m->pads[b]", "m->at - m->pads[0]"),
    "ties by number": ("*m->tied = layer", "*m->tied = -1"),
}  # fmt: skip
PROMPT_FAULTS = {
    "gate and up swapped": ("swiglu(y[r][j], y[r + half][j])", "swiglu(y[r + half][j], y[r][j])"),
    "one expert short": ("e < p->E; e++", "e < p->E - 1; e++"),
    "the first run of an expert only": ("start += M;", "start = p->ends_E[e];"),
    "the tail of a row left out": ("{rows[r][n - 1]}", "{0 * rows[r][n - 1]}"),
    "one row of weights too far": ("gate_up + F * D, F", "gate_up + (F - 1) * D, F"),
    "weights of the run's first tokens": ("[start + j]", "[start]"),
    "half of the last tokens": ("if (tokens > LANES)", "if (0)"),
}
ATTENTION_FAULTS = {
    "a query sees the next token": ("s < seen + j", "s <= seen + j"),
    "a query does not see itself": ("s < seen + j", "s < seen + j - 1"),
    "scores not scaled": ("scores[s][j] * scale", "scores[s][j]"),
    "sums as before": ("now.sum[j] *= now.shrink[j]", "now.sum[j] *= 1"),
    "values as before": ("y[c + r][j] * soft.shrink[j]", "y[c + r][j]"),
    "not divided": ("y[c][j] /= soft.sum[j]", "y[c][j] /= 1"),
    "a key head for each query head": ("head / (a->H / a->G)", "head % a->G"),
    "the last keys left out": ("s < all; s += KEYS", "s + KEYS <= all; s += KEYS"),
    "no past": ("seen = S - T + t + 1", "seen = t + 1"),
    "rows of the first batch": ("((head / a->H * T", "((0 * T"),
}
PADS_FAULTS = {
    "padding is seen": ("first <= s && s", "s"),
    "the first token is not seen": ("first <= s &&", "first < s &&"),
    "padding of another row": ("first = a->pads[head / a->H]", "first = a->pads[0]"),
    "padding of a head": ("first = a->pads[head / a->H]", "first = a->pads[head % a->B]"),
    "values not advanced": ("(key_head * blocks + begin)", "(key_head * blocks)"),
    "keys not advanced": ("Int s = begin * KEYS;", "Int s = 0;"),
    "first slot as of the first keys": ("(scores, M, first - s,", "(scores, M, first,"),
    "no zeros for padding": ("seen + j > first ? to_weight(y[c][j]) : 0", "to_weight(y[c][j])"),
    "zeros for the first token": ("seen + j > first ?", "seen + j > first + 1 ?"),
}


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A cache folder of its own for what is built, and nothing built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu.library.cache_clear()
    yield tmp_path / "cache" / "granitemoe"
    cpu.library.cache_clear()


def plant(before: str, after: str, folder: Path, monkeypatch) -> None:
    """A fault in a copy of the C texts, which are then what is built."""
    texts = [file.read_text() for file in cpu.SOURCES]
    assert sum(text.count(before) for text in texts) == 1, "the fault is no longer one"
    for file, text in zip(cpu.SOURCES, texts, strict=True):
        (folder / file.name).write_text(text.replace(before, after))
    monkeypatch.setattr(cpu, "SOURCES", [folder / file.name for file in cpu.SOURCES])


@pytest.mark.parametrize("fault", representing(FAULTS, "ties by number"))
def test_faults_in_the_c_text_are_found(fault, fresh, tmp_path, monkeypatch):
    """By the comparison that the tests above rest on."""
    plant(*FAULTS[fault], tmp_path, monkeypatch)
    model = build(3)
    if fault == "ties by number":
        for layer in model.model.layers:
            layer.block_sparse_moe.router.layer.weight.data[1:].zero_()
    pads = torch.tensor([[2], [0], [1]]) if "slot" in fault else None
    ours, plain = both(model, random_rows(model, 3, 9), 4, pads)
    assert not relative(ours, plain) <= 1e-3


def routed(N: int, dtype: torch.dtype, sizes: tuple[int, ...], last: float = 0.0) -> list[Tensor]:
    """x_ND, weights and routing for experts; last: how much likelier the last expert is."""
    (D, F_, E, K), rng = sizes, torch.Generator().manual_seed(N)
    x_ND, *weights = (
        torch.randn(size, generator=rng) for size in ((N, D), (E, 2 * F_, D), (E, D, F_))
    )
    logits_NE = torch.randn(N, E, generator=rng)
    logits_NE[:, -1] += last
    top = logits_NE.topk(K, dim=-1)
    weights = [w / w.shape[2] ** 0.5 for w in weights]
    return [x.to(dtype) for x in (x_ND, *weights, top.values.softmax(-1))] + [top.indices]


SIZES = ((70, 67, 5, 3), (3, 1, 2, 1), (256, 128, 9, 4))  # D, F, E, K


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("N", (1, 2, 15, 16, 17, 33, 300, 1100))
@torch.no_grad()
def test_prompts_in_c(N, sizes):
    """Any number of tokens, of registers, of whole runs of an expert and parts of one."""
    for last in (-99.0, 99.0):  # nobody's, and everybody's
        given = routed(N, torch.float32, sizes, last)
        exact = granitemoe.experts_loop(*[x.double() for x in given[:4]], given[4])
        assert relative(cpu.experts_in_c(*given).double(), exact) <= 1e-5
        given = routed(N, torch.bfloat16, sizes, last)
        exact = granitemoe.experts_loop(*[x.double() for x in given[:4]], given[4])
        ours, eager = (
            (form(*given).double() - exact).norm()
            for form in (cpu.experts_in_c, granitemoe.experts_loop)
        )
        assert ours <= 1.1 * eager


@pytest.mark.parametrize("fault", representing(PROMPT_FAULTS, "the tail of a row left out"))
@torch.no_grad()
def test_faults_in_prompts_are_found(fault, fresh, tmp_path, monkeypatch):
    plant(*PROMPT_FAULTS[fault], tmp_path, monkeypatch)
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # each row is odd: its tail matters in the second
        given = routed(900, dtype, (71, 67, 3, 2))
        exact = granitemoe.experts_loop(*given)
        found.append(not relative(cpu.experts_in_c(*given), exact) <= 0.02)
    assert any(found)
    assert all(found) or "tail" in fault


def queries(
    T: int, past: int, C: int, dtype: torch.dtype, heads: int = 3, rows: int = 2
) -> list[Tensor]:
    """q, k and v of some rows, two query heads to a key head; scores that differ."""
    rng, S = torch.Generator().manual_seed(T), past + T
    shapes = ((rows, 2 * heads, T, C), (rows, heads, S, C), (rows, heads, S, C))
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def attend(form, q: Tensor, k: Tensor, v: Tensor, scale: float, pads: Tensor | None = None):
    """By C's attention or by one of granitemoe.py's."""
    pads = no_pads(len(q)) if pads is None else pads
    slots = torch.arange(k.shape[2])
    if form is cpu.attend_in_c:
        return form(q, k, v, pads, scale)
    mask = granitemoe.visible(slots[-q.shape[2] :], slots >= pads)
    return form(q, k, v, mask, scale, 0.0)


LENGTHS = (
    (1, 0), (1, 200), (2, 0), (15, 1), (16, 80), (17, 0), (33, 96), (95, 0), (96, 0), (97, 100),
    (300, 7),
)  # fmt: skip


@pytest.mark.parametrize("C", (2, 5, 10, 64, 72))
@pytest.mark.parametrize("T, past", LENGTHS)
@torch.no_grad()
def test_attention_of_prompts_in_c(T, past, C):
    """Any number of queries, of blocks of keys and of registers."""
    for dtype in (torch.float32, torch.bfloat16):
        given = queries(T, past, C, dtype)
        exact = attend(granitemoe.attend_eager, *[x.double() for x in given], 0.4)
        ours, eager = (
            relative(attend(form, *given, 0.4).double(), exact)
            for form in (cpu.attend_in_c, granitemoe.attend_eager)
        )
        assert ours <= (1e-5 if dtype == torch.float32 else 1.1 * eager)


@pytest.mark.parametrize("C", (5, 64))
@pytest.mark.parametrize("T, past", LENGTHS)
@torch.no_grad()
def test_attention_of_padded_prompts_in_c(T, past, C):
    """From any first slot on, before, in and after the piece's own and at the bounds of a block of
    keys; queries of padding get zeros. What padding holds is not seen."""
    S = past + T
    firsts = sorted({n for n in (0, 1, past, past + T // 2, S - 1, S, 95, 96, 97, 192) if n <= S})
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = queries(T, past, C, dtype, rows=len(firsts))
        pads = torch.tensor(firsts)[:, None]
        padding = torch.arange(S) < pads  # (B, S)
        k[padding[:, None].expand(k.shape[:3])] = 30.0
        v[padding[:, None].expand(v.shape[:3])] = 1e4
        real = ~padding[:, None, past:, None]
        exact = attend(granitemoe.attend_eager, q.double(), k.double(), v.double(), 0.4, pads)
        ours = attend(cpu.attend_in_c, q, k, v, 0.4, pads)
        eager = attend(granitemoe.attend_eager, q, k, v, 0.4, pads)
        assert not (ours * ~real).any() and torch.isfinite(ours).all()
        error, theirs = (((x - exact) * real).norm() / (exact * real).norm() for x in (ours, eager))
        assert error <= (1e-5 if dtype == torch.float32 else 1.1 * theirs)


@pytest.mark.parametrize("fault", representing(ATTENTION_FAULTS, "sums as before"))
@torch.no_grad()
def test_faults_in_attention_are_found(fault, fresh, tmp_path, monkeypatch):
    plant(*ATTENTION_FAULTS[fault], tmp_path, monkeypatch)
    given = queries(200, 50, 10, torch.float32)
    exact = attend(granitemoe.attend_eager, *given, 0.4)
    assert not relative(attend(cpu.attend_in_c, *given, 0.4), exact) <= 1e-3


@pytest.mark.parametrize("fault", representing(PADS_FAULTS, "values not advanced"))
@torch.no_grad()
def test_faults_in_padding_are_found(fault, fresh, tmp_path, monkeypatch):
    """By the test above, which passes without one."""
    plant(*PADS_FAULTS[fault], tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        for T, past in ((97, 100), (300, 7)):
            test_attention_of_padded_prompts_in_c(T, past, 5)


# ------------------------------------------------------------------------------ prompts of a model


@torch.inference_mode()
def read(make, model: GraniteMoeForCausalLM, ids: Tensor, pads: Tensor, pieces: list[int]) -> tuple:
    """The logits after each piece, and the cache, of ids read in pieces."""
    cache, found = empty_cache(model, *ids.shape), []
    step = make(model, cache, pads)
    for piece in ids.split(pieces, dim=1):
        found.append(step(piece).clone())
    assert torch.equal(cache.ids, ids) and cache.length == ids.shape[1]
    return torch.stack(found), cache


def compare_prompts(model, ids, pads, pieces, bound=1e-5) -> None:
    """Logits of rows that have begun, and what the cache holds of tokens. Of padding it holds
    finite numbers; logits of padding are finite."""
    ours, cache = read(cpu.step, model, ids, pads, pieces)
    plain, expected = read(generate.plain_step, model, ids, pads, pieces)
    begun = (torch.tensor(pieces).cumsum(0)[:, None] > pads.T)[..., None]  # (pieces, B, 1)
    assert relative(ours * begun, plain * begun) <= bound
    assert torch.isfinite(ours).all() and ours.dtype == torch.float32
    tokens = (torch.arange(ids.shape[1]) >= pads)[:, None, :, None]  # (B, 1, S, 1)
    for held, exact in ((cache.keys, expected.keys), (cache.values, expected.values)):
        assert relative(held * tokens, exact * tokens) <= bound and torch.isfinite(held).all()


PIECES = ([31], [10, 21], [30, 1], [1] * 31, [7, 1, 1, 13, 9])


@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_in_c_equal_plain_ones(seed, pieces, padded):
    """Whole and in pieces, some of which are padding alone for a row, or one token long while a
    row is still padding."""
    model = build(seed)
    pads = torch.tensor([[0], [30], [12], [8], [1]]) if padded else no_pads(5)
    compare_prompts(model, random_rows(model, 5, 31), pads, pieces)


@pytest.mark.parametrize("rows", (1, 6))
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_in_c_take_any_shape(shape, rows):
    model = build(4, **SHAPES[shape])
    pads = torch.arange(rows)[:, None] * 3
    compare_prompts(model, random_rows(model, rows, 23), pads, [17, 6])


def test_prompts_in_c_of_many_tokens():
    """More than one block of keys and run of an expert; padding ends within a block."""
    model, pads = build(2), torch.tensor([[100], [0], [310]])
    compare_prompts(model, random_rows(model, 3, 420), pads, [300, 120])


def test_prompts_in_c_of_heads_too_large_for_a_stack(monkeypatch):
    """Whose attention is left to PyTorch."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * 130}
    monkeypatch.setattr(cpu, "AttentionInC", None)
    model = build(4, **sizes, num_hidden_layers=1)
    compare_prompts(model, random_rows(model, 3, 9), torch.tensor([[0], [5], [2]]), [4, 5])


def test_prompts_in_c_in_bfloat16():
    """To the float64 oracle at most 1.1 x the plain prompt's error; see test_c_in_bfloat16."""
    squares = torch.zeros(2)
    for seed in SEEDS * 3:
        E = random_config(seed)["num_local_experts"]
        model = build(seed, torch.bfloat16, num_experts_per_tok=E)
        ids = random_rows(model, 24, 12)
        exact = consult(model, ids)[0]
        for i, make in enumerate((cpu.step, generate.plain_step)):
            ours, _ = read(make, model, ids, no_pads(24), [2, 3, 7])
            squares[i] += relative(ours, exact[:, [1, 4, 11]].transpose(0, 1)) ** 2
    ours, plain = squares.sqrt()
    assert ours <= 1.1 * plain


def test_prompts_of_compiled_rows(folder, monkeypatch):
    """Go through C in every layer, padded ones too; ids are those of the plain prompts."""
    model, calls = generate.load_model(folder), []
    for form in (cpu.attend_in_c, cpu.experts_in_c):
        spy = lambda *given, form=form: calls.append(given[0].shape) or form(*given)  # noqa: E731
        monkeypatch.setattr(cpu, form.__name__, spy)
    c = model.config
    for prompts in (PROMPTS, [[5, 6, 7], [8, 9, 10]]):
        plain = collect(model, prompts, 4)
        assert not calls
        assert collect(model, prompts, 4, compiled=True) == plain
        B, T = len(prompts), max(map(len, prompts))
        layer = [(B, c.num_attention_heads, T, c.head_dim), (B * T, c.hidden_size)]
        assert calls == layer * c.num_hidden_layers
        calls.clear()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@torch.no_grad()
def test_extremes_of_prompts_in_c(dtype):
    """Keys that nothing is left of, values that only a weight of 0 hides, gates of minus a lot."""
    q, k, v = queries(40, 100, 8, dtype)
    q = q.abs()
    for low in (-torch.inf, -3e38):
        k[:, :, :96] = low
        ours, eager = (attend(f, q, k, v, 1.0) for f in (cpu.attend_in_c, eager_exact))
        assert relative(ours, eager) <= (1e-5 if dtype == torch.float32 else 0.01)
    q, k, v = queries(40, 0, 8, dtype)
    v[:, :, 39] = 1e38
    ours, eager = (attend(f, q, k, v, 1.0) for f in (cpu.attend_in_c, eager_exact))
    assert relative(ours[:, :, :39], eager[:, :, :39]) <= (1e-5 if dtype == torch.float32 else 0.01)
    one = torch.ones(1, 1, dtype=dtype)
    for gate, up in ((-1e38, 1.0), (-200.0, 1e36), (-100.0, 1e37)):
        gate_up = torch.tensor([[[gate, 0.0], [0.0, up]]], dtype=dtype)
        x, down, ids = one.repeat(1, 2), one.repeat(1, 2, 1), torch.zeros(1, 1, dtype=torch.long)
        assert cpu.experts_in_c(x, gate_up, down, one, ids).abs().max() <= 1e-5


def eager_exact(q: Tensor, k: Tensor, v: Tensor, *more) -> Tensor:
    return granitemoe.attend_eager(q.double(), k.double(), v.double(), *more).to(q.dtype)


SANITIZED = """
import fast, torch, test_fast_cpu
from fast import cpu
cpu.FLAGS += ["-fsanitize=address,undefined,float-cast-overflow"]
cpu.FLAGS += ["-fno-sanitize-recover=undefined", "-g"]
torch.set_num_threads(2), torch.set_grad_enabled(False)
for dtype in (torch.float32, torch.bfloat16):
    for shape, changes in test_fast_cpu.SHAPES.items():
        model = test_fast_cpu.build(4, dtype, **changes)
        pads = torch.tensor([[0], [1], [0], [3], [2]])
        ours, plain = test_fast_cpu.both(model, test_fast_cpu.random_rows(model, 5, 7), 4, pads)
        assert torch.isfinite(ours).all()
    for sizes in test_fast_cpu.SIZES:
        for tokens in (1, 17, 600):
            given = test_fast_cpu.routed(tokens, dtype, sizes)
            assert torch.isfinite(cpu.experts_in_c(*given)).all()
    for sizes in ((1, 0, 2), (2, 0, 2), (33, 70, 10), (100, 0, 66), (210, 3, 5)):
        given = test_fast_cpu.queries(*sizes, dtype)
        for first in (0, 1, 96, 150, 213):  # beyond the last slot, too: all padding
            pads = torch.tensor([[0], [first]])
            assert torch.isfinite(cpu.attend_in_c(*given, pads, 1.0)).all()
    model, one = test_fast_cpu.build(4, dtype), torch.zeros(1, 1, dtype=torch.long)
    cache = test_fast_cpu.empty_cache(model, 1, 9)
    step = fast.step(model, cache, one)
    for move in (int, model.share_memory, cache.keys.share_memory_, cache.values.share_memory_):
        move()  # what was there is freed: the next step has to look for it anew
        assert torch.isfinite(step(one)).all()
print("clean")
"""


FEW = {"odd experts": SHAPES["odd experts"]}


@pytest.mark.parametrize("how", representing(("native", "portable", "few shapes"), "few shapes"))
def test_c_under_sanitizers(how, fresh):
    """No byte outside of what it was given, and nothing that C leaves undefined, at odd sizes."""
    where = [*cpu.compiler(), "-print-file-name=libasan.so"]
    library = subprocess.run(where, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler brings no sanitizer")
    env = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    env |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS))), "OMP_NUM_THREADS": "2"}
    code = SANITIZED
    if how == "portable":
        code = code.replace("FLAGS +=", 'FLAGS += ["-U__AVX512BF16__"] +')
    elif how == "few shapes":
        code = code.replace("SHAPES.items()", "FEW.items()").replace('"-g"]', '"-O1"]')
        code = code.replace("(torch.float32, torch.bfloat16)", "(torch.bfloat16,)")
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "clean\n", done.stderr[-3000:]


def test_a_trial_fits_a_context_of_one(folder):
    """The command's first reply, in which all is built: no prompt of a user's is to blame."""
    model = generate.load_model(folder)
    assert fast.trial(model, 3) == [[0, 0], [0], [0]]
    model.config.max_position_embeddings = 1
    assert fast.trial(model, 3) == [[0], [0], [0]]
    assert not collect(model, fast.trial(model, 3), 2, compiled=True)


def test_c_step_in_generate(folder):
    """Ids, hooks and the model are those of the plain step; what is not finite is seen."""
    model = generate.load_model(folder)
    before = vars(model.config).copy(), [vars(m).copy() for m in model.modules()]
    for prompts, how in ((PROMPTS, {"repetition_penalty": 1.7}), (PROMPTS[:1], SAMPLED)):
        plain = collect(model, prompts, 12, **how)
        assert collect(model, prompts, 12, compiled=True, **how) == plain
    assert (vars(model.config), [vars(m) for m in model.modules()]) == before
    steps = generate.generate(model, [[5, 6]], 9, compiled=True)
    next(steps), next(steps)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)  # the same weights, not a copy
    with pytest.raises(ValueError, match="not finite at step 2"):
        list(steps)


SAMPLED = {"temperature": 1.3, "top_k": 40, "seed": 3}
PENALTY = {"repetition_penalty": 1.7}
OPTIONS = {
    "greedy": {}, "penalty": PENALTY, "temperature": {"temperature": 1.3},
    "top_k": {"temperature": 1.3, "top_k": 5}, "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.3, "min_p": 0.05},
    "all": {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.02} | PENALTY,
}  # fmt: skip


@pytest.mark.parametrize("prompts", (PROMPTS, [[5]], [[9] * 40, [3]]), ids=("four", "one", "far"))
@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_ids_are_the_plain_ones(option, prompts, folder, monkeypatch):
    """Prompts in pieces too, of which one row may have none of some."""
    model, how = generate.load_model(folder), {"seed": 11, "eos_token_ids": (), **OPTIONS[option]}
    plain = collect(model, prompts, 24, **how)
    assert len(plain) == 24 and (option == "greedy" or len({row[0] for row in plain}) > 3)
    for tokens in (generate.PREFILL_TOKENS, 6, 1):
        monkeypatch.setattr(generate, "PREFILL_TOKENS", tokens)
        assert collect(model, prompts, 24, compiled=True, **how) == plain


@pytest.mark.parametrize("how", ({}, SAMPLED), ids=("greedy", "sampled"))
def test_compiled_turns_on_one_cache(how, folder):
    """A conversation, of which a turn is taken back; the other kind of step may go on with it."""
    model = generate.load_model(folder)
    caches = [KVCache(model.config, 1, 60) for _ in range(3)]
    for turn, prompt in enumerate(([5, 6, 7], [8], [9, 10, 11, 12], [13, 14])):
        compiled = (False, True, turn % 2 == 0)
        found = [
            collect(model, [prompt], 7, cache=cache, compiled=c, eos_token_ids=(), **how)
            for cache, c in zip(caches, compiled, strict=True)
        ]
        assert found[0] == found[1] == found[2] and len(found[0]) == 7
        length = caches[0].length
        held = [cache.ids[0, : cache.length].tolist() for cache in caches]
        assert held[0] == held[1] == held[2]
        assert relative(caches[1].keys[..., :length, :], caches[0].keys[..., :length, :]) <= 1e-5
        for cache in caches:
            cache.length -= 2 * (turn == 1)


def test_c_follows_the_number_of_threads(folder):
    model, threads = generate.load_model(folder), torch.get_num_threads()
    plain = collect(model, PROMPTS, 8)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert collect(model, PROMPTS, 8, compiled=True) == plain
    finally:
        torch.set_num_threads(threads)


def test_c_whatever_the_defaults_are(folder):
    """What C writes into has its own dtype and is in memory that C reaches."""
    model, prompts = generate.load_model(folder), [[5, 6, 7, 8], [9, 10, 11, 12]]
    plain = collect(model, prompts, 8)
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        made = [*cpu.buffers(2, 3, model.config).values()]
        torch.set_default_device("cpu")
        assert {(x.dtype, x.device.type) for x in made} == {
            (torch.float32, "cpu"), (torch.int64, "cpu")
        }  # fmt: skip
        assert collect(model, prompts, 8, compiled=True) == plain
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_two_models_at_once(folder):
    """In two threads, each with a step of its own."""
    models, found = [build(2), build(3)], [None, None]
    plain = [collect(model, [[5, 6]], 30) for model in models]

    def act(i: int) -> None:
        for _ in range(5):
            found[i] = collect(models[i], [[5, 6]], 30, compiled=True)

    threads = [threading.Thread(target=act, args=(i,)) for i in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == plain


# ------------------------------------------------------------------------------------ building it


def script(folder: Path, text: str) -> str:
    """A compiler of our own."""
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_built_once_and_kept(fresh, folder, monkeypatch):
    """And nothing at all is built, started or written without the flag."""
    model = generate.load_model(folder)
    with audited(folder) as found:
        plain = collect(model, [[5]], 3)
    assert not found and not fresh.exists()
    assert collect(model, [[5]], 3, compiled=True) == plain
    (built,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu, "compile_step", None)
    assert collect(model, [[5]], 3, compiled=True) == plain
    monkeypatch.setattr(cpu, "FLAGS", [*cpu.FLAGS, "-DOTHER"])
    assert not built.name.startswith(cpu.built_name(torch.float32, True))


@pytest.mark.parametrize("cache", ("a file", "no home", "a link", "another user's", "open to all"))
def test_a_cache_that_cannot_be_used(cache, fresh, folder, monkeypatch):
    """Then it is built for this process alone, and leaves nothing."""
    if cache == "a file":
        fresh.parent.write_text("")
    elif cache == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification ignores
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif cache == "a link":
        fresh.parent.mkdir()
        (fresh.parent / "other").mkdir()
        fresh.symlink_to(fresh.parent / "other")
    elif cache == "another user's":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    else:
        fresh.parent.mkdir()
        fresh.parent.chmod(0o777)
    model = generate.load_model(folder)
    assert collect(model, [[5]], 3, compiled=True) == collect(model, [[5]], 3)
    kept = [*fresh.parent.rglob("*.so")] if fresh.parent.is_dir() else []
    assert not kept and not Path("relative").exists()


def spoil(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how in ("cut", "zeros"):  # in a new file: this process has the old one mapped to the end
        file.unlink()
        file.write_bytes(data[: len(data) // 2] if how == "cut" else bytes(len(data)))
    elif how == "writable":
        file.chmod(0o777)
    else:
        file.unlink()
        if how == "a FIFO":
            os.mkfifo(file)
        elif how == "a link":
            other = file.with_name("other")
            other.write_bytes(data)
            file.symlink_to(other)
        else:  # a library, by its name whole, that is not ours
            subprocess.run(
                [*cpu.compiler(), "-shared", "-x", "c", os.devnull, "-o", str(file)], check=True
            )
            name = file.name.rpartition("-")[0]
            file.rename(file.with_name(f"{name}-{cpu.digest(file.read_bytes())}.so"))


@pytest.mark.parametrize("how", ("cut", "zeros", "writable", "a FIFO", "a link", "no symbols"))
def test_a_library_that_is_not_whole_is_built_anew(how, fresh, folder):
    """In place: before, it ended in SIGBUS, a wait or an AttributeError, for ever."""
    model = generate.load_model(folder)
    plain = collect(model, [[5]], 3)
    assert collect(model, [[5]], 3, compiled=True) == plain
    (built,) = fresh.iterdir()
    before = built.read_bytes()
    spoil(built, how)
    cpu.library.cache_clear()
    assert collect(model, [[5]], 3, compiled=True) == plain
    (again,) = (file for file in fresh.iterdir() if file.suffix == ".so")
    assert again.is_file() and not again.is_symlink() and again.stat().st_mode & 0o777 == 0o700
    assert again.name.endswith(f"{cpu.digest(again.read_bytes())}.so")
    assert len(again.read_bytes()) == len(before)


def test_a_compiler_has_a_limit_of_time(fresh, folder, tmp_path, monkeypatch):
    """Of CPU time, which goes on to count when this process has ended."""
    monkeypatch.setattr(cpu, "CPU_SECONDS", 1)
    monkeypatch.setenv("CC", script(tmp_path, "while :; do :; done"))
    with pytest.raises(ValueError, match="compiled steps: .* failed: no message"):
        collect(generate.load_model(folder), [[5]], 2, compiled=True)


def test_the_name_has_the_processor_in_it(tmp_path, monkeypatch):
    """Where there is no /proc/cpuinfo, too: as the compiler describes it."""
    names = {cpu.built_name(torch.float32, True)}
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    for macro in ("__AVX2__", "__AVX512F__"):
        monkeypatch.setenv("CC", script(tmp_path, f"echo '#define {macro} 1'"))
        names.add(cpu.built_name(torch.float32, True))
    assert len(names) == 3


def test_openmp_is_in_the_name(fresh, folder, tmp_path, monkeypatch):
    """A library without it is not taken, once the compiler has it."""
    text = 'test -e "$0.new" || case "$*" in *"-fopenmp "*) exit 1;; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path, text))
    model = generate.load_model(folder)
    for form, built in (("C, in one thread (no OpenMP)", 1), ("C", 2)):
        collect(model, [[5]], 2, compiled=True)
        assert fast.description(model) == form and len([*fresh.iterdir()]) == built
        (tmp_path / "compiler.new").write_text("")
        cpu.library.cache_clear()


@pytest.mark.parametrize("text, words", (
    (None, r"need a C compiler; tried '.* \(\$CC, cc\)"),
    ("echo 'cpu.c:1: error: no' >&2; echo more >&2; exit 1", "failed: cpu.c:1: error: no$"),
    ("exit 3", "failed: no message$"),
    ("exit 0", "failed: it built no library that can be loaded$"),
))  # fmt: skip
def test_a_compiler_that_fails(text, words, fresh, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, text) if text else str(tmp_path / "compiler"))
    with pytest.raises(ValueError, match=words) as error:
        collect(generate.load_model(folder), [[5]], 2, compiled=True)
    assert "\n" not in str(error.value)
    assert not [*fresh.iterdir()]


def test_a_compiler_that_cannot_be_split(fresh, folder, monkeypatch):
    """A quotation mark alone: --compile says so, and without it nobody asks."""
    monkeypatch.setenv("CC", '"')
    model = generate.load_model(folder)
    assert not cpu.has_compiler() and not fast.pays(model)
    with pytest.raises(ValueError, match="need a C compiler; tried"):
        collect(model, [[5]], 2, compiled=True)


@pytest.mark.parametrize("lacks, form", (
    ("-fopenmp", "C, in one thread .no OpenMP."), ("-march=native", "C"), ("nothing", "C"),
))  # fmt: skip
def test_what_a_compiler_lacks(lacks, form, fresh, folder, tmp_path, monkeypatch):
    """OpenMP, or the name that others have for this processor."""
    text = f'case "$*" in *"{lacks} "*) exit 1;; esac\nexec cc $(echo "$*" | sed s/-mcpu=native//)'
    monkeypatch.setenv("CC", script(tmp_path, text))
    model = generate.load_model(folder)
    assert collect(model, PROMPTS, 5, compiled=True) == collect(model, PROMPTS, 5)
    assert re.fullmatch(form, fast.description(model))


def test_an_openmp_that_cannot_be_loaded(fresh, folder, tmp_path, monkeypatch):
    """A compiler may build against it all the same, as zig cc does."""
    (tmp_path / "gone.c").write_text("void gone(void); void call(void) { gone(); }")
    text = f'case "$*" in *"-fopenmp "*) exec cc "$@" {tmp_path}/gone.c;; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path, text))
    model = generate.load_model(folder)
    assert collect(model, PROMPTS, 5, compiled=True) == collect(model, PROMPTS, 5)
    assert "no OpenMP" in fast.description(model)


def test_what_compiling_would_bring(folder, monkeypatch):
    """Said of a large model where there is a compiler, and of no other."""
    model = generate.load_model(folder)
    assert not fast.pays(model)
    monkeypatch.setattr(GraniteMoeForCausalLM, "num_parameters", lambda self: 2e8)
    assert fast.pays(model)
    assert not fast.pays(model.half())
    monkeypatch.setenv("CC", "there-is-none")
    assert not fast.pays(model.float())


def refused(model: GraniteMoeForCausalLM, words: str) -> None:
    """One ValueError of one line, by generate, before anything is written or yielded."""
    with pytest.raises(ValueError, match=f"^{words}") as error:
        collect(model, [[5]], 2, compiled=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 170


def test_what_c_cannot_run(folder):
    half = generate.load_model(folder, dtype="float16")
    refused(half, "compiled steps: .*bfloat16 or float32; got cpu, float16")


@pytest.mark.parametrize("table, name", (
    ("attention", "eager"), ("attention", "flash"), ("attention", "mine"),
    ("experts", "grouped"), ("experts", "gathered"), ("experts", "mine"),
))  # fmt: skip
def test_named_forms_are_not_compiled(table, name, folder, monkeypatch):
    """Of another name than "auto" may mean: the compiled steps would not be them."""
    monkeypatch.setitem(granitemoe.ATTENTION, "mine", granitemoe.attend_eager)
    monkeypatch.setitem(granitemoe.EXPERTS, "mine", granitemoe.experts_loop)
    model = generate.load_model(folder, **{f"{table}_backend": name})
    refused(model, f"compiled steps: have forms of their own; .*'{name}'.* were asked for$")


@pytest.mark.parametrize("experts", ("auto", "loop", "batched"))
def test_forms_that_are_compiled(experts, folder):
    """What "auto" means here and on a GPU."""
    plain = collect(generate.load_model(folder), PROMPTS, 5)
    model = generate.load_model(folder, attention_backend="sdpa", experts_backend=experts)
    assert collect(model, PROMPTS, 5, compiled=True) == plain


def test_c_texts_are_laid_out():
    """By clang-format, where it is installed."""
    tool = shutil.which("clang-format") or shutil.which(
        "clang-format", path=Path(sys.executable).parent
    )
    if tool is None:
        pytest.skip("clang-format is not installed")
    line = [tool, "--dry-run", "-Werror", *cpu.SOURCES]
    assert subprocess.run(line, cwd=ROOT, capture_output=True).returncode == 0


@torch.no_grad()
def test_numbers_that_only_an_order_keeps_finite():
    """weight * (x * scale) where weight * x overflows, in a step and a prompt; NaN stays NaN; and
    the last of an odd number of hidden values is infinite."""
    model = build(4, num_hidden_layers=1)
    model.model.embed_tokens.weight.data *= 1e18
    model.model.norm.weight.data *= 1e19
    ours, plain = both(model, random_rows(model, 2, 6), 2)
    assert torch.isfinite(plain).all() and relative(ours, plain) <= 1e-5
    model.model.norm.weight.data[0] = torch.nan
    ours, plain = both(model, random_rows(model, 2, 6), 2)
    assert torch.isnan(plain).all() and torch.isnan(ours).all()
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up, down = torch.zeros(1, 6, 2).bfloat16(), torch.ones(1, 2, 3).bfloat16()
    gate_up[0, 2, 0] = gate_up[0, 5, 0] = 1e30
    given = (one.repeat(1, 2), gate_up, down, one, torch.zeros(1, 1, dtype=torch.long))
    assert torch.isposinf(cpu.experts_in_c(*given)).all()


def test_c_texts_are_short():
    """As a reader was promised; nothing that a compiler warns of."""
    lines = {file.name: file.read_text().splitlines() for file in cpu.SOURCES}
    assert len(lines["cpu.c"]) <= 370 and len(lines["prompt.c"]) <= 310
    assert max(len(line) for text in lines.values() for line in text) <= 100
    texts = [str(file) for file in cpu.SOURCES if file.suffix == ".c"]
    line = [*cpu.compiler(), *cpu.FLAGS, "-fopenmp", "-Wall", "-Wextra", "-Werror", *texts]
    line.append("-Wframe-larger-than=65536")  # arrays of a thread, which may have a small stack
    for flags in cpu.DTYPES.values():
        done = subprocess.run([*line, *flags, "-o", os.devnull], capture_output=True, text=True)
        assert not done.returncode, done.stderr
