"""Compiled steps against the plain model, at random shapes, views, hooks and memory that moves.

    python tests/fuzz_steps.py N SEED        N cases; exits with 1 if one of them went wrong
    python tests/fuzz_steps.py 1 SEED I      case I alone

A case builds a small model, reads a padded prompt in pieces and goes on token by token. Before a
random step something may happen to the model or the cache. The compiled step must give the plain
one's numbers or, where something happened that it does not follow, a ValueError of one line. Where
memory alone has moved it must not refuse. Each case runs in a process of its own, with 60 seconds.
"""

import sys
from collections import Counter
from random import Random

import torch
from conftest import forked
from test_fast_cpu import build, random_rows, relative
from test_guard import CACHES, CHANGED_WITHOUT_A_NUMBER, CHANGES, moved

import fast
import generate
from fast import cpu
from granitemoe import KVCache

FOLLOWED = ("shared", "shared cache", "other tensors", "other parameters", "another layer")
TAKEN = ("nothing", "moved", "harmless")  # and never refused
KINDS = ("nothing", "moved", "harmless", "model", "cache", "view")


def sizes(rng: Random) -> dict:
    """Of a config: heads, key heads, widths and experts that fill no register, or several."""
    G, per, half = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 2, 3, 5, 8, 16, 33, 67))
    E = rng.randint(1, 9)
    return {
        "num_attention_heads": G * per,
        "num_key_value_heads": G,
        "hidden_size": G * per * half * 2,
        "intermediate_size": rng.randint(1, 70),
        "num_local_experts": E,
        "num_experts_per_tok": rng.randint(1, E),
        "num_hidden_layers": 3,
        "vocab_size": rng.randint(2, 90),
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }


def view(model, cache, rng: Random) -> None:
    """One tensor becomes a view of a larger one, the same numbers: contiguous or not."""
    weight = rng.choice([*model.parameters()])
    dim = rng.randrange(weight.dim())
    wide = torch.cat((weight.data, weight.data), dim)
    weight.data = wide.narrow(dim, 0, weight.shape[dim])


def happen(kind: str, name: str, model, cache, rng: Random) -> None:
    if kind == "moved":
        moved(model, cache, name)
    elif kind == "harmless":
        CHANGED_WITHOUT_A_NUMBER[name](model)
    elif kind == "model":
        CHANGES[name][0](model)
    elif kind == "cache":
        CACHES[name][0](cache)
    elif kind == "view":
        view(model, cache, rng)


def reply(make, model, ids, pads, pieces, event, rng) -> list:
    """Logits after each piece; the event happens before piece `at`."""
    kind, name, at = event
    cache = KVCache(model.config, *ids.shape, dtype=model.model.norm.weight.dtype)
    cache.keys.zero_()  # what was never written is compared too, where a length is changed
    cache.values.zero_()
    if at < 0:
        happen(kind, name, model, cache, rng)
    step, found = make(model, cache, pads), []
    for i, piece in enumerate(ids.split(pieces, dim=1)):
        if i == at:
            happen(kind, name, model, cache, rng)
        found.append(step(piece).clone())
    return found


def an_event(rng: Random) -> tuple[str, str]:
    """What happens, by kind and name. Left out: a length that goes back among a row's padding,
    whose logits mean nothing, and a compiled layer, which takes the plain step a minute."""
    kind = rng.choice(KINDS)
    names = {"moved": FOLLOWED, "harmless": CHANGED_WITHOUT_A_NUMBER}
    names |= {"model": CHANGES.keys() - {"compiled"}, "cache": CACHES.keys() - {"length beyond"}}
    return kind, rng.choice(sorted(names.get(kind, [""])))


def verdict(ours: list, plain: list, pieces: list[int], last_pad: int) -> str:
    """Of logits in float32, as soon as every row has begun."""
    for i, (x, y) in enumerate(zip(ours, plain, strict=True)):
        error = relative(x, y)
        if sum(pieces[: i + 1]) > last_pad and not error <= 1e-4:
            return f"after piece {i} the error is {error}"
    return "equal"


def case(number: int, seed: int) -> str:
    """What became of it: "equal", "refused", or what is wrong."""
    rng = Random(f"{seed}/{number}")
    dtype = rng.choice((torch.float32, torch.bfloat16))
    changes, rows = sizes(rng), rng.randint(1, 6)
    first, tokens = rng.randint(1, 40), rng.randint(1, 5)
    pads = torch.tensor([[rng.randrange(first)] for _ in range(rows)])
    pads[rng.randrange(rows)] = 0
    pieces = [first, *[1] * tokens]
    if first > 1 and rng.random() < 0.5:
        cut = rng.randint(1, first - 1)
        pieces = [cut, first - cut, *[1] * tokens]
    event = (*an_event(rng), rng.choice((-1, rng.randrange(len(pieces)))))
    found = []
    for make in (generate.plain_step, fast.step):
        model = build(number, dtype, **changes)
        ids = random_rows(model, rows, first + tokens)
        try:
            found.append(reply(make, model, ids, pads, pieces, event, Random(number)))
        except Exception as error:
            if make is fast.step:
                short = "\n" not in str(error) and len(str(error)) < 200
                right = isinstance(error, ValueError) and short and event[0] not in TAKEN
                return "refused" if right else f"{event} ended in {error!r}"
            found.append(None)  # the plain step cannot go on either
    plain, ours = found
    if plain is None:
        return f"{event} taken, where the plain step ends in an error"
    said = verdict(ours, plain, pieces, int(pads.max())) if dtype == torch.float32 else "equal"
    return said if said == "equal" else f"{event} {said}"


@torch.no_grad()
def main(count: int, seed: int, only: int | None = None) -> int:
    torch.set_num_threads(1)
    ended, wrong = Counter(), 0
    for dtype in (torch.float32, torch.bfloat16):
        cpu.library(dtype)  # built once, before the forks
    for number in range(count) if only is None else [only]:
        outcome = forked(lambda n=number: print("\n" + case(n, seed), end=""), seconds=60)
        said = outcome.out.rpartition("\n")[2]
        if outcome.status:
            said = f"status {outcome.status} {outcome.err[-300:]}"
        if said not in ("equal", "refused"):
            wrong += 1
            print(f"case {number}: {said}", flush=True)
        else:
            ended[said] += 1
    print(f"{count} cases of seed {seed}: {wrong} wrong, {dict(ended)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
