"""One model, three texts: the definition, the C for a CPU and the Triton kernels, side by side.

    python lessons/three.py                  writes lessons/three.html, which needs no network
    python lessons/three.py --out FILE       another file

The page is cut out of the sources, each piece by the name of its function. What the page says about
the pieces is in ROWS. Change a name there too, when a source changes it: until then nothing is
written, and one line says what is missing. The fast forms are read as text, and not imported.
"""

import ast
import html
import io
import re
import tokenize
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

from common import Parser, command

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).with_suffix(".html")
TEXTS = {  # each file, and what its column is called
    "granitemoe.py": "Python, the definition",
    "fast/cpu.c": "C, for a CPU",
    "fast/kernels.py": "Triton, for a GPU",
}
LEFT_OUT = "…"  # a line of the page where a source has more


class Piece(NamedTuple):
    """A function or class, or its lines from the one with `since` to before the one with `until`"""

    name: str
    since: str = ""
    until: str = ""


class Row(NamedTuple):
    """A part of the model. `pieces` are of the three texts, in the order of TEXTS; a line of `same`
    has a few words of a line of each text (or "") which do the same, and get the same number."""

    name: str  # of its link
    title: str
    says: str  # code in `backticks`
    pieces: tuple[list[Piece], list[Piece], list[Piece]]
    same: list[tuple[str, str, str]]


ROWS = [
    Row(
        "embedding",
        "Embedding, and the layers",
        "A token's row of the embedding, times a number; then one layer after another. The C goes "
        "through all layers in one call, with all threads. On a GPU each part of a layer is a "
        "kernel of its own; `fast/cuda.py` records them all once, in a CUDA graph, and replays it.",
        (
            [Piece("GraniteMoeModel.forward", "x = self.embed_tokens", "if cache is not None:")],
            [Piece("embed"), Piece("step")],
            [Piece("embed")],
        ),
        [
            ("self.embed_tokens(input_ids) *", "m->embedding_multiplier *", "* multiplier"),
            ("for i, layer in enumerate", "for (Int layer = first", ""),
        ],
    ),
    Row(
        "norm",
        "Norm",
        "In C this is a loop of its own: it writes the normed x, and all threads wait for it. In "
        "Triton it is no kernel: `attn_in`, `route` and `head` begin with it, and each of their "
        "programs computes it again. So there is one kernel less to wait for, and for `attn_in` "
        "and `head` the normed x is never in memory.",
        ([Piece("RMSNorm")], [Piece("norm")], [Piece("rms_norm")]),
        [
            ("F.rms_norm(", "sqrtf(", "tl.rsqrt("),
            ("self.weight * normed", "to_float(weight[d]) *", "rounded(normed, weight.dtype)"),
        ],
    ),
    Row(
        "product",
        "A product",
        "For one token, a weight is read from memory and used once: reading takes the time, and "
        "not multiplying. So the C reads a weight once for up to four rows, and keeps two sums, "
        "since an addition waits for the one before it. A Triton program holds all weights of a "
        "few outputs at once. Tensor cores would help only if there were many rows.",
        (
            [Piece("Attention.__init__"), Piece("Attention.forward", "q = self.q_proj", "q = rot")],
            [Piece("dot"), Piece("product"), Piece("linear")],
            [Piece("load_row"), Piece("load_rows"), Piece("product")],
        ),
        [("q = self.q_proj(x)", "multiply_add(", "tl.sum(weight")],
    ),
    Row(
        "positions",
        "Positions",
        "The tables of cosines and sines are made once, by `rope_tables` of the definition, for "
        "all places of the cache. What is left turns pairs of numbers. The C does it in place, in "
        "a whole head. Triton does it right after the product, when a pair is still in registers.",
        ([Piece("rope_tables"), Piece("rotate")], [Piece("rotate")], [Piece("rotate")]),
        [
            ("first, second = x.chunk", "const float first", ""),
            ("return x * cos", "rounded(first * to_float(cos[i]))", "turned = rounded("),
        ],
    ),
    Row(
        "cache",
        "Attention: queries, keys, values and the cache",
        "Python makes q, k and v, turns two of them, and appends k and v to the cache. The C does "
        "the same, and then gives each thread its share of the key heads, each with the query "
        "heads that read it. In Triton the norm, the three products, the rotation and the cache "
        "are one kernel: k and v go from registers to their slot, and nowhere else.",
        (
            [Piece("KVCache.append"), Piece("Attention.forward")],
            [Piece("attention"), Piece("attend", until="/* attend_eager")],
            [Piece("attn_in")],
        ),
        [
            ("q = self.q_proj(x)", "m->layers[layer].q_proj", "first = product("),
            ("q = rotate(q", "rotate(m, b, q + h", "first, second = rotate("),
            ("self.keys[layer, :, :, self", "keys[at * C + c] =", "tl.store(out_ptr + c"),
        ],
    ),
    Row(
        "attention",
        "Attention: scores, softmax, values",
        "Python and C make all scores, then their softmax, then the sum of values. Triton takes "
        "the slots block by block and never holds all scores: when a larger score comes, what was "
        "summed before fades (`add_block`). Several programs share the slots of a key head, and "
        "the last one to end adds up. One new token sees all tokens before it, so the fast forms "
        "have no mask: they begin after the padding.",
        (
            [Piece("attend_eager")],
            [Piece("attend", "/* attend_eager"), Piece("softmax"), Piece("mix")],
            [
                Piece("attend", "start = tl.load(start_ptr"),
                Piece("look"),
                Piece("scaled_scores"),
                Piece("add_block"),
            ],
        ),
        [
            ("scores = q @ k", "dots(keys + start", "scores = scaled_scores("),
            ("probs = scores.softmax", "softmax(p, slots)", "p = tl.exp2("),
            ("F.dropout(probs, drop) @ v", "mix(p, slots", "y = dot(p.to"),
        ],
    ),
    Row(
        "stream",
        "Back to the stream",
        "What a block gives is damped and added to x. In C these are two loops, one after the "
        "other. In Triton the kernel that multiplies also adds, while its sums are in registers: "
        "`attn_out` here, and `down` after the experts. So a layer is six kernels: `attn_in`, "
        "`attend`, `attn_out`, `route`, `gate_up`, `down`.",
        (
            [Piece("Attention.forward", "y = attend("), Piece("DecoderLayer.forward")],
            [
                Piece("attention", '/* "return self.o_proj'),
                Piece("add_to_stream"),
                Piece("attention_and_router"),
            ],
            [Piece("attn_out"), Piece("added")],
        ),
        [
            ("return self.o_proj(y)", "m->layers[layer].o_proj", "product(weight, y)"),
            ("x = x + y * self", "m->x[i] + damped", "return x.to(tl.float32) +"),
        ],
    ),
    Row(
        "router",
        "Router",
        "The fast forms do not sort. They count: a score with fewer than K larger ones is chosen. "
        "Where equal scores make that unclear, the C stops, and `fast/cpu.py` asks PyTorch's topk; "
        "Triton takes the lower index. In Triton the norm, the scores and the choice are one "
        "kernel, in which the program that ends last chooses.",
        (
            [Piece("Router")],
            [Piece("choose"), Piece("router")],
            [Piece("route"), Piece("choose")],
        ),
        [
            ("logits_NE = self.layer", "m->layers[layer].router", "product(weight, h)"),
            (".topk(", "better += logits_E", "place = tl.sum("),
            ("top_logits_NK.softmax", "softmax(weights_K", "w = tl.where(place < K"),
        ],
    ),
    Row(
        "experts",
        "Experts",
        "Python and C line the choices up by expert, so that tokens with the same expert share the "
        "reading of its weights. Triton, with few rows, does not: each program is told a "
        "row and a k, and looks up which expert that is. `gate_up` is both products and the "
        "silu; `down` multiplies, weighs, sums over the K experts and adds to x. Python weighs a "
        "row where it makes it, the other two where they add it up.",
        (
            [Piece("swiglu"), Piece("sort_by_expert", "sorted_M, order_M"), Piece("experts_loop")],
            [Piece("sort_by_expert"), Piece("experts")],
            [Piece("gate_up"), Piece("down")],
        ),
        [
            ("ends_E = sort_by_expert(", "sort_by_expert(m);", ""),
            ("hidden = swiglu(", "product(gate_up_EPD", "hidden = swiglu("),
            ("rows = F.linear(hidden", "product(down_EDF", "out = tl.sum(weight"),
            ("y_ND.index_add_(", "y[d] += weight", "out = tl.sum(rounded("),
        ],
    ),
    Row(
        "head",
        "Head",
        "The last norm, one more product, and a division. The C has a loop for each; in Triton "
        "they are one kernel. Here the three texts are closest to each other.",
        (
            [
                Piece("GraniteMoeModel.forward", "return self.norm(x)"),
                Piece("GraniteMoeForCausalLM.forward", "if config.tie_word", "loss = None"),
            ],
            [Piece("head")],
            [Piece("head")],
        ),
        [
            ("return self.norm(x)", "norm(m, m->norm)", "h = rms_norm("),
            ("logits = F.linear(x", "linear(m, m->head", "product(weight, h)"),
        ],
    ),
]

INTRO = [
    "This repository has the same model three times. Each part below begins with the definition, "
    "which you know; then comes what it became for speed. All of it is cut from the files that "
    "run. The same number marks the same step: it begins in that line, and may go on in the next. "
    f"{LEFT_OUT} stands where a file has more.",
    "The two fast texts are for **one new token**, of one text or of a few. Letters such as D and "
    "K are those of the header of `granitemoe.py`; with a P, as in DP, the size is padded to a "
    "power of two. `rounded` rounds to bfloat16 as PyTorch does.",
    "**C:** every thread runs all of it. `SHARE` gives each its part of a loop; then they wait for "
    "each other. A comment in quotation marks is the line of Python that what follows replaces. "
    "`m->every` lists all rows, where a list of some could stand. A `Register` holds STEP numbers.",
    "**Triton:** a kernel runs as many small programs at once, and `program_id` tells each which "
    "part it owns. Where it can, it asks for its weights first and only then calls `wait`, which "
    "ends when the kernel before has ended.",
]

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #fff; --ink: #1b1c1d; --soft: #5c6166; --line: #dcdcd6;
  --accent: #1f5fbf; --note: #3d6b50; --mark: #fdf0c4; --number: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1c1e21; --ink: #e9eaec; --soft: #a2a8af; --line: #34373c;
    --accent: #8ab4ff; --note: #8fc0a2; --mark: #3d3517; --number: #131416;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 130rem; margin: auto; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .35rem; }
h3 { font-size: .85rem; margin: 0; padding: .55rem .8rem; border-bottom: 1px solid var(--line); }
p { margin: 0 0 .7rem; max-width: 48rem; }
section { margin-top: 2.6rem; }
nav { display: flex; flex-wrap: wrap; gap: .35rem .5rem; padding: .7rem 0; }
a { color: var(--accent); background: var(--card); border: 1px solid var(--line);
  border-radius: 99px; padding: .1rem .75rem; font-size: .9rem; text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
p code { font-size: .9em; }
.three { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); align-items: start; }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
.code { overflow-x: auto; padding: .2rem 0 .6rem; border-radius: 0 0 9px 9px; }
.code:focus-visible { outline-offset: -2px; }
figure { margin: .5rem 0 0; min-width: max-content; }
figcaption { color: var(--soft); font-size: .78rem; padding-left: 2.2rem; }
figcaption span { position: sticky; left: 2.2rem; }
pre { margin: .15rem 0 0; font-size: 12px; line-height: 1.55; }
.l { display: block; position: relative; padding: 0 .8rem 0 2.2rem; }
.l b { position: absolute; left: .55rem; top: .1rem; width: 1.15rem; border-radius: 99px;
  background: var(--accent); color: var(--number); font-size: 10.5px; line-height: 1.15rem;
  text-align: center; text-indent: 0; user-select: none; }
i { color: var(--note); font-style: normal; }
s { white-space: nowrap; text-decoration: none; } /* an arrow is not parted where a line is */
@media (max-width: 48rem) { body { padding: .9rem; } h1 { font-size: 1.4rem; } }
@media (min-width: 68rem) {
  html { scroll-padding-top: 4rem; }
  nav { position: sticky; top: 0; z-index: 1; background: var(--page); }
  .three { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .8rem; }
  .text:first-child { position: sticky; top: 4rem; } /* the definition stays beside long texts */
  figure { min-width: 0; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .l { --deep: calc(var(--n, 0) * 1ch);
    padding-left: calc(2.2rem + var(--deep)); text-indent: calc(-1 * var(--deep)); }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One model, three texts</title>
<!-- Made by lessons/three.py from the sources: change these, and make it anew. -->
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>One model, three texts</h1>
{intro}
</header>
<nav aria-label="Parts of the model">
{links}
</nav>
{rows}
</main>
</body>
</html>
"""


# -------------------------------------------------------------------------------- what a file has
class Text(NamedTuple):
    """A source, by lines. `notes` says of each character whether it is of a comment or docstring;
    `places` are the lines of each function and class, by its name."""

    file: str
    lines: list[str]
    notes: list[list[bool]]
    places: dict[str, range]


def python_places(source: str) -> dict[str, range]:
    """By dotted names, decorators included."""
    found = {}

    def enter(node: ast.AST, prefix: str) -> None:
        for each in ast.iter_child_nodes(node):
            if isinstance(each, ast.ClassDef | ast.FunctionDef):
                first = min([each.lineno, *(x.lineno for x in each.decorator_list)])
                found[prefix + each.name] = range(first - 1, each.end_lineno)
                enter(each, f"{prefix}{each.name}.")

    enter(ast.parse(source), "")
    return found


def c_places(source: str) -> dict[str, range]:
    """Functions as clang-format lays them out, from the comment before to the } that ends them."""
    lines, found = source.splitlines(), {}
    for n, line in enumerate(lines):
        match = re.match(r"(?:\w.*?[ *])?(\w+)\(", line)
        if not match or line.endswith(";"):
            continue
        first = n
        if first and re.fullmatch(r"\w[^;{}]*", lines[first - 1]):  # its type, on a line before
            first -= 1
        start = first - 1
        if first and lines[start].endswith("*/"):
            start = next(i for i in range(start, -1, -1) if lines[i].startswith("/*"))
            first = first if lines[start].startswith("/* ---") else start  # a section's heading
        last = next((i for i in range(n, len(lines)) if lines[i] == "}"), n)
        found[match[1]] = range(first, last + 1)
    return found


def python_notes(source: str) -> list[tuple[int, int]]:
    """Where comments and docstrings begin and end, in characters."""
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found, start = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or token.type == tokenize.STRING and start:
            (a, b), (c, d) = token.start, token.end
            found.append((begins[a - 1] + b, begins[c - 1] + d))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return found


def c_notes(source: str) -> list[tuple[int, int]]:
    """The same of C, past the strings and characters that may hold what looks like a comment."""
    token = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|/\*.*?\*/|//[^\n]*'
    found = re.finditer(token, source, re.DOTALL)
    return [match.span() for match in found if match[0][0] == "/"]


def read(root: Path, file: str) -> Text:
    source = (root / file).read_text(encoding="utf-8")
    places, spans = (
        (c_places(source), c_notes(source))
        if file.endswith(".c")
        else (python_places(source), python_notes(source))
    )
    flags = [False] * len(source)
    for start, end in spans:
        flags[start:end] = [True] * (end - start)
    notes, at = [], 0
    for line in source.splitlines(keepends=True):
        notes.append(flags[at : at + len(line)])
        at += len(line)
    return Text(file, source.splitlines(), notes, places)


# ------------------------------------------------------------------------------ what is cut of it
def line_with(text: Text, words: str, among: list[int], where: str) -> int:
    for n in among:
        if words in text.lines[n]:
            return n
    raise ValueError(f"{text.file}: {words!r} is not in {where}; lessons/three.py names it")


def cut(text: Text, piece: Piece) -> list[int]:
    """The numbers of a piece's lines, from 0."""
    if piece.name not in text.places:
        raise ValueError(f"{text.file}: {piece.name} is not there; lessons/three.py names it")
    lines = [*text.places[piece.name]]
    if piece.since:
        first = line_with(text, piece.since, lines, piece.name)
        lines = [n for n in lines if n >= first]
    if piece.until:
        last = line_with(text, piece.until, lines, piece.name)
        lines = [n for n in lines if n < last]
    return lines


def parameters(text: Text, lines: list[int]) -> list[int]:
    """Those of a kernel which take a line each: the page only counts them."""
    heads = [n for n in lines if re.match(r"def \w+\($", text.lines[n])]
    if not heads:
        return []
    inside = [n for n in lines if n > heads[0]]
    one = re.compile(r"    \w+(: [\w.]+)?,")
    return list(takewhile(lambda n: one.fullmatch(text.lines[n]), inside))


# -------------------------------------------------------------------------------------- the page
def prose(words: str) -> str:
    """A sentence with its `code` and **stress**."""
    words = re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(words))
    return re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", words)


def show_line(text: Text, n: int, indent: int, number: int | None) -> str:
    """One line of a source without its first `indent` spaces, its comments set apart."""
    line = text.lines[n][indent:]
    notes = text.notes[n][indent : indent + len(line)]
    parts = []
    for note, pairs in groupby(zip(line, notes, strict=True), lambda pair: pair[1]):
        part = html.escape("".join(c for c, _ in pairs)).replace("-&gt;", "<s>-&gt;</s>")
        parts.append(f"<i>{part}</i>" if note and part.strip() else part)
    deep = len(line) - len(line.lstrip())
    more = 3 if line[deep:].startswith("/*") else 0 if all(notes[deep:]) else 2
    style = f' style="--n:{deep + more}"'  # where the line goes on if it does not fit
    badge = f"<b>{number}</b>" if number else ""
    return f'<span class="l"{style}>{badge}{"".join(parts)}\n</span>'


def show_piece(text: Text, piece: Piece, numbers: dict[int, int]) -> str:
    """Its lines, and above them where they are from."""
    lines = cut(text, piece)
    filled = [text.lines[n] for n in lines if text.lines[n]]
    indent = min(len(line) - len(line.lstrip()) for line in filled)
    hidden, whole = parameters(text, lines), text.places[piece.name]
    left_out = f'<span class="l"><i>{LEFT_OUT}</i>\n</span>'
    made = [left_out] if lines[0] > whole[0] else []
    for n in lines:
        if n in hidden and n == hidden[0]:
            count = f"{LEFT_OUT} {len(hidden)} parameters"
            made.append(f'<span class="l" style="--n:6">    <i>{count}</i>\n</span>')
        if n not in hidden:
            made.append(show_line(text, n, indent, numbers.get(n)))
    made += [left_out] if lines[-1] < whole[-1] else []
    part = f", in {piece.name}" if len(lines) < len(whole) else ""
    caption = f"<span>{text.file}, line {lines[0] + 1}{html.escape(part)}</span>"
    code = "".join(made)
    return f"<figure><figcaption>{caption}</figcaption><pre>{code}</pre></figure>"


def show_cell(row: Row, column: int, text: Text) -> str:
    """All that a row shows of one text."""
    pieces, head = row.pieces[column], TEXTS[text.file]
    lines = [n for piece in pieces for n in cut(text, piece)]
    numbers = {}
    for number, same in enumerate(row.same, 1):
        if same[column]:
            numbers[line_with(text, same[column], lines, f"the row {row.name!r}")] = number
    figures = "\n".join(show_piece(text, piece, numbers) for piece in pieces)
    label = html.escape(f"{row.title}: {head}")
    region = f'<div class="code" tabindex="0" role="region" aria-label="{label}">'
    return f'<div class="text"><h3>{head}</h3>\n{region}\n{figures}\n</div></div>'


def page(root: Path = ROOT) -> str:
    """The page, of the sources in a folder."""
    texts = [read(root, file) for file in TEXTS]
    links = [f'<a href="#{row.name}">{row.name.capitalize()}</a>' for row in ROWS]
    rows = []
    for row in ROWS:
        cells = "\n".join(show_cell(row, i, text) for i, text in enumerate(texts))
        head = f'<h2 id="{row.name}-head">{html.escape(row.title)}</h2>\n<p>{prose(row.says)}</p>'
        start = f'<section id="{row.name}" aria-labelledby="{row.name}-head">'
        rows.append(f'{start}\n{head}\n<div class="three">\n{cells}\n</div>\n</section>')
    intro = "\n".join(f"<p>{prose(words)}</p>" for words in INTRO)
    parts = {"intro": intro, "links": "\n".join(links), "rows": "\n".join(rows)}
    return PAGE.format(style=STYLE, **parts)


def main() -> None:
    parser = Parser(description="Write the page with the three texts.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="(three.html)")
    out = parser.parse_args().out
    out.write_text(page(), encoding="utf-8")
    print(f"{out}: {len(ROWS)} parts of the model in {len(TEXTS)} texts")


if __name__ == "__main__":
    command(main)
