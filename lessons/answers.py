"""For puzzles.py and faster.py: the answers, and the inputs that pieces are tried on.

Read it after the puzzles. The answers are granitemoe.py's own functions.
"""

import doctest
import inspect
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import common  # noqa: F401  (makes the next two importable)
import torch
from torch import Tensor
from torch.func import functional_call

import generate
import granitemoe
from granitemoe import experts_loop

Piece = Callable[..., object]


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


def gate_up(x_D: Tensor, gate_up_EPD: Tensor, expert_ids_K: Tensor) -> Tensor:
    """What the kernel writes into y (K, F), in float32."""
    rows_KP = torch.einsum("kpd,d->kp", gate_up_EPD[expert_ids_K].float(), x_D.float())
    return granitemoe.swiglu(rows_KP)


# -------------------------------------------------------------------- the puzzles, and their cases
class Puzzle(NamedTuple):
    answer: Piece
    gives: str
    place: str  # where the answer stands
    cases: tuple[str, ...]  # see make


NORM, MOE = "granitemoe.py, norm and positions:", "granitemoe.py, mixture of experts:"
PUZZLES = {
    "rms_norm": Puzzle(norm, "y", f"{NORM} RMSNorm", (
        "B=2 T=3 D=5 eps=0.000001", "B=1 T=1 D=8 eps=0.5", "B=2 T=3 D=6 eps=2.0",
        "bfloat16 B=2 T=5 D=64 eps=0.000001",
    )),
    "rotary": Puzzle(turn, "y", f"{NORM} rope_tables, rotate", (
        "B=2 H=3 T=5 C=6 theta=50.0", "B=1 H=1 T=1 C=2 theta=10000.0",
        "bfloat16 B=1 H=2 T=5 C=8 theta=10000.0 from=3000",
    )),
    "attention": Puzzle(attend, "y", "granitemoe.py, attention: attend_eager", (
        "B=1 H=2 G=2 T=5 S=5 C=4 scale=0.7", "B=2 H=4 G=2 T=5 S=5 C=6 scale=0.7",
        "B=1 H=6 G=2 T=3 S=7 C=4 scale=0.3", "B=2 H=3 G=1 T=1 S=4 C=2 scale=1.5",
        "B=2 H=4 G=2 T=5 S=5 C=6 scale=8.0 shift=110.0",
        "bfloat16 B=1 H=4 G=2 T=3 S=40 C=16 scale=0.25",
    )),
    "route": Puzzle(choose, "weights_NK expert_ids_NK", f"{MOE} Router", (
        "N=7 D=4 E=5 K=2", "N=1 D=6 E=3 K=3", "N=4 D=3 E=6 K=1",
        "N=5 D=4 E=6 K=3 shift=110.0", "bfloat16 N=7 D=16 E=5 K=2",
    )),
    "expert": Puzzle(one_expert, "y_ND", f"{MOE} swiglu, experts_loop", (
        "N=5 D=8 F=12", "N=1 D=8 F=4", "N=6 D=8 F=8", "N=5 D=8 F=4 times=40.0",
        "bfloat16 N=5 D=32 F=32",
    )),
    "experts_loop": Puzzle(experts_loop, "y_ND", f"{MOE} experts_loop", (
        "N=7 D=8 E=5 K=2 F=12", "N=1 D=4 E=3 K=3 F=8", "N=4 D=4 E=6 K=1 F=4",
        "N=6 D=8 E=4 K=2 F=8", "bfloat16 N=4 D=16 E=128 K=128 F=8",
    )),
    "experts_batched": Puzzle(granitemoe.experts_gathered, "y_ND",
        f"{MOE} experts_grouped, experts_gathered", (
        "N=4 D=8 E=5 K=2 F=12", "N=8 D=8 E=12 K=2 F=12", "N=1 D=4 E=3 K=3 F=8",
        "N=6 D=8 E=4 K=2 F=8", "bfloat16 N=4 D=16 E=128 K=128 F=8",
    )),
    "load_balancing": Puzzle(balance, "loss",
        "granitemoe.py, language model: load_balancing_loss", (
        "N=9 E=5 K=2", "N=4 E=3 K=1", "N=1 E=4 K=4", "N=6 E=5 K=2 shift=110.0",
        "N=4 E=5 K=2 ties",
    )),
    "cached_step": Puzzle(step, "y keys values", "granitemoe.py, attention: Attention", (
        "B=1 H=2 G=2 T=1 L=3 C=4 scale=0.7 theta=100.0",
        "B=2 H=4 G=2 T=3 L=2 C=6 scale=0.3 theta=50.0",
        "B=1 H=2 G=1 T=4 L=0 C=4 scale=0.7 theta=100.0",
        "B=1 H=4 G=2 T=5 L=1 C=6 scale=8.0 theta=100.0 shift=150.0",
        "bfloat16 B=1 H=2 G=1 T=2 L=3000 C=4 scale=2.0 theta=10000.0",
    )),
    "top_p": Puzzle(keep, "probs", "generate.py, the next id: filtered_probs", (
        "B=3 V=9 p=0.7", "B=2 V=20 p=0.95", "B=3 V=5 p=0.1", "B=2 V=8 p=1.0",
        "B=3 V=6 p=0.9 shift=110.0", "B=3 V=6 p=0.9 shift=-110.0", "B=1 V=8 p=0.5 ties",
    )),
    "sort_by_expert": Puzzle(granitemoe.sort_by_expert, "order_M tokens_M ends_E",
        f"{MOE} sort_by_expert", ("N=9 K=2 E=4", "N=9 K=2 E=64", "N=1 K=3 E=5")),
    "experts_grouped": Puzzle(granitemoe.experts_grouped, "y_ND", f"{MOE} experts_grouped", (
        "N=40 D=8 E=5 K=2 F=12", "N=64 D=16 E=8 K=2 F=8", "N=1 D=4 E=3 K=3 F=8",
        "bfloat16 N=9 D=16 E=64 K=64 F=8",
    )),
    "gate_up": Puzzle(gate_up, "y", "fast/kernels.py: gate_up", (
        "D=4 E=3 K=1 F=4 ROWS=4", "D=16 E=5 K=2 F=12 ROWS=8", "D=8 E=4 K=3 F=5 ROWS=4",
        "float16 D=8 E=4 K=2 F=8 ROWS=8 shift=300.0",
    )),
}  # fmt: skip


def example(stub: Piece) -> list:
    """The arguments of the example in a docstring."""
    noted, name = [], stub.__name__
    scope = {"torch": torch, name: lambda *x: noted.extend(x) or PUZZLES[name].answer(*x)}
    for line in doctest.DocTestParser().get_examples(stub.__doc__):
        exec(line.source, scope)
    return noted


def make(stub: Piece, case: str) -> list:
    """Random arguments, of the shapes in the docstring. A case gives sizes, arguments that are
    numbers, and conditions: a dtype, the first tensor times so many, scores so much larger (see
    large_scores), positions from so far on, ties (nothing is random)."""
    told = re.findall(r"(\w+(?: and \w+)*)\s+\(([A-Z](?:, [A-Z])*)\)", stub.__doc__)
    shapes = {x: shape.split(", ") for names, shape in told for x in names.split(" and ")}
    size = {x: float(n) if "." in n else int(n) for x, n in re.findall(r"(\w+)=(\S+)", case)}
    size["P"], rng = 2 * size.get("F", 0), torch.Generator().manual_seed(0)
    made = {}
    for name in inspect.signature(stub).parameters:
        made[name] = size.get(name)
        if name in shapes:
            sizes = [size[letter] for letter in shapes[name]]
            made[name] = torch.randn(sizes, generator=rng, dtype=torch.float32)
    if "positions" in made:
        made["positions"] = 3 * made["positions"].argsort() + 2 + size.get("from", 0)
    if "weights_NK" in made:
        made["weights_NK"] = made["weights_NK"].softmax(dim=-1)
    if "expert_ids_NK" in made:  # the last expert is not chosen, if the others are enough
        some = torch.rand(size["N"], max(size["K"], size["E"] - 1), generator=rng)
        made["expert_ids_NK"] = some.argsort()[:, : size["K"]].contiguous()
    if "expert_ids" in made:
        made["expert_ids"] = torch.rand(size["E"], generator=rng).argsort()[: size["K"]]
    first = next(iter(made))
    if "times" in size:
        made[first] = made[first] * size["times"]
    if "shift" in size:
        large_scores(made, size["shift"])
    if "ties" in case:
        made[first] = torch.zeros_like(made[first])
    if dtype := re.match("b?float16", case):
        floats = {x: y for x, y in made.items() if isinstance(y, Tensor) and y.is_floating_point()}
        made |= {x: y.to(getattr(torch, dtype[0])) for x, y in floats.items()}
    return list(made.values())


def large_scores(made: dict, shift: float) -> None:
    """Adds about so much to the scores: exp of them is infinite in float32, a softmax is not. In
    attention it is taken away for every other head of the keys."""
    if "logits" in made or "logits_NE" in made:
        name = next(iter(made))
        made[name] = made[name] + shift
    if "matrices" in made:  # a product of 90,000: float16 ends at 65,504
        made["x"][0] = made["matrices"][..., 0] = shift
    if "router_ED" in made:
        made["x_ND"][:, 0], made["router_ED"][:, 0] = shift, 1.0
    if "q" in made:
        half = made["q"].shape[-1] // 2
        signs = torch.tensor([1.0, -1.0])[torch.arange(made["k"].shape[1]) % 2]
        made["q"][..., half - 1], made["q"][..., -1] = 1.0, 0.0  # the pair that turns least
        for name in {"k", "keys"} & made.keys():
            made[name][..., half - 1] = signs[:, None] * shift / made["scale"]
            made[name][..., -1] = 0.0


def cases(stub: Piece) -> Iterator[tuple[str, list]]:
    """Arguments for a puzzle, and a name for them: those of the example in its docstring, then
    random ones."""
    if ">>>" in stub.__doc__:
        yield "the example in its docstring", example(stub)
    for case in PUZZLES[stub.__name__].cases:
        yield case, make(stub, case)
