"""The house: which room may know which, how large the rooms are, and whether the README is true.

A reader is promised a model in one file and a command in another, both short.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TESTS, thorough
from elsewhere import MODULES

ROOMS = sorted(
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
    if path.name != "my_puzzles.py"  # a reader's copy
)
KNOWS = {  # what of ours each room may import
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
PART_TESTS = {"checkpoint", "tokenizer", "chat", "fast_cpu", "fast_cuda"}  # know their part
SHARED = {"changes", "fuzz"}
PUBLIC = ("generate", "load_model")  # whose parameters are the command's options
TOP = {
    ".ci", ".github", ".gitignore", ".pytest.ini", ".ruff.toml", "LICENSE", "README.md", "bench",
    "fast", "files", "generate.py", "granitemoe.py", "lessons", "requirements.txt",
    "test_granitemoe.py", "tests", "tiny",
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
    allowed = set(KNOWS[room.parts[0]])
    if room.parts[0] == "tests" and room.stem.removeprefix("test_") in PART_TESTS | SHARED:
        allowed |= {"fast", "files"}
    assert {name.split(".")[0] for name in imports(room)} & ours <= allowed


def test_the_model_stands_alone():
    """torch and the standard library; it does not even name what makes it faster."""
    found = {name.split(".")[0] for name in imports(Path("granitemoe.py"))}
    assert found - set(sys.stdlib_module_names) == {"torch"}
    assert not re.search(r"\bfast/|\bfiles/|generate\.py", (ROOT / "granitemoe.py").read_text())


def test_nothing_points_up():
    parts = [room for room in ROOMS if room.parts[0] in ("fast", "files")]
    assert parts and not [room for room in parts if "generate" in imports(room)]


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


# --------------------------------------------------------------------------------- other systems


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_no_room_needs_what_windows_lacks(room):
    """To be imported, that is: within a function, or where it may fail, it can be looked for."""
    for node in parse(room).body:
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


def test_the_rooms_tests_are_listed():
    listed = (TESTS / "README.md").read_text(encoding="utf-8")
    for path in TESTS.glob("*.py"):
        assert f"`{path.name}`" in listed, path.name
