"""The page with the three texts: cut from the sources as they are, and readable in a browser."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_lessons import CONTRASTS, browse, in_browser, tab  # noqa: F401  (tab is a fixture)

sys.path.insert(0, str(ROOT / "lessons"))

from lessons import three  # noqa: E402

MADE = three.OUT.read_text(encoding="utf-8")
SOURCES = {file: (ROOT / file).read_text(encoding="utf-8") for file in three.TEXTS}
CELLS = len(three.ROWS) * len(three.TEXTS)


@pytest.fixture
def changed(tmp_path):
    """The page of sources in which one passage of a file, which is there once, is another."""

    def act(file: str, old: str, new: str) -> str:
        for name, source in SOURCES.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(source, encoding="utf-8")
        assert SOURCES[file].count(old) == 1
        (tmp_path / file).write_text(SOURCES[file].replace(old, new), encoding="utf-8")
        return three.page(tmp_path)

    return act


def figures(page: str) -> list[tuple[str, str]]:
    """The caption and the code of each piece, as a reader sees them, without the numbers."""
    found = re.findall(r"<figcaption>(.*?)</figcaption><pre>(.*?)</pre>", page, re.DOTALL)
    plain = [[re.sub(r"<b>\d+</b>|<[^>]*>", "", part) for part in pair] for pair in found]
    return [(html.unescape(caption), html.unescape(code)) for caption, code in plain]


# ------------------------------------------------------------------------------------ what it says


def test_it_is_current():
    assert three.page() == MADE, "three.html is old; run: python lessons/three.py"


def test_each_row_has_all_three_texts():
    sections = re.findall(r'<section id="(\w+)".*?</section>', MADE, re.DOTALL)
    assert sections == [row.name for row in three.ROWS] == re.findall(r'href="#(\w+)"', MADE)
    for section in re.findall(r"<section.*?</section>", MADE, re.DOTALL):
        assert re.findall(r"<h3>(.*?)</h3>", section) == [*three.TEXTS.values()]
        cells = section.split('<div class="text">')[1:]
        for file, cell in zip(three.TEXTS, cells, strict=True):
            captions = {caption.partition(", ")[0] for caption, _ in figures(cell)}
            assert captions == {file} and cell.count('<span class="l"') <= 70


def test_every_line_is_the_sources_own():
    """From the line that the caption says on, without a gap but for parameters left out."""
    found = figures(MADE)
    assert len(found) == sum(len(piece) for row in three.ROWS for piece in row.pieces)
    for caption, code in found:
        file, number = re.match(r"(\S+), line (\d+)", caption).groups()
        source = SOURCES[file].splitlines()[int(number) - 1 :]
        shown = [line.strip() for line in code.splitlines()]
        shown = shown[shown[0] == three.LEFT_OUT :]
        for n, line in enumerate(shown):
            if count := re.fullmatch(rf"{three.LEFT_OUT} (\d+) parameters", line):
                hidden, source[n : n + int(count[1])] = source[n : n + int(count[1])], [line]
                assert all(each.endswith(",") for each in hidden) and source[n + 1] == "):"
        assert shown[-1] != three.LEFT_OUT or shown.pop()
        assert shown == [line.strip() for line in source[: len(shown)]], caption


def test_functions_are_found_by_name():
    """Each piece begins with its function, or says in which one it is; and a whole one ends."""
    for row in three.ROWS:
        for file, pieces in zip(three.TEXTS, row.pieces, strict=True):
            text = three.read(ROOT, file)
            for piece in pieces:
                lines = [text.lines[n] for n in text.places[piece.name]]
                last = piece.name.split(".")[-1]
                head = (
                    rf"^ *(class|def) {last}\b" if file.endswith("py") else rf"^(\w.*\b)?{last}\("
                )
                assert re.search(head, "\n".join(lines), re.MULTILINE), (file, piece)
                assert file.endswith("py") or lines[-1] == "}" and lines.count("}") == 1


def test_the_same_lines_have_the_same_number():
    """In the norm: both lines of the definition, in the C and in Triton."""
    section = re.search(r'<section id="norm".*?</section>', MADE, re.DOTALL)[0]
    lines = re.findall(r"<b>(\d+)</b>(.*)", section)
    assert [number for number, _ in lines] == ["1", "2"] * 3
    plain = [html.unescape(re.sub("<[^>]*>", "", line)).strip() for _, line in lines]
    assert [line.split("(")[0] for line in plain] == [
        "normed = F.rms_norm", "return self.weight * normed.to",
        "const float scale = 1 / sqrtf", "normed[d] = to_activation",
        "normed = x * tl.rsqrt", "return ",
    ]  # fmt: skip


def test_notes_are_comments_and_docstrings(changed):
    """And not what looks like one in a string."""
    page = changed(
        "granitemoe.py",
        "        return self.weight * normed.to(x.dtype)\n",
        '        note = "# no" + """no"""  # yes\n'
        "        return self.weight * normed.to(x.dtype)\n",
    )
    line = re.search(r"note = .*", page)[0]
    assert re.findall("<i>(.*?)</i>", line) == ["# yes"]
    assert "<i>&quot;&quot;&quot;x / sqrt(mean(x^2) + eps) * weight" in page
    page = changed("fast/cpu.c", "float top = x[0];", 'char a = \'"\'; say("/* no */"); /* yes */')
    assert re.findall("<i>(.*?)</i>", re.search(r"char a.*", page)[0]) == ["/* yes */"]


# ------------------------------------------------------------------------------------ what changes


def test_an_edit_moves_along(changed):
    page = changed("fast/cpu.c", '#include "numbers.h"\n', '#include "numbers.h"\n\n\n')
    before, after = figures(MADE), figures(page)
    assert [code for _, code in after] == [code for _, code in before]
    for (old, _), (new, _) in zip(before, after, strict=True):
        numbers = [int(re.search(r"line (\d+)", caption)[1]) for caption in (old, new)]
        assert numbers[1] - numbers[0] == (2 if old.startswith("fast/cpu.c") else 0)


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("granitemoe.py", "class Router(", "class Chooser(", "Router"),
        ("granitemoe.py", "def rotate(", "def turn(", "rotate"),
        ("fast/cpu.c", "static void norm(", "static void rms(", "norm"),
        ("fast/cpu.c", "\nvoid step(", "\nvoid go(", "step"),
        ("fast/kernels.py", "def gate_up(", "def first_half(", "gate_up"),
        ("fast/kernels.py", "tl.rsqrt(tl.sum(x * x)", "1 / tl.sqrt(tl.sum(x * x)", "tl.rsqrt("),
        ("fast/cpu.c", "/* attend_eager:", "/*", "attend_eager"),
    ],
)  # fmt: skip
def test_what_is_gone_is_named_in_one_line(file, old, new, said, changed):
    with pytest.raises(ValueError) as caught:
        changed(file, old, new)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and said in message and "\n" not in message


def test_a_renamed_function_ends_the_command_in_one_line(tmp_path):
    """Of a copy of the repository, and the page that was there stays."""
    for name in ("lessons/three.py", "lessons/common.py", *SOURCES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    line = [sys.executable, tmp_path / "lessons" / "three.py"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    made = tmp_path / "lessons" / "three.html"
    assert done.returncode == 0 and made.read_text(encoding="utf-8") == MADE
    renamed = SOURCES["fast/kernels.py"].replace("def head(", "def last(")
    (tmp_path / "fast" / "kernels.py").write_text(renamed, encoding="utf-8")
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    said = "three.py: error: fast/kernels.py: head is not there; lessons/three.py names it\n"
    assert done.returncode == 1 and done.stderr == said and not done.stdout
    assert made.read_text(encoding="utf-8") == MADE


def test_out_is_another_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["three.py", "--out", str(tmp_path / "page.html")])
    three.main()
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == MADE
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'page.html'}: ")


HOSTILE = '</script></pre><b>&amp; <img src=x> "\'" {style}'


@pytest.mark.parametrize("file, mark", [("granitemoe.py", "#"), ("fast/cpu.c", "//")])
def test_sources_are_escaped(file, mark, changed):
    """Whatever a source holds is text in the page."""
    place = "first, second = x.chunk(2, dim=-1)" if mark == "#" else "float top = x[0];"
    page = changed(file, place, f"{place} {mark} {HOSTILE}")
    assert any(f"{mark} {HOSTILE}" in code for _, code in figures(page))
    assert "<img" not in page and "<script" not in page and "</script" not in page
    assert page.count("</pre>") == MADE.count("</pre>") and page.count("<b>") == MADE.count("<b>")


def test_tags_are_closed():
    open_tags, alone = [], {"meta", "!doctype"}
    body = re.sub(r"<!--.*?-->|<style>.*?</style>", "", MADE, flags=re.DOTALL)
    for end, tag in re.findall(r"<(/?)([!\w]+)", body):
        if end:
            assert open_tags.pop() == tag
        elif tag not in alone:
            open_tags.append(tag)
    names = re.findall(r' id="(.*?)"', MADE)
    assert open_tags == [] and len({*names}) == len(names)
    assert {*re.findall(r'labelledby="(.*?)"', MADE)} < {*names}


def test_it_needs_no_network():
    assert """content="default-src 'none'; style-src 'unsafe-inline'">""" in MADE
    outside = re.sub(r"<pre>.*?</pre>", "", MADE, flags=re.DOTALL)
    assert not re.search(r"https?:|url\(|@import|src=|<script|<link|href=\"[^#]", outside)


# ----------------------------------------------------------------------------------- in a browser


@in_browser
@pytest.mark.parametrize("width, columns", [(400, 1), (1400, 3)])
def test_it_fits(width, columns, tab):  # noqa: F811
    """The page never scrolls sideways. Narrow, long lines do so in their own block; wide, they go
    on below."""
    page = tab(MADE, width)
    assert page.value("innerWidth") == width
    assert page.value("document.documentElement.scrollWidth") == width
    assert page.value(
        "[...document.querySelectorAll('main *')].every((node) => node.closest('.code > *')"
        " || node.getBoundingClientRect().right <= innerWidth)"
    )
    lefts = page.value(
        "[...document.querySelectorAll('.three')].map((row) => new Set([...row.children].map("
        "(cell) => cell.getBoundingClientRect().left)).size)"
    )
    assert lefts == [columns] * len(three.ROWS)
    scrolls = page.value(
        "[...document.querySelectorAll('.code')]"
        ".filter((code) => { code.scrollLeft = 9; return code.scrollLeft > 0; }).length"
    )
    assert scrolls == 0 if columns == 3 else scrolls > CELLS / 2


ACTIVE = """((a) => [a.getAttribute('href') || a.getAttribute('aria-label'),
  getComputedStyle(a).outlineStyle === 'solid' && getComputedStyle(a).outlineWidth === '2px'
])(document.activeElement)"""


@in_browser
@pytest.mark.parametrize("width", (400, 1400))
def test_it_goes_by_keyboard(width, tab):  # noqa: F811
    """Tab reaches each link and each block of code, each with a name and a visible focus. A link
    leads to its part, which then is in view; a block scrolls with the arrows."""
    page = tab(MADE, width)
    reached = []
    for _ in range(len(three.ROWS) + CELLS):
        page.press("Tab", 9)
        reached.append(page.value(ACTIVE))
    assert all(visible for _, visible in reached)
    heads = three.TEXTS.values()
    links, blocks = reached[: len(three.ROWS)], reached[len(three.ROWS) :]
    assert [name for name, _ in links] == [f"#{row.name}" for row in three.ROWS]
    assert [n for n, _ in blocks] == [f"{r.title}: {head}" for r in three.ROWS for head in heads]
    page.value("document.querySelector('[href=\"#router\"]').focus()")
    page.press("Enter", 13)
    assert page.value("location.hash") == "#router"
    top = "document.getElementById('router').getBoundingClientRect().top"
    assert page.value(f"{top} >= 0 && {top} < 100")
    under = "document.querySelector('nav').getBoundingClientRect()"
    assert width == 400 or page.value(f"{top} >= {under}.bottom && {under}.top === 0")
    page.press("Tab", 9)
    assert page.value(ACTIVE)[0] == "Router: Python, the definition"
    if width == 400:
        page.press("ArrowRight", 39)
        for _ in range(1000):  # scrolling is smooth: it takes a moment
            if page.value("document.activeElement.scrollLeft > 0"):
                break
        assert page.value("document.activeElement.scrollLeft > 0")


@in_browser
@pytest.mark.parametrize("scheme", (0, 1), ids=("dark", "light"))
def test_it_is_readable(scheme, tmp_path):
    """Dark on light or light on dark as the reader prefers, each text with a contrast of 4.5."""
    open_page = MADE.replace("default-src 'none';", "script-src 'unsafe-inline';")
    page = open_page.replace("</body>", f"<script>{{{CONTRASTS}}}</script></body>")
    shown = browse(tmp_path, page, f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom")
    seen = json.loads(re.search(r"<body>(.*)</body>", shown, re.DOTALL)[1])
    assert (seen["page"] > 0.5) == (scheme == 1) and len(seen["found"]) > 1000
    assert [each for each in seen["found"] if each["contrast"] < 4.5] == []


@in_browser
def test_copied_code_is_the_code(tmp_path):
    """A selection has each line once, without the numbers and without empty lines between."""
    act = """const pre = document.querySelectorAll("#norm pre")[0];
getSelection().selectAllChildren(pre); document.body.textContent = getSelection().toString();"""
    open_page = MADE.replace("default-src 'none';", "script-src 'unsafe-inline';")
    page = open_page.replace("</body>", f"<script>{act}</script></body>")
    shown = browse(tmp_path, page, "--dump-dom")
    shown = html.unescape(re.search(r"<body>(.*)</body>", shown, re.DOTALL)[1])
    start = SOURCES["granitemoe.py"].index("class RMSNorm")
    assert SOURCES["granitemoe.py"][start:].startswith(shown.rstrip())
    assert shown.rstrip().endswith("normed.to(x.dtype)")
