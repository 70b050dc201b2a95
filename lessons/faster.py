"""Make the experts fast yourself: three pieces with empty bodies, judged by what they count up.

    cp lessons/faster.py my_faster.py               then fill in bodies in the copy, and run
    python lessons/faster.py my_faster.py           all three
    python lessons/faster.py my_faster.py gate_up   one of them

Time depends on the machine, counts do not. A piece must give the right values, and then keep to its
limits: matrix products, waits (each time that the host needs a value which a GPU computes), and the
bytes that it holds at once beside its inputs. `python lessons/ladder.py` counts the model's own.
The last one is a kernel for a GPU. Triton's interpreter runs it on a CPU: pip install triton.
"""

import os
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch  # noqa: F401  (for the bodies)
import torch.nn.functional as F  # noqa: F401
from torch import Tensor

with patch.dict(os.environ, TRITON_INTERPRET="1"):  # for this import: Triton reads it then
    try:
        import triton.language as tl
    except ImportError:
        tl = SimpleNamespace(constexpr=None)


# ------------------------------------------------------------------------------------- the puzzles
def sort_by_expert(expert_ids_NK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """Line up the M = N*K choices in expert_ids_NK (N, K) by expert: all of expert 0 first. Returns
    order_M (M), their places in the flattened choices, which stay in order where the expert is the
    same; tokens_M (M), the token of each; and ends_E (E) in int32, where each expert's run ends.

    Limits: no wait, and as many operations for 64 experts as for 4.

    >>> order_M, tokens_M, ends_E = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 1]]), 4)
    >>> order_M.tolist(), tokens_M.tolist(), ends_E.tolist()
    ([1, 2, 5, 0, 4, 3], [0, 1, 2, 0, 2, 1], [2, 3, 5, 6])
    """


def experts_grouped(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The experts for many tokens. For each token of x_ND (N, D), the sum over its K choices of
    weight times expert: weights_NK (N, K), expert_ids_NK (N, K), gate_up_EPD (E, P, D), down_EDF
    (E, D, F), as in experts_loop. F.grouped_mm(rows, matrices, offs=ends) multiplies rows which are
    lined up by expert, (M, D), each run with its own of the matrices (E, D, P). Returns
    y_ND (N, D).

    Limits: 3 products, no wait, and at most 1.3 times the bytes that granitemoe.py's own holds at
    once: each token's row is gathered once, no expert's matrices are copied.

    >>> x_ND, eye = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.eye(4)
    >>> gate_up_EPD = torch.stack([torch.cat([eye, 1.5 * eye]), torch.cat([eye, 0.5 * eye])])
    >>> down_EDF = torch.stack([0.5 * eye, eye])
    >>> weights_NK, expert_ids_NK = torch.tensor([[0.75, 0.25]]), torch.tensor([[0, 1]])
    >>> experts_grouped(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    tensor([[2.4222, 0.0000, 0.0000, 0.0000]])
    """


def gate_up(x, matrices, expert_ids, y, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """A Triton kernel (it gets @triton.jit when it is tried): the first half of the chosen experts,
    for one token. Four tensors come as pointers to their first numbers, rows follow each other
    without gaps: x (D), matrices (E, P, D), expert_ids (K) and y (K, F). WIDTH is F, P is 2 * F.
    Program (k, i), of tl.program_id(0) and tl.program_id(1), writes row k of y from number i * ROWS
    on, up to ROWS numbers: silu(g) * u. g and u are the dot products of x with the gate's rows and
    the up's rows of expert number k in expert_ids. The gate's F rows come first. D and ROWS are
    powers of two; WIDTH is not, so the last program of a row has fewer numbers. x and matrices may
    be in float16; sums are in float32, and so is y.

    Limit: it uses the chosen experts alone.
    """


if __name__ == "__main__":
    sys.path.insert(0, "lessons")  # where a copy in the top folder finds how it is tried
    try:
        from checker import main
    except ModuleNotFoundError:
        sys.exit(f"{sys.argv[0]}: error: run it in the folder that holds lessons/")
    main("faster")
