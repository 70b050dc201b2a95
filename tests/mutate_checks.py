"""Remove each check in turn, on a copy, and require a test to fail.

    python tests/mutate_checks.py [PART]        only the checks whose description contains PART

A check is a call of require(), a raised error, an entry of a table of limits, or an `except` of the
command. It survives where the tests in TESTS, which must pass as it is, still pass without it.
Prints the score and exits with 1 where it is below 95 %.
"""

import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("granitemoe.py", "generate.py", "engine/checkpoint.py", "engine/tokenizer.py")
TESTS = ["tests/test_generation.py", "tests/test_checkpoint.py", "tests/test_command.py"]
SLOW = "soak or fuzz or memory_while or without_asserts or threads"  # no check is theirs alone
TABLES = ("LIMITS", "CHOICES", "SAMPLING")
ANYTHING = ast.parse("lambda x: True", mode="eval").body


def checks(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Each check with a description, and the node that removing it changes."""
    seen = set()  # an inner function's nodes are met with the outer ones too
    for scope in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        for node in (n for n in ast.walk(scope) if n not in seen):
            call = getattr(getattr(node, "value", None), "func", None)
            required = isinstance(node, ast.Expr) and getattr(call, "id", "") == "require"
            raised = isinstance(node, ast.Raise) and node.exc is not None
            handler = isinstance(node, ast.ExceptHandler) and scope.name == "main"
            if required or raised or handler:
                seen.add(node)
                yield f"{scope.name}: {ast.unparse(node).splitlines()[0]}", node
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in TABLES:
            for key in node.value.keys:
                yield f"{node.targets[0].id}: {key.value}", node


def without(tree: ast.Module, number: int) -> str:
    """The source without check `number`."""
    tree = copy.deepcopy(tree)
    description, target = list(checks(tree))[number]
    if isinstance(target, ast.ExceptHandler):
        target.type = ast.Tuple([], ast.Load())  # catches nothing
    elif isinstance(target, ast.Assign):
        table, name = target.value, description.partition(": ")[2]
        place = [key.value for key in table.keys].index(name)
        if target.targets[0].id == "SAMPLING":
            table.values[place].elts[1] = ANYTHING
        else:
            del table.keys[place], table.values[place]
    else:
        for node in ast.walk(tree):
            for block in ("body", "orelse", "handlers", "finalbody"):
                found = getattr(node, block, None)
                if isinstance(found, list) and target in found:
                    found[found.index(target)] = ast.Pass()
    return ast.unparse(ast.fix_missing_locations(tree))


def survives(job: tuple[str, str, str]) -> bool:
    """Run the tests against a copy with one file replaced; stops at the first that fails."""
    file, source, _ = job
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        for name in FILES:
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        (Path(folder) / file).write_text(source)
        line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
        line += ["-k", f"not ({SLOW})"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(line, cwd=folder, env=env, capture_output=True, timeout=600)
        except subprocess.TimeoutExpired:  # without the check something hangs, which is noticed too
            return False
        return ran.returncode == 0


def main(part: str = "") -> int:
    jobs = []
    for file in FILES:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for number, (description, _) in enumerate(checks(tree)):
            name = f"{file} {description}"
            if part in name:
                jobs.append((file, without(tree, number), name))
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
