"""The lessons say what is so: figures against another way to get them, pages with bad text."""

import argparse
import dataclasses
import html
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CONFIG,
    ROOT,
    checkpoint,
    on_posix,
    representing,
    same_output,
    thorough,
    write_files,
)  # fmt: skip
from safetensors.torch import load, save
from torch.utils import benchmark

import generate
import granitemoe
from granitemoe import GraniteMoeConfig

sys.path.insert(0, str(ROOT / "lessons"))

import common  # noqa: E402
from common import pieces  # noqa: E402

from lessons import balance, ladder, quotes, routing, score, sparsity, walkthrough  # noqa: E402

L, E, K = 2, 5, 3  # of the checkpoint
TEXT = "the theory (first):\n    is in the string  # größer, 2 < 3\n"
SCRIPTS = (
    "ablate", "balance", "ladder", "puzzles", "routing", "score", "sparsity", "walkthrough",
)  # fmt: skip


def random_ids(count: int) -> list[int]:
    return torch.randint(280, (count,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def run(monkeypatch, capsys):
    """What a lesson's command prints."""

    def act(lesson, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [lesson.__name__, *map(str, arguments)])
        lesson.main()
        return capsys.readouterr().out

    return act


@pytest.mark.parametrize("name", representing(SCRIPTS, "routing"))
def test_lessons_run_as_scripts(name, tmp_path):
    """From any folder, without installing anything: each finds granitemoe.py by itself."""
    script = ROOT / "lessons" / f"{name}.py"
    assert f"python lessons/{name}.py" in script.read_text(encoding="utf-8")
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_errors_are_one_line(tmp_path):
    command = [sys.executable, ROOT / "lessons" / "score.py", tmp_path / "no such file"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and re.fullmatch(r"score\.py: error: .*no such.*\n", done.stderr)


SIZE = r"argument --{}: must be an integer from {} to 2147483648, got {}"
BAD = [  # a script, arguments that are wrong, what it says of them
    ("score", "--context= x", SIZE.format("context", 1, "''")),
    ("score", "--stride 0 x", SIZE.format("stride", 1, "'0'")),
    ("score", "--stride -1 x", SIZE.format("stride", 1, "'-1'")),
    ("score", "", "the following arguments are required: FILE"),
    ("score", "--nonsense x", "unrecognized arguments: --nonsense"),
    ("score", "''", "argument FILE: must be a path, got ''"),
    ("score", "missing", "'missing': no such file or directory"),
    ("score", "folder", "'folder': is a directory"),
    ("score", "binary", "'binary': must be UTF-8 text, but its byte 1 is 0xff"),
    ("score", "empty", "'empty': must have a token to score, has none"),
    ("score", "text --model folder", "'folder/config.json': no such file"),
    ("routing", "x --layer nan", SIZE.format("layer", 0, "'nan'")),
    ("routing", "x --layer 5", "--layer: must be from 0 to 4, got 5"),
    ("routing", "x --max-new-tokens -5", SIZE.format("max-new-tokens", 0, "'-5'")),
    ("routing", "x --html=", "argument --html: must be a path, got ''"),
    ("routing", "x --html folder", "argument --html: must be a file to write, .*, got 'folder'"),
    ("routing", "x --html no/x.html", "argument --html: must be a file to write, .*'no/x.html'"),
    ("routing", "--file binary", "'binary': must be UTF-8 text, but its byte 1 is 0xff"),
    ("routing", "--file empty", "'empty': must have a token, has none"),
    ("routing", "--file=", "argument --file: must be a path, got ''"),
    ("routing", "''", "TEXT: must have from 1 to 512 tokens, has 0"),
    ("routing", "0" * 600, "TEXT: must have from 1 to 512 tokens, has 600"),
    ("routing", "\udcff", r"argument TEXT: must be UTF-8 text, got '\\udcff'"),
    ("walkthrough", "''", "TEXT: must have a token, has none"),
    ("walkthrough", "\udcff", r"argument TEXT: must be UTF-8 text, got '\\udcff'"),
    ("walkthrough", "--nonsense", "unrecognized arguments: --nonsense"),
    ("ladder", "--tokens 1 0", SIZE.format("tokens", 1, "'0'")),
    ("ladder", f"--tokens {'9' * 400}", SIZE.format("tokens", 1, "'9{59}")),
    ("ladder", "--dtype int8", "argument --dtype: invalid choice: 'int8' .*"),
    ("sparsity", "''", "argument FOLDER: must be a path, got ''"),
    ("sparsity", "folder", "'folder/config.json': no such file"),
    ("sparsity", "empty", "'empty/config.json': no such file"),
    ("sparsity", "list", "'list/config.json': must be a JSON object, got list"),
    ("sparsity", "deep", "'deep': num_hidden_layers: must be at most 1000, got 2000000000"),
]


@pytest.mark.parametrize("name, arguments, error", BAD)
def test_what_is_wrong_is_named_in_one_line(name, arguments, error, monkeypatch, tmp_path, capsys):
    """The option or the file, what is allowed and what was given: by the status 2 or 1."""
    monkeypatch.chdir(tmp_path)
    for made in ("folder", "list", "deep"):
        Path(made).mkdir()
    deep = {**CONFIG, "num_hidden_layers": 2_000_000_000}
    Path("list/config.json").write_text("[1]")
    Path("deep/config.json").write_text(json.dumps(deep))
    for made, raw in (("binary", b"a\xff"), ("empty", b""), ("text", b"a")):
        Path(made).write_bytes(raw)
    monkeypatch.setattr(sys, "argv", [f"lessons/{name}.py", *shlex.split(arguments)])
    with pytest.raises(SystemExit) as caught:
        common.command(importlib.import_module(f"lessons.{name}").main)
    printed = capsys.readouterr()
    line = printed.err if caught.value.code == 2 else f"{caught.value.code}\n"
    assert not printed.out and re.fullmatch(rf"{name}\.py: error: {error}\n", line), line


def test_a_file_that_must_not_be_read_is_named(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(sys, "argv", ["score.py", "secret"])
    with pytest.raises(SystemExit, match=r"^score\.py: error: 'secret': permission denied$"):
        common.command(score.main)


@on_posix
def test_a_pipe_can_be_scored(run, folder, tmp_path):
    """It has no size until it is read."""
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_text, args=(TEXT,))
    writer.start()
    assert f" {len(TEXT.encode())} bytes;" in run(score, pipe, "--model", folder)
    writer.join()


COURSE = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
ANEW = "a quote is old; run: python lessons/quotes.py"


QUOTES = [quote[:2] for quote in quotes.find_quotes(COURSE)]
LONG = [  # those that try each of the experts
    pytest.param(*quote, marks=thorough) if "--drop-expert all" in quote[0] else quote
    for quote in QUOTES
]


@pytest.mark.parametrize("line, shown", LONG)
def test_quoted_outputs_are_real(line, shown, run, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    plain, _, pipe = line.partition(" | ")
    _, script, *arguments = shlex.split(plain.replace("/tmp/", f"{tmp_path}/"))
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    printed = run(importlib.import_module(f"lessons.{Path(script).stem}"), *arguments)
    lines = printed.replace(f"{tmp_path}/", "/tmp/").rstrip().splitlines()
    lines = lines[: int(pipe.removeprefix("head -"))] if pipe.startswith("head") else lines
    assert same_output(shown, "\n".join(lines)), ANEW


def begun(*_: object, **__: object) -> None:
    """In place of work."""
    pytest.fail("the work began before the arguments were looked at")


def test_what_counts_as_the_same_output():
    shown = "unchanged  2.9989\n+0.031 12%"
    assert same_output(shown, "unchanged 2.9992\n+0.032 13%\n")
    for other in ("unchanged 3.0264\n+0.031 12%", "unchanged 2.9989\n+0.049 12%",
                  "unchanged 2.9989\n-0.031 12%", "unchanged 2.9989\n+0.031 14%",
                  "unchanged 2.9989", "unchanged 2.9989 +0.031 12%"):  # fmt: skip
        assert not same_output(shown, other), other


def test_quotes_does_nothing_when_asked_for_help(run, monkeypatch):
    monkeypatch.setattr(quotes, "run", begun)
    with pytest.raises(SystemExit) as end:
        run(quotes, "--help")
    assert end.value.code == 0


@pytest.mark.parametrize("page", quotes.PAGES, ids=lambda page: page.parent.name)
def test_tables_and_links_are_real(page):
    text = page.read_text(encoding="utf-8")
    assert quotes.renew(text) == text, ANEW
    if page.parent.name == "tiny":
        assert [text.count(f"<!-- {name} -->") for name in quotes.tables()] == [2, 2]


def test_each_step_of_the_course_is_whole():
    """What to write down, what one can say afterwards, a folded answer, links to the model."""
    steps = re.split(r"^## (?=\d)", COURSE, flags=re.MULTILINE)[1:]
    assert [step.splitlines()[0] for step in steps] == [
        "1. See it", "2. Follow one token", "3. Break it", "4. Build it", "5. Train it",
        "6. Measure it", "7. Make it fast",
    ]  # fmt: skip
    for step in steps:
        assert step.count("**Afterwards you can say**") == 1 <= step.count("**Write down first.**")
        assert step.count("<details><summary>Question: ") == step.count("</details>") == 1
        assert quotes.LINK.search(step) and "\n$ python " in step


def test_quotes_are_made_anew(monkeypatch, tmp_path, capsys):
    """Each in its place, whatever their lengths; other text, and quotes that cannot be, stay."""
    page = tmp_path / "README.md"
    before = (
        "Text.\n\n```console\n$ pip install x && python a.py\nold\n\nold\n$ pytest\n1 passed\n```\n"
        "\n```console\n$ python quiet.py\n$ python b.py | cat\nold 1.5 s\n```\n\nText.\n"
        "\n```console\n$ python table.py\n```\n\n| old |\n| --- |\n\nText.\n"
        "\n```console\n$ python fails.py\nkept\n```\n[`Router`](../granitemoe.py#L1)\n"
    )
    made = {
        "python a.py": "new\n", "python b.py | cat": "old 2.5 s\n", "python fails.py": None,
        "python table.py": "| new |\n| --- |\n| row |\n",
    }  # fmt: skip
    page.write_text(before)
    monkeypatch.setattr(quotes, "PAGES", [page])
    monkeypatch.setattr(quotes, "run", made.__getitem__)
    root = tmp_path.parent
    monkeypatch.setattr(quotes, "renew", lambda text: text.replace("#L1", "#L2"))
    monkeypatch.setattr(quotes, "ROOT", root)
    monkeypatch.setattr(quotes.three, "OUT", tmp_path / "three.html")
    monkeypatch.setattr(sys, "argv", ["quotes.py"])
    quotes.main()
    assert (tmp_path / "three.html").read_text(encoding="utf-8") == quotes.three.page()
    after = before.replace("old\n\nold\n", "new\n").replace("#L1", "#L2")
    assert page.read_text() == after.replace("| old |\n| --- |\n", made["python table.py"])
    assert "made anew" in capsys.readouterr().out
    monkeypatch.setattr(quotes, "renew", lambda text: text)
    quotes.main()
    assert "as before" in capsys.readouterr().out


def test_commands_of_quotes_run(capsys):
    assert quotes.run("python -c 'print(1)' | cat") == "1\n"
    assert quotes.run("python -c 'raise SystemExit(\"no log\")'") is None
    assert "left as it was: python -c" in capsys.readouterr().out


class Screen(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def test_long_work_tells_a_terminal_how_far_it_is(monkeypatch):
    """After a second, on one line that is gone at the end, also where the work fails."""
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    clock = iter((0, 0.9, 1.1, 2))
    monkeypatch.setattr("common.time.monotonic", lambda: next(clock))
    with pytest.raises(ValueError), common.progress("rows") as tell:
        for done in (1, 2, 3000):
            tell(done, 3000)
        raise ValueError
    shown = "\rrows: 2 of 3,000\rrows: 3,000 of 3,000"
    assert screen.getvalue() == f"{shown}\r{' ' * 20}\r"


def test_short_work_and_files_are_told_nothing(monkeypatch):
    for stream, step in ((Screen(), 0.1), (io.StringIO(), 9), (None, 9)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("common.time.monotonic", itertools.count(0, step).__next__)
        with common.progress("rows") as tell:
            for done in range(5):
                tell(done, 5)
        assert stream is None or not stream.getvalue()


# ---------------------------------------------------------------- routing.py


def test_record_is_what_the_routers_chose(model):
    """Guards against a hook on the wrong layer, a lost token, and hooks that stay behind."""
    ids = random_ids(23)
    found = routing.record(model, ids)
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_router_logits=True)
    for i, logits in enumerate(output.router_logits):
        top = logits.softmax(dim=-1).topk(K)
        assert torch.equal(found.expert_ids[i], top.indices)
        expected = top.values / top.values.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(found.weights[i], expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_counts_sum_to_n_times_k(model):
    found = routing.record(model, random_ids(40))
    assert found.counts.shape == (L, E)
    assert found.counts.sum(dim=1).tolist() == [40 * K] * L
    assert found.counts[1, 3] == sum(e == 3 for row in found.expert_ids[1].tolist() for e in row)


def test_long_texts_are_read_in_windows(model):
    ids = random_ids(64 + 64 + 9)  # the context is 64
    found = routing.record(model, ids)
    for start in (0, 64, 128):
        part = routing.record(model, ids[start : start + 64])
        assert torch.equal(found.expert_ids[:, start : start + 64], part.expert_ids)
        torch.testing.assert_close(found.weights[:, start : start + 64], part.weights)
    assert found.counts.sum(dim=1).tolist() == [137 * K] * L


def test_same_first_expert_by_hand():
    """Token 7 goes to 1, 1, 0; token 8 to 2, 2; token 9 comes once and does not count."""
    ids, firsts = [7, 8, 7, 9, 8, 7], [1, 2, 0, 3, 2, 1]
    expert_ids = torch.tensor([firsts, [0] * 6])[:, :, None]
    assert routing.usual(expert_ids, ids) == [4 / 5, 1]
    assert math.isnan(routing.usual(expert_ids[:, :1], [7])[0])


def test_routing_of_a_file(run, folder, model, monkeypatch, tmp_path):
    text, out = TEXT * 9, tmp_path / "page.html"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = generate.load_tokenizer(folder).encode(text).ids
    how = ("--file", tmp_path / "text.txt", "--model", folder)
    printed = run(routing, *how)
    assert f"text.txt: {len(ids)} tokens." in printed and "same" in printed
    found = routing.record(model, ids)
    shares = [f"{share:.0%}" for share in routing.usual(found.expert_ids, ids)]
    assert re.findall(r"(\d+%)$", printed, re.MULTILINE) == shares
    assert f"{len(ids)} tokens, {L} layers" in run(routing, *how, "--html", out)
    assert len(json.loads(re.search(r'id="data">(.*?)<', out.read_text())[1])["tokens"]) == len(ids)
    monkeypatch.setattr(routing, "LONGEST", 20)
    assert f"text.txt: the first 20 of {len(ids)} tokens. same" in run(routing, *how)
    assert f"{out}: the first 20 of {len(ids)} tokens, {L} l" in run(routing, *how, "--html", out)
    assert f'"length":"the first 20 of {len(ids)} tokens"' in out.read_text()
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="must have a token"):
        run(routing, *how)
    for bad in (how[2:], (*how, "a text too")):
        with pytest.raises(SystemExit):
            run(routing, *bad)


def test_balance_by_hand():
    even, one, half = [5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]
    peak, entropy = routing.balance(torch.tensor([even, one, half]))
    assert peak.tolist() == [1, 4, 2]
    torch.testing.assert_close(entropy, torch.tensor([2.0, 0.0, 1.0]))


def test_routing_in_a_terminal(monkeypatch, run, folder, model):
    """Each token with its choices, and the text on the colours of the layer that was asked for."""
    arguments = (TEXT, "--model", folder, "--max-new-tokens", 5, "--layer", 1)
    plain = run(routing, *arguments)
    ids = generate.load_tokenizer(folder).encode(TEXT).ids
    found = routing.record(model, ids)
    choices = re.findall(r"^  '.*?((?:  +\d+ [01]\.\d\d)+)$", plain, re.MULTILINE)
    assert len(choices) >= len(ids) + 1 and "\x1b" not in plain and "max/mean" in plain
    for n, choice in enumerate(choices[: len(ids)]):
        assert [int(e) for e in choice.split()[::2]] == found.expert_ids[1, n].tolist()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = run(routing, *arguments).split("▸")[1].split("\n\n")[-1]
    codes = routing.palette(E)
    painted = [int(code) for code in re.findall(r"48;5;(\d+)m", text)]
    assert painted == [codes[e] for e in found.expert_ids[1, :, 0].tolist()]
    assert len(set(codes)) == E
    with pytest.raises(ValueError, match="--layer"):
        run(routing, *arguments, "--layer", L)


def test_a_token_cannot_steer_the_terminal(folder):
    tokenizer = generate.load_tokenizer(folder)
    ids = tokenizer.encode("\x1b[2J\x07\r").ids
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", "".join(pieces(tokenizer, ids)))
    assert pieces(tokenizer, [0, 299]) == ["<|end_of_text|>", "\ufffd"]


# ---------------------------------------------------------------- routing.template


HOSTILE = [
    "<script>alert(1)</script>", "</script>", "<!--", "]]>", "{{data}}", "\\u003c", "a\nb", "\n",
    "<img src=x onerror=alert(1)>", '"', "'", "&amp;", "\u2028", "\ufffd", " ", "\\1",
]  # fmt: skip
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1200,800",
]  # fmt: skip
CONTRASTS = r"""
const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const style = getComputedStyle;
function seen(colours) {  // what layers of colour, the lowest first, make of a pixel: its luminance
  for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
}
const found = [...document.querySelectorAll("main *")].filter((node) =>
  [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).map((node) => {
  const grounds = [];
  for (let at = node; at; at = at.parentElement) grounds.unshift(style(at).backgroundColor);
  const contrast = (...more) => {
    const all = [...grounds, ...more];
    const below = seen(all), above = seen([...all, style(node).color]);
    return Math.max(below, above) / Math.min(below, above);
  };
  const half = node.classList.contains("later") ? [style(node).boxShadow.match(/.*\)/)[0]] : [];
  return { text: node.textContent, contrast: Math.min(contrast(), contrast(...half)) };
});
const page = seen([style(document.body).backgroundColor]);
document.body.textContent = JSON.stringify({ page, found });
"""


def random_routing(N: int, layers: int, experts: int, k: int) -> routing.Routing:
    scores = torch.randn(layers, N, experts, generator=torch.Generator().manual_seed(0))
    top, expert_ids = scores.topk(k)
    counts = torch.stack([layer.flatten().bincount(minlength=experts) for layer in expert_ids])
    return routing.Routing(top.softmax(dim=-1), expert_ids, counts, *routing.balance(counts))


def make_page(tokens: list[str], experts: int = 7, layers: int = 2, k: int = 3) -> str:
    found = random_routing(len(tokens), layers, experts, k)
    start = {"layer": 1, "window": 12, "length": f"the first {len(tokens)} of 9999 tokens"}
    return routing.page(tokens[0], tokens, 4, found, start)


def browse(folder: Path, page: str, *flags: str) -> str:
    (folder / "page.html").write_text(page, encoding="utf-8")
    profile, address = f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()
    command = [BROWSER, *QUIET, profile, *flags, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_page_escapes_what_tokens_hold():
    """A prompt, or a model, must not be able to put markup or code into the page: no token can
    close the element that holds the data, and the page's code sets text only."""
    template = routing.TEMPLATE.read_text(encoding="utf-8")
    head, tail = template.split("{{data}}")
    raw = make_page(HOSTILE).removeprefix(head).removesuffix(tail)
    assert "<" not in raw and json.loads(raw)["tokens"] == HOSTILE
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", template)


def test_no_file_looks_like_a_page_that_is_none():
    """Opened in a browser, a template shows empty boxes: only what routing.py writes is a page."""
    assert [path.name for path in (ROOT / "lessons").glob("*.htm*")] == ["three.html"]
    assert "{{data}}" not in make_page(["a", "b", "c", "d", "e"])


def test_page_needs_no_network():
    """No address in the page, and a policy that forbids the browser to fetch anything."""
    template = routing.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|src=|href=|-src [^\";]*[*:]", template)
    assert """content="default-src 'none'; style-src 'unsafe-inline'; script""" in template


@pytest.mark.parametrize("layers, experts, k", [(5, 8, 2), (24, 32, 8)], ids=("tiny", "1b"))
def test_page_is_small(layers, experts, k):
    """Under 1 MB for 2,000 tokens, and every choice and weight can be read back from it."""
    tokens = [["</script>", " café", "\\", "return"][n % 4] for n in range(2000)]
    page, found = make_page(tokens, experts, layers, k), random_routing(2000, layers, experts, k)
    assert len(page.encode()) < 1_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["tokens"] == tokens and data["counts"] == found.counts.tolist()
    for i in range(layers):
        ids, weights = ([ord(c) - 61 for c in data[n][i]] for n in ("expert_ids", "weights"))
        assert ids == found.expert_ids[i].flatten().tolist()
        assert weights == (found.weights[i] * 100).round().flatten().tolist()


def cells(shown: str, table: str) -> list[list[str]]:
    """A table of a page as the browser has built it: its body, row by row."""
    body = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', shown, re.DOTALL)[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[html.unescape(cell) for cell in row] for row in rows]


@in_browser
@pytest.mark.parametrize("experts, k", [(7, 3), (4, 1), (3, 3)])
def test_page_counts(experts, k, tmp_path):
    """The tokens of an expert, the pairs and the positions, against counting in Python."""
    N, window, bins, near = 50, 12, 8, 0.51  # of the page; percentages are whole ones
    tokens = [f"t{n * n % 11}" for n in range(N)]
    chosen = random_routing(N, 2, experts, k).expert_ids[0].tolist()
    act = "<script>showLayer(0); showExpert(2, true)</script></body>"
    page = make_page(tokens, experts, k=k).replace("</body>", act)
    shown = browse(tmp_path, page, "--dump-dom")
    its = [token for token, ids in zip(tokens, chosen, strict=True) if 2 in ids]
    assert f"Expert 2 of layer 0 gets {len(its)} of {N} tokens, {len(set(its))} diff" in shown
    rows = cells(shown, "favourites")
    assert [its.count(row[0].strip('"')) for row in rows] == sorted(
        map(its.count, set(its)), reverse=True
    )
    for token, share, here in rows:
        times = its.count(token.strip('"'))
        assert float(share) == pytest.approx(100 * times / len(its), abs=near)
        all_times = tokens.count(token.strip('"'))
        assert float(here) == pytest.approx(100 * times / all_times, abs=near)
    for a, row in enumerate(cells(shown, "pairs")):
        with_a = [ids for ids in chosen if a in ids]
        expected = [100 * sum(b in ids for ids in with_a) / len(with_a) for b in range(experts)]
        assert row[0] == str(a) and row[1 + a] == "·"
        del row[1 + a], expected[a]
        assert list(map(float, row[1:])) == pytest.approx(expected, abs=near)
    for e, row in enumerate(cells(shown, "positions")):
        ranges = [[n for n in range(N) if n % window * bins // window == b] for b in range(bins)]
        expected = [100 * sum(e in chosen[n] for n in ns) / (k * len(ns)) for ns in ranges]
        assert row[0] == str(e) and list(map(float, row[1:])) == pytest.approx(expected, abs=near)
    dim = len(re.findall(r'class="t[^"]* dim', shown))
    assert dim == N - len(its)


class Tab:
    """A page in Chromium, of an exact width and with real keys, over its pipe."""

    def __init__(self, folder: Path, width: int) -> None:
        (to, mine), (ours, back) = os.pipe(), os.pipe()
        line = [BROWSER, *QUIET, f"--user-data-dir={folder / 'tab'}", "--remote-debugging-pipe"]
        shell = ["bash", "-c", f"exec {shlex.join(line)} 3<&{to} 4>&{back}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(to, back), **quiet)
        os.close(to), os.close(back)
        self.write, self.read = os.fdopen(mine, "wb", 0), os.fdopen(ours, "rb")
        self.sent, self.session = 0, {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        found = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Page.navigate", url=(folder / "page.html").as_uri())
        while not self.value("document.readyState === 'complete' && !!document.title"):
            pass

    def __call__(self, method: str, **params) -> dict:
        self.sent += 1
        call = {"id": self.sent, "method": method, "params": params, **self.session}
        self.write.write(json.dumps(call).encode() + b"\0")
        while True:
            raw = b"".join(iter(lambda: self.read.read(1), b"\0"))
            if (answer := json.loads(raw)).get("id") == self.sent:
                return answer["result"]

    def value(self, code: str):
        return self("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        what = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown", **what, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **what)


@pytest.fixture
def tab(tmp_path):
    opened = []

    def act(page: str, width: int) -> Tab:
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        opened.append(Tab(tmp_path, width))
        return opened[0]

    yield act
    for each in opened:
        each.process.terminate()
        each.process.wait()


@in_browser
@pytest.mark.parametrize("width", (400, 1400))
@pytest.mark.parametrize("experts", (8, 40))
def test_page_fits(width, experts, tab):
    """The page itself never scrolls sideways; what is too wide does so in its own box."""
    page = tab(make_page([f"token{n}" for n in range(300)], experts), width)
    assert page.value("innerWidth") == width
    assert page.value("$('text').clientWidth") > 300
    assert page.value("document.documentElement.scrollWidth") == width
    assert page.value(
        "[...document.querySelectorAll('main *')].every((node) => node.closest('.scroll')"
        " || node.getBoundingClientRect().right <= innerWidth)"
    )


@in_browser
@pytest.mark.parametrize("width", (400, 1400))
@pytest.mark.parametrize("experts", (8, 40))
def test_the_balance_of_each_layer_is_in_sight(width, experts, tab):
    """However many experts: the two columns are within the box that scrolls. Eight fit as well."""
    page = tab(make_page([f"token{n}" for n in range(300)], experts), width)
    heads = "[...$('load').tHead.rows[0].cells]"
    ends = dict(page.value(heads + ".map((c) => [c.textContent, c.getBoundingClientRect().right])"))
    edge = page.value(BOX + ".getBoundingClientRect().right")
    assert max(ends["max/mean"], ends["entropy"]) <= edge <= width
    if experts == 8:
        assert page.value(f"{BOX}.scrollWidth <= {BOX}.clientWidth")
    peak, entropy = page.value(
        "[...$('load').tBodies[0].rows[1].cells].slice(1, 3).map((c) => c.textContent)"
    )
    assert page.value("$('figures').textContent").startswith(
        f"max/mean load {peak}, entropy {entropy}"
    )


BOX = "$('load').closest('.scroll')"
PAINTED = """((chips) => spans.map((span) => {
  const { backgroundColor: ground, boxShadow: half } = getComputedStyle(span);
  const of = (colour) => chips.findIndex((chip) => colour.startsWith(chip));
  return [of(ground), of(half)];
}))(experts.map((chip) => getComputedStyle(chip).backgroundColor))"""


@in_browser
@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (400, 1400))
def test_one_expert_alone_has_one_colour(width, scheme, tab):
    """Its own, all of a token where it is the first choice and half where it is a later one; the
    others have none. Guards against the first choice's colour on a token of another expert."""
    chosen = random_routing(60, 2, 8, 3).expert_ids[1].tolist()
    page = tab(make_page([f"t{n}" for n in range(60)], 8), width)
    page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.value(PAINTED) == [[row[0], -1] for row in chosen]
    page.value("experts[5].click()")
    places = [row.index(5) if 5 in row else None for row in chosen]
    expected = {0: [5, -1], None: [-1, -1]}
    assert {0, 1, 2, None} <= {*places}
    assert page.value(PAINTED) == [expected.get(place, [-1, 5]) for place in places]
    assert page.value("$('legend').innerText").startswith("Expert 5 alone: filled where it is")
    page.value("spans[9].onpointerenter()")  # pointing changes none of it
    assert page.value(PAINTED) == [expected.get(place, [-1, 5]) for place in places]
    assert page.value(
        "[...$('choices').querySelectorAll('span:first-child')].map((x) => x.textContent)"
    ) == [f"expert {e}" for e in chosen[9]]
    page.value("experts[5].click()")
    assert page.value(PAINTED) == [[row[0], -1] for row in chosen]
    assert page.value("$('legend').hidden")
    assert page.value("$('summary').textContent").startswith("The first 60 of 9999 tokens, 2 l")
    page.value("experts[5].click()")
    page.value(f"{{{CONTRASTS}}}")
    found = json.loads(page.value("document.body.textContent"))["found"]
    assert len(found) > 200 and [each for each in found if each["contrast"] < 4.5] == []


ACTIVE = """((a) => [a.id, a.getAttribute('aria-label'),
  getComputedStyle(a).outlineStyle === 'solid' && getComputedStyle(a).outlineWidth === '2px'
].join())(document.activeElement)"""


@in_browser
def test_page_by_keyboard(tab):
    """Everything can be reached with Tab, with a visible focus that stays where it is."""
    page = tab(make_page([f"t{n}" for n in range(50)]), 400)
    reached = []
    while not reached or not reached[-1].startswith(",,") and len(reached) < 60:
        page.press("Tab", 9)
        reached.append(page.value(ACTIVE))
    assert all(each.endswith(",true") for each in reached[:-1])
    assert [each.split(",")[0] for each in reached[:3]] == ["layer", "numbers", "text"]
    labels = [each.split(",")[1] for each in reached]
    assert [label.split(":")[0] for label in labels[3:10]] == [f"expert {e}" for e in range(7)]
    assert [label.split(":")[0] for label in labels[10:12]] == ["layer 0", "layer 1"]
    assert {"show layer 0", "show layer 1"} < set(labels) and "expert,,true" in reached
    page.value("$('text').focus()")
    for key, code, place in (
        ("ArrowRight", 39, 6), ("ArrowLeft", 37, 5), ("End", 35, 50), ("ArrowRight", 39, 1),
        ("ArrowLeft", 37, 50), ("Home", 36, 1),
    ):  # fmt: skip
        page.press(key, code)
        assert page.value("$('place').textContent").startswith(f"Token {place} of 50, ")
    page.press("Tab", 9)
    for dim in (True, False):  # the first expert's tokens alone, then all again
        page.press("Enter", 13)
        assert page.value(ACTIVE).startswith(",expert 0: ")
        assert page.value("!!document.querySelector('.dim')") == dim
    for _ in range(7):
        page.press("Tab", 9)
    page.press("Enter", 13)
    assert page.value(ACTIVE).startswith(",layer 0: expert")
    assert page.value("$('place').textContent").endswith("layer 0")
    for part in ("favourites", "pairs", "positions"):
        assert "ayer 0" in page.value(f"$('{part}').caption.textContent")
    page.value("$('expert').focus()")
    page.press("ArrowDown", 40)
    assert page.value("$('favourites').caption.textContent").startswith("Expert 1 of layer 0")


@in_browser
def test_page_in_a_browser(run, folder, tmp_path):
    """It follows the pointer and the layer selector, and shows each token as text however bad."""
    arguments = (TEXT, "--model", folder, "--max-new-tokens", 5, "--html", tmp_path / "made.html")
    assert f"{L} layers" in run(routing, *arguments)
    page = (tmp_path / "made.html").read_text(encoding="utf-8")
    hover = "spans[0].onpointerenter(); $('layer').selectedIndex = 1; $('layer').onchange()"
    acted = page.replace("</body>", f"<script>{hover}</script></body>")
    shown = browse(tmp_path, acted, "--dump-dom")
    limit = f"{math.log2(E):.2f} bits"
    assert re.search(rf'id="figures">max/mean load [\d.]+, entropy [\d.]+ of {limit}<', shown)
    assert len(re.findall(r'class="chip"', shown)) == E + L  # the legend, and one for each layer
    assert re.search(r'id="place">Token 1 of \d+, given, layer 1<', shown)
    weights = re.findall(r"<span[^>]*>([01]\.\d\d)</span>", shown)
    assert len(weights) == K and sum(map(float, weights)) == pytest.approx(1, abs=0.02)
    bad = browse(tmp_path, make_page(HOSTILE), "--dump-dom")
    tokens = re.findall(r'<span class="t[ "][^>]*>(.*?)</span>', bad, re.DOTALL)
    assert list(map(html.unescape, tokens)) == [t.replace("\n", "↵\n") for t in HOSTILE]


@in_browser
@pytest.mark.parametrize("scheme", (0, 1), ids=("dark", "light"))
@pytest.mark.parametrize("dim", (False, True), ids=("all", "one expert"))
def test_text_is_readable(scheme, dim, tmp_path):
    """Dark on light or light on dark as the reader prefers, and each text has a contrast of 4.5 or
    more to all that it stands on, in colours that the browser computed."""
    page = make_page([f"t{n}" for n in range(90)], experts=40)
    act = "showExpert(1, true);" if dim else ""
    page = page.replace("</body>", f"<script>{{{act}{CONTRASTS}}}</script></body>")
    shown = browse(tmp_path, page, f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom")
    seen = json.loads(re.search(r"<body>(.*)</body>", shown, re.DOTALL)[1])
    assert (seen["page"] > 0.5) == (scheme == 1) and len(seen["found"]) > 200
    assert [each for each in seen["found"] if each["contrast"] < 4.5] == []


# ---------------------------------------------------------------- score.py


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    files = write_files(tmp_path_factory.mktemp("theirs"), checkpoint())
    load = transformers.GraniteMoeForCausalLM.from_pretrained
    return load(files, dtype=torch.float32).eval()


@pytest.mark.parametrize("context, stride", [(64, 32), (64, 64), (20, 7), (9, 1), (1, 1)])
def test_scores_equal_transformers(model, theirs, context, stride):
    """Each token by itself, from the window that the definition gives it. Guards against a token
    scored twice or not at all, by the wrong position's logits, or with too little context."""
    ids = random_ids(150)
    expected = []
    for t in range(1, len(ids)):
        last = min(t + stride - 1 - (t - 1) % stride, len(ids) - 1)  # of the tokens scored with t
        first = max(0, last - context)
        assert t - first >= min(t, context - stride + 1)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids[first:t]])).logits[0, -1]
        expected.append(logits.log_softmax(dim=-1)[ids[t]])
    ours = score.log_probs(model, ids, context, stride)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_scores_by_hand():
    """A model that takes every byte value for equally likely needs 8 bits a byte."""
    figures = score.summarise(torch.full((10,), -math.log(256)), 10)
    assert figures == pytest.approx({"loss": math.log(256), "perplexity": 256, "bits/byte": 8})
    assert score.summarise(torch.full((10,), -1e6), 10)["perplexity"] == math.inf


def test_a_tokenizer_that_begins_texts_itself(folder, model, tmp_path):
    """Its bos token is there once, and is no text."""
    from tokenizers import Tokenizer, processors

    (file := tmp_path / "text").write_text("the theory")
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain, size = score.read_ids(file, bare, model.config)
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tok.id_to_token(0)
    tok.post_processor = processors.TemplateProcessing(f"{end} $A", None, [(end, 0)])
    assert tok.encode("a").ids[0] == 0
    assert score.read_ids(file, tok, model.config) == (plain, 10) and plain.count(0) == 1


def test_score_command(run, folder, model, monkeypatch, tmp_path):
    text, file = TEXT * 5, tmp_path / "text.py"
    file.write_text(text, encoding="utf-8")
    ids = generate.load_tokenizer(folder).encode(text).ids
    printed = run(score, file, "--model", folder)
    scores = score.log_probs(model, [0, *ids], 64, 32)  # after the bos token: none is left out
    expected = -scores.sum().item() / math.log(2) / len(text.encode())
    assert printed.startswith(f"{len(ids)} tokens, {len(text.encode())} bytes;")
    assert f"bits/byte {expected:.4f}" in printed
    monkeypatch.setattr("common.time.monotonic", itertools.count(0, 9).__next__)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    assert run(score, file, "--model", folder) == printed  # nothing of it on standard output
    steps = re.findall(rf"\rscored tokens: (\d+) of {len(ids)}", screen.getvalue())
    assert list(map(int, steps)) == [*range(32, len(ids), 32), len(ids)]
    lines = run(score, file, "--model", folder, "--tokens").splitlines()
    assert [float(line.split()[0]) for line in lines] == pytest.approx(scores.tolist(), abs=6e-5)
    for bad, error in (
        (("--stride", 65), "stride: must be from 1 to the context, 64, got 65"),
        (("--context", 65), "context: must be from 1 to the model's, 64, got 65"),
        (("--context", 8, "--stride", 9), "stride: must be from 1 to the context, 8, got 9"),
    ):
        with pytest.raises(ValueError, match=error):
            run(score, file, "--model", folder, *bad)


# ---------------------------------------------------------------- sparsity.py


def test_sparsity_of_the_released_sizes(run, folder):
    """Total and active as the checkpoints have them, and the names as the active ones round."""
    for name, total, active in (("1b-a400m", 1334628352, 0.429), ("3b-a800m", 3298793472, 0.883)):
        n = sparsity.count(GraniteMoeConfig.from_dict(sparsity.RELEASED[name]))
        assert n["total"] == total and n["active"] / 1e9 == pytest.approx(active, abs=5e-4)
        assert name.endswith(f"-a{round(n['inside'] / 1e8)}00m")
        assert n["bytes"] == 2 * n["active"] and n["dense_bytes"] == 2 * total
    rows = run(sparsity, folder).splitlines()
    assert [row.split()[1] for row in rows[2:]] == ["1b-a400m", "3b-a800m", folder.name]
    shutil.copytree(folder, second := folder.parent / "other" / folder.name)
    names = [row.split()[1] for row in run(sparsity, folder, second).splitlines()[4:]]
    assert names == [folder.name, str(second)]  # neither hides the other
    assert "857.3 MB" in rows[2] and "3.7 x" in rows[3]


def test_sparsity_counted_by_hand(model):
    n, D, width, V = sparsity.count(model.config), 32, 24, 300
    shared = 2 * D * D + 2 * D * D // 2 + E * D + 2 * D  # attention, router, norms of a layer
    expert = 3 * width * D
    assert n["inside"] == L * (shared + K * expert) + D
    assert n["active"] == n["inside"] + V * D
    assert n["total"] == n["active"] + L * (E - K) * expert
    untied = sparsity.count(dataclasses.replace(model.config, tie_word_embeddings=False))
    assert untied["inside"] == n["inside"] and untied["bytes"] == n["bytes"]


# ---------------------------------------------------------------- walkthrough.py


def test_walk_adds_up(model):
    """Each layer's numbers explain its output, and they are those of the model's own forward."""
    ids, m = random_ids(12), CONFIG["residual_multiplier"]
    steps, logits = walkthrough.follow(model, ids)
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_router_logits=True)
    torch.testing.assert_close(logits, output.logits[0, -1])
    before = model.model.embed_tokens.weight[ids[-1]] * CONFIG["embedding_multiplier"]
    assert len(steps) == L
    for i, step in enumerate(steps):
        torch.testing.assert_close(step["before"], before.detach())
        after = before + m * step["attention"] + m * step["experts"]
        torch.testing.assert_close(step["after"], after.detach())
        torch.testing.assert_close(step["logits"], output.router_logits[i][-1])
        torch.testing.assert_close(step["shares"].sum(), torch.tensor(1.0))
        assert step["weights"].sum().item() == pytest.approx(1)
        assert step["chosen"].tolist() == step["logits"].topk(K).indices.tolist()
        before = step["after"]


def test_share_is_the_weight_where_experts_agree(tmp_path):
    """When all experts are the same one, what each gives is its weight."""
    files = checkpoint()
    tensors = load(files["model.safetensors"])
    for name, tensor in tensors.items():
        if tensor.dim() == 3:
            tensors[name] = tensor[:1].repeat(E, 1, 1)
    same = write_files(tmp_path / "same", {**files, "model.safetensors": save(tensors)})
    for step in walkthrough.follow(generate.load_model(same), random_ids(9))[0]:
        torch.testing.assert_close(step["shares"], step["weights"])


def test_a_long_text_is_walked_from_its_last_tokens(run, folder, model):
    """As many as the context has, 64, and the first line says so."""
    text = TEXT * 9
    ids = generate.load_tokenizer(folder).encode(text).ids
    first, _, rest = run(walkthrough, text, "--model", folder).partition("\n\n")
    assert first == f"Of {len(ids)} tokens the model reads the last 64: its context has no more."
    assert f"is number {ids[-1]}, the last of 64." in rest
    logits = walkthrough.follow(model, ids[-64:])[1]
    assert f"{logits.softmax(dim=-1).max():6.1%}" in rest
    assert "context" not in run(walkthrough, TEXT, "--model", folder)


def test_walk_is_printed(run, folder):
    printed = run(walkthrough, TEXT, "--model", folder)
    assert printed.count("\nLayer ") == L and printed.count("%  '") == 5
    assert max(map(len, printed.splitlines())) <= 100


# ---------------------------------------------------------------- balance.py and ladder.py


LOG = "tokens,train_loss,held_out_loss,aux_loss,max_share,min_share\n"


def write_run(folder: Path, loss: float, shares: list[list[float]]) -> Path:
    folder.mkdir(parents=True)
    most, least = max(map(max, shares)), min(map(min, shares))
    (folder / "log.csv").write_text(f"{LOG}100,6.9,5.0,2.3,{most},{least}\n")
    report = {"tokens_seen": 200, "held_out_loss": loss, "expert_shares": shares}
    report |= {"parameters": 4e6, "active_parameters": 2e6}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of two kinds."""
    shares = {"balanced": [[0.6, 0.4], [0.55, 0.45]], "dense": [[1.0], [1.0]]}
    losses = {"balanced-0": 4.5, "balanced-1": 4.7, "dense-0": 4.2, "dense-1": 4.3}
    return [write_run(tmp_path / n, x, shares[n.partition("-")[0]]) for n, x in losses.items()]


def test_balance_tells_the_noise_beside_the_means(run, runs):
    printed = run(balance, *runs)
    assert "| balanced | 4.0 M | 2.0 M | 4.500 4.700 | 4.600 | 0.200 | +0.000 +0.000 |" in printed
    assert "| dense | 4.0 M | 2.0 M | 4.200 4.300 | 4.250 | 0.100 | -0.300 -0.400 |" in printed
    assert "| balanced-1 | 60% 40% | 55% 45% |" in printed and "dense-0" not in printed


def test_balance_draws_each_run(run, runs, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "balance.svg"
    assert "| balanced | " in run(balance, *runs, "--plot", out)
    assert out.read_text(encoding="utf-8").count("clip-path=") == 4 + 2 + 2  # of three panels


def test_balance_refuses_what_is_no_run(run, runs):
    (runs[0] / "log.csv").write_text(f"{LOG}100,1,2\n")
    with pytest.raises(ValueError, match=r"log\.csv: not a training log"):
        run(balance, *runs)
    report = json.loads((runs[1] / "report.json").read_text())
    shares = ([], [[]], [[1, "a"]], 5, None)
    wrong = [{}, *(report | {"expert_shares": x} for x in shares), report | {"tokens_seen": "x"}]
    for told in (*wrong, [], 3):
        (runs[1] / "report.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=r"report\.json: not a training's report"):
            run(balance, runs[1])


@pytest.mark.parametrize("arguments, said", [
    (["--train", ""], "--train: must be a path, got ''"), ([""], "runs: must be a path, got ''"),
    (["--plot", ""], "--plot: must be a path, got ''"),
    (["--plot", "no/such.svg"], "--plot: must be a file to write, in a folder that is there"),
])  # fmt: skip
def test_balance_refuses_arguments(arguments, said, run, capsys):
    with pytest.raises(SystemExit):
        run(balance, *arguments)
    assert said in capsys.readouterr().err


def test_balance_refuses_a_picture_before_the_work(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(balance.subprocess, "run", begun)
    with pytest.raises(ValueError, match=r"--plot: must end in one of .*, got 'x\.nosuch'"):
        run(balance, "--train", tmp_path, "--plot", tmp_path / "x.nosuch")


def test_balance_prints_without_matplotlib(monkeypatch, run, runs, tmp_path, capsys):
    """The tables come first; then one line says what drawing needs."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run(balance, *runs, "--plot", tmp_path / "balance.svg")
    assert "| balanced | " in capsys.readouterr().out


def test_balance_trains_what_is_not_there(monkeypatch, run, tmp_path):
    """Six trainings, each like for like; a second call trains those alone that are not done."""
    lines = []

    def pretend(line: list) -> SimpleNamespace:
        lines.append(list(map(str, line[2:])))
        write_run(Path(line[3]), 4.0, [[0.5, 0.5]])
        return SimpleNamespace(returncode=int(failing))

    failing = False
    monkeypatch.setattr(balance.subprocess, "run", pretend)
    run(balance, "--train", tmp_path)
    same = ["--tokens", "4e6", "--prompt-tokens", "0"]
    assert [line[2:] for line in lines] == [
        ["--seed", seed, *same, *options]
        for seed in ("0", "1")
        for options in ([], ["--aux-coef", "0"], ["--dense"])
    ]
    shutil.rmtree(tmp_path / "off-1")
    lines.clear()
    run(balance, "--train", tmp_path)
    assert [line[1] for line in lines] == [str(tmp_path / "off-1")]
    shutil.rmtree(tmp_path / "off-1")
    failing = True
    with pytest.raises(ValueError, match="off-1: the training stopped; run again"):
        run(balance, "--train", tmp_path)


def test_the_shipped_runs_are_whole():
    """What the course says of them: as many tokens each, layers even with the loss alone."""
    runs = {path.name: balance.read_run(path) for path in balance.RUNS.iterdir()}
    assert sorted(runs) == sorted(f"{kind}-{seed}" for kind in balance.KINDS for seed in "01")
    assert {run.report["tokens_seen"] for run in runs.values()} == {4e6}
    for name, each in runs.items():
        assert each.report["held_out_tokens"] == runs["dense-0"].report["held_out_tokens"]
        assert len(each.report["expert_shares"]) == 5, name
        most = max(map(max, each.report["expert_shares"]))
        assert (most < 0.25) == name.startswith("balanced")


# ---------------------------------------------------------------- tiny/train.py


def train_command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, ROOT / "tiny" / "train.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_training_never_writes_over_a_model():
    """Not over tiny/ either, which is what everything else uses."""
    before = (ROOT / "tiny" / "model.safetensors").stat().st_mtime_ns
    done = train_command()
    assert done.returncode == 2 and "required: --out" in done.stderr
    done = train_command("--out", ROOT / "tiny")
    assert done.returncode == 2 and "holds a finished model" in done.stderr
    assert (ROOT / "tiny" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("arguments, said", [
    ([], "the following arguments are required: --out"),
    (["--out", ""], "argument --out: must be a folder, got ''"),
    (["--out", "/dev/null/x"], "--out /dev/null/x: not a directory"),
    (["--out", "x", "--start", "/no/such"], "--start /no/such: has no model.safetensors"),
    *[(["--out", "x", f"--{name}", x], f"--{name}: must be a number from 0 to 1e12, got {x!a}")
      for name in ("tokens", "prompt-tokens", "aux-coef") for x in ("nan", "x", "-1", "1e13")],
    (["--out", "x", "--seed", "y"], "argument --seed: invalid int value: 'y'"),
])  # fmt: skip
def test_training_refuses_arguments(arguments, said, train, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(train, "standard_library", begun)
    with pytest.raises(SystemExit) as end:
        train.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.fixture
def train(monkeypatch):
    """tiny/train.py, with batches of two windows of 16 tokens."""
    monkeypatch.syspath_prepend(str(ROOT / "tiny"))
    module = importlib.import_module("train")
    monkeypatch.setattr(module, "B", 2)
    monkeypatch.setattr(module, "T", 16)
    return module


def test_an_interrupted_training_goes_on_as_if_it_were_not(train, monkeypatch, tmp_path, capsys):
    """To the last digit; and never with other options than it began with."""
    small = dataclasses.replace(train.CONFIG, num_hidden_layers=1, max_position_embeddings=16)
    ids = torch.randint(2048, (5000,), generator=torch.Generator().manual_seed(0))
    options = {"start": None, "tokens": 32 * 400, "aux_coef": 0.02, "seed": 0, "dense": False}
    learn, steps = train.learn, []

    def act(out: str, **changed: object) -> str:
        (tmp_path / out).mkdir(exist_ok=True)
        args = argparse.Namespace(out=tmp_path / out, **options | changed)
        train.train(args, small, ids, ids[:600])
        return (args.out / "log.csv").read_text()

    def stop(*given: object) -> tuple:
        steps.append(1)
        if len(steps) == 250:
            raise KeyboardInterrupt
        return learn(*given)

    whole = act("whole")
    monkeypatch.setattr(train, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        act("parts")
    monkeypatch.setattr(train, "learn", learn)
    for changed in ({"seed": 1}, {"aux_coef": 0.0}, {"tokens": 1e6}, {"dense": True}):
        with pytest.raises(SystemExit, match="was begun with"):
            act("parts", **changed)
    assert act("parts") == whole and len(whole.splitlines()) == 5
    assert act("other", seed=1) != whole


def test_training_says_what_it_prints(train, monkeypatch, capsys):
    row = train.line([409600, 6.4772, 4.9482, 3.9769, 0.4998, 0.0042, 0.1], 7229.4, "8 min")
    head = train.HEAD.splitlines()[-1]
    assert len(row) == len(head) and row.split()[:3] == ["409,600", "6.477", "4.948"]
    for word, number in zip(("largest", "left"), ("50.0%", "min"), strict=True):
        assert row[: head.index(word) + len(word)].endswith(number)
    train.tell("trying it")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.tell("trying it")
    assert capsys.readouterr().err.strip() == "trying it"


SMALL = {"E": 6, "K": 2, "D": 16, "F": 8}


def test_the_ladder_counts():
    """What tells the forms apart: products, waits for values, and memory for fetched experts."""
    inputs = ladder.make_inputs(40, SMALL, torch.float32)
    forms = [getattr(granitemoe, name) for name in ladder.FORMS]
    loop, grouped, gathered = (ladder.count(form, inputs) for form in forms)
    assert loop[0] >= 2 * SMALL["E"] and grouped[0] <= 3 and gathered[0] <= 3
    assert loop[1] >= 1 and grouped[1] == gathered[1] == 0
    fetched = SMALL["K"] * 2 * SMALL["F"] * SMALL["D"] * 4  # bytes of a token's gate|up matrices
    assert gathered[2] >= fetched > grouped[2]


def test_quoted_counts_of_the_ladder_are_real():
    row = r"^\| `(experts_\w+)` \| (\d+) \((\d+)\) \| (\d+) \| (\d+) \|"
    rows = re.findall(row, COURSE, re.MULTILINE)
    assert [row[0] for row in rows] == list(ladder.FORMS)
    inputs = ladder.make_inputs(ladder.COUNTED, ladder.SIZES, torch.float32)
    for name, *quoted in rows:
        lines, counts = ladder.count_lines(name), ladder.count(getattr(granitemoe, name), inputs)
        assert [int(x) for x in quoted] == [lines[name], sum(lines.values()), *counts[:2]]


def test_the_meter_sees_what_waits():
    """Values that Python or a shape needs count; ids used as indices do not."""
    x, mask, ids = torch.randn(6, 3), torch.tensor([True, False] * 3), torch.tensor([0, 2])
    for act in (
        lambda x: x[mask], lambda x: torch.where(x > 0), lambda x: x[0, 0].item(),
        lambda x: ids.unique(), lambda x: ids.tolist(), lambda x: bool(mask.all()),
    ):  # fmt: skip
        assert ladder.count(act, (x,))[1] == 1
    for act in (lambda x: x[ids], lambda x: x @ x.T, lambda x: x.sort(), lambda x: x.topk(2)):
        assert ladder.count(act, (x,))[1] == 0


def test_the_meter_measures_memory():
    """What lives at once counts together, what follows in turn does not, and views are free."""
    x = torch.zeros(4, 256)  # 1 kB a row
    assert ladder.count(lambda x: (x + 1) + 1, (x,))[2] == 2048
    assert ladder.count(lambda x: [x + 1 for _ in range(5)] and None, (x,))[2] == 5 * 1024
    assert ladder.count(lambda x: [(x + 1).sum() for _ in range(5)], (x,))[2] <= 1024 + 5
    assert ladder.count(lambda x: x.view(2, 512)[:1].T, (x,))[2] == 0


def test_speed_is_that_of_the_best_run(monkeypatch):
    """A stall in most of a few runs changes nothing: two runs in each of five measurements."""
    raw = [9.0, 0.5, 7.0, 8.0, 9.0]
    times = benchmark.Measurement(2, raw, benchmark.TaskSpec("", ""))
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda *_, **__: times)
    assert ladder.speed(len, (torch.zeros(10, 3),), 3.0) == 10 / 0.25


def test_ladder_table(monkeypatch):
    monkeypatch.setattr(ladder, "TOO_LARGE", 100_000)
    rows = ladder.table(SMALL, [1, 999], torch.float32, 0.001).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0].strip("`") for row in cells[2:]] == list(ladder.FORMS)
    assert {len(row) for row in cells} == {7} and cells[4][-1].endswith("GB)")
    lines = ladder.count_lines("experts_grouped")
    assert lines["sort_by_expert"] < 10 < sum(lines.values())  # its long docstring is not code
