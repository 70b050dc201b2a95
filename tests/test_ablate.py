"""lessons/ablate.py: each change against another way to make it."""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import CONFIG, ROOT, checkpoint, collect, write_files
from safetensors.torch import load, save

import generate

sys.path.insert(0, str(ROOT / "lessons"))

from lessons import ablate, score  # noqa: E402

L, E, K = 2, 5, 3  # of the checkpoint
IDS = torch.randint(280, (90,), generator=torch.Generator().manual_seed(3)).tolist()
NOTHING = {"top_k": None, "scalar": None, "no_renormalise": False, "drop_expert": None}
NOTHING |= {"swap_experts": None}
EXPERTS = ("input_linear.weight", "output_linear.weight")


def scores(model) -> torch.Tensor:
    return score.log_probs(model, IDS, 64, 32)


def changed_scores(model, **change) -> torch.Tensor:
    with ablate.broken(model, argparse.Namespace(**NOTHING | change)) as changed:
        return scores(changed)


def edited(tmp_path, edit=lambda tensors: None, **config):
    """The checkpoint written anew with other tensors or another config, and loaded."""
    files = checkpoint()
    tensors = load(files["model.safetensors"])
    edit(tensors)
    files = {**files, "config.json": json.dumps({**CONFIG, **config}).encode()}
    return generate.load_model(write_files(tmp_path, {**files, "model.safetensors": save(tensors)}))


@pytest.fixture(autouse=True)
def unharmed(model):
    """Whatever a change was, the model that it was made on is as before."""
    config, before = dataclasses.replace(model.config), scores(model)
    yield
    assert model.config == config and torch.equal(scores(model), before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_that_of_a_checkpoint(k, model, tmp_path):
    other = edited(tmp_path, num_experts_per_tok=k)
    assert torch.equal(changed_scores(model, top_k=k), scores(other))
    assert not torch.equal(scores(other), scores(model))


@pytest.mark.parametrize("name", ablate.SCALARS)
def test_a_scalar_is_that_of_a_checkpoint(name, model, tmp_path):
    other = edited(tmp_path, **{name: 0.7})
    assert torch.equal(changed_scores(model, scalar=f"{name}=0.7"), scores(other))
    assert not torch.equal(scores(other), scores(model))


@pytest.mark.parametrize("name", ablate.SCALARS[:3])
def test_a_scalar_can_be_zero(name, model):
    """What no config.json may have: against the same number set in the parts that use it."""
    other = copy.deepcopy(model)
    if name == "embedding_multiplier":  # only zeros go in, so that every token is equally likely
        even = torch.full((len(IDS) - 1,), -math.log(CONFIG["vocab_size"]))
        torch.testing.assert_close(changed_scores(model, scalar=f"{name}=0"), even)
    for layer in other.model.layers:
        if name == "attention_multiplier":  # a query of zeros sees all keys alike
            layer.self_attn.q_proj.weight.data.zero_()
        if name == "residual_multiplier":  # nothing of what a layer returns
            layer.self_attn.o_proj.weight.data.zero_()
            layer.block_sparse_moe.output_linear.weight.data.zero_()
    if name == "embedding_multiplier":
        other.model.embed_tokens.register_forward_hook(lambda _, x, y: torch.zeros_like(y))
    torch.testing.assert_close(changed_scores(model, scalar=f"{name}=0"), scores(other))
    assert not torch.allclose(scores(other), scores(model), atol=1e-3)


def test_changed_configs_share_the_weights(model):
    changed = ablate.under(model, num_experts_per_tok=1)
    for mine, theirs in zip(changed.parameters(), model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()


def test_a_dropped_expert_is_one_that_returns_zero(model, tmp_path):
    """In that layer alone; the same as a down matrix of zeros."""
    seen = []
    for layer in range(L):
        for e in range(E):
            name = f"model.layers.{layer}.block_sparse_moe.output_linear.weight"
            other = edited(tmp_path, lambda tensors, n=name, e=e: tensors[n][e].zero_())
            found = changed_scores(model, drop_expert=f"{layer}:{e}")
            torch.testing.assert_close(found, scores(other))
            assert not torch.allclose(found, scores(model), atol=1e-3)
            seen.append(-found.double().mean().item())
    table = ablate.drop_each(model, IDS)
    assert table.shape == (L, E) and table.flatten().tolist() == pytest.approx(seen, abs=1e-5)


def test_swapped_experts_are_swapped_matrices(model, tmp_path):
    def edit(tensors):
        for name in EXPERTS:
            tensor = tensors[f"model.layers.1.block_sparse_moe.{name}"]
            tensor[[0, 3]] = tensor[[3, 0]]

    found = changed_scores(model, swap_experts="1:0:3")
    torch.testing.assert_close(found, scores(edited(tmp_path, edit)))
    assert not torch.allclose(found, scores(model), atol=1e-3)
    assert torch.equal(found, changed_scores(model, swap_experts="1:3:0"))


def test_numbers_of_experts_mean_nothing(model, tmp_path):
    """Matrices and rows of the router exchanged together: the same model."""

    def edit(tensors):
        for name in (*EXPERTS, "router.layer.weight"):
            tensor = tensors[f"model.layers.1.block_sparse_moe.{name}"]
            tensor[[0, 3]] = tensor[[3, 0]]

    torch.testing.assert_close(scores(edited(tmp_path, edit)), scores(model))


def test_swapping_twice_is_no_change(model):
    args = argparse.Namespace(**NOTHING | {"swap_experts": "0:1:4"})
    with ablate.broken(model, args) as once, ablate.broken(once, args) as twice:
        torch.testing.assert_close(scores(twice), scores(model))


def test_without_renormalising(model):
    """The weights are the K largest of a softmax over all E: less than 1 together, unless K = E."""
    ids = torch.tensor([IDS[:20]])
    seen = []
    router = model.model.layers[1].block_sparse_moe.router
    args = argparse.Namespace(**NOTHING | {"no_renormalise": True})
    with ablate.broken(model, args) as changed, torch.no_grad():
        hook = router.register_forward_hook(lambda _, inputs, output: seen.append(output))
        changed(ids)
        hook.remove()
    logits, weights, expert_ids = seen[0]
    top = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    assert torch.equal(expert_ids, logits.topk(K).indices)
    torch.testing.assert_close(weights, top.topk(K).values)
    assert (weights.sum(dim=1) < 0.999).all()
    assert not torch.allclose(changed_scores(model, no_renormalise=True), scores(model), atol=1e-3)
    all_chosen = ablate.under(model, num_experts_per_tok=E)
    found = changed_scores(all_chosen, no_renormalise=True)
    torch.testing.assert_close(found, scores(all_chosen))


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(monkeypatch, capsys, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the theory of the string, (and) in the other\n" * 9, encoding="utf-8")

    def act(*arguments: object) -> str:
        given = ["ablate.py", "--model", folder, "--file", text, "--prompt", "the", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        ablate.main()
        return capsys.readouterr().out

    return act


def test_loss_and_text_are_printed(run, folder, model, tmp_path):
    """Of both models, the text from the same random numbers."""
    printed = run("--drop-expert", "1:2", "--seed", 5)
    tokenizer = generate.load_tokenizer(folder)
    ids = [0, *tokenizer.encode((tmp_path / "text.txt").read_text()).ids]
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "eos_token_ids": 0}
    prompt, expected, losses = tokenizer.encode("the").ids, [], []
    args = argparse.Namespace(**NOTHING | {"drop_expert": "1:2"})
    for each in (contextlib.nullcontext(model), ablate.broken(model, args)):
        with each as changed:
            new = [row[0] for row in collect(changed, [prompt], 48, **how)]
            losses.append(-score.log_probs(changed, ids, 64, 32).double().mean().item())
        text = tokenizer.decode(prompt + new)
        expected.append(ablate.indent(ablate.CONTROL.sub("\ufffd", text), "    "))
    assert expected[0] != expected[1] and "\x1b" not in printed
    head, _, texts = printed.partition("\n\n")
    assert head == (
        f"text.txt: {len(ids) - 1} tokens, loss in nats a token\nunchanged  {losses[0]:.4f}\n"
        f"changed    {losses[1]:.4f}  {losses[1] - losses[0]:+.4f}"
    )
    assert texts == "unchanged:\n{}\n\nchanged:\n{}\n".format(*expected)


def test_each_expert_dropped_is_a_table_and_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "drop.svg"
    printed = run("--drop-expert", "all", "--plot", out)
    rows = re.findall(r"^\| (\d) \|((?: [+-]\d\.\d{3} \|)+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1"] and rows[0][1].count("|") == E
    one = re.search(r"([+-][\d.]+)$", run("--drop-expert", "1:4"), re.MULTILINE)[1]
    assert float(rows[1][1].split("|")[4]) == pytest.approx(float(one), abs=6e-4)
    picture = out.read_bytes()
    assert b"<svg" in picture
    run("--drop-expert", "all", "--plot", out)
    assert picture.partition(b"</metadata>")[2] == out.read_bytes().partition(b"</metadata>")[2]


def test_progress_of_each_expert(run, monkeypatch):
    """Over all of them, on standard error: it rises to the end."""
    printed, said = run("--drop-expert", "all"), []
    note = contextlib.nullcontext(lambda done, of: said.append((done, of)))
    monkeypatch.setattr(ablate, "progress", lambda what: note)
    assert run("--drop-expert", "all") == printed
    (first, tokens), rest = said[0], said[-1]
    whole = [done for done, of in said if of == rest[1]]
    assert first < tokens and rest == (L * E * tokens, L * E * tokens)
    assert whole == sorted({*whole}) and len(whole) > L * E


def test_a_picture_needs_matplotlib(run, monkeypatch, tmp_path):
    """Said before the work: nothing is printed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(ablate, "loss", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run("--drop-expert", "all", "--plot", tmp_path / "drop.svg")


NUMBER = r"--scalar residual_multiplier: must be a number from 0 to 1e\+18, "


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("--top-k 6", "--top-k: must be at most 5, the experts, got 6"),
        ("--drop-expert 2:0", "numbers up to 1:4, got '2:0'"),
        ("--drop-expert 0:5", "numbers up to 1:4, got '0:5'"),
        ("--drop-expert 0", "numbers up to 1:4, got '0'"),
        ("--drop-expert=-1:0", "numbers up to 1:4, got '-1:0'"),
        ("--drop-expert=", "numbers up to 1:4, got ''"),
        ("--drop-expert nan", "--drop-expert: must be L:E, numbers up to 1:4, got 'nan'"),
        ("--swap-experts 0", "--swap-experts: must be L:A:B, numbers up to 1:4:4, got '0'"),
        ("--drop-expert All", "numbers up to 1:4, got 'All'"),
        ("--drop-expert 0:1:2", "numbers up to 1:4, got '0:1:2'"),
        ("--swap-experts 0:1", "numbers up to 1:4:4, got '0:1'"),
        ("--swap-experts 0:1:5", "numbers up to 1:4:4, got '0:1:5'"),
        ("--scalar width=1", "must be one of embedding_multiplier, .*, got 'width'"),
        ("--scalar residual_multiplier", NUMBER + "got ''"),
        ("--scalar residual_multiplier=x", NUMBER + "got 'x'"),
        ("--scalar residual_multiplier=nan", NUMBER + "got 'nan'"),
        ("--scalar residual_multiplier=-1", NUMBER + "got '-1'"),
        ("--scalar residual_multiplier=1e999", NUMBER + "got '1e999'"),
        ("--scalar logits_scaling=0", "a number from 1e-18 to .*, since it divides .*, got '0'"),
        ("--top-k 1 --prompt=", "--prompt: must have from 1 to 64 tokens, has 0"),
        (f"--top-k 1 --prompt {'0' * 70}", "--prompt: must have from 1 to 64 tokens, has 70"),
        ("--top-k 1 --file EMPTY", "EMPTY': must have a token to score, has none"),
        ("--top-k 1 --file BINARY", "BINARY': must be UTF-8 text, but its byte 1 is 0xff"),
    ],
)
def test_bad_changes_are_refused(arguments, error, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "BINARY").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=error) as caught:
        run(*arguments.split())
    assert "\n" not in str(caught.value) and not capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("", "one of the arguments --top-k .* is required"),
        ("--top-k x", "argument --top-k: must be an integer from 1 to 2147483648, got 'x'"),
        ("--top-k=", "argument --top-k: must be an integer from 1 to 2147483648, got ''"),
        ("--top-k 0", "argument --top-k: must be an integer from 1 to 2147483648, got '0'"),
        ("--top-k -1", "argument --top-k: must be an integer from 1 to 2147483648, got '-1'"),
        ("--top-k 1 --seed -1", "argument --seed: must be an integer from 0 to 9.*, got '-1'"),
        ("--top-k 1 --seed 1.5", "argument --seed: must be an integer from 0 to 9.*, got '1.5'"),
        ("--top-k 1 --file=", "argument --file: must be a path, got ''"),
        ("--top-k 1 --prompt \udcff", r"argument --prompt: must be UTF-8 text, got '\\udcff'"),
        ("--drop-expert all --plot=", "argument --plot: must be a path, got ''"),
        ("--drop-expert all --plot /no/x.svg", "argument --plot: must be a file to write, .*'/no"),
        ("--drop-expert all --plot /", "argument --plot: must be a file to write, .* got '/'"),
        ("--top-k 1 --no-renormalise", "not allowed with argument --top-k"),
        ("--top-k 1 --plot drop.svg", "--plot: needs --drop-expert all"),
    ],
)
def test_bad_usage_is_one_line(arguments, error, run, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments.split())
    assert caught.value.code == 2
    assert re.fullmatch(rf"ablate\.py: error: .*{error}.*\n", capsys.readouterr().err)


def test_errors_of_the_script_are_one_line(tmp_path):
    line = [sys.executable, ROOT / "lessons" / "ablate.py", "--swap-experts", "9:0:1"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"ablate\.py: error: .* got '9:0:1'\n", done.stderr)
