"""What you read is what runs: without a flag, the functions of granitemoe.py.

Each of them is broken in turn, and the default command has to fail. A faster form swapped in from
elsewhere, as there once was, would show here.
"""

import ast
import importlib
import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT, forked, on_linux

SOURCE = (ROOT / "granitemoe.py").read_text(encoding="utf-8")
BROKEN = 77  # the exit status of a command that came by
NOT_BY_DEFAULT = {  # on a CPU, for one prompt
    "attend_eager", "attend_one", "attend_flash",  # other forms of attention
    "takes_grouped_mm", "experts_grouped", "experts_gathered",  # and of the experts
    "visible", "documents",  # masks
    "load_balancing_loss",
}  # fmt: skip


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")


def command_with_broken(name: str) -> int:
    """Run the command on granitemoe.py with `raise SystemExit` as the body of one function."""
    tree = ast.parse(SOURCE)
    if name:
        dict(functions(tree))[name].body = ast.parse(f"raise SystemExit({BROKEN})").body
    for module in [*sys.modules]:
        if module.split(".")[0] in ("granitemoe", "generate", "files", "fast"):
            del sys.modules[module]
    spec = importlib.util.spec_from_loader("granitemoe", None)
    module = sys.modules["granitemoe"] = importlib.util.module_from_spec(spec)
    exec(compile(tree, "granitemoe.py", "exec"), vars(module))
    sys.argv = ["generate.py", "class Stack:", "--max-new-tokens", "2", "--device", "cpu"]
    return importlib.import_module("generate").main()


@on_linux
def test_the_command_as_it_is():
    outcome = forked(lambda: command_with_broken(""))
    assert outcome.status == 0 and outcome.out.startswith("class Stack:"), outcome.err


@on_linux
@pytest.mark.parametrize("name", [name for name, _ in functions(ast.parse(SOURCE))])
def test_what_you_read_is_what_runs(name):
    outcome = forked(lambda: command_with_broken(name))
    expected = 0 if name in NOT_BY_DEFAULT else BROKEN
    assert outcome.status == expected, outcome.err
