"""For puzzles.py: answers, likely mistakes, inputs to try, and what a piece replaces in the model.

Read it after the puzzles. The answers are granitemoe.py's own functions. A mistake is the answer on
changed inputs, or with its result changed: a piece that gives the same in every case has made it.
"""

import doctest
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from common import pieces
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import granitemoe
from granitemoe import ATTENTION, EXPERTS, GraniteMoeConfig, experts_loop

Piece = Callable[..., object]
Mistakes = Iterator[tuple[str, object]]  # what is said of one, and what it gives


# ------------------------------------------------------------------------------------- the answers
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional_call(granitemoe.RMSNorm(weight.shape, eps), {"weight": weight}, x)


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    config = SimpleNamespace(head_dim=x.shape[3], rope_theta=theta)
    return granitemoe.rotate(x, *granitemoe.rope_tables(positions[None], config, x.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, last: int | None = None) -> Tensor:
    """last: the first query sees keys 0 to last, each query after it one key more."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(last or 0)
    return granitemoe.attend_eager(q, k, v, None if last is None else mask, scale, 0.0)


def choose(x_ND: Tensor, router_ED: Tensor, K: int) -> tuple[Tensor, Tensor]:
    E, D = router_ED.shape
    sizes = SimpleNamespace(num_experts_per_tok=K, hidden_size=D, num_local_experts=E)
    return functional_call(granitemoe.Router(sizes), {"layer.weight": router_ED}, x_ND)[1:]


def one_expert(x_ND: Tensor, gate_up_PD: Tensor, down_DF: Tensor) -> Tensor:
    ids_N1 = torch.zeros(len(x_ND), 1, dtype=torch.int64)
    return experts_loop(x_ND, gate_up_PD[None], down_DF[None], ids_N1.float() + 1, ids_N1)


def balance(logits_NE: Tensor, K: int) -> Tensor:
    return granitemoe.load_balancing_loss((logits_NE,), K)


def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *numbers: float) -> tuple:
    """The model's Attention on its own cache, with projections that hand out q, k and v."""
    (B, G, L, C), T, (scale, theta) = keys.shape, q.shape[2], numbers
    config = SimpleNamespace(head_dim=C, rope_theta=theta, attention_dropout=0.0)
    config.num_hidden_layers, config.num_key_value_heads = 1, G
    config.attention_backend, config.attention_multiplier = "eager", scale
    block = SimpleNamespace(config=config, training=False, o_proj=lambda y: y)
    for name, x in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        setattr(block, name, lambda _, x=x: x.transpose(1, 2).flatten(2))
    rope = granitemoe.rope_tables(torch.arange(L, L + T)[None], config, q.dtype)
    cache = granitemoe.KVCache(config, B, L + T, dtype=q.dtype)
    cache.append(0, keys, values)
    cache.length = L
    y = granitemoe.Attention.forward(block, q.transpose(1, 2).flatten(2), rope, None, cache, 0)
    return y.unflatten(2, (-1, C)).transpose(1, 2), cache.keys[0], cache.values[0]


def keep(logits: Tensor, p: float) -> Tensor:
    return generate.sampling_probs(logits, top_p=p)


# --------------------------------------------------------------------------------- likely mistakes
def of_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    one, D, centred = torch.ones_like(weight), len(weight), x - x.mean(-1, True)
    root = x / norm(x, one, 0.0)
    yield "The mean of x is subtracted. That is LayerNorm.", norm(centred, weight, eps)
    yield "The weight is missing.", norm(x, one, eps)
    yield "eps is added to the root. Add it to the mean, under the root.", x * weight / (root + eps)
    yield "eps is missing.", x * weight / root
    yield "This is the root of the sum. Take the mean.", norm(x, weight, eps / D) / D**0.5
    yield "The root is missing.", norm(x, weight, eps) * norm(x, one, eps) / x
    whole = norm(x.flatten(), x.new_ones(x.numel()), eps).view_as(x)
    yield "The mean is over all tokens. Take one for each token.", whole * weight


def of_rotary(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    yield "The angles have the wrong sign.", turn(x, -positions, theta)
    yield "Each position is one too large.", turn(x, positions + 1, theta)
    counted = torch.arange(len(positions))
    yield "Tokens are numbered from 0. Use positions.", turn(x, counted, theta)
    yield "The exponent is -i/C. It must be -2i/C.", turn(x, positions, theta**0.5)
    apart = turn(x.unflatten(3, (-1, 2)).transpose(3, 4).flatten(3), positions, theta)
    neighbours = apart.unflatten(3, (2, -1)).transpose(3, 4).flatten(3)
    yield "The pairs are neighbours. Pair x_i with x_(i + C/2).", neighbours


def of_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    (B, H, T, C), (G, S) = q.shape, k.shape[1:3]
    yield "Scores are divided by the root of C. Multiply by scale.", attend(q, k, v, C**-0.5)
    yield "scale is not used.", attend(q, k, v, 1.0)
    yield "There is no mask: queries see keys ahead.", attend(q, k, v, scale, S)
    by_T = "It is causal by T, but keys are more than queries. The last query must see all S keys."
    yield by_T, attend(q, k, v, scale, 0)
    yield "Each query sees one key too many.", attend(q, k, v, scale, S - T + 1)
    weights = attend(q, k, torch.eye(S).expand(B, G, S, S), scale, S).tril(S - T)
    late = weights @ v.repeat_interleave(H // G, dim=1)
    yield "Keys ahead are set to 0 after the softmax. Mask their scores before it.", late
    tiled = attend(q, *(x.repeat(1, H // G, 1, 1) for x in (k, v)), scale)
    yield "Query head h uses head h % G. It must be head h // (H/G).", tiled


def of_route(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    weights_NK, ids_NK = choose(x_ND, router_ED, K)
    all_NK = choose(x_ND, router_ED, len(router_ED))[0][:, :K]
    yield "This is the softmax over all experts. Take it over the chosen K.", (all_NK, ids_NK)
    yield "The softmax is taken twice.", (all_NK.softmax(dim=-1), ids_NK)
    sigmoids_NK = (x_ND @ router_ED.T).gather(1, ids_NK).sigmoid()
    yield "These are sigmoids. Take the softmax.", (sigmoids_NK, ids_NK)
    yield "These are the scores. Take their softmax.", (sigmoids_NK.logit(), ids_NK)
    yield "The largest must come first.", (weights_NK.flip(1), ids_NK.flip(1))


def of_expert(x_ND: Tensor, gate_up_PD: Tensor, down_DF: Tensor) -> Mistakes:
    D, F = down_DF.shape
    minus_PD = torch.cat((-gate_up_PD[:F], gate_up_PD[F:]))
    y_ND, minus_ND = (one_expert(x_ND, matrix, down_DF) for matrix in (gate_up_PD, minus_PD))
    yield "Gate and up are swapped.", one_expert(x_ND, gate_up_PD.roll(F, 0), down_DF)
    yield "silu is missing.", y_ND - minus_ND
    rows_PD = gate_up_PD.view(F, 2, D).transpose(0, 1).flatten(0, 1)
    yield "The gate is the first half, not every other row.", one_expert(x_ND, rows_PD, down_DF)


def of_experts(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    def loop(w: Tensor, ids: Tensor = ids, x: Tensor = x) -> Tensor:
        return experts_loop(x, gate_up, down, w, ids)

    yield "The weights are not applied.", loop(w**0)
    yield "The weights are applied twice.", loop(w * w)
    yield "Only the first choice of a token is in the sum.", loop(w[:, :1], ids[:, :1])
    yield "The weight of the first choice is used for all.", loop(w[:, :1].expand_as(w))
    for last in (ids == ids[:, -1:], ids == ids.amax(1, True)):
        yield "A later expert replaces what an earlier one gave. Add them.", loop(w * last)
    order, tokens, _ = granitemoe.sort_by_expert(ids, len(down))
    rows = loop(w.new_ones(len(order), 1), ids.flatten()[order, None], x[tokens])
    y = (rows.view(*w.shape, -1) * w[..., None]).sum(dim=1)
    yield "Rows are in the order of experts. Put them back in the order of tokens.", y


def of_balance(logits_NE: Tensor, K: int) -> Mistakes:
    (N, E), loss = logits_NE.shape, balance(logits_NE, K)
    yield "It must be E times the sum over experts.", loss / E
    yield "Only the first choice of a token is counted. Count all K.", balance(logits_NE, 1)
    yield "It is divided by K.", loss / K
    yield "One of the two means is a sum over tokens.", loss * N
    yield "Both means are sums over tokens.", loss * N * N


def of_step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *n: float) -> Mistakes:
    (y, *whole), L = step(q, k, v, keys, values, *n), keys.shape[2]
    back = [turn(x, torch.full(x.shape[2:3], -L), n[1]) for x in (q, k)]
    again = step(q, k, v, turn(keys, torch.arange(L), n[1]), values, *n)
    alone = step(q, k, v, keys[:, :, :0], values[:, :, :0], *n)[0]
    new, at = [x[:, :, L:] for x in whole], torch.arange(L, L + q.shape[2])
    from_0 = step(*back, v, keys, values, *n)
    no_q = step(turn(q, -at, n[1]), k, v, keys, values, *n)
    no_k = step(q, turn(k, -at, n[1]), v, keys, values, *n)
    yield "New tokens are numbered from 0 again. Number them from L.", from_0
    yield "The new tokens are not in the keys and values returned.", (y, keys, values)
    yield "The old tokens are not in the keys and values returned.", (y, *new)
    yield "The queries see only the new tokens.", (alone, *whole)
    yield "The queries are not turned.", no_q
    yield "The new keys are not turned.", no_k
    yield "The old keys are turned again.", again


def of_top_p(logits: Tensor, p: float) -> Mistakes:
    probs, right = logits.softmax(dim=-1), keep(logits, p)
    yield "What stays is not divided by its sum.", probs * (right > 0)
    fewer = right * (right > right.masked_fill(right == 0, 2.0).amin(-1, True))
    yield "The id with which the sum reaches p is dropped. It stays.", fewer / fewer.sum(-1, True)
    yield "They are sorted. Put them in the order of ids.", right.sort(descending=True).values
    yield "This keeps 1 - p. Keep p.", keep(logits, 1 - p)


class Puzzle(NamedTuple):
    answer: Piece
    mistakes: Callable[..., Mistakes]
    gives: str
    place: str  # where the answer stands
    cases: tuple[str, ...]  # sizes, and the arguments that are numbers


NORM, MOE = "granitemoe.py, norm and positions:", "granitemoe.py, mixture of experts:"
PUZZLES = {
    "rms_norm": Puzzle(norm, of_norm, "y", f"{NORM} RMSNorm",
        ("B=2 T=3 D=5 eps=0.000001", "B=1 T=1 D=8 eps=0.5")),
    "rotary": Puzzle(turn, of_rotary, "y", f"{NORM} rope_tables, rotate",
        ("B=2 H=3 T=5 C=6 theta=100.0", "B=1 H=1 T=1 C=2 theta=10000.0")),
    "attention": Puzzle(attend, of_attention, "y", "granitemoe.py, attention: attend_eager",
        ("B=1 H=2 G=2 T=5 S=5 C=4 scale=0.7", "B=2 H=4 G=2 T=5 S=5 C=6 scale=0.7",
         "B=1 H=6 G=2 T=3 S=7 C=4 scale=0.3", "B=2 H=3 G=1 T=1 S=4 C=2 scale=1.5")),
    "route": Puzzle(choose, of_route, "weights_NK expert_ids_NK", f"{MOE} Router",
        ("N=7 D=4 E=5 K=2", "N=1 D=6 E=3 K=3", "N=4 D=3 E=6 K=1")),
    "expert": Puzzle(one_expert, of_expert, "y_ND", f"{MOE} swiglu, experts_loop",
        ("N=5 D=8 F=12", "N=1 D=8 F=4")),
    "experts_loop": Puzzle(experts_loop, of_experts, "y_ND", f"{MOE} experts_loop",
        ("N=7 D=8 E=5 K=2 F=12", "N=1 D=4 E=3 K=3 F=8", "N=4 D=4 E=6 K=1 F=4")),
    "experts_batched": Puzzle(granitemoe.experts_gathered, of_experts, "y_ND",
        f"{MOE} experts_grouped, experts_gathered",
        ("N=4 D=8 E=5 K=2 F=12", "N=8 D=8 E=12 K=2 F=12", "N=1 D=4 E=3 K=3 F=8")),
    "load_balancing": Puzzle(balance, of_balance, "loss",
        "granitemoe.py, language model: load_balancing_loss",
        ("N=9 E=5 K=2", "N=4 E=3 K=1", "N=1 E=4 K=4")),
    "cached_step": Puzzle(step, of_step, "y keys values",
        "granitemoe.py, attention: Attention",
        ("B=1 H=2 G=2 T=1 L=3 C=4 scale=0.7 theta=100.0",
         "B=2 H=4 G=2 T=3 L=2 C=6 scale=0.3 theta=100.0",
         "B=1 H=2 G=1 T=4 L=0 C=4 scale=0.7 theta=100.0")),
    "top_p": Puzzle(keep, of_top_p, "probs", "generate.py, the next id: filtered_probs",
        ("B=3 V=9 p=0.7", "B=2 V=20 p=0.95", "B=1 V=5 p=0.01")),
}  # fmt: skip


# ----------------------------------------------------------------------------- to try a piece with
def cases(stub: Piece) -> Iterator[tuple[str, list]]:
    """Arguments for a puzzle, and a name for them: those of the example in its docstring, then
    random ones, of the shapes in the docstring."""
    noted, name = [], stub.__name__
    scope = {"torch": torch, name: lambda *x: noted.extend(x) or PUZZLES[name].answer(*x)}
    for line in doctest.DocTestParser().get_examples(stub.__doc__):
        exec(line.source, scope)
    yield "the example in its docstring", noted
    told = re.findall(r"(\w+(?: and \w+)*) \(([A-Z](?:, [A-Z])*)\)", stub.__doc__)
    shapes = {x: shape.split(", ") for names, shape in told for x in names.split(" and ")}
    for case in PUZZLES[name].cases:
        size = {x: float(n) if "." in n else int(n) for x, n in re.findall(r"(\w+)=(\S+)", case)}
        size["P"], rng = 2 * size.get("F", 0), torch.Generator().manual_seed(0)
        made = {
            x: torch.randn([size[d] for d in shapes[x]], generator=rng) if x in shapes else size[x]
            for x in inspect.signature(stub).parameters
        }
        if "positions" in made:
            made["positions"] = 3 * made["positions"].argsort() + 2
        if "weights_NK" in made:  # the last expert is not chosen, if the others are enough
            made["weights_NK"] = made["weights_NK"].softmax(dim=-1)
            some = torch.rand(size["N"], max(size["K"], size["E"] - 1), generator=rng)
            made["expert_ids_NK"] = some.argsort()[:, : size["K"]]
        yield case, list(made.values())


class Wrong(ValueError):
    """What the reader is told of a piece; nothing if its body is not written yet."""


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
        raise Wrong
    return tuple(got) if isinstance(got, (tuple, list)) else (got,), given


def gradients(piece: Piece, inputs: list) -> list[Tensor | None]:
    """Of a weighted sum of all that the piece returns, for each input; None if none reaches it."""
    got, given = run(piece, inputs, grad=True)
    got = [y for y in got if y.requires_grad]
    for y in got:
        y.backward(torch.linspace(1, 2, y.numel()).view_as(y), retain_graph=True)
    return [x.grad if isinstance(x, Tensor) else None for x in given]


# -------------------------------------------------------------------------------- within the model
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
            change(granitemoe.Router, "forward",
                   lambda m, x: (m.layer(x), *f(x, m.layer.weight, m.top_k)))
        ],
        "expert": [change(granitemoe, "swiglu", activate)],
        "experts_loop": [patch.dict(EXPERTS, loop=f)],
        "experts_batched": [  # for one token; more are left to the loop
            patch.dict(EXPERTS, loop=lambda x, *y: (f if len(x) == 1 else usual)(x, *y))
        ],
        "load_balancing": [],  # of training alone
        "cached_step": [
            change(granitemoe, "rotate", lambda x, *rope: x),
            change(granitemoe.KVCache, "append", lambda cache, layer, k, v: (k, v)),
            patch.dict(ATTENTION, eager=cached),
        ],
        "top_p": [change(generate, "filtered_probs", lambda x, s: f(x / s.temperature, s.top_p))],
    }[name]  # fmt: skip


def write(solved: dict[str, Piece], prompt: str, count: int, **sampling: float) -> list[list[str]]:
    """The prompt and `count` tokens as tiny/ writes them: first by itself, then with the pieces."""
    forms = {"dtype": "float32", "attention_backend": "eager", "experts_backend": "loop"}
    model = generate.load_model(generate.TINY, **forms)
    tokenizer, written = generate.load_tokenizer(generate.TINY), []
    for replaced in ({}, solved):
        ids = tokenizer.encode(prompt).ids
        with ExitStack() as stack:
            for name, piece in replaced.items():
                for change in fit(name, piece, model.config):
                    stack.enter_context(change)
            ids += [i for (i,) in generate.generate(model, [ids], count, **sampling)]
        written.append(pieces(tokenizer, ids))
    return written
