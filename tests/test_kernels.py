"""The Triton kernels without a card: against the plain model, by their text, and compiled ahead.

Where there is no GPU, conftest.py asks for Triton's interpreter, which runs kernels on tensors of
the CPU. It takes milliseconds for a program, so models are small, and so are blocks: several of
each kind stand where a card would have one. What the interpreter cannot show, that each kernel
waits for the one before it, is read from the text.
"""

import ast
import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, TESTS, representing, thorough
from torch import Tensor

import generate
from fast import cpu, cuda
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache, Router
from test_granitemoe import CHECKPOINTS, LENGTHS, T, fill, random_config
from test_granitemoe import cuda as on_a_card

TEXT = (ROOT / "fast/kernels.py").read_text(encoding="utf-8")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # relative
needs_triton = pytest.mark.skipif(cuda.kernels is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(
    cuda.kernels is None or torch.cuda.is_available(),
    reason="needs triton, and no GPU: there kernels are compiled",
)

BLOCKS = {  # in place of a card's
    "FEW": {
        "attn_in": {"BN": 4},
        "attend": {"BS": 16},
        "attn_out": {"BN": 32},
        "route": {"BE": 4},
        "gate_up": {"BN": 16},
        "down": {"BN": 16},
        "head": {"BN": 64},
    },
    "STEP": {
        "attn_in_many": {"BM": 16, "BN": 16, "BK": 16},
        "attend": {"BS": 16},
        "attn_out_many": {"BM": 16, "BN": 32, "BK": 32},
        "route": {"BE": 8},
        "route_many": {"BM": 16, "BK": 16},
        "gate_up_many": {"BM": 4, "BN": 16, "BK": 32},
        "down_many": {"BM": 4, "BN": 32, "BK": 16},
        "head_many": {"BM": 16, "BN": 64, "BK": 32},
    },
    "SHORT": {
        "attn_in_many": {"BM": 16, "BN": 16, "BK": 32},
        "attend_many": {"BM": 16, "BS": 16},
        "attn_out_many": {"BM": 16, "BN": 32, "BK": 16},
        "route_many": {"BM": 16, "BK": 32},
        "gate_up_many": {"BM": 16, "BN": 16, "BK": 16},
        "down_many": {"BM": 16, "BN": 32, "BK": 32},
        "head_many": {"BM": 16, "BN": 64, "BK": 32},
    },
    "LONG": {
        "attn_in_many": {"BM": 32, "BN": 8, "BK": 32},
        "attend_many": {"BM": 32, "BS": 32},
        "attn_out_many": {"BM": 32, "BN": 16, "BK": 32},
        "route_many": {"BM": 16, "BK": 32},
        "gate_up_many": {"BM": 8, "BN": 32, "BK": 32},
        "down_many": {"BM": 8, "BN": 64, "BK": 32},
        "head_many": {"BM": 16, "BN": 64, "BK": 32},
    },
}


# --------------------------------------------------------------------------------- the interpreter
BACKWARDS: list[bool] = []  # not empty: a kernel's programs run from the last to the first


def call(self, *arguments, **named):
    """A device function. Triton would patch its own language again at each call; it has been, by
    the kernel or, for functions of Triton's own, at their first call."""
    from triton.runtime import interpreter

    module = self.fn.__module__
    if module.startswith("triton.") and module not in PATCHED:
        PATCHED.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


PATCHED: set[str] = set()


def set_program(self, *place: int) -> None:
    last = [n - 1 - i for n, i in zip(self.grid_dim, place, strict=True)]
    self.grid_idx = tuple(last) if BACKWARDS else place


def allocate(self, *arguments) -> None:
    """What no kernel has written is nothing that another may read."""
    ALLOCATE(self, *arguments)
    FORWARDS.append(self)
    for name in ("x", "q", "y", "shares", "scores", "w", "hidden", "rows", "logits"):
        if hasattr(self, name):
            getattr(self, name).fill_(torch.nan)
    for name in ("chosen", "order", "tiles", "counts"):
        if hasattr(self, name):
            getattr(self, name).fill_(2**30)


ALLOCATE = cuda.Forward.allocate
FORWARDS: list[cuda.Forward] = []


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels run on the CPU, and quickly for that; a graph is what launches them again."""
    from triton.runtime import interpreter as it

    monkeypatch.setattr(it.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(it.InterpreterBuilder, "set_grid_idx", set_program)
    builder = it.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)
    monkeypatch.setattr(cuda, "capture", lambda run: SimpleNamespace(replay=run))
    monkeypatch.setattr(cuda.Forward, "allocate", allocate)
    with np.errstate(all="ignore"):
        yield
    BACKWARDS.clear()
    FORWARDS.clear()


# ------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    """Tokens that a model is fed, a piece at a time, and what is special."""

    pieces: tuple[int, ...]
    starts: tuple[int, ...] = (0,)  # of the rows: slots left empty
    sizes: tuple[int, ...] = (4, 2, 8, 6, 2, 24, 61)  # H G C E K F V
    more: dict = {}  # of the config
    limits: dict = {}  # names of fast/cuda.py, and what stands for them
    change: Callable[[GraniteMoeForCausalLM], object] = lambda model: None
    spoiled: bool = False  # the first row's last token is BAD
    backwards: bool = False
    own_blocks: bool = False  # fast/cuda.py's
    dtype: torch.dtype = torch.float32
    room: int = 0  # slots, if more than 3 stay free


BAD = 7  # an id that no other row has
MANY = {"FEW_ROWS": 0}
SMALL = {"PIECE": 32, "SHORT_PIECE": 16}
SORTED_BY_MANY = {"ONE_SORT": 8}
NINE = (0, 3, 0, 0, 1, 0, 0, 2, 0)
UNTIED = {"tie_word_embeddings": False}
ONE_LAYER = {"num_hidden_layers": 1}


def routers(model: GraniteMoeForCausalLM) -> list[Tensor]:
    return [layer.block_sparse_moe.router.layer.weight.data for layer in model.model.layers]


def tied(model: GraniteMoeForCausalLM) -> None:
    """Each score comes twice or more."""
    for weight in routers(model):
        weight.copy_(weight[torch.arange(len(weight)) % 3])


def level(model: GraniteMoeForCausalLM) -> None:
    for weight in routers(model):
        weight.zero_()


def alike(model: GraniteMoeForCausalLM) -> None:
    """All tokens choose experts 3 and 5, and nothing else."""
    model.model.embed_tokens.weight.data[:, 0] = 20
    for weight in routers(model):
        weight[:, 0], weight[3, 0], weight[5, 0] = 0, 50, 40


def bad_token(number: float) -> Callable:
    return lambda model: model.model.embed_tokens.weight.data[BAD].fill_(number)


def bad_expert(model: GraniteMoeForCausalLM) -> None:
    model.model.layers[0].block_sparse_moe.output_linear.weight.data[2] = torch.inf


def parity(seed: int) -> GraniteMoeConfig:
    return GraniteMoeConfig.from_dict(random_config(seed) | {"model_type": "granitemoe"})


PADDED = tuple(T - length for length in LENGTHS)  # as the parity tests pad
CASES = {
    # few rows
    "one row": Case((5, 1, 1, 1)),
    "padded rows": Case((7, 1, 1), (0, 5, 2)),
    "four rows, three heads a key head": Case((9, 1, 1), (0, 2, 8, 0), (6, 2, 6, 10, 3, 20, 99)),
    "one key head, odd sizes": Case((6, 1, 1), (3, 0), (5, 1, 14, 5, 3, 17, 53)),
    "a key head each": Case((6, 1, 1), (0, 1), (3, 3, 10, 7, 1, 12, 50), UNTIED),
    "head_dim 256": Case((18, 1), (0, 2), (2, 1, 256, 4, 2, 8, 33), ONE_LAYER),
    "every expert": Case((3, 1, 1), (0, 1), (2, 2, 8, 4, 4, 16, 40)),
    "one expert": Case((3, 1, 1), (0,), (2, 1, 8, 1, 1, 16, 40)),
    "ties, few rows": Case((4, 1), (0, 2), (4, 4, 8, 8, 3, 16, 40), ONE_LAYER, change=tied),
    "every score equal, few rows": Case((2, 1), (0, 0), change=level),
    "all on two experts, few rows": Case((3, 1, 1), (0, 1, 0), change=alike),
    "from the last program to the first": Case((20, 1, 1), (0, 5, 2), backwards=True),
    "a first token": Case((1, 1), room=2),
    "splits meet": Case((126, 1, 1, 1, 1), (0, 0), (2, 1, 4, 2, 1, 8, 20), ONE_LAYER),
    "splits meet, padded": Case((30, 1, 1, 1, 1), (0, 14, 16), (2, 1, 4, 2, 1, 8, 20), ONE_LAYER),
    "slots fill a block": Case((14, 1, 1, 1, 1), (0, 13), (2, 1, 4, 2, 1, 8, 20)),
    "32 splits": Case((3, 1, 1), (0, 2), (2, 1, 4, 2, 1, 8, 20), ONE_LAYER, room=2049),
    "one split": Case((17, 1, 1), (0, 15), limits={"splits": lambda *_: 1}),
    "a card's blocks, few rows": Case((5, 1, 1), (0, 2), own_blocks=True),
    # one token of each of many rows
    "one row as many": Case((5, 1, 1), limits=MANY),
    "nine rows": Case((4, 1, 1), NINE),
    "nine rows, one layer": Case((2, 1), NINE[:1] * 9, more=ONE_LAYER),
    "nine rows, odd sizes": Case((4, 1, 1), NINE, (5, 1, 14, 5, 3, 17, 53), UNTIED),
    "nine rows, D = 80": Case((4, 1), NINE, (5, 5, 16, 9, 4, 21, 70)),
    "seventeen rows of all lengths": Case(
        (17, 1), (*range(17),), (3, 3, 8, 11, 5, 12, 33), ONE_LAYER
    ),
    "more rows than one program sorts": Case(
        (2, 1), (0,) * 9, more=ONE_LAYER, limits=SORTED_BY_MANY
    ),
    "many sorted blocks": Case((2, 1), (0,) * 36, (2, 1, 8, 13, 3, 8, 33), limits=SORTED_BY_MANY),
    "130 rows": Case((1, 1), (0,) * 130, (1, 1, 4, 5, 2, 8, 20), ONE_LAYER),
    "every expert, nine rows": Case((2, 1), NINE, (2, 2, 8, 4, 4, 16, 40)),
    "one expert, nine rows": Case((2, 1), NINE, (2, 1, 8, 1, 1, 16, 40)),
    "ties, many rows": Case((4, 1), NINE, (4, 4, 8, 8, 3, 16, 40), change=tied),
    "ties, sorted by many": Case((4, 1), NINE, limits=SORTED_BY_MANY, change=tied),
    "all on two experts, many rows": Case((4, 1), NINE, change=alike),
    "many rows, from the last program": Case((4, 1, 1), NINE, backwards=True),
    "sorted by many, from the last program": Case(
        (4, 1), NINE * 2, more=ONE_LAYER, limits=SORTED_BY_MANY, backwards=True
    ),
    "head_dim 256, many rows": Case((3, 1), NINE[:5], (2, 1, 256, 4, 2, 8, 33), ONE_LAYER),
    "a card's blocks, many rows": Case((5, 1), NINE, own_blocks=True),
    # prompts
    "a prompt of 15": Case((15,)),
    "a prompt of 16": Case((16,)),
    "a prompt of 17, padded": Case((17,), (0, 12)),
    "a prompt of 31": Case((31,), limits=SMALL),
    "a prompt of 33 in pieces": Case((33,), limits=SMALL),
    "a prompt of 65, padded, in pieces": Case((65, 1), (0, 40), limits=SMALL),
    "a prompt of 63": Case((63,), sizes=(2, 1, 4, 3, 2, 8, 20), own_blocks=True),
    "a prompt of 64": Case((64,), sizes=(2, 1, 4, 3, 2, 8, 20), own_blocks=True),
    "a prompt of 65": Case((65,), sizes=(2, 1, 4, 3, 2, 8, 20), own_blocks=True),
    "a prompt of 128, padded": Case((128,), (0, 70), (2, 1, 4, 3, 2, 8, 20), own_blocks=True),
    "a prompt of 129, long blocks": Case(
        (129,), (0,), (2, 1, 4, 3, 2, 8, 20), limits={"SHORT_PIECE": 64}, own_blocks=True
    ),
    "two rows in a block": Case((11,), (0, 3, 1)),
    "room for a piece": Case((9,), (0, 3), room=32),
    "short turns": Case((5, 1, 4, 1), more=ONE_LAYER),
    "turns": Case((5, 1, 1, 17, 1, 1, 2, 1), (0, 2), limits=SMALL),
    "a token before a row begins": Case((3, 1, 1, 4, 1, 1), (0, 8, 5)),
    "tokens before a row begins, nine rows": Case((1, 1, 1, 1, 1), NINE),
    "a prompt on odd sizes": Case((21, 6), (0, 4), (5, 1, 14, 5, 3, 17, 53), UNTIED, SMALL),
    "three heads a key head, prompts": Case(
        (25, 14), (0, 13), (6, 2, 6, 10, 3, 20, 99), limits=SMALL
    ),
    "seven heads a key head": Case((20, 3), (0, 4), (7, 1, 6, 5, 2, 8, 33), limits=SMALL),
    "head_dim 256, a prompt": Case((20,), (0, 4), (2, 1, 256, 4, 2, 8, 33), ONE_LAYER),
    "every expert, a prompt": Case((20,), (0, 2), (2, 2, 8, 4, 4, 16, 40), limits=SMALL),
    "one expert, a prompt": Case((20,), (0, 2), (2, 1, 8, 1, 1, 16, 40), limits=SMALL),
    "most experts empty": Case((5,), sizes=(2, 1, 8, 70, 2, 8, 33)),
    "all on two experts, a prompt": Case((37,), (0, 3), limits=SMALL, change=alike),
    "ties, a prompt": Case((18,), (0, 4), (4, 4, 8, 8, 3, 16, 40), change=tied),
    "every score equal, a prompt": Case((12,), (0, 0), change=level),
    "a prompt, from the last program": Case((41,), (0, 21), limits=SMALL, backwards=True),
    "a full cache": Case((19, 1), (0, 3), limits=SMALL, room=20),
    # what is not finite
    "a token of NaN": Case(
        (4, 1), (0, 0, 2), more=UNTIED, change=bad_token(torch.nan), spoiled=True
    ),
    "a token of infinity, many rows": Case(
        (4, 1), NINE, more=UNTIED, change=bad_token(torch.inf), spoiled=True
    ),
    "a token of NaN, sorted by many": Case(
        (4, 1), NINE, more=UNTIED, limits=SORTED_BY_MANY, change=bad_token(torch.nan), spoiled=True
    ),
    "a prompt that ends in NaN": Case(
        (18,), (0, 4, 0), more=UNTIED, change=bad_token(torch.nan), spoiled=True
    ),
    "an expert of infinity, few rows": Case(
        (3, 1, 1, 1), (0, 1, 0, 0), more=ONE_LAYER, change=bad_expert
    ),
    "an expert of infinity, many rows": Case((3, 1, 1), NINE, more=ONE_LAYER, change=bad_expert),
    "an expert of infinity, prompts": Case((5, 4), NINE, more=ONE_LAYER, change=bad_expert),
    # numbers of two bytes
    "float16": Case((20, 1, 1), (0, 3), dtype=torch.float16),
    "float16, many rows": Case((4, 1, 1), NINE, dtype=torch.float16),
    "float16, a prompt": Case((41, 3), (0, 21), limits=SMALL, dtype=torch.float16),
} | {  # of the parity tests
    f"checkpoint {name}": Case((T, 1), PADDED, more={"seed": seed})
    for name, (seed, _) in CHECKPOINTS.items()
}  # fmt: skip
QUICK = (
    "padded rows", "nine rows, one layer", "a prompt of 33 in pieces", "a token of NaN",
    "more rows than one program sorts", "short turns",
)  # fmt: skip


# --------------------------------------------------------------------------------- the comparison


def make_model(case: Case) -> GraniteMoeForCausalLM:
    """Random weights, under which every block matters."""
    H, G, C, E, K, F, V = case.sizes
    config = GraniteMoeConfig(
        vocab_size=V,
        hidden_size=H * C,
        intermediate_size=F,
        num_attention_heads=H,
        num_key_value_heads=G,
        num_local_experts=E,
        num_experts_per_tok=K,
        max_position_embeddings=512,
        rope_theta=300.0,
        rms_norm_eps=0.03,
        embedding_multiplier=5.0,
        attention_multiplier=0.3,
        residual_multiplier=0.6,
        logits_scaling=2.3,
        **({"num_hidden_layers": 2, "tie_word_embeddings": True} | case.more),
    )
    return filled(config, case.change)


def filled(config: GraniteMoeConfig, change: Callable) -> GraniteMoeForCausalLM:
    model = GraniteMoeForCausalLM(config).eval()
    fill(model, 1)
    change(model)
    return model


def far(found: Tensor, exact: Tensor) -> float:
    """The largest relative error of a row of numbers that are finite; infinite where other rows
    are finite than should be."""
    finite = exact.isfinite().all(dim=1)
    if not torch.equal(finite, found.isfinite().all(dim=1)):
        return torch.inf
    found, exact = found[finite].double(), exact[finite].double()
    errors = (found - exact).norm(dim=1) / exact.norm(dim=1)
    return max(errors.tolist(), default=0.0)


def of_tokens(memory: Tensor, real: Tensor) -> Tensor:
    """The keys or values (L, B, G, S, C) of real tokens (B, S), a row each."""
    return memory.permute(1, 3, 0, 2, 4).flatten(2)[real]


def wasted(pads: Tensor, end: int) -> float:
    """Infinite if tokens that are not real went to experts, in the last layer of the last prompt:
    a card would read weights for them."""
    prompts = [forward for forward in FORWARDS if forward.T > 1]
    last = [forward for forward in prompts if int(forward.at) + int(forward.live) == end]
    for forward in last:
        tokens = torch.arange(int(forward.at), end) >= pads
        owned = forward.tiles[2][forward.tiles[0] >= 0]
        if max(owned.tolist(), default=0) != int(tokens.sum()) * forward.sizes["K"]:
            return torch.inf
    return 0.0


def errors(case: Case, device: str = "cpu") -> dict[str, float]:
    """How far the kernels are from the plain step, by what is compared."""
    model = (
        filled(parity(case.more["seed"]), case.change) if "seed" in case.more else make_model(case)
    )
    rows, total, V = len(case.starts), sum(case.pieces), model.config.vocab_size
    exact_cache, cache = (
        KVCache(model.config, rows, case.room or total + 3, device=device, dtype=dtype)
        for dtype in (torch.float32, case.dtype)
    )
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    pads = torch.tensor(case.starts, device=device)[:, None]
    rng = torch.Generator().manual_seed(total)
    ids = torch.randint(V, (rows, total), generator=rng).to(device)
    ids[ids == BAD] = BAD + 1
    ids[0, -1] = BAD if case.spoiled else 1
    wide = filled(model.config, case.change).to(device)
    wide.load_state_dict(model.to(device, case.dtype).state_dict())
    plain, compiled = generate.plain_step(wide, exact_cache, pads), cuda.step(model, cache, pads)
    found: dict[str, float] = {"logits": 0.0, "work": 0.0}
    with torch.inference_mode():
        for piece in ids.split(case.pieces, dim=1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Router, "forward", stable)
                exact = plain(piece)
            ours = compiled(piece)
            begun = pads[:, 0] < cache.length
            found["logits"] = max(found["logits"], far(ours[begun], exact[begun]))
            found["work"] = max(found["work"], wasted(pads, cache.length))
    assert torch.equal(cache.ids[:, :total], ids) and cache.length == total
    return found | {
        name: remembered(getattr(cache, name), getattr(exact_cache, name), total, pads, case)
        for name in ("keys", "values")
    }


def remembered(memory: Tensor, exact: Tensor, total: int, pads: Tensor, case: Case) -> float:
    """The error of what is kept for later tokens. No slot past the last token is written; what is
    before a row's first, others may multiply by 0."""
    slots = torch.arange(memory.shape[3], device=pads.device)
    real = (slots >= pads) & (slots < total)
    before = (slots < pads) & (slots < total)
    if case.spoiled:  # in eager NaN times 0 reaches tokens before it
        real[0] = False
    if not of_tokens(memory, (slots >= total).expand_as(real)).isnan().all():
        return torch.inf
    if case.change is not bad_expert and not of_tokens(memory, before).isfinite().all():
        return torch.inf
    return far(of_tokens(memory, real), of_tokens(exact, real))


def stable(self: Router, x: Tensor) -> tuple:
    """Router.forward, whose topk leaves open which of equal scores it takes: here the first."""
    logits = self.layer(x).float()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
    return logits, logits.gather(1, ids).softmax(dim=-1).to(x.dtype), ids


def run(case: Case, monkeypatch, device: str = "cpu") -> dict[str, float]:
    """The errors of a case."""
    BACKWARDS[:] = [True] * case.backwards
    FORWARDS.clear()
    with monkeypatch.context() as patch:
        for table, blocks in BLOCKS.items():
            options = {
                kernel: own | blocks.get(kernel, {}) for kernel, own in getattr(cuda, table).items()
            }
            if not case.own_blocks:
                patch.setattr(cuda, table, options)
        for limit, value in case.limits.items():
            patch.setattr(cuda, limit, value)
        return errors(case, device)


@interpreted
@pytest.mark.parametrize("name", representing(CASES, *QUICK))
def test_kernels_equal_the_plain_step(name, interpreter, monkeypatch):
    found = run(CASES[name], monkeypatch)
    print(name, found)  # pytest -rP shows it
    assert max(found.values()) < TOLERANCES[CASES[name].dtype], found


# ------------------------------------------------------------------------------------ the door


@pytest.fixture
def door(interpreter, monkeypatch) -> GraniteMoeForCausalLM:
    """A model, for which compiled=True means the kernels."""
    monkeypatch.setattr(cpu, "step", cuda.step)
    for table, blocks in BLOCKS.items():
        own = getattr(cuda, table)
        monkeypatch.setattr(cuda, table, {name: own[name] | blocks.get(name, {}) for name in own})
    return make_model(Case((), more=ONE_LAYER))


def ids_of(model, prompts: list, n: int, compiled: bool = True, **options) -> list:
    return list(generate.generate(model, prompts, n, compiled=compiled, **options))


@interpreted
def test_replies_equal_plain_ones(door):
    """Two in a conversation of one row, and one of padded rows."""
    caches = [KVCache(door.config, 1, 24) for _ in range(2)]
    for prompt in ([3, 9, 4], [7, 1]):
        plain, ours = (
            ids_of(door, [prompt], 3, compiled, cache=cache, seed=3, temperature=3.0)
            for compiled, cache in enumerate(caches)
        )
        held = [cache.ids[0, : cache.length].tolist() for cache in caches]
        assert plain == ours and held[0] == held[1] and len({row[0] for row in ours}) == 3
    rows, options = [[5, 17, 3], [40], [7, 2]], {"seed": 3, "temperature": 1.0}
    assert ids_of(door, rows, 3, **options) == ids_of(door, rows, 3, False, **options)


@interpreted
def test_a_reply_stops_at_what_is_not_finite(door):
    """Inside a graph nothing can be raised; the step's logits carry the news."""
    steps = generate.generate(door, [[1, 2]], 5, compiled=True)
    next(steps), next(steps)
    with torch.no_grad():
        door.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="logits: not finite at step 2"):
        list(steps)


@interpreted
@thorough
def test_replies_leave_nothing_behind(door, monkeypatch):
    """No graph, no cache, no tensor."""
    monkeypatch.setattr(cuda.Forward, "allocate", ALLOCATE)  # the other one keeps them
    alive = []
    for turn in range(4):
        ids_of(door, [[5, turn]], 3)
        gc.collect()
        alive.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    assert len(set(alive[1:])) == 1, alive


@interpreted
def test_a_graph_is_captured_once_for_each_size(interpreter, monkeypatch):
    """At its second call, and then replayed."""
    captured, again = [], cuda.capture
    monkeypatch.setattr(cuda, "capture", lambda run: captured.append(run.__self__.T) or again(run))
    case = Case((3, 1, 1, 2, 1), more=ONE_LAYER)
    assert max(run(case, monkeypatch).values()) < TOLERANCES[torch.float32]
    assert captured == [1, 64] and [forward.T for forward in FORWARDS] == [64, 1]


@interpreted
def test_a_first_call_that_does_not_end_is_made_again(door, monkeypatch):
    """Before anything is captured: something may not be compiled."""
    captured, again, launch = [], cuda.capture, cuda.Forward.run
    monkeypatch.setattr(cuda, "capture", lambda run: captured.append(run) or again(run))
    step = cuda.step(door, KVCache(door.config, 1, 8), torch.zeros(1, 1, dtype=torch.long))
    monkeypatch.setattr(cuda.Forward, "run", lambda self: 1 / 0)
    with pytest.raises(ValueError, match="failed: division by zero$"):
        step(torch.tensor([[5]]))
    monkeypatch.setattr(cuda.Forward, "run", launch)
    step(torch.tensor([[5]]))
    assert not captured
    step(torch.tensor([[5]]))
    assert len(captured) == 1


@interpreted
def test_where_memory_has_moved_graphs_are_made_anew(door, monkeypatch):
    moved = iter([False, False, True, False])
    monkeypatch.setattr(cuda.Guard, "look", lambda self, ids: next(moved))
    step = cuda.step(door, KVCache(door.config, 1, 8), torch.zeros(1, 1, dtype=torch.long))
    logits = [step(torch.tensor([[5]])).clone() for _ in range(4)]
    assert len(FORWARDS) == 2 and all(forward.graph for forward in FORWARDS)
    assert all(x.isfinite().all() for x in logits)


@interpreted
def test_a_full_cache_is_said(door):
    cache, ids = KVCache(door.config, 1, 4), torch.ones(1, 3, dtype=torch.long)
    step = cuda.step(door, cache, torch.zeros(1, 1, dtype=torch.long))
    step(ids), step(ids[:, :1])
    for more in (ids, ids[:, :1]):
        with pytest.raises(ValueError, match=r"^cache: \d tokens do not fit in 4$"):
            step(more)
    assert cache.length == 4


@interpreted
def test_a_card_that_fails(door, monkeypatch):
    """Compilers and captures raise errors of dozens of classes, many lines long."""

    def fail(self) -> None:
        raise RuntimeError("no kernel\nis there")

    for function, words in ((fail, "no kernel"), (lambda self: 1 / 0, "division by zero")):
        monkeypatch.setattr(cuda.Forward, "run", function)
        with pytest.raises(ValueError, match=f"^compiling or capturing failed: {words}$"):
            ids_of(door, [[5]], 3)


@interpreted
def test_a_card_with_less_memory_gets_fewer_stages(door, monkeypatch):
    from triton.runtime.errors import OutOfResources

    asked = []

    class Kernel:
        arg_names = ["x_ptr", "D", "BN"]

        def __getitem__(self, grid: tuple) -> Callable:
            return self.launch

        def launch(self, *arguments, num_stages: int, **sizes) -> None:
            asked.append(num_stages)
            if num_stages > most:
                raise OutOfResources(300000, 232448, "shared memory")

    pads = torch.zeros(1, 1)
    forward = cuda.Forward(door, KVCache(door.config, 1, 4), pads, [pads, pads], 1)
    forward.options["attend"]["num_stages"], most = 4, 2
    monkeypatch.setattr(cuda, "kernels", SimpleNamespace(attend=Kernel()))
    forward.launch("attend", (1,), forward.x)
    forward.launch("attend", (1,), forward.x)
    assert asked == [4, 3, 2, 2]
    most = 0
    with pytest.raises(OutOfResources):
        forward.launch("attend", (1,), forward.x)
    assert asked[4:] == [2, 1] and cuda.FEW["attend"]["num_stages"] == 4


@needs_triton
def test_sizes_of_pieces_and_splits():
    """Few sizes, none more than a piece holds; at least two tokens, which a step is not."""
    for rows, count in itertools.product((1, 3, 64, 2047, 9999), (1, 2, 63, 64, 65, 2048, 9999)):
        size = cuda.piece_size(count, rows)
        assert size & (size - 1) == 0 and (size * rows <= cuda.PIECE or size == 1)
        assert size >= count or size * rows * 2 > cuda.PIECE
    found = [cuda.piece_size(count, 1) for count in (1, 64, 65, 300, 2048, 2049)]
    assert found == [64, 64, 128, 512, 2048, 2048]
    assert [cuda.splits(*x) for x in ((1, 8, 600), (1, 8, 2049), (9, 8, 600), (64, 8, 600))] == [
        8, 32, 4, 1,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- planted faults
FAULTS = {  # in a copy of the text: old, new, the case that has to fail
    "ties by the higher index": (
        "(e[:, None] < e[None, :])",
        "(e[:, None] > e[None, :])",
        "ties, few rows",
    ),
    "many ties by the higher index": (
        "index = tl.min(tl.where(free & (left == best[:, None]), e, EP)",
        "index = tl.max(tl.where(free & (left == best[:, None]), e, -1)",
        "ties, a prompt",
    ),
    "weights not divided": ("w / tl.sum(w, axis=0)", "w", "one row"),
    "many weights not divided": ("w / tl.sum(w, axis=1)[:, None]", "w", "a prompt of 15"),
    "silu": ("tl.exp(-gate)", "tl.exp(gate)", "one row"),
    "gate and up": (
        "swiglu(product(gate_weight, h), product(up_weight, h),",
        "swiglu(product(up_weight, h), product(gate_weight, h),",
        "one row",
    ),
    "many gates and ups": ("swiglu(gate, up, h_ptr", "swiglu(up, gate, h_ptr", "a prompt of 15"),
    "attention's residual": (
        "added(x, product(weight, y), multiplier)",
        "added(x, product(weight, y), 1.0)",
        "one row",
    ),
    "many tokens' residual": (
        "added(x, total, multiplier).to(x.dtype)",
        "added(x, total, 1.0).to(x.dtype)",
        "a prompt of 15",
    ),
    "experts not weighted": (
        "rounded(out, x.dtype) * w[:, None]",
        "rounded(out, x.dtype)",
        "one row",
    ),
    "many experts not weighted": ("total += w * load_row", "total += load_row", "a prompt of 15"),
    "no epsilon": ("tl.sum(x * x) / D + eps", "tl.sum(x * x) / D", "one row"),
    "many without epsilon": ("squares / D + eps", "squares / D", "a prompt of 15"),
    "turned the other way": (
        "rounded(first * cos, dtype) -",
        "rounded(first * cos, dtype) +",
        "one row",
    ),
    "turned by the slot": ("(at - tl.load(start_ptr + b)) * C + c", "at * C + c", "padded rows"),
    "many turned by the slot": (
        "tl.maximum(at + new - start, 0)",
        "(at + new)",
        "a prompt of 17, padded",
    ),
    "padding is seen": ("low = start + split * share", "low = split * share", "padded rows"),
    "the last slot left out": ("end = tl.load(at_ptr) + 1", "end = tl.load(at_ptr)", "one row"),
    "shares too short": (
        "tl.cdiv(tl.cdiv(end - start, SPLITS), BS) * BS",
        "(end - start) // SPLITS // BS * BS + BS // 2",
        "splits meet",
    ),
    "tops of shares": ("tl.exp2(tops - tl.max(tops, axis=0))", "tl.exp2(tops * 0)", "splits meet"),
    "heads of a key head": (
        "(b * H + g * R + r[:, None])",
        "(b * H + r[:, None] * G + g)",
        "one row",
    ),
    "many heads of a key head": ("* H + g * R + m % R)", "* H + m % R * G + g)", "a prompt of 15"),
    "a query does not see itself": (
        "q, at + new, edge, end",
        "q, at + new - 1, edge, end",
        "a prompt of 15",
    ),
    "the last block of slots": (
        "end = at + tl.minimum(first + tokens, live)",
        "end = edge + BS",
        "a prompt of 65, padded, in pieces",
    ),
    "no fading": (
        "dot(p.to(v.dtype), v, y * fade[:, None])",
        "dot(p.to(v.dtype), v, y)",
        "a prompt of 65, padded, in pieces",
    ),
    "counters not set back": (
        "tl.store(ended_ptr + n, 0)",
        "tl.store(ended_ptr + n, 2)",
        "one row",
    ),
    "padding has experts": (
        "real = (n < N) & (n % T < tl.load(live_ptr)) & (tl.load(at_ptr) + n % T >= start)",
        "real = n < N",
        "a prompt of 17, padded",
    ),
    "what is left of a piece has experts": (
        "real = (n < N) & (n % T < tl.load(live_ptr)) &",
        "real = (n < N) &",
        "a prompt of 33 in pieces",
    ),
    "what is left of a piece is kept": (
        "mask = ((n < N) & (new < live))[:, None] & known",
        "mask = (n < N)[:, None] & known",
        "room for a piece",
    ),
    "blocks before": (
        "tl.where(other < block, counts, 0)",
        "tl.where(other < 0, counts, 0)",
        "a prompt of 31",
    ),
    "an expert's last tile": (
        "(total + ROWS - 1) // ROWS",
        "total // ROWS",
        "nine rows, one layer",
    ),
    "the k-th choice": (
        "choice = tl.where(hit, k, choice)",
        "choice = tl.where(hit, 0, choice)",
        "nine rows, one layer",
    ),
    "the last of a piece": (
        "n = b * T + tl.load(live_ptr) - 1",
        "n = b * T + T - 1",
        "a prompt of 15",
    ),
    "logits not scaled": (
        "rounded(rounded(product(weight, h), h.dtype) / divisor, h.dtype)",
        "rounded(product(weight, h), h.dtype)",
        "one row",
    ),
    "many logits not scaled": (
        "rounded(rounded(total, dtype) / divisor, dtype)",
        "rounded(total, dtype)",
        "nine rows, one layer",
    ),
}


def load(text: str, folder: Path) -> ModuleType:
    """This text as a module, in a file of its own, which Triton reads."""
    path = folder / "faulty.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@interpreted
@pytest.mark.parametrize("name", representing(FAULTS, "ties by the higher index"))
def test_planted_faults_are_found(name, interpreter, monkeypatch, tmp_path):
    old, new, case = FAULTS[name]
    assert TEXT.count(old) == 1
    monkeypatch.setattr(cuda, "kernels", load(TEXT.replace(old, new), tmp_path))
    found = run(CASES[case], monkeypatch)
    print(name, found)
    assert not max(found.values()) < 1e-3, found


# ------------------------------------------------------------------------- what the text has to say
READ_EARLY = {"down": {"chosen_ptr", "w_ptr"}}  # besides weights: its docstring says why


def launched() -> set[str]:
    return set(
        re.findall(r'launch\(\s*"(\w+)"', (ROOT / "fast/cuda.py").read_text(encoding="utf-8"))
    )


def calls(node: ast.AST, name: str) -> int:
    every = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    return sum(ast.unparse(each.func) == name for each in every)


def complaints(text: str) -> list[str]:
    """What is missing of the order of kernels, which no interpreter shows."""
    functions = {each.name: each for each in ast.parse(text).body if hasattr(each, "name")}
    found = [f"{name} is not there" for name in launched() - {*functions}]
    for name in launched() & {*functions}:
        kernel = functions[name]
        waits = [ast.unparse(statement) == "wait(PDL)" for statement in kernel.body]
        if sum(waits) != 1 or calls(kernel, "wait") != 1:
            found.append(f"{name} does not wait once, whatever comes")
        early = kernel.body[1 : (waits + [True]).index(True)]
        pointers = {
            each.id
            for statement in early
            for each in ast.walk(statement)
            if isinstance(each, ast.Name) and each.id.endswith("_ptr")
        }
        others = {x for x in pointers if not x.endswith(("weight_ptr", "norm_ptr"))}
        if others - READ_EARLY.get(name, set()):
            found.append(f"{name} reads {others} before it waits")
        if any(calls(statement, "tl.store") for statement in early):
            found.append(f"{name} writes before it waits")
        if calls(kernel, "launch_next") != 1 or kernel.args.args[-1].arg != "PDL":
            found.append(f"{name} does not say when the next may start")
        if "Grid: (" not in ast.get_docstring(kernel).replace("\n", " "):
            found.append(f"{name} does not name its grid")
    return found


UNORDERED = {
    "no wait": ("    wait(PDL)\n    y = load_row", "    y = load_row"),
    "a wait for some": ("    wait(PDL)\n    row =", "    if n > 0:\n        wait(PDL)\n    row ="),
    "read before": (
        "    wait(PDL)\n    y = load_row(y_ptr + b * D, d, D)",
        "    y = load_row(y_ptr + b * D, d, D)\n    wait(PDL)",
    ),
    "no launch": ("    launch_next(PDL)\n    hidden = swiglu", "    hidden = swiglu"),
}


def test_kernels_wait_for_each_other():
    assert len(launched()) >= 17 and complaints(TEXT) == []


@pytest.mark.parametrize("name", UNORDERED)
def test_what_does_not_wait_is_found(name):
    old, new = UNORDERED[name]
    assert TEXT.count(old) == 1 and complaints(TEXT.replace(old, new))


@needs_triton
def test_tables_name_kernels_and_their_letters():
    used = set()
    for table in (cuda.FEW, cuda.STEP, cuda.SHORT, cuda.LONG):
        for name, options in table.items():
            letters = {*options} - {"num_warps", "num_stages"}
            assert letters <= {*getattr(cuda.kernels, name).arg_names}, name
            used.add(name)
    assert used == launched()


# ------------------------------------------------------------------------------------ ahead of time
NARROW = {"route", "sort_by_expert", "add_norm", "embed"}  # little is read, in small pieces


def ahead(*words: str) -> list:
    """What ahead.py prints: a list for each kernel. In a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, TESTS / "ahead.py", *words]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(row) for row in done.stdout.splitlines()]


AHEAD = (
    "90 1b bfloat16 1x1",
    "90 1b bfloat16",
    "90 3b bfloat16",
    "80 bfloat16",
    "100 bfloat16",
    "90 float16",
)


@needs_triton
@pytest.mark.parametrize("name", representing(AHEAD, "90 1b bfloat16 1x1"))
def test_compiled_for_a_card(name):
    """Nothing is spilled, and of the loads of what is large a third or more are of 16 bytes."""
    rows = ahead(*name.split())
    assert len(rows) >= 8
    for *_, kernel, facts in rows:
        assert facts["stack"] == 0, (kernel, facts)
        assert facts["wide"] * 3 >= facts["loads"] or kernel in NARROW, (kernel, facts)


# ---------------------------------------------------------------------------------------- on a card
ALL_EXPERTS = (4, 2, 64, 4, 4, 64, 301)  # no near-tie may fall either way
SOME_EXPERTS = (4, 2, 64, 8, 2, 64, 301)
ON_CARD = {
    "one row": Case((5, 1, 1, 1), own_blocks=True),
    "padded rows": Case((9, 1, 1, 1), (0, 7, 2), own_blocks=True),
    "nine rows": Case((9, 1, 1, 1), NINE, own_blocks=True),
    "64 rows": Case((9, 1, 1, 1), (0,) * 63 + (4,), own_blocks=True),
    "a prompt in pieces": Case((300, 1, 1), (0, 70), limits={"PIECE": 256}, own_blocks=True),
    "a long prompt": Case((300, 300, 1, 1), limits={"SHORT_PIECE": 64}, own_blocks=True),
}


@on_a_card
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ON_CARD)
def test_cuda_kernels_equal_the_plain_step(name, dtype, monkeypatch):
    """Compiled and captured. In two bytes every expert is chosen; in float32 two of eight."""
    sizes = SOME_EXPERTS if dtype == torch.float32 else ALL_EXPERTS
    found = run(ON_CARD[name]._replace(dtype=dtype, sizes=sizes), monkeypatch, "cuda")
    print(name, dtype, found)
    assert max(found.values()) < 2 * TOLERANCES[dtype], found
