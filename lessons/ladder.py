"""The ladder from the definition of a mixture of experts to its fast forms, measured on one layer.

    python lessons/ladder.py        a markdown table for sizes of the 1b in bfloat16, on the CPU

Three functions of the same tensors give the same result (see granitemoe.py). Counted for 32 tokens,
by watching every operator that PyTorch runs:
lines       of code without docstrings: its own and, in brackets, with all that it calls
products    matrix products of one layer; a grouped or a batched one counts once
waits       how often a GPU's host must wait for a value: results whose shape depends on values, and
            numbers handed to Python
temporary   the most bytes that intermediate results hold at one moment, over the tokens
Measured: tokens/s of the layer's experts, the best of all runs in three seconds: whatever else the
machine does can only make a run slower.
"""

import ast
import inspect
from collections.abc import Callable

import torch
from common import Parser, command, integer, markdown, progress
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import granitemoe
from generate import DTYPES

FORMS = ("experts_loop", "experts_grouped", "experts_gathered")
SIZES = {"E": 32, "K": 8, "D": 1024, "F": 512}
COUNTED = 32  # tokens for the counts: enough that each expert gets some
TOO_LARGE = 2 * 2**30  # bytes of temporaries; a form that needs more is not timed


class Meter(TorchDispatchMode):
    """Counts the operators run inside `with`: products, waits, and the peak of live bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.peak = 0
        self.waits: list[str] = []  # the operators' names
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}  # by address: storage, bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, tags = func.overloadpacket.__name__, set(func.tags)
        self.products += name.endswith(("mm", "mv", "linear"))
        asks = bool(tags & {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})
        if name == "index":  # tagged for the sake of boolean masks alone
            asks = any(x is not None and x.dtype == torch.bool for x in args[1])
        self.waits += [name] if asks else []
        given, made = (
            {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in (args, result)
        )
        addresses = {storage.data_ptr() for storage in given}
        self.live = {at: entry for at, entry in self.live.items() if not entry[0].expired()}
        for storage in made:
            if storage.data_ptr() not in addresses:  # else a view, or written in place
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


class ListMeter(TorchFunctionMode):
    """Counts Tensor.tolist, which hands numbers to Python without running an operator."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


def make_inputs(N: int, sizes: dict[str, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x_ND, gate_up_EPD, down_EDF, weights_NK and expert_ids_NK, all random."""
    E, K, D, F = (sizes[letter] for letter in "EKDF")
    torch.manual_seed(0)
    weights_NK, expert_ids_NK = torch.randn(N, E).softmax(dim=-1).topk(K)
    x_ND, gate_up_EPD, down_EDF = torch.randn(N, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    floats = (x_ND, gate_up_EPD * D**-0.5, down_EDF * F**-0.5, weights_NK)
    return *(x.to(dtype) for x in floats), expert_ids_NK


def count_lines(name: str) -> dict[str, int]:
    """Lines of code, one a statement, of a function of granitemoe.py and of all that it calls."""
    counted, todo = {}, [name]
    while todo:
        function = ast.parse(inspect.getsource(getattr(granitemoe, todo[-1]))).body[0]
        function.body = function.body[ast.get_docstring(function) is not None :]
        counted[todo.pop()] = len(ast.unparse(function).splitlines())
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        functions = {n for n in names if inspect.isfunction(getattr(granitemoe, n, None))}
        todo += functions - set(counted) - set(todo)
    return counted


def count(form: Callable[..., object], inputs: tuple[Tensor, ...]) -> tuple[int, int, float]:
    """Matrix products, waits, and temporary bytes a token of one call."""
    with torch.no_grad(), ListMeter() as lists, Meter() as meter:
        form(*inputs)
    return meter.products, len(meter.waits) + lists.calls, meter.peak / len(inputs[0])


@torch.inference_mode()
def speed(form: Callable[..., Tensor], inputs: tuple[Tensor, ...], seconds: float) -> float:
    """Tokens a second of the fastest run: a stall spoils a median of few runs, and not the best."""
    from torch.utils.benchmark import Timer  # looks for CUDA's compiler, and may print that

    names = {"form": form, "inputs": inputs}
    timer = Timer("form(*inputs)", globals=names, num_threads=torch.get_num_threads())
    return len(inputs[0]) / min(timer.blocked_autorange(min_run_time=seconds).times)


def table(
    sizes: dict[str, int],
    tokens: list[int],
    dtype: torch.dtype,
    seconds: float,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> str:
    """The markdown table, a row for each form; `tell` is called with how many are done, and of how
    many."""
    columns = ["form", "lines", "products", "waits", "temporary a token"]
    columns += [f"tokens/s at {N}" for N in tokens]
    rows = []
    for name in FORMS:
        form, lines = getattr(granitemoe, name), count_lines(name)
        products, waits, held = count(form, make_inputs(COUNTED, sizes, dtype))
        cells = [f"`{name}`", f"{lines[name]} ({sum(lines.values())})", f"{products}", f"{waits}"]
        speeds = (
            f"{speed(form, make_inputs(N, sizes, dtype), seconds):,.0f}"
            if held * N <= TOO_LARGE
            else f"({held * N / 1e9:.0f} GB)"
            for N in tokens
        )
        rows.append([*cells, f"{held / 1e3:,.0f} kB", *speeds])
        tell(len(rows), len(FORMS))
    return markdown(columns, rows)


def main() -> None:
    parser = Parser(description="Compare the three forms of the experts.")
    add = parser.add_argument
    add("--tokens", type=integer(1), nargs="+", default=[1, 32, 512], metavar="N")
    add("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    with progress("forms measured") as tell:
        made = table(SIZES, args.tokens, DTYPES[args.dtype], 3.0, tell)
    print(made)
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\nOne layer with {SIZES}, {args.dtype}, {threads}.")
    print("A speed is the best run's in 3 seconds.")
    print("A size in brackets is what the form would hold at once.")


if __name__ == "__main__":
    command(main)
