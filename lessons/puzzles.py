"""Build GraniteMoe yourself: ten of its pieces, from easy to hard, with empty bodies.

    cp lessons/puzzles.py my_puzzles.py               then fill in bodies in the copy, and run
    python lessons/puzzles.py my_puzzles.py           all ten, then the model with your pieces
    python lessons/puzzles.py my_puzzles.py rotary    one of them

Each piece is tried on its example and on small random inputs in float32, with its gradients. Then
as the model runs it: in bfloat16, at far positions, with large scores. There a result has its
inputs' dtype, and what rounding would spoil (a mean, an angle, a sum over experts) is computed in
float32. (load_balancing and top_p get float32 alone, as in the model.) A piece must not change its
inputs. Your pieces may call each other. Letters are the dimensions in the header of granitemoe.py,
which is also the answer book: a solved puzzle names its section there.
"""

import sys

import torch  # noqa: F401  (for the bodies)
import torch.nn.functional as F  # noqa: F401
from torch import Tensor


# ------------------------------------------------------------------------------------- the puzzles
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each token of x (B, T, D) by the root of the mean of its squares, then multiply it by
    weight (D). eps is added to the mean. The division is done in float32, and its result rounded to
    the dtype of x before weight comes in. Returns y (B, T, D).

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
    query head h uses their head h // (H/G). Causal: the last query sees all S keys, each query
    before it one key fewer. S may be more than T. Returns y (B, H, T, C).

    >>> q, k, v = torch.tensor([[1.0, 1.0], [0.0, 2.1972], [4.0, 8.0]]).view(3, 1, 1, 2, 1)
    >>> attention(q, k, v, 0.5).flatten()  # the weights of the second query are 1/4 and 3/4
    tensor([4.0000, 7.0000])
    """


def route(x_ND: Tensor, router_ED: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Score the experts for each token: the dot products of x_ND (N, D) and router_ED (E, D).
    Choose the K largest scores, the largest first. The weights are the softmax of these K alone.
    Returns weights_NK (N, K) and, in int64, expert_ids_NK (N, K): the numbers of those chosen.

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

    >>> x_ND, eye = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.eye(4)
    >>> gate_up_EPD = torch.stack([torch.cat([eye, 1.5 * eye]), torch.cat([eye, 0.5 * eye])])
    >>> down_EDF = torch.stack([0.5 * eye, eye])
    >>> weights_NK, expert_ids_NK = torch.tensor([[0.75, 0.25]]), torch.tensor([[0, 1]])
    >>> experts_loop(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)  # of 2.6424 and 1.7616
    tensor([[2.4222, 0.0000, 0.0000, 0.0000]])
    """


def experts_batched(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """The same as experts_loop, but without a loop over tokens or experts: the number of PyTorch
    operations must not depend on N and E. x_ND (N, D), gate_up_EPD (E, P, D), down_EDF (E, D, F),
    weights_NK (N, K), expert_ids_NK (N, K). Returns y_ND (N, D).

    >>> x_ND, eye = 2 * torch.eye(2, 4), torch.eye(4)
    >>> gate_up_EPD = torch.stack([torch.cat([eye, 1.5 * eye]), torch.cat([eye, 0.5 * eye])])
    >>> down_EDF = torch.stack([0.5 * eye, eye])
    >>> weights_NK, expert_ids_NK = torch.tensor([[0.5], [1.0]]), torch.tensor([[1], [0]])
    >>> experts_batched(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    tensor([[0.8808, 0.0000, 0.0000, 0.0000],
            [0.0000, 2.6424, 0.0000, 0.0000]])
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
    the smallest set of the likeliest ids stays that has p or more together (with p = 1: all). The
    others become 0, and what stays is divided by its sum. Where ids are equally likely, any of them
    may be in the set. Returns probs (B, V), in the order of the ids.

    >>> top_p(torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log(), 0.7)  # 0.5 is less than 0.7: 0.3 stays
    tensor([[0.0000, 0.6250, 0.0000, 0.3750]])
    """


if __name__ == "__main__":
    sys.path.insert(0, "lessons")  # where a copy in the top folder finds how it is tried
    try:
        from checker import main
    except ModuleNotFoundError:
        sys.exit(f"{sys.argv[0]}: error: run it in the folder that holds lessons/")
    main("puzzles")
