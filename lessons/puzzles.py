"""Build GraniteMoe yourself: ten of its pieces, from easy to hard, with empty bodies.

    cp lessons/puzzles.py my_puzzles.py               then fill in bodies in the copy, and run
    python lessons/puzzles.py my_puzzles.py           all ten, then the model with your pieces
    python lessons/puzzles.py my_puzzles.py rotary    one of them

Each piece is tried on its example and on small random inputs, in float32, with its gradients. It
must not change its inputs. Your pieces may call each other. Letters are the dimensions in the
header of granitemoe.py. That file is also the answer book: a solved puzzle names its section there.
"""

import argparse
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: F401  (for the bodies)
from torch import Tensor

sys.path.append("lessons")  # where a copy in the top folder finds the next two
from answers import PUZZLES, Count, Piece, Wrong, cases, gradients, run, write  # noqa: E402
from common import command  # noqa: E402


# ------------------------------------------------------------------------------------- the puzzles
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each token of x (B, T, D) by the root of the mean of its squares, then multiply it by
    weight (D). eps is added to the mean. Returns y (B, T, D).

    >>> rms_norm(torch.tensor([[[1.0, 7.0]]]), torch.tensor([1.0, 2.0]), 0.0)  # the root is 5
    tensor([[[0.2000, 2.8000]]])
    """


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn each pair (x_i, x_j) of x (B, H, T, C), where j = i + C/2 and i = 0 ... C/2 - 1, by an
    angle a: the token's number in positions (T), times theta to the power -2i/C. Turning (u, v)
    by a gives (u cos a - v sin a, v cos a + u sin a). Returns y (B, H, T, C).

    >>> x = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])  # two pairs, both (1, 0)
    >>> rotary(x, torch.tensor([1]), 100.0)  # their angles are 1 and 0.1
    tensor([[[[0.5403, 0.9950, 0.8415, 0.0998]]]])
    """


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Each query of q (B, H, T, C) gets a weighted mean of values. The weights are the softmax of
    its scores: its dot products with keys, times scale. k and v (B, G, S, C) have fewer heads:
    query head h uses their head h // (H/G), rounded down. Causal: the last query sees all S keys,
    each query before it one key fewer. S may be more than T. Returns y (B, H, T, C).

    >>> q, k, v = torch.tensor([[1.0, 1.0], [0.0, 2.1972], [4.0, 8.0]]).view(3, 1, 1, 2, 1)
    >>> attention(q, k, v, 0.5).flatten()  # the weights of the second query are 1/4 and 3/4
    tensor([4.0000, 7.0000])
    """


def route(x_ND: Tensor, router_ED: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Score the experts for each token: the dot products of x_ND (N, D) and router_ED (E, D).
    Choose the K largest scores, the largest first. The weights are the softmax of these K alone.
    Returns weights_NK (N, K), and expert_ids_NK (N, K): the numbers of the chosen experts.

    >>> route(torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0986], [-2.0]]), 2)
    (tensor([[0.7500, 0.2500]]), tensor([[1, 0]]))
    """


def expert(x_ND: Tensor, gate_up_PD: Tensor, down_DF: Tensor) -> Tensor:
    """One expert, for x_ND (N, D). gate_up_PD (P, D) holds two matrices: its first F rows are the
    gate, the other F rows the up. A token's dot products with them are g and u, F numbers each.
    The matrix down_DF (D, F) times silu(g) * u is the result. Returns y_ND (N, D).

    >>> x_ND, down_DF = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    >>> expert(x_ND, torch.tensor([[1.0], [1.5]]), down_DF)  # g = 2, u = 3, silu(2) = 1.7616
    tensor([[2.6424]])
    """


def experts_loop(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For each token of x_ND (N, D), the sum over its K choices of weight times expert. Choices are
    weights_NK (N, K) and expert_ids_NK (N, K), as route gives them. Expert e has the matrices
    number e of gate_up_EPD (E, P, D) and of down_EDF (E, D, F). Loop over the experts, each on the
    tokens that chose it; an expert may have no token. Returns y_ND (N, D).

    >>> gate_up_EPD = torch.tensor([1.0, 1.5, 1.0, 0.5]).view(2, 2, 1)
    >>> x_ND, down_EDF = torch.tensor([[2.0]]), torch.tensor([0.5, 1.0]).view(2, 1, 1)
    >>> weights_NK, expert_ids_NK = torch.tensor([[0.75, 0.25]]), torch.tensor([[0, 1]])
    >>> experts_loop(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)  # of 2.6424 and 1.7616
    tensor([[2.4222]])
    """


def experts_batched(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The same as experts_loop, but without a loop over tokens or experts: the number of PyTorch
    operations must not depend on N and E. x_ND (N, D), gate_up_EPD (E, P, D), down_EDF (E, D, F),
    weights_NK (N, K), expert_ids_NK (N, K). Returns y_ND (N, D).

    >>> gate_up_EPD = torch.tensor([1.0, 1.5, 1.0, 0.5]).view(2, 2, 1)
    >>> x_ND, down_EDF = torch.tensor([[2.0], [2.0]]), torch.tensor([0.5, 1.0]).view(2, 1, 1)
    >>> weights_NK, expert_ids_NK = torch.tensor([[0.5], [1.0]]), torch.tensor([[1], [0]])
    >>> experts_batched(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK).flatten()
    tensor([0.8808, 2.6424])
    """


def load_balancing(logits_NE: Tensor, K: int) -> Tensor:
    """The loss of a router with logits_NE (N, E): E times the sum over experts of (choices of it,
    per token) times (its mean probability). Probabilities are the softmax over all experts; a
    token chooses its K best. Means are over tokens. Returns loss, one number: K if all is even.

    >>> load_balancing(torch.tensor([[1.0986, 0.0], [1.0986, 0.0]]), 1)  # 2 * (1 * 3/4 + 0 * 1/4)
    tensor(1.5000)
    """


def cached_step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary positions and attention for T new tokens: q (B, H, T, C), k and v (B, G, T, C), not
    turned yet. keys and values (B, G, L, C) are kept of the L tokens before them, with keys turned
    already. Tokens are numbered from 0, all of them together. Returns y (B, H, T, C), keys and
    values (B, G, L + T, C) of old and new tokens, to be kept. Called for one token after another,
    it gives the y that attention gives for all at once.

    >>> q, k, v = torch.tensor([[0.0, 0.0], [1.0, 0.0], [6.0, 8.0]]).view(3, 1, 1, 1, 2)
    >>> keys, values = torch.tensor([[1.0, 0.0], [2.0, 4.0]]).view(2, 1, 1, 1, 2)
    >>> y, keys, values = cached_step(q, k, v, keys, values, 1.0, 100.0)
    >>> y.flatten(), keys[0, 0, 1]  # scores are 0, so y is the mean; the new key was turned by 1
    (tensor([4., 6.]), tensor([0.5403, 0.8415]))
    """


def top_p(logits: Tensor, p: float) -> Tensor:
    """The probabilities (B, V) to draw the next id from, for logits (B, V): their softmax, of which
    the smallest set of the likeliest ids stays that has p or more together. The others become 0,
    and what stays is divided by its sum. Returns probs (B, V), in the order of the ids.

    >>> top_p(torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log(), 0.7)  # 0.5 is less than 0.7: 0.3 stays
    tensor([[0.0000, 0.6250, 0.0000, 0.3750]])
    """


# ------------------------------------------------ how they are tried: nothing to fill in below here
@contextmanager
def one_line(path: str, start: str = "") -> Iterator[None]:
    """Within `with`, an error becomes one line that tells the line in the reader's file."""
    try:
        yield
    except Wrong:
        raise
    except (Exception, SystemExit) as error:
        if start and isinstance(error, NotImplementedError) and not str(error):
            raise Wrong from None
        frames = traceback.extract_tb(error.__traceback__)
        lines = [getattr(error, "lineno", None), *(f.lineno for f in frames if f.filename == path)]
        where = f"{path}, line {lines[-1]}" if lines[-1] else path
        said = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
        raise Wrong(f"{start}{where}: {said:.160}") from None


def differ(names: list[str], got: tuple, want: tuple) -> str:
    """The first difference in words, or nothing."""
    if len(got) != len(want):
        return f"{len(got)} came back, must be {len(want)}: {', '.join(names)}"
    for name, a, b in zip(names, got, want, strict=True):
        if not isinstance(a, Tensor):
            return f"{name} is {'missing' if a is None else f'a {type(a).__name__}, not a tensor'}"
        for what, x, y in (("shape", tuple(a.shape), tuple(b.shape)), ("dtype", a.dtype, b.dtype)):
            if x != y:
                return f"the {what} of {name} is {x}, must be {y}"
        far = ~torch.isclose(a, b, 1e-4, 1e-6 * b.double().norm().item())
        for at in far.nonzero().tolist()[:1]:
            mine, right = (x[tuple(at)].item() for x in (a, b))
            return f"{name}{at or ''} is {mine:.5g}, must be {right:.5g}"
    return ""


def mistake(stub: Piece, piece: Piece) -> str:
    """What a likely mistake is called, if one gives what the piece gives in every case."""
    fits = None
    with suppress(Exception, SystemExit):
        for _, inputs in cases(stub):
            (got, _), same = run(piece, inputs), []
            for said, wrong in PUZZLES[stub.__name__].mistakes(*inputs):
                ys, _ = run(lambda wrong=wrong: wrong, [])
                if not all(y.isfinite().all() for y in ys) or not differ(["y"] * len(ys), got, ys):
                    same.append(said)
            fits = [said for said in same if fits is None or said in fits]
        return (fits or [""])[0]
    return ""


def check(stub: Piece, piece: Piece, path: str) -> None:
    """Raises Wrong unless the piece does what the answer does, and has the same gradients."""
    puzzle, names, counts = PUZZLES[stub.__name__], [*inspect.signature(stub).parameters], {}
    if not callable(piece):
        raise Wrong(f"{path} has no function of this name.")
    for case, inputs in cases(stub):
        want, _ = run(puzzle.answer, inputs)
        with one_line(path, f"for {case}, "):
            with Count() as count:
                got, given = run(piece, inputs)
            problem = differ(puzzle.gives.split(), got, want)
        counts[case] = count.calls
        for x, now, before in zip(names, given, inputs, strict=True):
            if isinstance(now, Tensor) and not torch.equal(now, before):
                raise Wrong(f"for {case}, it changes its input {x}. Work on a copy.")
        if problem:
            raise Wrong(f"for {case}, {problem}. {mistake(stub, piece)}".rstrip())
    (case, few), (larger, many) = [*counts.items()][1:3]
    if stub is experts_batched and many > few + 3:
        counted = f"PyTorch runs {few} operations for {case}, and {many} for {larger}"
        raise Wrong(f"the values are right, but {counted}. Is there a loop over tokens or experts?")
    for case, inputs in cases(stub) if stub is not top_p else ():  # of which nothing learns
        with one_line(path, f"for {case}, with gradients, "):
            slopes = gradients(piece, inputs)
        for x, mine, right in zip(names, slopes, gradients(puzzle.answer, inputs), strict=True):
            name = [f"the gradient of {x}"]
            if right is not None and (problem := differ(name, (mine,), (right,))):
                raise Wrong(f"for {case}, the values are right, but {problem}.")


def show(solved: dict[str, Piece], path: str) -> bool:
    """Print what tiny/ writes with the pieces in it, up to where it parts from the usual text."""
    with one_line(path, "within the model, "):
        usual, mine = write(solved, "class Stack:", 38, temperature=0.8, top_p=0.9, seed=40)
    same = [a == b for a, b in zip(usual, mine, strict=True)]
    n = same.index(False) if False in same else len(same)
    print(f"\n{''.join(usual[:n])}\n\nThe model in tiny/ wrote this with your {', '.join(solved)}.")
    if n < len(same):
        print(f"Here it parts: yours goes on with {mine[n]!r}, granitemoe.py with {usual[n]!r}.")
    else:
        print("It is the text that it writes without them.")
    return all(same)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try your pieces of GraniteMoe.")
    parser.add_argument("file", nargs="?", metavar="FILE", help="your copy of puzzles.py")
    names = f"one of {', '.join(PUZZLES)}"
    parser.add_argument("name", nargs="?", choices=PUZZLES, metavar="NAME", help=names)
    args = parser.parse_args()
    if args.file in PUZZLES and not args.name:
        args.file, args.name = None, args.file
    path = args.file or sys.argv[0]  # a copy that is run itself
    if args.file is None and Path(__file__).name == "puzzles.py":
        print(__doc__.partition("\n\nEach")[0])
        return
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. Begin with: cp lessons/puzzles.py {path}")
    found, solved, waiting = {"__name__": "pieces", "__file__": path}, {}, []
    with one_line(path):
        exec(compile(Path(path).read_bytes(), path, "exec"), found)
    asked = [args.name] if args.name else list(PUZZLES)
    for name in asked:
        try:
            check(globals()[name], found.get(name), path)
        except Wrong as wrong:
            print(f"{name}: {wrong}") if str(wrong) else waiting.append(name)
        else:
            solved[name] = found[name]
            print(f"{name}: solved. Compare with {PUZZLES[name].place}.")
    if waiting:
        first = f"{waiting[0]}: not written yet (nothing is returned)."
        print(f"{first} Fill in its body in {path}, then run")
        print(f"    python lessons/puzzles.py {path} {waiting[0]}")
    if waiting[1:]:
        print(f"After it: {', '.join(waiting[1:])}.")
    wrong = len(solved) < len(asked)
    solved.pop("load_balancing", None)  # it takes no part in writing
    wrong |= bool(solved) and not args.name and not show(solved, path)
    sys.exit(wrong)


if __name__ == "__main__":
    command(main)
