"""How the pieces of puzzles.py and faster.py are tried.

    from checker import check, check_all
    check(rms_norm)        # in a notebook: the function as it stands there
    check_all(rms_norm, rotary)                        # then the model with those that are solved

Against granitemoe.py's own: values, gradients, values in bfloat16 and with large scores, counted
operations. What is solved is put into tiny/, which then writes with it. A learner's code is traced
while it runs: calls of the answer book, and loops that never end, are told.
"""

import ast
import difflib
import functools
import inspect
import io
import itertools
import os
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import faster
import puzzles
import torch
import torch.nn.functional as F
from answers import PUZZLES, Piece, cases, make
from common import Parser, command, pieces
from ladder import count
from mistakes import MISTAKES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import granitemoe
from granitemoe import ATTENTION, EXPERTS, GraniteMoeConfig

HERE = Path(__file__).resolve().parent
BOOK = {str(HERE.parent / "granitemoe.py"), str(HERE.parent / "generate.py")}
BOOK |= {str(HERE / "answers.py"), str(HERE / "mistakes.py")}
BOOK |= {str(path) for path in (HERE.parent / "fast").glob("*.py")}
FILES = {"puzzles": puzzles, "faster": faster}
STUBS = {n: getattr(puzzles, n, None) or getattr(faster, n) for n in PUZZLES}
MOST_STEPS = 4_000_000  # of the bytecode of a learner's file; a loop that never ends has more
MOST_PRINTS = 40  # lines of a learner's own that are shown, of one call


class Wrong(ValueError):
    """What is told of a piece."""


class Unwritten(Wrong):
    """Its body is not there yet."""


class Endless(BaseException):
    """A loop does not end. `except Exception` in a learner's code does not catch it."""


# --------------------------------------------------------------------- running what a learner wrote
class Count(TorchDispatchMode):
    """Counts the operations of PyTorch inside `with`."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def run(piece: Piece, inputs: list, grad: bool = False) -> tuple[tuple, list]:
    """What the piece returns for copies of the inputs, and these; gradients reach them if grad."""
    given = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    for x in given:
        if grad and isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    got = piece(*given)
    if got is None or got is ...:
        if is_empty(piece):
            raise Unwritten("nothing is returned")
        raise Wrong("it returns nothing. Is `return` missing?")
    if inspect.iscoroutine(got):
        got.close()
        raise Wrong("`async def` gives no result. Write `def`.")
    if inspect.isgenerator(got):
        raise Wrong("`yield` gives no result. Use `return`.")
    return tuple(got) if isinstance(got, (tuple, list)) else (got,), given


def gradients(piece: Piece, inputs: list) -> list[Tensor | None]:
    """Of a weighted sum of all that the piece returns, for each input; None if none reaches it."""
    with torch.enable_grad():
        got, given = run(piece, inputs, grad=True)
        got = [y for y in got if y.requires_grad]
        for y in got:
            y.backward(torch.linspace(1, 2, y.numel()).view_as(y), retain_graph=True)
    return [x.grad if isinstance(x, Tensor) else None for x in given]


@contextmanager
def usual_settings() -> Iterator[None]:
    """Within `with`, PyTorch's own grad mode, default dtype and device; what is changed there, and
    the state of its random numbers, is changed back."""
    gradient, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_grad_enabled(gradient)
        torch.set_default_dtype(dtype)


def place(path: str, line: int | None) -> str:
    """Where something happened: in a file, or in a notebook's cell."""
    name = path if Path(path).is_file() else "the cell"
    return f"{name}, line {line}" if line else name


@contextmanager
def one_line(path: str, start: str = "") -> Iterator[None]:
    """Within `with`, an error becomes one line that tells the line in the learner's file."""
    try:
        yield
    except Wrong:
        raise
    except (Exception, SystemExit, KeyboardInterrupt, Endless) as error:
        if type(error).__name__ == "InterpreterError" and error.__cause__:
            error = error.__cause__  # what Triton's interpreter met
        if start and isinstance(error, NotImplementedError) and not str(error):
            raise Unwritten("nothing is returned") from None
        frames = traceback.extract_tb(error.__traceback__)
        lines = [getattr(error, "lineno", None), *(f.lineno for f in frames if f.filename == path)]
        where = place(path, lines[-1])
        if isinstance(error, KeyboardInterrupt) and str(error):
            raise  # it says where already
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped at {where}") from None
        said = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
        raise Wrong(f"{start}{where}: {said:.160}{advice(said)}") from None


def advice(said: str) -> str:
    """What to do about an error of PyTorch that does not say it."""
    if "multiple of 16 bytes" in said:
        return ". F.grouped_mm takes rows of whole 16 bytes alone."
    if re.search("shapes cannot be multiplied|contraction dimension", said):
        return ". A @ B takes (n, k) and (k, m): is one of them to be transposed?"
    if "Expected dtype ['fp32'" in said:
        return ". Keep sums in tl.float32."
    if "must match the size of tensor" in said or "must be broadcastable" in said:
        return ". Is one cut at the wrong place, or is keepdim=True or [:, None] missing?"
    if "could not infer output dtype" in said or "dtype should be floating point" in said:
        return ". A mean is of floats: .float() first."
    if "selected index k out of range" in said:
        return ". Is topk along the wrong dimension?"
    if re.search("same (dtype|type|scalar type)", said):
        return ". Bring both to one dtype: y.to(x.dtype)."
    return ""


@contextmanager
def traced(path: str) -> Iterator[list[str]]:
    """Within `with`, the list fills with the answer book's functions that are called. Raises
    Endless in the file `path` when MOST_STEPS of it have run."""
    used, left = [], [MOST_STEPS]

    def at_step(frame: FrameType, event: str, _: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Endless(f"still running after {MOST_STEPS:,} steps. Does a loop never end?")
        return at_step

    def at_call(frame: FrameType, event: str, _: object) -> object:
        file = frame.f_code.co_filename
        if file in BOOK:
            used.append(f"{Path(file).name}, {frame.f_code.co_qualname}")
        frame.f_trace_opcodes = file == path  # a loop may stand in one line
        return at_step if file == path else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        with patch.object(sys, "breakpointhook", no_debugger):
            yield used
    finally:
        sys.settrace(before)


def no_debugger(*_: object, **__: object) -> None:
    raise Wrong("`breakpoint()` cannot stop here: what it prints is kept. Use print.")


def guarded(name: str, piece: Piece) -> Piece:
    """A piece as another piece calls it: where its body is empty, it says so."""

    @functools.wraps(piece)
    def call(*given: object, **named: object) -> object:
        try:
            got = piece(*given, **named)
        except NotImplementedError as error:
            if str(error):
                raise
            got = None
        if got is None or got is ...:
            raise Wrong(f"your `{name}` returns nothing yet. Write it first.")
        return got

    return call


@contextmanager
def others_guarded(piece: Piece) -> Iterator[None]:
    """Within `with`, pieces that this piece calls are guarded."""
    scope = getattr(written(piece), "__globals__", {})
    own = {name: scope[name] for name in PUZZLES if inspect.isfunction(scope.get(name))}
    scope.update({name: guarded(name, f) for name, f in own.items()})
    try:
        yield
    finally:
        scope.update(own)


def quiet() -> AbstractContextManager:
    """A learner's own prints are shown once, while the values are compared."""
    return redirect_stdout(io.StringIO())


@contextmanager
def few_prints() -> Iterator[None]:
    """Within `with`, what is printed is kept. Then its first lines are shown, and no more."""
    kept = io.StringIO()
    try:
        with redirect_stdout(kept):
            yield
    finally:
        lines = kept.getvalue().splitlines()
        for line in lines[:MOST_PRINTS]:
            print(line)
        if lines[MOST_PRINTS:]:
            print(f"... and {len(lines) - MOST_PRINTS:,} lines more")


# --------------------------------------------------------------------------------- comparing values
def error_of(y: Tensor, exact: Tensor) -> float:
    """Root mean square of what y is off."""
    return (y.double() - exact.double()).square().mean().sqrt().item()


def rounded_alike(mine: Tensor, right: Tensor, exact: Tensor, strict: bool) -> bool:
    """Whether a result in bfloat16 is as good as ours. Another order of the operations rounds
    otherwise: so its error, to the result in float64, may be twice ours. strict: where the rounding
    itself is what is asked for, at most one number in twenty may differ."""
    if strict:
        return bool((mine != right).double().mean() <= 0.05)
    least = exact.double().square().mean().sqrt().item() * 2**-10
    return error_of(mine, exact) <= 2 * error_of(right, exact) + least


def differ(
    names: list[str], got: tuple, want: tuple, exact: tuple = (), strict: bool = False
) -> str:
    """The first difference in words, or nothing. exact: want in float64, where it is bfloat16.
    strict: see rounded_alike; and what must be 0 is 0 itself."""
    if len(got) != len(want):
        return f"{len(got)} came back, must be {len(want)}: {', '.join(names)}"
    if kinds(got) != kinds(want) and sorted(kinds(got)) == sorted(kinds(want)):
        return f"the results are in another order, must be {', '.join(names)}"
    for i, (name, a, b) in enumerate(zip(names, got, want, strict=True)):
        if not isinstance(a, Tensor):
            return f"{name} is {'missing' if a is None else f'a {type(a).__name__}, not a tensor'}"
        for what in ("shape", "dtype", "layout", "device"):
            x, y = (getattr(t, what) for t in (a, b))
            x, y = (tuple(z) if what == "shape" else z for z in (x, y))
            if x != y:
                return f"the {what} of {name} is {x}, must be {y}{remedy(what, x, y)}"
        if b.dtype == torch.bfloat16:
            if rounded_alike(a, b, exact[i], strict):
                continue
            off = (a.double() - exact[i].double()).abs().nan_to_num(torch.inf)
            far = (a != b) & (off >= off[a != b].amax()) if strict else off >= off.amax()
        else:
            far = ~torch.isclose(a, b, 1e-4, 1e-6 * (1 + b.double().norm().item()))
            far |= (a != 0) & (b == 0) & strict
        for at in far.nonzero().tolist()[:1]:
            mine, right = (x[tuple(at)].item() for x in (a, b))
            return f"{name}{at or ''} is {mine:.5g}, must be {right:.5g}"
    return ""


def kinds(ys: tuple) -> list[str]:
    return [f"{y.dtype} {y.shape}" if isinstance(y, Tensor) else "" for y in ys]


def remedy(what: str, got: object, must: object) -> str:
    """What to do about a wrong shape or dtype."""
    if what == "shape" and sorted(got) == sorted(must):
        return ". Dimensions are exchanged"
    if what == "shape" and len(got) > len(must):
        return ". A dimension is not summed (or averaged) over"
    rounding = what == "dtype" and got in (torch.float32, torch.float64)
    return ". Bring the result back to its input's dtype" if rounding else ""


class Wanted:
    """What the answer gives for some inputs, and how near a piece must come."""

    def __init__(self, name: str, inputs: list) -> None:
        answer, self.names = PUZZLES[name].answer, PUZZLES[name].gives.split()
        self.strict = name in ("rms_norm", "top_p")
        self.tied = name == "top_p" and is_tied(inputs[0])
        self.want, _ = run(answer, inputs)
        wide = [x.double() if is_float(x) else x for x in inputs]
        self.exact = run(answer, wide)[0] if self.want[0].dtype == torch.bfloat16 else ()

    def problem(self, got: tuple) -> str:
        if self.tied and isinstance(got[0], Tensor) and got[0].shape == self.want[0].shape:
            got, want = ([y.sort(dim=-1).values for y in ys] for ys in (got, self.want))
            return differ([f"sorted {name}" for name in self.names], tuple(got), tuple(want))
        return differ(self.names, got, self.want, self.exact, self.strict)

    def same(self, got: tuple, other: tuple) -> bool:
        """Whether two results that may both be wrong are the same."""
        if len(got) != len(other):
            return False
        if not self.problem(got):
            return not self.problem(other)
        if self.tied:
            got, other = ([y.sort(dim=-1).values for y in ys] for ys in (got, other))
        return all(map(alike, got, other, self.want))


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def is_tied(logits: Tensor) -> bool:
    return bool((logits == logits[..., :1]).all())


def alike(mine: object, other: Tensor, right: Tensor) -> bool:
    """The same numbers, nan and infinities too; in bfloat16 much nearer to each other than to what
    is right."""
    kind = lambda x: (x.shape, x.layout, x.device, x.is_complex())  # noqa: E731
    if not isinstance(mine, Tensor) or kind(mine) != kind(other):
        return False
    mine, other = mine.double(), other.to(mine.dtype).double()
    finite = mine.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    if not torch.allclose(mine[~finite], other[~finite], equal_nan=True):
        return False
    a, b = mine[finite], other[finite]
    if right.dtype != torch.bfloat16:
        return torch.allclose(a, b, 1e-4, 1e-6 * (1 + b.double().norm().item()))
    if mine.shape != right.shape:
        return False
    return not finite.any() or error_of(a, b) <= 0.4 * error_of(a, right[finite])


# ----------------------------------------------------------------------------------- trying a piece
def mistake(stub: Piece, piece: Piece, path: str, failed: str) -> str:
    """What a likely mistake is called, if one gives what the piece gives in every case in which the
    piece gives anything; for a piece that failed with ordinary numbers, in every such case."""
    fits, overflow = None, special(failed)
    for case, inputs in cases(stub):
        if special(case) and not special(failed):
            continue
        try:
            with one_line(path), quiet(), traced(path):
                got, _ = run(piece, inputs)
        except Wrong:
            continue
        wanted, same = Wanted(stub.__name__, inputs), {}
        overflow &= overflows(case, got) or not wanted.problem(got)
        for number, (said, wrong) in enumerate(MISTAKES[stub.__name__](*inputs)):
            if wanted.same(got, tuple(wrong) if isinstance(wrong, (tuple, list)) else (wrong,)):
                same[number] = said
        fits = same if fits is None else {n: said for n, said in fits.items() if n in same}
    return next(iter((fits or {}).values()), OVERFLOW if overflow else "")


def special(case: str) -> bool:
    """Not ordinary numbers, but the model's own conditions."""
    return any(condition in case for condition in ("bfloat16", "times=", "shift=", "ties"))


def overflows(case: str, got: tuple) -> bool:
    return special(case) and not all(y.isfinite().all() for y in got if isinstance(y, Tensor))


OVERFLOW = (
    "exp of a large number is infinite in float32. In a softmax, subtract the row's largest score "
    "first; in silu, use torch.sigmoid."
)


def try_values(stub: Piece, piece: Piece, path: str) -> dict[str, int]:
    """Raises Wrong where a value differs. Returns how many operations each case took."""
    name, counts = stub.__name__, {}
    names = [*inspect.signature(stub).parameters]
    for case, inputs in cases(stub):
        with one_line(path, f"for {case}, "), few_prints(), traced(path) as used, Count() as calls:
            got, given = run(piece, inputs)
        if used:
            raise Wrong(f"{used[0]} is called, which is the answer book. It does not count.")
        counts[case] = calls.calls
        for x, now, before in zip(names, given, inputs, strict=True):
            if isinstance(now, Tensor) and not torch.equal(now, before):
                raise Wrong(f"for {case}, it changes its input {x}. Work on a copy.")
        if problem := Wanted(name, inputs).problem(got):
            raise Wrong(f"for {case}, {problem}. {mistake(stub, piece, path, case)}".rstrip())
    return counts


def try_gradients(stub: Piece, piece: Piece, path: str) -> None:
    """Raises Wrong where a gradient differs, in the cases with ordinary float32 numbers."""
    names = [*inspect.signature(stub).parameters]
    for case, inputs in cases(stub):
        if special(case):
            continue
        with one_line(path, f"for {case}, with gradients, "), traced(path), quiet():
            slopes = gradients(piece, inputs)
        rights = gradients(PUZZLES[stub.__name__].answer, inputs)
        for x, mine, right in zip(names, slopes, rights, strict=True):
            if right is None or (mine is None and not right.any()):
                continue
            if problem := differ([f"the gradient of {x}"], (mine,), (right,)):
                cut = "Is something cut off (detach(), no_grad(), .item(), .data)?"
                raise Wrong(f"for {case}, the values are right, but {problem}. {cut}")


WAITS = (
    "These wait: .item(), .tolist(), nonzero, a mask as an index, bincount, and repeat_interleave "
    "without output_size."
)


COPIES = "Are matrices copied (.contiguous(), an index), or experts computed that nobody chose?"


def one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """F.one_hot as on a GPU, where it waits only if it must find num_classes. On a CPU it looks
    whether all values are in range too."""
    E = num_classes if num_classes >= 0 else int(x.max()) + 1
    return (x[..., None] == torch.arange(E)).long()


def try_counts(stub: Piece, piece: Piece, path: str, counts: dict[str, int]) -> None:
    """Raises Wrong where a piece that must be fast runs or holds too much."""
    name, (_, (case, few), (larger, many), *_) = stub.__name__, counts.items()
    if many > few + 3:
        counted = f"PyTorch runs {few} operations for {case}, and {many} for {larger}"
        raise Wrong(f"the values are right, but {counted}. Is there a loop over tokens or experts?")
    if name == "experts_batched":
        return
    for case, inputs in [*cases(stub)][1:]:
        with one_line(path, f"for {case}, "), quiet(), patch.object(F, "one_hot", one_hot):
            products, waits, held = count(piece, inputs)
        allowed, _, own = count(PUZZLES[name].answer, inputs)
        if products > allowed:
            more = f"it runs {products} products, not {allowed}. Gate and up can be one."
            raise Wrong(f"the values are right, but {more}")
        if waits:
            raise Wrong(f"the values are right, but it waits for a value (times: {waits}). {WAITS}")
        if held > 1.3 * own and name == "experts_grouped" and not special(case):
            N = len(inputs[0])
            at_once = (
                f"for {case} it holds {held * N:,.0f} bytes at once, granitemoe.py {own * N:,.0f}"
            )
            raise Wrong(f"the values are right, but {at_once}. {COPIES}")


def examine(stub: Piece, piece: Piece, path: str) -> None:
    """Raises Wrong unless the piece does what the answer does, within the puzzle's limits."""
    name = stub.__name__
    if inspect.isclass(piece) or not callable(piece):
        raise Wrong(f"{path} has no function of this name.")
    if defined_in(piece) in BOOK:
        raise Wrong(
            f"this one is of {Path(defined_in(piece)).name}, the answer book. It does not count."
        )
    if name == "gate_up":
        return try_kernel(piece, path)
    with others_guarded(piece):
        counts = try_values(stub, piece, path)
        if name in ("experts_batched", "sort_by_expert", "experts_grouped"):
            try_counts(stub, piece, path, counts)
        if name not in ("top_p", "sort_by_expert"):  # of which nothing learns
            try_gradients(stub, piece, path)


def written(piece: Piece) -> Piece:
    """The function itself, where Triton or another decorator wraps it."""
    return inspect.unwrap(getattr(piece, "fn", piece))


def defined_in(piece: Piece) -> str:
    """The name of its file, or of a notebook's cell; nothing if it has none."""
    return getattr(getattr(written(piece), "__code__", None), "co_filename", "")


def is_empty(piece: Piece) -> bool:
    """Whether its body does nothing yet: it names nothing. So is one whose source is not known."""
    try:
        source = inspect.getsource(written(piece))
        (function,) = ast.parse(textwrap.dedent(source)).body
    except (OSError, TypeError, SyntaxError):
        return True
    nodes = itertools.chain.from_iterable(map(ast.walk, function.body))
    return {node.id for node in nodes if isinstance(node, ast.Name)} <= {"NotImplementedError"}


@contextmanager
def interpreted() -> Iterator[None]:
    """Within `with`, Triton interprets kernels, on a CPU, and does not warn of what overflows."""
    with patch.dict(os.environ, TRITON_INTERPRET="1"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def try_kernel(kernel: Piece, path: str) -> None:
    """Raises Wrong unless the kernel gate_up writes what it must, and that alone."""
    if is_empty(kernel):
        raise Unwritten("nothing is written")
    if faster.tl.constexpr is None:
        raise Wrong("it needs Triton. Run: pip install triton")
    import triton

    with interpreted():
        act = kernel if isinstance(kernel, triton.runtime.KernelInterface) else triton.jit(kernel)
    for case in PUZZLES["gate_up"].cases:
        x_D, gate_up_EPD, ids_K = make(STUBS["gate_up"], case)[:3]
        size = {letter: int(n) for letter, n in re.findall(r"(\w+)=(\d+)", case)}
        unused = torch.ones(size["E"], dtype=torch.bool).index_fill(0, ids_K, False)
        gate_up_EPD[unused] = torch.nan  # whoever uses them gives nan
        y_KF = torch.full((size["K"] + 2 * size["E"], size["F"]), 7.0)  # K rows, what follows stays
        grid = (size["K"], triton.cdiv(size["F"], size["ROWS"]))
        with one_line(path, f"for {case}, "), traced(path), quiet(), interpreted():
            act[grid](x_D, gate_up_EPD, ids_K, y_KF, size["D"], size["F"], size["ROWS"])
        want = PUZZLES["gate_up"].answer(x_D, gate_up_EPD, ids_K)
        mine, beyond = y_KF[: size["K"]], y_KF[size["K"] :]
        if problem := differ(["y"], (mine,), (want,)):
            named = kernel_mistake(mine, x_D.float(), gate_up_EPD.float(), ids_K)
            raise Wrong(f"for {case}, {problem}. {named}".rstrip())
        if not (beyond == 7).all():
            raise Wrong(f"for {case}, it writes past the last row's end. Give tl.store a mask.")


def kernel_mistake(y_KF: Tensor, x_D: Tensor, gate_up_EPD: Tensor, ids_K: Tensor) -> str:
    if y_KF.isnan().any():
        return UNCHOSEN
    if y_KF.isinf().any():
        return NARROW
    for said, wrong in MISTAKES["gate_up"](x_D, gate_up_EPD, ids_K):
        if alike(y_KF, wrong, y_KF):
            return said
    return UNTOUCHED if (y_KF == 7).any() else ""


UNCHOSEN = (
    "It reads an expert that was not chosen (whose numbers are nan here). Program k takes number "
    "expert_ids[k]."
)
NARROW = (
    "Its sums are not in float32. Bring x and the rows to tl.float32 before they are multiplied."
)
UNTOUCHED = (
    "Some numbers were not written: they are 7 as before. Program (k, i) writes row k, from number "
    "i * ROWS on."
)


# --------------------------------------------------------------------------------- within the model
def fit(name: str, f: Piece, config: GraniteMoeConfig) -> list[AbstractContextManager]:
    """What puts a piece f into the model with the forms eager and loop, while it is entered."""
    change, usual, held = patch.object, EXPERTS["loop"], {}
    layers = itertools.cycle(range(config.num_hidden_layers))

    def activate(x: Tensor) -> Tensor:  # swiglu is an expert with 1 and 0 for its matrices
        eye, half = torch.eye(x.shape[1]), x.shape[1] // 2
        return f(x, eye, eye[:, :half])[:, :half]

    def cached(q: Tensor, k: Tensor, v: Tensor, mask: None, scale: float, drop: float) -> Tensor:
        i = next(layers)  # each layer has keys and values of its own
        y, *held[i] = f(q, k, v, *held.get(i, (k[:, :, :0], v[:, :, :0])), scale, config.rope_theta)
        return y

    return {
        "rms_norm": [change(granitemoe.RMSNorm, "forward", lambda m, x: f(x, m.weight, m.eps))],
        "rotary": [
            change(granitemoe, "rope_tables", lambda at, c, _: [at[0], c.rope_theta]),
            change(granitemoe, "rotate", f),
        ],
        "attention": [patch.dict(ATTENTION, eager=lambda q, k, v, _, scale, __: f(q, k, v, scale))],
        "route": [
            change(
                granitemoe.Router,
                "forward",
                lambda m, x: (m.layer(x), *f(x, m.layer.weight, m.top_k)),
            )
        ],
        "expert": [change(granitemoe, "swiglu", activate)],
        "experts_loop": [patch.dict(EXPERTS, loop=f)],
        "experts_batched": [  # for one token; more are left to the loop
            patch.dict(EXPERTS, loop=lambda x, *y: (f if len(x) == 1 else usual)(x, *y))
        ],
        "load_balancing": [
            change(granitemoe, "load_balancing_loss", lambda logits, k, _: f(torch.cat(logits), k))
        ],
        "cached_step": [
            change(granitemoe, "rotate", lambda x, *rope: x),
            change(granitemoe.KVCache, "append", lambda cache, layer, k, v: (k, v)),
            patch.dict(ATTENTION, eager=cached),
        ],
        "top_p": [change(generate, "filtered_probs", lambda x, s: f(x / s.temperature, s.top_p))],
    }[name]


SAMPLING = {"temperature": 0.8, "top_p": 0.9, "seed": 40}
LATER = ("experts_loop", "experts_batched", "cached_step")  # they do what earlier pieces do


def load_tiny() -> granitemoe.GraniteMoeForCausalLM:
    forms = {"dtype": "float32", "attention_backend": "eager", "experts_backend": "loop"}
    return generate.load_model(generate.TINY, **forms)


@contextmanager
def in_place(solved: dict[str, Piece], config: GraniteMoeConfig) -> Iterator[set[str]]:
    """Within `with`, pieces stand in the model; the set fills with the names of those called."""
    called = set()

    def noted(name: str, piece: Piece) -> Piece:
        def call(*given: object) -> object:
            called.add(name)
            with traced(defined_in(piece)):
                return piece(*given)

        return call

    with ExitStack() as stack:
        for name, piece in solved.items():
            for change in fit(name, noted(name, piece), config):
                stack.enter_context(change)
        yield called


def write(solved: dict[str, Piece], prompt: str, count: int) -> tuple[list[str], set[str]]:
    """The prompt and `count` tokens as tiny/ writes them with these pieces in it, and the names of
    those that it called."""
    model, tokenizer = load_tiny(), generate.load_tokenizer(generate.TINY)
    ids = tokenizer.encode(prompt).ids
    with in_place(solved, model.config) as called, quiet():
        ids += [i for (i,) in generate.generate(model, [ids], count, **SAMPLING)]
    return pieces(tokenizer, ids), called


def balance_of(text: str, solved: dict[str, Piece]) -> float:
    """The balance loss of tiny/ for a text, by a piece if there is one."""
    model, tokenizer = load_tiny(), generate.load_tokenizer(generate.TINY)
    ids = torch.tensor([tokenizer.encode(text).ids])
    with in_place(solved, model.config), quiet(), torch.no_grad():
        return model(ids, labels=ids, output_router_logits=True).aux_loss.item()


def show(solved: dict[str, Piece], path: str) -> bool:
    """Put the pieces into tiny/ and print what it writes, up to where it parts from its usual text.
    A second time where later pieces take the places of earlier ones."""
    usual, _ = write({}, "class Stack:", 38)
    first = {name: f for name, f in solved.items() if name not in (*LATER, "load_balancing")}
    rounds = [first, solved] if {*solved} & {*LATER} and first else [solved]
    shown, right = set(), True
    for some in rounds:
        some = {name: f for name, f in some.items() if name != "load_balancing"}
        if not some:
            continue
        with one_line(path, "within the model, "):
            mine, called = write(some, "class Stack:", 38)
        right &= tell(usual, mine, [name for name in some if name in called - shown], bool(shown))
        shown |= called
    if "load_balancing" in solved:
        text, own = "".join(usual), {"load_balancing": solved["load_balancing"]}
        with one_line(path, "within the model, "):
            mine = balance_of(text, own)
        theirs = balance_of(text, {})
        right &= abs(mine - theirs) < 1e-3
        print(
            f"By your load_balancing the balance loss of tiny/ is {mine:.3f}, by ours {theirs:.3f}."
        )
    return right


def tell(usual: list[str], mine: list[str], names: list[str], again: bool) -> bool:
    """Print what was written with these pieces, or only that it is the same again."""
    n = sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, usual, mine)))
    if again and n == len(usual):
        print(f"So it does with your {', '.join(names)} in their places.")
        return True
    print(f"\n{''.join(usual[:n])}\n\nThe model in tiny/ wrote this with your {', '.join(names)}.")
    if n < len(usual):
        print(f"Here it parts: yours goes on with {mine[n]!r}, granitemoe.py with {usual[n]!r}.")
    else:
        print("It is the text that it writes without them.")
    return n == len(usual)


# ------------------------------------------------------------------------------------- the commands
def attempt(piece: Piece, name: str, path: str) -> str:
    """What is said of a piece, after its name; it begins with "solved" if it is."""
    try:
        with usual_settings(), one_line(path):
            examine(STUBS[name], piece, path)
    except Unwritten as unwritten:
        return f"not written yet ({unwritten})."
    except Wrong as wrong:
        return str(wrong)
    return f"solved. Compare with {PUZZLES[name].place}."


def check(piece: Piece) -> bool:
    """Try a function as it stands in a notebook, and print what is said of it."""
    name = getattr(written(piece), "__name__", str(piece))
    if not callable(piece) or name not in PUZZLES:
        near = difflib.get_close_matches(name, PUZZLES, n=1, cutoff=0.75)
        names = near or PUZZLES
        print(f"{name:.60}: give a function, without quotes, of this name: {' or '.join(names)}")
        return False
    try:
        said = attempt(piece, name, defined_in(piece))
    except KeyboardInterrupt as stop:
        said = f"{stop}" or "stopped"
    print(f"{name}: {said}")
    return said.startswith("solved")


def check_all(*pieces: Piece) -> bool:
    """Try functions as check does. Then put those that are solved into tiny/, which writes."""
    solved = {written(piece).__name__: piece for piece in pieces if check(piece)}
    try:
        with usual_settings():
            right = not solved or show(solved, defined_in(next(iter(solved.values()))))
    except Wrong as wrong:
        print(wrong)
        return False
    return right and len(solved) == len(pieces)


def load(path: str) -> dict[str, object]:
    """What a learner's file defines."""
    found = {"__name__": "pieces", "__file__": path}
    with usual_settings(), one_line(path), few_prints(), traced(path):
        exec(compile(Path(path).read_bytes(), path, "exec"), found)
    return found


def parse(file: str) -> tuple[str | None, list[str]]:
    """The learner's file, None where none is named, and the names of the pieces to try."""
    names = [name for name in PUZZLES if hasattr(FILES[file], name)]
    parser = Parser(description="Try your pieces of GraniteMoe.")
    parser.add_argument("file", nargs="?", metavar="FILE", help=f"your copy of {file}.py")
    told = f"one of {', '.join(names)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{told}; all, if none is named")
    args = parser.parse_args()
    path, asked = args.file, args.names
    own = Path(sys.argv[0]).resolve() == HERE / f"{file}.py"
    if path in names and own:
        raise ValueError(f"{path}: of which file? Name it first: my_{file}.py {path}")
    if path in names or path is None and not own:  # a copy that is run itself
        path, asked = sys.argv[0], [path, *asked] if path else asked
    if path is None:
        return None, []
    check_file(path, file)
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"NAME: must be {told}, got {unknown[0]!a:.60}")
    return path, asked or names


def check_file(path: str, file: str) -> None:
    """Raises ValueError unless it may hold a learner's pieces."""
    shown, begin = ascii(path)[1:-1][:80], f"Begin with: cp lessons/{file}.py my_{file}.py"
    if os.path.isdir(path):
        raise ValueError(f"{shown}: is a folder. Name a file, such as my_{file}.py")
    if not os.path.isfile(path):
        raise ValueError(f"{shown}: no such file. {begin}")
    if str(Path(path).resolve()) in BOOK:
        raise ValueError(f"{shown}: is the answer book. {begin}")
    if Path(path).resolve() == HERE / f"{file}.py":
        raise ValueError(f"{shown}: is the original, which stays empty. {begin}")
    if path.endswith(".ipynb"):
        raise ValueError(f"{shown}: is a notebook. There, check(rms_norm) tries a function")


def try_file(file: str) -> None:
    path, asked = parse(file)
    if path is None:
        print(FILES[file].__doc__.partition("\n\nEach")[0].partition("\n\nTime")[0])
        return
    found, solved, waiting = load(path), {}, []
    if asked[1:] and not found.keys() & {*asked}:
        raise ValueError(f"{path}: has none of these functions: {', '.join(asked)}")
    for name in asked:
        said = attempt(found.get(name), name, path)
        if said.startswith("not written"):
            waiting.append((name, said))
            continue
        print(f"{name}: {said}")
        if said.startswith("solved"):
            solved[name] = found[name]
    for name, said in waiting[:1]:
        print(f"{name}: {said} Fill in its body in {path}, then run")
        again = [sys.argv[0], path, name] if path != sys.argv[0] else [path, name]
        print(f"    python {shlex.join(again)}")
    if waiting[1:]:
        print(f"After it: {', '.join(name for name, _ in waiting[1:])}.")
    right = len(solved) == len(asked)
    if file == "puzzles" and solved and len(asked) > 1:
        right &= show(solved, path)
    sys.exit(not right)


def main(file: str) -> None:
    """The command of puzzles.py or faster.py."""

    def act() -> None:
        try:
            try_file(file)
        except KeyboardInterrupt as stop:
            print(f"{stop}" or "stopped")
            raise

    command(act)
