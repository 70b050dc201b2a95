"""Remove each check in turn, on a copy, and require a test to fail.

    python tests/mutate_checks.py [PART [N]]    only the checks whose description contains PART,
                                                and of these every N-th

A check is a call of require() or of another function that refuses, a raised error, an entry of a
table whose loop raises, or an `except` of the command. It survives where the tests in TESTS, of
which none is thorough and which must pass as it is, still pass without it. Prints the score and
exits with 1 where it is below 95 %.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "granitemoe.py", "generate.py", "files/checkpoint.py", "files/tokenizer.py",
    "files/chat.py", "files/terminal.py", "fast/cuda.py", "fast/cpu.py",
)  # fmt: skip
PARTS = ("generation", "checkpoint", "tokenizer", "chat", "fast_cpu", "fast_cuda", "command")
TESTS = [f"tests/test_{name}.py" for name in PARTS]
SLOW = "soak or fuzz or memory_while or without_asserts or threads or auto or asked_for or drop_as"
REFUSING = ("require", "refuse", "refuse_unless", "check_number", "check_field", "check_fields")


def raises(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Raise) for inner in ast.walk(node))


def checks(tree: ast.Module) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each check with a description, and what removes it from the tree."""
    for scope in [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]:
        where = scope.name
        for node in inside(scope):
            for block in ("body", "orelse", "finalbody"):
                body = getattr(node, block, None)
                for line in [n for n in body if is_check(n)] if isinstance(body, list) else ():
                    change = partial(body.__setitem__, body.index(line), ast.Pass())
                    yield f"{where}: {ast.unparse(line).splitlines()[0]}", change
            if isinstance(node, ast.ExceptHandler) and where == "run":
                nothing = partial(setattr, node, "type", ast.Tuple([], ast.Load()))
                yield f"{where}: {ast.unparse(node).splitlines()[0]}", nothing
            if isinstance(node, ast.For) and raises(node):
                for entries in tables(node.iter):
                    for at, entry in enumerate(entries[0]):
                        drop = partial(drop_at, entries, at)
                        yield f"{where}: entry {ast.unparse(entry):.60}", drop


def is_check(node: ast.AST) -> bool:
    call = getattr(getattr(node, "value", None), "func", None)
    name = getattr(call, "id", getattr(call, "attr", ""))
    required = isinstance(node, ast.Expr) and name in REFUSING
    return required or (isinstance(node, ast.Raise) and node.exc is not None)


def inside(scope: ast.AST) -> Iterator[ast.AST]:
    """A scope's nodes without those of functions and classes within it, which have their own."""
    yield scope
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield from inside(child)


def tables(node: ast.AST) -> Iterator[list[list[ast.AST]]]:
    """The lists that hold the entries of a literal that a loop goes over."""
    literal = (
        node.func.value if isinstance(node, ast.Call) and hasattr(node.func, "value") else node
    )
    if isinstance(literal, ast.Dict):
        yield [literal.keys, literal.values]
    elif isinstance(literal, ast.Tuple):
        yield [literal.elts]


def drop_at(entries: list[list[ast.AST]], at: int) -> None:
    for column in entries:
        del column[at]


def without(source: str, number: int) -> str:
    """The source without check `number`."""
    tree = ast.parse(source)
    _, remove = list(checks(tree))[number]
    remove()
    return ast.unparse(ast.fix_missing_locations(tree))


def survives(job: tuple[str, str, str]) -> bool:
    """Run the tests against a copy with one file replaced; stops at the first that fails."""
    file, source, _ = job
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        for name in ("granitemoe.py", "generate.py", "test_granitemoe.py"):
            shutil.copy(ROOT / name, folder)
        for name in ("tests", "files", "fast"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        (Path(folder) / "tiny").symlink_to(ROOT / "tiny")
        (Path(folder) / file).write_text(source)
        line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
        line += ["-k", f"not ({SLOW})"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(line, cwd=folder, env=env, capture_output=True, timeout=600)
        except subprocess.TimeoutExpired:  # without the check something hangs, which is noticed too
            return False
        return ran.returncode == 0


def main(part: str = "", every: str = "1") -> int:
    jobs = []
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        for number, (description, _) in enumerate(checks(ast.parse(source))):
            name = f"{file} {description}"
            if part in name:
                jobs.append((file, without(source, number), name))
    jobs = jobs[:: int(every)]
    if not survives((FILES[0], (ROOT / FILES[0]).read_text(encoding="utf-8"), "nothing removed")):
        sys.exit("the tests fail as it is: removing a check would show nothing")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alive = []
        for job, lived in zip(jobs, pool.map(survives, jobs), strict=True):
            print("survives" if lived else "fails   ", job[2][:150], flush=True)
            alive += [job[2]] * lived
    print(f"{len(jobs) - len(alive)} of {len(jobs)} removals make a test fail")
    return 1 if len(alive) > 0.05 * len(jobs) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
