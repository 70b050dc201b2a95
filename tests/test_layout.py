"""The layout: which file may know which, how dense the text is, and whether the README is true.

A reader is promised a model in one file and a command in another, both short.
"""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, TESTS, thorough
from elsewhere import MODULES

SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in (
        "*.py",
        "files/*.py",
        "fast/*.py",
        "bench/*.py",
        "lessons/*.py",
        "tiny/*.py",
        "tests/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("my_puzzles.py", "my_faster.py")  # a reader's copies
)
KNOWS = {  # what of ours each file or part may import
    "granitemoe.py": set(),
    "generate.py": {"fast", "files", "granitemoe"},
    "fast": {"fast", "granitemoe"},
    "files": {"files", "granitemoe"},
    "test_granitemoe.py": {"generate", "granitemoe"},
    "bench": {"bench", "fast", "files", "generate", "granitemoe"},
    "lessons": {"generate", "granitemoe"},
    "tiny": {"granitemoe"},
    "tests": {"generate", "granitemoe", "lessons", "test_granitemoe"},
}
# tests that may look into files/ and fast/
PART_TESTS = {
    "checkpoint", "tokenizer", "chat", "command", "fast_cpu", "fast_cuda", "guard", "kernels",
}  # fmt: skip
SHARED = {"ahead", "changes", "fuzz", "fuzz_steps"}
PUBLIC = ("generate", "load_model")  # whose parameters are the command's options
TOP = {
    ".ci", ".clang-format", ".github", ".gitignore", ".pytest.ini", ".ruff.toml", "LICENSE",
    "README.md", "bench", "fast", "files", "generate.py", "granitemoe.py", "lessons",
    "requirements.txt", "test_granitemoe.py", "tests", "tiny",
}  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def parse(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", SOURCES, ids=str)
def test_arrows(file):
    ours = {
        "generate",
        "granitemoe",
        "fast",
        "files",
        "bench",
        "lessons",
        "tests",
        "test_granitemoe",
    }
    allowed = set(KNOWS[file.parts[0]])
    if file.parts[0] == "tests" and file.stem.removeprefix("test_") in PART_TESTS | SHARED:
        allowed |= {"fast", "files"}
    assert {name.split(".")[0] for name in imports(file)} & ours <= allowed


def test_the_model_stands_alone():
    """torch and the standard library; it does not even name what makes it faster."""
    found = {name.split(".")[0] for name in imports(Path("granitemoe.py"))}
    assert found - set(sys.stdlib_module_names) == {"torch"}
    assert not re.search(r"\bfast/|\bfiles/|generate\.py", (ROOT / "granitemoe.py").read_text())


def test_nothing_points_up():
    parts = [file for file in SOURCES if file.parts[0] in ("fast", "files")]
    assert parts and not [file for file in parts if "generate" in imports(file)]


def test_fast_forms_do_not_know_each_other():
    assert "fast.cuda" not in imports(Path("fast/cpu.py"))
    assert "fast.cpu" not in imports(Path("fast/cuda.py"))


@pytest.mark.parametrize("file", [r for r in SOURCES if r.parts[0] != "tiny"], ids=str)
def test_functions(file):
    """On one screen each, with no more parameters than one can remember."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef):
            kernel = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
            first = node.body[0] if kernel else node  # a kernel's parameters are its tensors
            size, given = node.end_lineno - first.lineno + 1, node.args
            parameters = [a.arg for a in given.posonlyargs + given.args + given.kwonlyargs]
            many = len([name for name in parameters if name not in ("self", "cls")]) > 7
            assert size <= 45, (node.name, size)
            assert not many or kernel or node.name in PUBLIC, (node.name, parameters)


# ---------------------------------------------------------------------------------------- density
# How much a reader takes in at a time: syntax nodes (expressions and statements) to a line of code
# and to a simple statement, conditional expressions. Limits on lines alone are met by packing.
READ = ("granitemoe.py", "generate.py", "test_granitemoe.py")
NODES = {"granitemoe.py": 7.5, "generate.py": 7.0, "test_granitemoe.py": 7.5}  # others: 8
STATEMENT = {"granitemoe.py": 9.5, "generate.py": 9.5, "test_granitemoe.py": 11.5}
LINES = {"granitemoe.py": 400, "generate.py": 340}
SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Raise, ast.Assert, ast.Expr)
DENSE = [file for file in SOURCES if str(file) in READ or file.parts[0] in ("fast", "files")]


class Density(NamedTuple):
    """Of one source text."""

    lines: int  # of code: not blank, no whole comment, no docstring
    nodes: float  # a line of code
    statement: float  # nodes a simple statement, on average
    large: int  # nodes of the statement that 95 in 100 do not exceed
    conditional: float  # conditional expressions to 100 lines of code


def size(node: ast.AST) -> int:
    return sum(isinstance(each, ast.expr | ast.stmt) for each in ast.walk(node))


def density(source: str) -> Density:
    tree, prose = ast.parse(source), set()
    every = [*ast.walk(tree)]
    docstrings = []
    for node in every:
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            docstrings.append(node.body[0])
            prose |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            prose.add(token.start[0])
    code = [
        line for n, line in enumerate(source.splitlines(), 1) if line.strip() and n not in prose
    ]
    simple = [node for node in every if isinstance(node, SIMPLE) and node not in docstrings]
    sizes = sorted(map(size, simple)) or [0]
    return Density(
        len(code),
        size(tree) / max(1, len(code)),
        sum(sizes) / len(sizes),
        sizes[int(0.95 * (len(sizes) - 1))],
        100 * sum(isinstance(node, ast.IfExp) for node in every) / max(1, len(code)),
    )


def test_the_count():
    source = (
        '"""One.\n\nTwo."""\n\n# three\nx = 1 if y else 2  # four\n\n\ndef f():\n    """Five."""\n'
    )
    # the docstrings' two nodes each, the assignment's six, the function
    assert density(source) == (2, 11 / 2, 6, 6, 50)


@pytest.mark.parametrize("file", DENSE, ids=str)
def test_density(file):
    name, found = str(file), density((ROOT / file).read_text(encoding="utf-8"))
    assert found.nodes <= NODES.get(name, 8), found
    assert found.statement <= STATEMENT.get(name, 12.5), found
    assert found.lines <= LINES.get(name, found.lines), found
    if name in LINES:
        assert found.large <= 18 and found.conditional <= 2.5, found


@pytest.mark.parametrize("name", READ)
def test_the_formatters_own_layout(name):
    """Where the formatter is switched off, lines can be packed. (A table is not.)"""
    source = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"#\s*(fmt|yapf):", source)
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff 0.14 or newer is not installed")
    line = [ruff, "format", "--check", "--no-cache", name]
    assert subprocess.run(line, cwd=ROOT, capture_output=True).returncode == 0


def test_layout():
    """The owner's: nothing else at the top level."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    assert {line.partition("/")[0] for line in tracked.stdout.splitlines()} <= TOP


# --------------------------------------------------------------------------------- other systems


@pytest.mark.parametrize("file", SOURCES, ids=str)
def test_no_file_needs_what_windows_lacks(file):
    """To be imported, that is: within a function, or where it may fail, it can be looked for."""
    for node in parse(file).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {*names} & {*MODULES}, ast.unparse(node)


@thorough
def test_the_tests_are_found_elsewhere():
    """Without fork, /proc and the rest each test file is imported; what needs them is skipped."""
    line = [sys.executable, TESTS / "elsewhere.py", "-q", "-rs"]
    done = subprocess.run([*line, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " tests collected" in done.stdout, done.stdout[-3000:]
    some = [
        f"tests/test_{n}.py" for n in ("command", "chat", "tokenizer", "checkpoint", "generation")
    ]
    done = subprocess.run([*line, *some], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    for reason in ("needs a system with fork and /proc", "this system has no FIFOs"):
        assert reason in done.stdout, done.stdout[-3000:]


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


def test_the_tests_are_listed():
    listed = (TESTS / "README.md").read_text(encoding="utf-8")
    for path in TESTS.glob("*.py"):
        assert f"`{path.name}`" in listed, path.name
