"""generate() as a function that others build on: its arguments, its faults, and what it leaves.

Run as a script, it generates many tokens and fails if memory grows:

    python tests/test_generation.py 100000 [FOLDER]
"""

import itertools
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CONFIG,
    IDS,
    ROOT,
    TESTS,
    audited,
    checkpoint,
    collect,
    needs_compiler,
    on_linux,
    representing,
    scripted,
    write_files,
)  # fmt: skip

import generate
from generate import load_model, load_tokenizer, sampling_probs
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache

NAN, INF = float("nan"), float("inf")
PROMPTS = [[5, 9], [0, 0, 0, 7], [299], [64, 7, 31, 200, 5, 250]]
SAMPLED = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "seed": 3}


# --------------------------------------------------------------------------------------- arguments

BAD_PROMPTS = {
    "no list": 5, "a tuple": ([5],), "no prompt": [], "a text": "ab", "ids without a row": [5, 6],
    "an empty row": [[5], []], "negative": [[5], [6, -1]], "too large": [[5], [6, 300]],
    "float": [[5], [6, 1.0]], "bool": [[5], [6, True]], "none": [[5], [6, None]],
    "text": [[5], [6, "7"]], "tensor": [torch.tensor([5])], "2^70": [[5], [6, 2**70]],
}  # fmt: skip
BAD_ARGUMENTS = [
    *[("temperature", x) for x in (-1, -1e-9, NAN, INF, 1e-45, "1", None, True, 1e30)],
    *[("top_p", x) for x in (0, -0.1, 1.5, NAN, "1", None)],
    *[("top_k", x) for x in (-1, 2.5, 2.0, "1", None, NAN)],
    *[("min_p", x) for x in (-0.1, 1.1, NAN, None)],
    *[("repetition_penalty", x) for x in (0, -1, NAN, INF, None)],
    *[("max_new_tokens", x) for x in (-1, 2.5, NAN, None, "3", True)],
    *[("seed", x) for x in (-1, 2**64, 1.5, "1", NAN)],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(name, model):
    """Refused at the call, not at the first step; an id is named with its place."""
    with pytest.raises(ValueError, match="prompts") as caught:
        generate.generate(model, BAD_PROMPTS[name], 3)
    if name in ("negative", "too large", "float", "bool", "none", "text", "2^70"):
        assert "prompts[1][1]" in str(caught.value) and "299" in str(caught.value)


@pytest.mark.parametrize("name, value", BAD_ARGUMENTS)
def test_bad_arguments(name, value, model):
    arguments = {"max_new_tokens": 3, name: value}
    with pytest.raises(ValueError, match=name):
        generate.generate(model, PROMPTS, **arguments)
    if name in ("temperature", "top_p", "top_k", "min_p"):
        with pytest.raises(ValueError, match=name):
            sampling_probs(torch.zeros(1, 9), **{name: value})


@pytest.mark.parametrize("eos", (None, (), [], 64, [1, 64], {64}))
def test_ends(eos, tmp_path):
    """A row yields what ends it, then None; None as an end is no end."""
    model = load_model(write_files(tmp_path / "m", scripted(ids := [5, 9, 64, 7, 8])))
    rows = [row[0] for row in collect(model, [[5]], 4, eos_token_ids=eos)]
    assert rows == (ids[1:3] if eos else ids[1:])


def test_limits(model):
    """No tokens, more than the context holds, and a prompt that is too long."""
    context = CONFIG["max_position_embeddings"]
    assert collect(model, PROMPTS, 0) == []
    for size in (1, context - 1, context):
        assert len(collect(model, [[5] * size], 10**12)) == context - size
    with pytest.raises(ValueError, match=f"has {context + 1} tokens, .* {context}"):
        collect(model, [[5] * (context + 1)])


def test_some_token_is_always_left():
    """Whatever is cut away, probabilities stay probabilities; equal logits give the first id."""
    rng = random.Random(0)
    for _ in range(300):
        logits = torch.randn(2, 11) * 10.0 ** rng.randint(-3, 3)
        cut = {"top_k": rng.choice((0, 1, 5, 99)), "top_p": rng.choice((1e-9, 0.5, 1.0))}
        cut |= {"min_p": rng.choice((0.0, 1.0)), "temperature": rng.choice((1e-4, 1, 1e4))}
        probs = sampling_probs(logits, **cut)
        assert torch.isfinite(probs).all() and torch.allclose(probs.sum(-1), torch.ones(2))
        assert torch.equal(probs.gather(-1, logits.argmax(-1, True)), probs.amax(-1, True))
    assert sampling_probs(torch.zeros(1, 9), temperature=0).argmax() == 0


# ------------------------------------------------------------------------------ the model's inputs

TWO = torch.tensor([[5, 6, 7], [8, 9, 10]])
ONES = torch.ones(2, 3, dtype=torch.long)
AGAIN = torch.tensor([[0, 1, 0], [0, 1, 2]])
BAD_INPUTS = {
    "a row": ({"input_ids": TWO[0]}, "input_ids"),
    "empty": ({"input_ids": TWO[:, :0]}, "input_ids"), "no rows": ({"input_ids": TWO[:0]}, "input"),
    "floats": ({"input_ids": TWO.float()}, "input_ids"), "bools": ({"input_ids": TWO > 6}, "input"),
    "mask too short": ({"attention_mask": ONES[:, :2]}, "attention_mask"),
    "mask of a row": ({"attention_mask": ONES[:1]}, "attention_mask"),
    "mask of 4 dimensions": ({"attention_mask": ONES[None, None]}, "attention_mask"),
}  # fmt: skip
BAD_CACHES = {"of one row": {"batch_size": 1}, "too short": {"max_length": 2}}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(name, model):
    inputs, word = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=word):
        model(**{"input_ids": TWO, **inputs})


@pytest.mark.parametrize("mask", (ONES * 7, ONES * -2, ONES.bool(), ONES.int()))
def test_a_mask_means_its_truth(mask, model):
    """On every device alike: any number but 0 is a token, in the logits and in the loss."""
    mask[1, 0] = 0
    more = {"output_router_logits": True}
    a, b = (model(TWO, attention_mask=m, **more) for m in (mask, mask.bool().long()))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.aux_loss, b.aux_loss)


def test_a_mask_may_have_holes(model):
    """What is masked is as if it were not there, for those who look back at it."""
    mask, positions = TWO != 6, torch.tensor([[0, 1, 1], [0, 1, 2]])
    holed = model(TWO, attention_mask=mask, position_ids=positions).logits[0, 2]
    assert torch.allclose(holed, model(TWO[:1, [0, 2]]).logits[0, 1], atol=1e-5)


def test_compiled_as_a_whole(model):
    """A graph cannot ask whether a row's positions start anew."""
    inputs = {"attention_mask": ONES, "position_ids": ONES.cumsum(1) - 1}
    forward = torch.compile(model.model, fullgraph=True, backend="eager")
    model.model.config.experts_backend = "gathered"
    try:
        with torch.no_grad():
            whole = forward(TWO, **inputs)[0]
            assert torch.allclose(whole, model.model(TWO, **inputs)[0], atol=1e-5)
    finally:
        model.model.config.experts_backend = "loop"


def test_padding_may_have_any_position(model):
    """It starts nothing anew, on either side. (But for a last bit: with its experts, the number of
    rows changes in products that real tokens share.)"""
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    a, b = (
        model(TWO, attention_mask=mask, position_ids=torch.tensor(positions)).logits[mask.bool()]
        for positions in ([[1, 0, 1], [0, 1, 1]], [[0, 0, 1], [0, 1, 0]])
    )
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("ids", (TWO - 9, TWO * 100))
def test_ids_out_of_range(ids, model):
    """The embedding refuses them on a CPU; generate looks at every id, whatever the device."""
    with pytest.raises(IndexError):
        model(ids)


@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches(name, model):
    """Refused before anything is written to them."""
    sizes = {"batch_size": 2, "max_length": 9, "dtype": torch.float32, **BAD_CACHES[name]}
    kept = {key: sizes.pop(key) for key in ("batch_size", "max_length", "dtype")}
    cache = KVCache(GraniteMoeConfig.from_dict({**CONFIG, **sizes}), **kept)
    with pytest.raises(ValueError, match="cache"):
        model(TWO, cache=cache)
    assert cache.length == 0


def test_flash_says_what_it_cannot_do(model, tmp_path):
    """An unavailable kernel is refused by name; another in its place would hide that."""
    flash = load_model(write_files(tmp_path / "m", checkpoint()), attention_backend="flash")
    assert torch.allclose(flash(TWO).logits, model(TWO).logits, atol=1e-5)
    with pytest.raises(ValueError, match="flash.*mask"):
        flash(TWO, attention_mask=ONES)


@pytest.mark.parametrize("compiled", (False, pytest.param(True, marks=needs_compiler)))
def test_a_penalty_counts_what_the_cache_holds(compiled, model):
    """However it came there, and no more than that: a conversation is one long prompt."""
    parts, how = [IDS, [9, 40], [11]], {"repetition_penalty": 1.9, "compiled": compiled}
    whole = collect(model, [sum(parts, [])], 8, **how)
    cache = KVCache(model.config, 1, 32)
    collect(model, [parts[0]], 1, cache=cache, **how)
    with torch.no_grad():
        model(torch.tensor([parts[1]], dtype=torch.int32), cache=cache)
    assert cache.ids[0, : cache.length].tolist() == parts[0] + parts[1]
    assert collect(model, [parts[2]], 8, cache=cache, **how) == whole
    assert whole != collect(model, [sum(parts, [])], 8)
    cache.length = len(parts[0])  # what is dropped counts no longer
    assert collect(model, [parts[1] + parts[2]], 8, cache=cache, **how) == whole


def test_cache_of_generate(model):
    """One row continues in it; more rows than one cannot."""
    whole = collect(model, [IDS], 6)
    cache = KVCache(model.config, 1, 30)
    first = collect(model, [IDS], 3, cache=cache)
    assert first + collect(model, [first[-1]], 3, cache=cache) == whole
    with pytest.raises(ValueError, match="cache"):
        generate.generate(model, PROMPTS, 3, cache=cache)
    with pytest.raises(ValueError, match="prompts"):
        generate.generate(model, [[5] * 25], 3, cache=cache)
    for compiled in (False, True):  # in C, a row that is not given would be read all the same
        with pytest.raises(ValueError, match="cache of one row"):
            generate.generate(
                model, [[5]], 3, cache=KVCache(model.config, 2, 30), compiled=compiled
            )


def test_numpy_integers_are_ids(model):
    """Small ones, too, which would wrap round where a length is added to them."""
    prompt = [np.uint8(i) for i in [7] * 40]
    expected = collect(model, [[7] * 40], 24, eos_token_ids=())
    assert collect(model, [prompt], np.uint8(24), eos_token_ids=()) == expected


def test_numbers_of_numpy_and_pytorch(model):
    """In any place; texts and truth values are none."""
    plain = collect(model, [IDS], 4, temperature=0.5, seed=1, top_k=9, eos_token_ids=[3])
    how = {"temperature": np.float32(0.5), "seed": np.array(1), "top_k": torch.tensor(9)}
    for ends in (np.int64(3), np.array([3]), torch.tensor([3]), [np.uint8(3)]):
        ids = [*map(np.int64, IDS[:-1]), torch.tensor(IDS[-1])]
        assert collect(model, [ids], np.int8(4), **how, eos_token_ids=ends) == plain
    for bad in ("3", ["x"], 2.5, True, [None]):
        with pytest.raises(ValueError, match="eos_token_ids"):
            generate.generate(model, [IDS], 4, eos_token_ids=bad)
    with pytest.raises(ValueError, match="temperature"):
        generate.generate(model, [IDS], 4, temperature=np.True_)


@pytest.mark.parametrize("options", ({}, SAMPLED))
def test_the_callers_default_device_and_dtype(options, tmp_path, model):
    """As notebooks set them; "meta" stands for another device."""
    folder, expected = write_files(tmp_path / "m", checkpoint()), collect(model, PROMPTS, **options)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert collect(load_model(folder), PROMPTS, **options) == expected
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("bad", (NAN, INF, -INF))
def test_logits_that_are_not_finite(bad, temperature, model):
    """Guards against the id 0 that argmax makes of NaN, which is the end of text: a silent stop."""
    calls = itertools.count()

    def spoil(module, args, output) -> None:
        if next(calls) == 3:
            output.logits[0, -1, 17] = bad

    options, steps = {"temperature": temperature, "seed": 3}, []
    hook = model.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="logits.*not finite at step 3"):
        steps.extend(generate.generate(model, [IDS], 9, **options))
    hook.remove()
    assert steps == collect(model, [IDS], 3, **options)


@pytest.mark.parametrize("options", ({}, SAMPLED))
def test_an_exception_leaves_the_model_usable(options, model):
    """Also one that the caller raises between two steps, and a generator that is dropped."""
    before = collect(model, PROMPTS, **options)

    def fail(module, args) -> None:
        raise RuntimeError("for the test")

    running = generate.generate(model, PROMPTS, 20, **options)
    next(running)
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="for the test"):
        list(running)
    hook.remove()
    dropped = generate.generate(model, PROMPTS, 20, **options)
    next(dropped)
    dropped.close()
    assert collect(model, PROMPTS, **options) == before


# ----------------------------------------------------------------------------------- what it leaves


def state(model: GraniteMoeForCausalLM) -> tuple:
    """What a call could change, for the model and the whole process."""
    weights = {name: (w.data_ptr(), w.sum().item(), w.grad) for name, w in model.named_parameters()}
    modes = (model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    threads = (torch.get_num_threads(), threading.active_count(), torch.get_default_dtype())
    seeds = (torch.get_rng_state().tolist(), random.getstate(), len(model.state_dict()))
    return weights, modes, threads, seeds, vars(model.config).copy(), os.getcwd(), {**os.environ}


@pytest.mark.parametrize("options", ({}, SAMPLED, {"temperature": 1.0}))
def test_leaves_no_trace(options, model):
    """Neither afterwards nor in the caller's code between two steps."""
    collect(model, PROMPTS)
    before = state(model)
    for _ in generate.generate(model, PROMPTS, 5, **options):
        assert state(model) == before
    assert state(model) == before


def test_threads(model):
    """Four at once, greedy and sampled, give what each gives alone."""
    jobs = [(p, o) for p in (PROMPTS, *[[p] for p in PROMPTS]) for o in ({}, SAMPLED)] * 4
    alone = [collect(model, prompts, **options) for prompts, options in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: collect(model, job[0], **job[1]), jobs))
    assert together == alone and len({str(ids) for ids in alone}) > 5


def test_two_at_once(model, tmp_path):
    """Two generations, and two models, take turns step by step."""
    other = load_model(write_files(tmp_path / "m", scripted([5, 9, 64])))
    runs = [(model, [IDS]), (model, PROMPTS), (other, [[5]])]
    alone = [collect(m, prompts) for m, prompts in runs]
    turns = itertools.zip_longest(*[generate.generate(m, p, 20) for m, p in runs])
    assert [[x for x in steps if x is not None] for steps in zip(*turns, strict=True)] == alone


def test_side_effects(tmp_path):
    """Loading and generating open the checkpoint's files and do nothing else to the world."""
    folder = write_files(tmp_path / "model", checkpoint())
    (folder / "pytorch_model.bin").write_bytes(b"x")
    load_model(folder)  # what is imported late, is imported
    with audited(folder) as harm:
        model, tok = load_model(folder), load_tokenizer(folder)
        assert tok.decode([row[0] for row in collect(model, [tok.encode("ab").ids])])
        collect(model, PROMPTS, **SAMPLED)
    assert harm == []
    with audited(folder) as harm:  # the audit sees what it is for
        (folder / "pytorch_model.bin").read_bytes()
        (folder / "config.json").open("a").close()
        subprocess.run(["true"], check=True)
    assert len(harm) >= 3


# --------------------------------------------------------------------------------------------- soak


def anonymous() -> int:
    """Bytes of memory that are this process's own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def soak(count: int, folder: Path = ROOT / "tiny") -> int:
    """Generate `count` tokens; once warm, memory may grow by 1 MiB and no more.

    In float32: in bfloat16 oneDNN keeps a compiled product for each number of rows that an
    expert has ever got, a thousand at most, which hides whether anything of ours grows.
    """
    model, made, base, rng = load_model(folder, dtype="float32"), 0, None, random.Random(0)
    warm = max(count // 10, 6000)
    context, last = model.config.max_position_embeddings, model.config.vocab_size - 1
    while made < count:
        prompts = [[rng.randint(0, last) for _ in range(rng.randint(1, 40))] for _ in range(2)]
        for ids in generate.generate(model, prompts, min(256, context), temperature=1.0):
            made += sum(i is not None for i in ids)
        if base is None and made >= warm:
            base = anonymous()
            files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    drift = anonymous() - base
    same = files == len(os.listdir("/proc/self/fd")), threads == len(os.listdir("/proc/self/task"))
    print(f"{made} tokens of {folder.name}: memory {drift / 1024:+.0f} KiB after the first {warm}")
    return 0 if drift <= 2**20 and all(same) else 1


@on_linux
@pytest.mark.parametrize("count", representing((11_000, 7_500), 7_500))
def test_soak(count, tmp_path):
    """Tokens after the first 6,000, by when all is warm; of a smaller model where they are few."""
    folder = ROOT / "tiny" if count > 10_000 else write_files(tmp_path / "model", checkpoint())
    line = [sys.executable, str(TESTS / "test_generation.py"), str(count), str(folder)]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


if __name__ == "__main__":
    sys.exit(soak(int(sys.argv[1]), *map(Path, sys.argv[2:])))
