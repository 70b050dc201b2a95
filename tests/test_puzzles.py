"""The puzzles: what is right is solved, what is wrong is told in one line, by name if it is likely.

A guide that praises a wrong answer, or blames a right one, teaches worse than none. So each puzzle
is solved here twice, by granitemoe's own functions and from its docstring, and broken in many ways.
"""

import ast
import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "lessons"))

import answers  # noqa: E402
import puzzles  # noqa: E402

SOURCE = (ROOT / "lessons" / "puzzles.py").read_text(encoding="utf-8")
HEAD = """
import granitemoe
from granitemoe import rope_tables, rotate, swiglu
from generate import Sampling, filtered_probs
from types import SimpleNamespace as Fake

normed, routed = granitemoe.RMSNorm.forward, granitemoe.Router.forward
append = granitemoe.KVCache.append
"""  # bound before pieces stand in their place
OWN = {  # bodies that call granitemoe.py
    "rms_norm": "return normed(Fake(weight=weight, normalized_shape=weight.shape, eps=eps), x)",
    "rotary": """
        config = Fake(head_dim=x.shape[-1], rope_theta=theta)
        return rotate(x, *rope_tables(positions[None], config, x.dtype))""",
    "attention": "return granitemoe.attend_sdpa(q, k, v, None, scale, 0.0)",
    "route": "return routed(Fake(layer=lambda x: F.linear(x, router_ED), top_k=K), x_ND)[1:]",
    "expert": "return F.linear(swiglu(F.linear(x_ND, gate_up_PD)), down_DF)",
    "experts_loop": """
        matrices = gate_up_EPD, down_EDF
        return granitemoe.experts_loop(x_ND, *matrices, weights_NK, expert_ids_NK)""",
    "experts_batched": """
        matrices = gate_up_EPD, down_EDF
        return granitemoe.experts_grouped(x_ND, *matrices, weights_NK, expert_ids_NK)""",
    "load_balancing": "return granitemoe.load_balancing_loss((logits_NE,), K)",
    "cached_step": """
        at = torch.arange(q.shape[2]) + keys.shape[2]
        longer = [F.pad(x[None], (0, 0, 0, q.shape[2])) for x in (keys, values)]
        cache = Fake(keys=longer[0], values=longer[1], length=keys.shape[2])
        keys, values = append(cache, 0, rotary(k, at, theta), v)
        y = granitemoe.attend_eager(rotary(q, at, theta), keys, values, None, scale, 0.0)
        return y, keys, values""",
    "top_p": "return filtered_probs(logits, Sampling(temperature=1.0, top_p=p))",
}
RIGHT = {  # from the docstrings alone
    "rms_norm": """
        wide = x.float()
        root = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        return (wide / root).to(x.dtype) * weight""",
    "rotary": """
        C = x.shape[-1]
        a = positions[:, None] * theta ** (-2 * torch.arange(C // 2) / C)
        u, v = x[..., : C // 2], x[..., C // 2 :]
        y = torch.cat([u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()], -1)
        return y.to(x.dtype)""",
    "attention": """
        H, T, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
        heads = torch.arange(H) // (H // G)
        scores = torch.einsum("bhtc,bhsc->bhts", q, k[:, heads]) * scale
        ahead = torch.arange(S) > torch.arange(T)[:, None] + S - T
        return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v[:, heads]""",
    "route": """
        best, ids = (x_ND @ router_ED.T).topk(K, dim=-1)
        return best.softmax(-1), ids""",
    "expert": """
        half = len(gate_up_PD) // 2
        g, u = x_ND @ gate_up_PD[:half].T, x_ND @ gate_up_PD[half:].T
        return F.silu(g) * u @ down_DF.T""",
    "experts_loop": """
        y = torch.zeros(x_ND.shape)
        for e in range(len(down_EDF)):
            token, choice = torch.where(expert_ids_NK == e)
            rows = expert(x_ND[token], gate_up_EPD[e], down_EDF[e])
            y[token] = y[token] + weights_NK[token, choice][:, None] * rows
        return y.to(x_ND.dtype)""",
    "experts_batched": """
        g, u = torch.einsum("nkpd,nd->nkp", gate_up_EPD[expert_ids_NK], x_ND).chunk(2, -1)
        rows = torch.einsum("nkdf,nkf->nkd", down_EDF[expert_ids_NK], F.silu(g) * u)
        return (rows * weights_NK[:, :, None]).sum(1)""",
    "load_balancing": """
        N, E = logits_NE.shape
        choices = F.one_hot(logits_NE.topk(K).indices, E).sum(1).float().mean(0)
        return E * (choices * logits_NE.softmax(-1).mean(0)).sum()""",
    "cached_step": """
        at = keys.shape[2] + torch.arange(q.shape[2])
        keys = torch.cat([keys, rotary(k, at, theta)], 2)
        values = torch.cat([values, v], 2)
        return attention(rotary(q, at, theta), keys, values, scale), keys, values""",
    "top_p": """
        probs, order = logits.softmax(-1).sort(descending=True)
        probs = probs * (probs.cumsum(-1) - probs < p)
        probs = probs / probs.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, order, probs)""",
}
NAMES = list(RIGHT)
UNWRITTEN = "not written yet (nothing is returned). Fill in its body in my_puzzles.py, then run"
SORTED = """
        K = expert_ids_NK.shape[1]
        ids, order = expert_ids_NK.flatten().sort()
        g, u = torch.einsum("mpd,md->mp", gate_up_EPD[ids], x_ND[order // K]).chunk(2, -1)
        rows = torch.einsum("mdf,mf->md", down_EDF[ids], F.silu(g) * u)
        return (rows.view(len(x_ND), K, -1) * weights_NK[:, :, None]).sum(1)"""
EVERY_LOOP = "return experts_loop(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)"
NEIGHBOURS = """
        C = x.shape[-1]
        a = positions[:, None] * theta ** (-2 * torch.arange(C // 2) / C)
        u, v = x[..., ::2], x[..., 1::2]
        pairs = u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()
        return torch.stack(pairs, -1).flatten(-2)"""
LAYER_NORM = """
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight"""
ALL = """
        best, ids = (x_ND @ router_ED.T).softmax(-1).topk(K)
        return best, ids"""
PLANTED = [  # a puzzle, what of its body is replaced (all, if None) and by what, what must be said
    ("rms_norm", None, LAYER_NORM, "LayerNorm"),
    ("rms_norm", " * weight", "", "The weight is missing"),
    ("rms_norm", "+ eps).sqrt()", ").sqrt() + eps", "eps is added to the root"),
    ("rms_norm", " + eps", "", "eps is missing"),
    ("rms_norm", ".mean(-1", ".sum(-1", "root of the sum"),
    ("rms_norm", ".sqrt()", "", "The root is missing"),
    ("rms_norm", ".mean(-1, keepdim=True)", ".mean()", "The mean is over all tokens"),
    ("rms_norm", ".mean(-1,", ".mean(1,", "y[0, 0, 0] is 1, must be 0.2."),
    ("rms_norm", "* weight", "* weight.detach()", "right, but the gradient of weight is missing."),
    ("rotary", None, NEIGHBOURS, "The pairs are neighbours"),
    ("rotary", "positions[", "torch.arange(len(positions))[", "numbered from 0. Use positions"),
    ("rotary", "positions[", "(1 + positions)[", "one too large"),
    ("rotary", "-2 *", "-1 *", "The exponent is -i/C"),
    ("rotary", "(-2", "(2", "must be"),
    ("rotary", "- v * a.sin(), v * a.cos() +", "+ v * a.sin(), v * a.cos() -", "wrong sign"),
    ("attention", " + S - T", "", "causal by T, but keys are more than queries"),
    ("attention", " + S - T", " + S - T + 1", "one key too many"),
    ("attention", "* scale", "* q.shape[-1] ** -0.5", "divided by the root of C"),
    ("attention", "* scale", "", "scale is not used"),
    ("attention", "// (H // G)", "% G", "uses head h % G"),
    ("attention", ".masked_fill(ahead, -torch.inf)", "", "There is no mask"),
    ("attention", "-torch.inf).softmax(-1)", "0)", "must be"),
    ("attention", ".masked_fill(ahead, -torch.inf).softmax(-1)",
     ".softmax(-1).masked_fill(ahead, 0)", "after the softmax"),
    ("route", None, ALL, "softmax over all experts"),
    ("route", None, ALL.replace("return best", "return best.softmax(-1)"), "taken twice"),
    ("route", "best.softmax(-1)", "best.sigmoid()", "sigmoids"),
    ("route", "best.softmax(-1)", "best", "These are the scores"),
    ("route", "softmax(-1), ids", "softmax(-1).flip(1), ids.flip(1)", "largest must come first"),
    ("route", "(-1), ids", "(-1), ids.float()", "dtype of expert_ids_NK is torch.float32, must"),
    ("expert", "F.silu(g) * u", "F.silu(u) * g", "Gate and up are swapped"),
    ("expert", "F.silu(g) * u", "g * u", "silu is missing"),
    ("expert", "F.silu(g)", "g.sigmoid()", "y_ND[0, 0] is 1.3212, must be 2.6424."),
    ("expert", "[:half].T, x_ND @ gate_up_PD[half:]", "[::2].T, x_ND @ gate_up_PD[1::2]",
     "other row"),
    ("experts_loop", "weights_NK[token, choice][:, None] *", "", "weights are not applied"),
    ("experts_loop", "[:, None] *", "[:, None] ** 2 *", "weights are applied twice"),
    ("experts_loop", "y[token] + ", "", "replaces what an earlier one gave"),
    ("experts_loop", "expert_ids_NK ==", "expert_ids_NK[:, :1] ==", "Only the first choice"),
    ("experts_loop", "[token, choice]", "[token, 0]", "weight of the first choice"),
    ("experts_loop", "range(len(down_EDF))", "range(1, len(down_EDF))", "must be"),
    ("experts_batched", None, EVERY_LOOP, "Is there a loop"),
    ("experts_batched", None, SORTED, "in the order of experts"),
    ("experts_batched", "* weights_NK", "* weights_NK[:, :1]", "must be"),
    ("experts_batched", " * weights_NK[:, :, None]", "", "weights are not applied"),
    ("experts_batched", "weights_NK[", "weights_NK.square()[", "weights are applied twice"),
    ("load_balancing", "E * ", "", "E times the sum"),
    ("load_balancing", "topk(K)", "topk(1)", "Only the first choice"),
    ("load_balancing", ".float().mean(0)", ".float().mean(0) / K", "divided by K"),
    ("load_balancing", ".float().mean(0)", ".float().sum(0)", "One of the two means is a sum"),
    ("load_balancing", "logits_NE.softmax", "logits_NE.detach().softmax", "gradient of logits_NE"),
    ("cached_step", "keys.shape[2] + ", "", "numbered from 0 again"),
    ("cached_step", "return attention(rotary(q, at, theta), keys, values, scale), keys, values",
     "return attention(rotary(q, at, theta), rotary(k, at, theta), v, scale), keys, values",
     "see only the new tokens"),
    ("cached_step", "scale), keys, values",
     "scale), keys[:, :, :-len(at)], values[:, :, :-len(at)]",
     "The new tokens are not in"),
    ("cached_step", "scale), keys, values",
     "scale), keys[:, :, -len(at):], values[:, :, -len(at):]",
     "The old tokens are not in"),
    ("cached_step", "rotary(q, at, theta)", "q", "The queries are not turned"),
    ("cached_step", "[keys, rotary(k, at, theta)]", "[keys, k]", "The new keys are not turned"),
    ("cached_step", "torch.cat([keys, rotary(k, at, theta)], 2)",
     "rotary(torch.cat([keys, k], 2), torch.arange(at[-1] + 1), theta)",
     "old keys are turned again"),
    ("top_p", "- probs < p", "< p", "reaches p is dropped"),
    ("top_p", "- probs < p", "- probs < 1 - p", "keeps 1 - p"),
    ("top_p", "probs / probs.sum(-1, keepdim=True)", "probs", "not divided by its sum"),
    ("top_p", "torch.zeros_like(probs).scatter(-1, order, probs)", "probs", "They are sorted"),
]  # fmt: skip
BAD = [  # bodies of rms_norm that give nothing to compare, and the one line about each
    ("return 1 / 0", "FILE, line LINE: ZeroDivisionError: division by zero"),
    ("raise ValueError('two\\nlines')", "FILE, line LINE: ValueError: two lines"),
    ("return helper(x)", "FILE, line 2: KeyError: 'in helper'"),
    ("raise SystemExit(3)", "FILE, line LINE: SystemExit: 3"),
    ("raise NotImplementedError('x')", "FILE, line LINE: NotImplementedError: x"),
    ("return x.double()", "the dtype of y is torch.float64, must be torch.float32."),
    ("return x.long()", "the dtype of y is torch.int64, must be torch.float32."),
    ("return x[0]", "the shape of y is (1, 2), must be (1, 1, 2)."),
    ("return x, x", "2 came back, must be 1: y."),
    ("return (None,)", "y is missing."),
    ("return 3.0", "y is a float, not a tensor."),
    ("return x.numpy()", "y is a ndarray, not a tensor."),
    ("return x.to_sparse()", "my_puzzles.py: "),
    ("return x.mul_(2)", "it changes its input x. Work on a copy."),
    ("return weight.zero_()", "it changes its input weight. Work on a copy."),
    ("for e in x.mean(): pass", "FILE, line LINE: TypeError: iteration over a 0-d tensor"),
    ("return weight[weight]", "FILE, line LINE: IndexError: tensors used as indices must be long"),
    ("return torch.from_numpy((x / (x.square().mean(-1, True) + eps).sqrt() * weight).numpy())",
     "with gradients, FILE, line LINE: RuntimeError: Can't call numpy()"),
]  # fmt: skip


def fill(bodies: dict[str, str]) -> str:
    """A copy of the puzzles with these bodies."""
    source = SOURCE
    for name, body in bodies.items():
        stub = re.search(rf'^def {name}\(.*?""".*?""" *\n', source, re.DOTALL | re.MULTILINE)
        text = re.sub("^    ", "", body.strip("\n"), flags=re.M) if "\n" in body else f"    {body}"
        source = f"{source[: stub.end()]}{text}\n{source[stub.end() :]}"
    return source.replace("\n\n# ---", f"\n{HEAD * (bodies is OWN)}\n# ---", 1)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """What is printed, and the exit status, for bodies filled in, or for a file of this text."""

    def act(bodies: dict[str, str] | str, *names: str) -> tuple[list[str], int]:
        monkeypatch.chdir(tmp_path)
        text = bodies if isinstance(bodies, str) else fill(bodies)
        Path("my_puzzles.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["puzzles.py", "my_puzzles.py", *names])
        with pytest.raises(SystemExit) as end:
            puzzles.main()
        return capsys.readouterr().out.splitlines(), int(end.value.code)

    return act


@pytest.mark.parametrize("bodies", (OWN, RIGHT), ids=("own", "right"))
def test_right_pieces_are_solved(bodies, run):
    """granitemoe's own functions and independent ones; the model then writes its usual text."""
    lines, status = run(bodies)
    assert status == 0, lines
    assert [line.partition(":")[0] for line in lines[:10]] == NAMES
    assert all(line.split(": ")[1].startswith("solved. Compare with ") for line in lines[:10])
    assert lines[-1] == "It is the text that it writes without them." and "class Stack:" in lines
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines[11 : lines.index(lines[-2]) - 2]) in readme  # whose sampling it is


def test_a_solved_puzzle_names_its_section():
    for name in NAMES:
        file, section, things = re.split(", |: ", answers.PUZZLES[name].place, maxsplit=2)
        source = (ROOT / file).read_text(encoding="utf-8")
        part = re.search(rf"^# -+ {section}$(.*?)(?:^# ---|\Z)", source, re.DOTALL | re.MULTILINE)
        for thing in things.split(", "):
            assert re.search(rf"^(?:def|class) {thing}\b", part[1], re.MULTILINE), (name, thing)


@pytest.mark.parametrize("name, old, new, said", PLANTED, ids=lambda x: str(x)[:15])
def test_mistakes_are_refused(name, old, new, said, run):
    """In one line, whose end names what is likely."""
    body = new if old is None else RIGHT[name].replace(old, new)
    assert body != RIGHT[name]
    lines, status = run(RIGHT | {name: body}, name)
    assert status == 1 and len(lines) == 1 and lines[0].startswith(f"{name}: "), lines
    assert said in lines[0], lines


def test_each_puzzle_has_mistakes_planted():
    for name in NAMES:
        assert sum(planted[0] == name for planted in PLANTED) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_have_different_names(name):
    """What gives what a listed mistake gives is called by its name, not by another's."""
    stub, puzzle = getattr(puzzles, name), answers.PUZZLES[name]
    seen = [[said for said, _ in puzzle.mistakes(*inputs)] for _, inputs in answers.cases(stub)]
    assert all(each == seen[0] for each in seen)
    for n, said in enumerate(seen[0]):
        piece = lambda *inputs, n=n: list(puzzle.mistakes(*inputs))[n][1]  # noqa: E731
        with pytest.raises(answers.Wrong):
            puzzles.check(stub, piece, "")
        assert puzzles.mistake(stub, piece) == said


@pytest.mark.parametrize("body, said", BAD, ids=lambda x: x[:20])
def test_whatever_a_body_does_gets_one_line(body, said, run):
    text = f"def helper(x):\n    raise KeyError('in helper')\n{fill({'rms_norm': body})}"
    line = 1 + text[: text.index(f"    {body}\n")].count("\n")
    lines, status = run(text, "rms_norm")
    assert status == 1 and len(lines) == 1, lines
    said = said.replace("FILE", "my_puzzles.py").replace("LINE", str(line))
    assert lines[0].startswith("rms_norm: for the example in its docstring, ") and said in lines[0]


@pytest.mark.parametrize(
    "body", ("...", "pass", "return ...", "return", "raise NotImplementedError")
)
def test_an_empty_body_says_what_to_do(body, run):
    lines, status = run({"rotary": body}, "rotary")
    assert status == 1 and lines == [
        f"rotary: {UNWRITTEN}",
        "    python lessons/puzzles.py my_puzzles.py rotary",
    ]


def test_a_copy_without_changes(run):
    lines, status = run(SOURCE)
    assert status == 1 and len(lines) == 3 and lines[0].startswith("rms_norm: not written yet (")
    assert lines[2] == f"After it: {', '.join(NAMES[1:])}."


def test_some_are_solved(run):
    """What is solved goes into the model; what is wrong or empty does not, and is told."""
    wrong = {"route": "return x_ND, x_ND", "load_balancing": RIGHT["load_balancing"]}
    lines, status = run({"rms_norm": RIGHT["rms_norm"], "top_p": RIGHT["top_p"], **wrong})
    assert status == 1 and lines[1].startswith("route: for the example")
    assert lines[4] == f"rotary: {UNWRITTEN}"
    assert lines[-2] == "The model in tiny/ wrote this with your rms_norm, top_p."
    assert run({"load_balancing": RIGHT["load_balancing"]})[0][-1].startswith("After it: ")


def test_where_the_text_parts(run):
    """A piece that is right in the small cases alone."""
    body = RIGHT["rms_norm"].replace("* weight", "* (weight if len(weight) < 100 else weight * 2)")
    lines, status = run(RIGHT | {"rms_norm": body})
    assert status == 1 and all(": solved." in line for line in lines[:10])
    parts = r"Here it parts: yours goes on with '.+', granitemoe\.py with '.+'\."
    assert re.fullmatch(parts, lines[-1]) and "class Stack:" in lines
    body = RIGHT["rms_norm"].replace("* weight", "* (weight if len(weight) < 100 else 1 / 0)")
    with pytest.raises(ValueError, match=r"within the model, my_puzzles\.py, line \d+: ZeroDiv"):
        run({"rms_norm": body})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "load_balancing"])
def test_each_piece_works_in_the_model(name):
    """It is called in each layer at each token, or as its kind is. Afterwards it is gone."""
    space, calls = {"__name__": "x"}, []
    exec(fill(RIGHT), space)
    piece = lambda *inputs: calls.append(1) or space[name](*inputs)  # noqa: E731
    usual, mine = answers.write({name: piece}, "def", 4, temperature=0.8, top_p=0.9, seed=8)
    layers, steps = 5, 4
    least = {"rms_norm": 11, "top_p": 1}.get(name, layers) * steps
    assert usual == mine and len(calls) >= least - layers * (name == "experts_batched")
    made = len(calls)
    assert answers.write({}, "def", 4, temperature=0.8, top_p=0.9, seed=8)[1] == usual
    assert len(calls) == made


def test_examples_are_true():
    """The puzzles' own, of granitemoe's functions; and the cases cover what is easily forgotten."""
    own = {name: puzzle.answer for name, puzzle in answers.PUZZLES.items()}
    assert doctest.testmod(puzzles, extraglobs=own).failed == 0
    for name in NAMES:
        assert len(list(answers.cases(getattr(puzzles, name)))) >= 3
    _, (_, positions, _) = list(answers.cases(puzzles.rotary))[1]
    assert 0 not in positions and positions.diff().unique().numel() > 1
    sizes = [dict(re.findall(r"(\w)=(\d+)", x)) for x in answers.PUZZLES["attention"].cases]
    assert any(1 < int(x["T"]) < int(x["S"]) for x in sizes) and any(x["T"] == "1" for x in sizes)
    assert any(x["H"] == x["G"] for x in sizes) and any(
        1 < int(x["G"]) < int(x["H"]) for x in sizes
    )
    for name in ("experts_loop", "experts_batched"):
        _, (x_ND, gate_up, _, weights, ids) = list(answers.cases(getattr(puzzles, name)))[1]
        assert len(ids.unique()) < len(gate_up) and not ids.sort().values.diff().eq(0).any()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(x_ND)))


def test_no_answer_stands_in_the_file():
    assert len(SOURCE.splitlines()) <= 300
    assert not re.search(r"import granitemoe|granitemoe\.(?!py)", SOURCE)
    functions = {n.name: n for n in ast.parse(SOURCE).body if isinstance(n, ast.FunctionDef)}
    assert list(answers.PUZZLES) == list(functions)[:10] == NAMES
    for name in NAMES:
        assert len(functions[name].body) == 1 and ast.get_docstring(functions[name])


@pytest.mark.parametrize("text, said", [
    ("def rms_norm(x, weight, eps)\n    return\n", "my_puzzles.py, line 1: SyntaxError: expected"),
    ("raise NotImplementedError\n", "my_puzzles.py, line 1: NotImplementedError"),
    ("x = 1\nprint(y)\n", "my_puzzles.py, line 2: NameError"),
    ("import sys\nsys.exit(0)\n", "my_puzzles.py, line 2: SystemExit: 0"),
    ("x = 1\0", "my_puzzles.py: SyntaxError|my_puzzles.py: ValueError"),
])  # fmt: skip
def test_files_that_cannot_be_read(text, said, run):
    with pytest.raises(ValueError) as error:
        run(text)
    assert re.match(said, str(error.value)) and "\n" not in str(error.value)


def test_names_and_files(run, monkeypatch, capsys):
    assert run("x = 1\n", "route")[0] == ["route: my_puzzles.py has no function of this name."]
    monkeypatch.setattr(sys, "argv", ["puzzles.py", "none.py"])
    with pytest.raises(
        ValueError, match=r"no such file. Begin with: cp lessons/puzzles\.py none\.py"
    ):
        puzzles.main()
    monkeypatch.setattr(sys, "argv", ["puzzles.py"])
    assert puzzles.main() is None and "cp lessons/puzzles.py my_puz" in capsys.readouterr().out
    assert run(SOURCE, "rout") == ([], 2)


def test_a_copy_tries_itself(tmp_path):
    """Run as a script, from the top folder. It is loaded once more: its main must not run twice."""
    copy = tmp_path / "my_puzzles.py"
    copy.write_text(fill({"rms_norm": "return print('called') or 1 / 0"}), encoding="utf-8")
    line = [sys.executable, copy, "rms_norm"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == ""
    called, *told = done.stdout.splitlines()
    assert called == "called" and len(told) == 1 and f"{copy}, line " in told[0]


def test_the_course_quotes_what_is_printed(run):
    course = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\$ python lessons/puzzles\.py my_puzzles\.py(.*)\n([^$`]+)", course, re.M)
    shown = [(arguments.split(), text.splitlines()) for arguments, text in found]
    assert shown == [([], run(SOURCE)[0]), (["route"], run({"route": ALL}, "route")[0])]
