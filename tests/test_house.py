"""The house: which room may know which, how large the rooms are, and whether the README is true.

A reader is promised a model in one file and a command in another, both short.
"""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT, TESTS

ROOMS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "engine/*.py", "bench/*.py", "lessons/*.py", "tiny/*.py", "tests/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "my_puzzles.py"  # a reader's copy
)
KNOWS = {  # what of ours each room may import
    "granitemoe.py": set(),
    "generate.py": {"engine", "granitemoe"},
    "engine": {"engine", "granitemoe"},
    "test_granitemoe.py": {"generate", "granitemoe"},
    "bench": {"bench", "generate", "granitemoe"},
    "lessons": {"generate", "granitemoe"},
    "tiny": {"granitemoe"},
    "tests": {"generate", "granitemoe", "lessons", "test_granitemoe"},
}
ENGINE_TESTS = {
    "checkpoint",
    "tokenizer",
    "chat",
    "cpu",
    "cuda",
}  # each test of a room knows that room
SHARED = {"changes", "fuzz"}
LARGEST = {"granitemoe.py": (600, 420), "generate.py": (500, 380), "engine": (350, 350)}
PUBLIC = ("generate", "load_model")  # whose parameters are the command's options
TOP = {
    ".ci", ".gitignore", ".ruff.toml", "LICENSE", "README.md", "bench", "engine", "generate.py",
    "granitemoe.py", "lessons", "requirements.txt", "test_granitemoe.py", "tests", "tiny",
}  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def parse(room: Path) -> ast.Module:
    return ast.parse((ROOT / room).read_text(encoding="utf-8"))


def imports(room: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parse(room)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_arrows(room):
    ours = {"generate", "granitemoe", "engine", "bench", "lessons", "tests", "test_granitemoe"}
    allowed = set(KNOWS[room.parts[0]])
    if room.parts[0] == "tests" and room.stem.removeprefix("test_") in ENGINE_TESTS | SHARED:
        allowed.add("engine")
    assert {name.split(".")[0] for name in imports(room)} & ours <= allowed


def test_the_model_stands_alone():
    """torch and the standard library; it does not even name what makes it faster."""
    found = {name.split(".")[0] for name in imports(Path("granitemoe.py"))}
    assert found - set(sys.stdlib_module_names) == {"torch"}
    assert not re.search(r"\bengine\b|generate\.py", (ROOT / "granitemoe.py").read_text())


def test_the_engine_knows_nothing_of_a_command():
    assert not [room for room in ROOMS if room.parts[0] == "engine" and "generate" in imports(room)]


def count(source: str) -> tuple[int, int]:
    """Lines, and those of code: not blank, no whole comment, no docstring."""
    lines, prose = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        whole = token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
        prose |= {token.start[0]} if whole else set()
    return len(lines), sum(bool(x.strip()) and n not in prose for n, x in enumerate(lines, 1))


@pytest.mark.parametrize("room", [r for r in ROOMS if r.parts[0] in LARGEST], ids=str)
def test_sizes(room):
    lines, code = count((ROOT / room).read_text(encoding="utf-8"))
    assert (lines, code) <= LARGEST[room.parts[0]] and code <= LARGEST[room.parts[0]][1]


def test_the_count():
    source = '"""One.\n\nTwo."""\n\n# three\nx = 1  # four\n\n\ndef f():\n    """Five."""\n'
    assert count(source) == (10, 2)


@pytest.mark.parametrize("room", [r for r in ROOMS if r.parts[0] != "tiny"], ids=str)
def test_functions(room):
    """On one screen each, with no more parameters than one can remember."""
    for node in ast.walk(parse(room)):
        if isinstance(node, ast.FunctionDef):
            size, given = node.end_lineno - node.lineno + 1, node.args
            parameters = [a.arg for a in given.posonlyargs + given.args + given.kwonlyargs]
            many = len([name for name in parameters if name not in ("self", "cls")]) > 7
            assert size <= 40, (node.name, size)
            assert not many or node.name in PUBLIC, (node.name, parameters)


def test_layout():
    """The owner's: nothing else at the top level."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    assert {line.partition("/")[0] for line in tracked.stdout.splitlines()} <= TOP


# -------------------------------------------------------------------------------------- the README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140
    doors = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert doors[:3] == ["Run it", "Read it", "Build on it"]


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.DOTALL))
def test_python_in_the_readme_runs(code):
    """Each block as somebody would paste it into a file, in a process of its own."""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("print" in code) == bool(done.stdout)


def test_the_output_in_the_readme_is_real():
    """What the first command writes, word for word; lines in brackets tell times."""
    shown = re.search(r"&& python generate\.py\n(.*?)\n\$ ", README, re.DOTALL)[1].splitlines()
    line = [sys.executable, "generate.py"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    anew = "the README quotes another output; run: python lessons/quotes.py"
    assert done.stdout.splitlines() == [x for x in shown if not x.startswith("[")], anew
    said = [re.sub(r"\d+\.\d+ s|[\d.]+ (tokens|GB)/s", "", x) for x in done.stderr.splitlines()]
    noted = [re.sub(r"\d+\.\d+ s|[\d.]+ (tokens|GB)/s", "", x) for x in shown if x[:1] == "["]
    assert said == noted, anew
    assert re.search(r"&& pytest\n\d+ passed.* in [\d.]+s", README)


def test_links_of_the_readmes_lead_somewhere():
    for page in (
        ROOT / "README.md",
        *(ROOT / n / "README.md" for n in ("lessons", "tiny", "tests")),
    ):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)


def test_the_rooms_tests_are_listed():
    listed = (TESTS / "README.md").read_text(encoding="utf-8")
    for path in TESTS.glob("*.py"):
        assert f"`{path.name}`" in listed, path.name
