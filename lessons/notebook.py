"""The course as a notebook: its cells are made from lessons/README.md, for quotes.py.

Text stays text. A command becomes a cell that runs it, and keeps the output that the page quotes.
Where the page copies a file of puzzles, each puzzle gets a cell to fill in and one that tries it.
A notebook is JSON, so no library is needed.
"""

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LESSONS = Path(__file__).resolve().parent
ABOUT = (
    "This is [the course](README.md) as a notebook, made from it by `python lessons/quotes.py`. "
    "Its cells run the course's commands. Below them stands what the course quotes, until you run "
    "them yourself. Begin with the next cell: the others need it."
)
FILL_IN = (
    "That is for the command line. In this notebook no copy is needed. Run the next cell first. "
    "Fill in the bodies in the cells below. Run each, and then the cell after it, which tries your "
    "function as it stands here. (A cell with a syntax error leaves it as it was before.)"
)
ALL = "All of them; then `tiny/` writes with those that are solved:"
START = """\
# Goes to the repository's top folder. Where that is missing (on Colab, say), it is fetched first.
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = "{address}"  # of the repository; put yours here
here, clone = Path.cwd(), Path("granitemoe").resolve()
places = [here, *here.parents, clone]
top = next((place for place in places if (place / "granitemoe.py").is_file()), None)
if top is None:
    subprocess.run(["git", "clone", "--depth", "1", ADDRESS, clone], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "-r", clone / "requirements.txt"]
    subprocess.run(install, check=True)
    top = clone
os.chdir(top)
sys.path.append(str(top / "lessons"))  # where the puzzles find how they are tried
python = Path(sys.executable).parent  # of the notebook: its commands take the same
os.environ["PATH"] = f"{{python}}{{os.pathsep}}{{os.environ['PATH']}}"
"""
PLACEHOLDER = "https://github.com/OWNER/REPOSITORY"  # until README.md says what to clone
CLONED = re.compile(r"git clone (?:-\S+ )*(\w+://\S+)")
BLOCK = re.compile(r"^```console\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"\n((?:\|.*\n)+)")
COPIED = re.compile(r"^\$ cp .*?lessons/(\w+)\.py my_", re.MULTILINE)
# What %run takes as a shell does. It fills in names for { and $, and files for * ? and [.
SCRIPT = re.compile(r"python ((?:\w+/)*\w+\.py\b[^|&;<>$*?\[\]{}~`\\#]*)")


def text(page: str) -> Iterator[dict]:
    """Cells of text; a heading begins one."""
    for part in re.split(r"^(?=## )", page, flags=re.MULTILINE):
        if part.strip():
            yield {"cell_type": "markdown", "metadata": {}, "source": part.strip("\n")}


def code(source: str, shown: str = "", skip: bool = False) -> dict:
    """A cell that can be run, with what it is said to print. Programs that run whole notebooks
    leave it out if skip."""
    stream = {"name": "stdout", "output_type": "stream", "text": shown.splitlines(keepends=True)}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {"tags": ["skip-execution"]} if skip else {},
        "outputs": [stream] if shown else [],
        "source": source.rstrip("\n"),
    }


def as_cell(line: str) -> str:
    """A command of the shell as a notebook takes it."""
    if script := SCRIPT.fullmatch(line):
        return f"%run {script[1]}"
    return f"%%bash\n{line}" if set("{}$") & set(line) else f"!{line}"  # ! fills in names too


def commands(block: str, measured: re.Pattern, missing: set[str]) -> Iterator[dict]:
    """A cell for each command of a block, with its output.

    Skipped are commands that measure, those of which nothing is quoted (a training is one), and
    those that read what a skipped one writes: missing keeps these files.
    """
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        skip = bool(measured.search(line)) or not shown or any(x in line for x in missing)
        missing.update(re.findall(r"/tmp/[\w-]+", line) if skip else ())
        yield code(as_cell(line), shown, skip)


def puzzles(name: str) -> Iterator[dict]:
    """Cells for a file of puzzles: what it imports, then each empty function, and its trial."""
    source = (LESSONS / f"{name}.py").read_text(encoding="utf-8")
    rows, body = source.splitlines(), ast.parse(source).body
    stubs = [x for x in body if isinstance(x, ast.FunctionDef) and ast.get_docstring(x)]
    stubs = [x for x in stubs if len(x.body) == 1]
    head = [row for row in rows[body[0].end_lineno : stubs[0].lineno - 1] if row[:3] != "# -"]
    head = re.sub(r"  # noqa.*", "", "\n".join(head)).strip()
    yield from text(FILL_IN)
    yield code(f"{head}\n\nfrom checker import check, check_all")
    for stub in stubs:
        lines = "\n".join(rows[stub.lineno - 1 : stub.end_lineno])
        yield code(f"{lines}\n    # fill in the body here")
        yield code(f"check({stub.name});")  # or a notebook shows what is returned, too
    if name == "puzzles":
        yield from text(ALL)
        yield code(f"check_all({', '.join(stub.name for stub in stubs)});")


def jump(page: str) -> str:
    """A page whose links to its own headings are as Jupyter names these: #1.-See-it."""
    for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE):
        github = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        page = page.replace(f"](#{github})", f"](#{heading.replace(' ', '-')})")
    return page


def cells(page: str, measured: re.Pattern) -> Iterator[dict]:
    """All cells. What names a reader's own file, my_puzzles.py say, stays text."""
    title, at = re.search(r".*\n", page)[0], 0
    address = CLONED.search((LESSONS.parent / "README.md").read_text(encoding="utf-8"))
    yield from text(f"{title}\n{ABOUT}")
    yield code(START.format(address=address[1] if address else PLACEHOLDER))
    rest, missing = page.removeprefix(title), set()
    for block in BLOCK.finditer(rest):
        own = re.search(r"\bmy_\w+\.py", block[1])
        yield from text(rest[at : block.end() if own else block.start()])
        at, shown = block.end(), block[1]
        table = TABLE.match(rest, at)
        if table and shown.splitlines()[-1].startswith("$ "):  # it is what this command prints
            at, shown = table.end(), shown + table[1]
        for name in COPIED.findall(block[1]):
            yield from puzzles(name)
        yield from () if own else commands(shown, measured, missing)
    yield from text(rest[at:])


def make(page: str, measured: re.Pattern) -> str:
    """The notebook's file for a page, the same each time. What matches measured is not to be run
    by a test."""
    made, seen = list(cells(jump(page), measured)), Counter()
    for cell in made:
        name = hashlib.sha256(cell["source"].encode()).hexdigest()[:8]
        seen[name] += 1
        cell["id"] = f"{name}-{seen[name]}"  # the same source may come twice
        cell["source"] = cell["source"].splitlines(keepends=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
