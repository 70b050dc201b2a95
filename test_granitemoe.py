"""Parity of granitemoe.py and generate.py with transformers, both reading the same files from disk.

The random checkpoints have sizes of which no two are equal, scalars of which none is 1, and blocks
as strong as the residual stream. So a transposed matrix, a dropped multiplier or one wrong expert
moves the logits by far more than the tolerance. MUTATIONS breaks the model in such ways and
requires parity to fail. Where it fails, `first_divergence` names the first module that differs.
"""

import argparse
import contextlib
import dataclasses
import doctest
import functools
import itertools
import json
import math
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GraniteMoeForCausalLM as Theirs

import generate
import granitemoe
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # more wait for each other on a busy machine

LOGITS = 3e-6  # the relative L2 error allowed in float32
GRADIENTS = 1e-5  # the same of gradients
B = 5  # rows
T = 11  # tokens in each
LENGTHS = [T, 4, 7, 1, T - 1]  # of the rows, where they are padded
BACKENDS = list(itertools.product(("eager", "sdpa", "flash"), ("loop", "batched")))
CARD = (  # marks: `pytest -m card` runs what needs a card, which is skipped where there is none
    pytest.mark.card,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
)
DEVICES = ("cpu", pytest.param("cuda", marks=CARD))
backends = pytest.mark.parametrize("attention, experts", BACKENDS)
sides = pytest.mark.parametrize("side", (None, "left", "right"))


def cuda(test):
    """A decorator: this test needs a card."""
    for mark in CARD:
        test = mark(test)
    return test


def relative(ours: Tensor, exact: Tensor) -> float:
    """L2 error relative to the size of `exact`; NaN, which no bound admits, if either has one."""
    ours = ours.detach().cpu().double()
    exact = exact.detach().cpu().double()
    return float((ours - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------ random checkpoints


def random_config(seed: int) -> dict:
    """A config.json in which nothing equals anything, of a model that runs in milliseconds."""
    rng = random.Random(seed)
    while True:
        G = rng.choice((2, 3))
        E = rng.choice((7, 9, 10, 13))
        K = rng.choice((2, 3, 4))
        L = rng.choice((2, 3))
        H = G * rng.randint(2, 4)
        C = 2 * rng.randint(3, 8)
        V = rng.randint(90, 130)
        width = 8 * rng.randint(2, 5)  # by eights, like H * C: transformers' experts demand it
        sizes = (B, T, V, H * C, H, G, C, E, K, width, 2 * width, L)
        if len(set(sizes)) == len(sizes) and H * C % 8 == 0:
            break
    return {
        "embedding_multiplier": rng.uniform(3, 9),
        "attention_multiplier": C**-0.5 * rng.choice((0.5, 1.8)) * rng.uniform(0.9, 1.1),
        "residual_multiplier": rng.uniform(0.2, 0.7),
        "logits_scaling": rng.uniform(1.5, 3),
        "rms_norm_eps": rng.uniform(0.02, 0.04),  # large enough to be missed where it is wrong
        "rope_theta": rng.uniform(100, 900),  # so small that 11 positions turn more than one pair
        "router_aux_loss_coef": rng.uniform(0.1, 0.2),
        "output_router_logits": seed % 3 == 0,
        "tie_word_embeddings": seed % 2 == 0,
        "pad_token_id": rng.randint(3, 80),
        "bos_token_id": None,
        "eos_token_id": None,
        "vocab_size": V,
        "hidden_size": H * C,
        "intermediate_size": width,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "num_local_experts": E,
        "num_experts_per_tok": K,
        "max_position_embeddings": 64,
    }


RENAMED = {  # the end of a parameter's name in transformers: in released files
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}


def on_disk(name: str) -> str:
    """The name in released files of a parameter that transformers has renamed in memory."""
    for new, old in RENAMED.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def fill(model: nn.Module, seed: int) -> None:
    """Random weights that give each block's output the size of the residual stream, which is 1.

    Attention scores get a deviation of 1.5 and router logits of 2: neither uniform nor one-hot.
    """
    c = model.config
    C = c.hidden_size // c.num_attention_heads
    sharp = (1.5 / (c.attention_multiplier * C**0.5)) ** 0.5
    strong = 1.8 / c.residual_multiplier
    gains = {
        "q_proj": sharp,
        "k_proj": sharp,
        "v_proj": 1.0,
        "o_proj": strong,
        "router.layer": 2.0,
        "input_linear": 1.4,
        "output_linear": strong,
        "lm_head": c.logits_scaling,
        "embed_tokens": c.hidden_size**0.5 / c.embedding_multiplier,
    }
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=rng)
            continue
        key = next(key for key in gains if key in on_disk(name))
        deviation = gains[key] * parameter.shape[-1] ** -0.5
        parameter.data.normal_(0, deviation, generator=rng)


class Pair(NamedTuple):
    """One checkpoint on disk, opened in float32 by both."""

    folder: Path
    theirs: nn.Module
    ours: GraniteMoeForCausalLM


CHECKPOINTS = {  # seed (even: tied; multiple of 3: gives router logits), save_pretrained's options
    "tied": (2, {}),
    "untied-shards": (3, {"max_shard_size": "30KB"}),
    "tied-shards-renamed": (6, {"max_shard_size": "30KB", "save_original_format": False}),
    "untied-renamed": (5, {"save_original_format": False}),
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    made = {}
    for name, (seed, options) in CHECKPOINTS.items():
        folder = tmp_path_factory.mktemp(name)
        model = Theirs(transformers.GraniteMoeConfig(**random_config(seed)))
        fill(model, seed)
        model.save_pretrained(folder, **options)
        theirs = Theirs.from_pretrained(folder, dtype=torch.float32).eval()
        ours = generate.load_model(folder, dtype="float32")
        made[name] = Pair(folder, theirs, ours)
    return made


@pytest.fixture(params=CHECKPOINTS)
def pair(request, pairs) -> Pair:
    return pairs[request.param]


@pytest.fixture
def one(pairs) -> Pair:
    return pairs["untied-shards"]


def rebuilt(model: GraniteMoeForCausalLM, **changes) -> GraniteMoeForCausalLM:
    """The same float32 weights under a changed config."""
    config = dataclasses.replace(model.config, **changes)
    twin = GraniteMoeForCausalLM(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def with_backends(model, attention: str, experts: str) -> GraniteMoeForCausalLM:
    return rebuilt(model, attention_backend=attention, experts_backend=experts)


# ------------------------------------------------------------------------------------- the inputs


def random_ids(config: GraniteMoeConfig, rows: int = B) -> Tensor:
    """(rows, T), a few of them the padding id, which counts as any other where the mask is 1."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, T), generator=rng)
    ids[0, 3] = config.pad_token_id
    ids[-1, T - 2] = config.pad_token_id
    return ids


def padding(side: str | None) -> dict[str, Tensor]:
    """Forward's mask and positions for rows of LENGTHS, padded on a side."""
    if side is None:
        return {}
    lengths = torch.tensor(LENGTHS)[:, None]
    at = torch.arange(T)
    mask = at < lengths
    if side == "left":
        mask = at >= T - lengths
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask.long(), "position_ids": positions}


def tokens_only(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """x (B, T, ...) or (B*T, ...) at the flattened positions that hold tokens: what padding
    predicts is undefined."""
    x = x.reshape(-1, x.shape[-1])
    if "attention_mask" not in inputs:
        return x
    return x[inputs["attention_mask"].flatten().bool()]


def labelled(ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, and ids as labels: without padding, without the first token of each padded row,
    which no token predicts, and without every fourth, so that a mean over too many shows."""
    labels = ids.clone()
    labels[:, 1::4] = -100
    if inputs:
        labels[inputs["attention_mask"] == 0] = -100
        labels[inputs["position_ids"] == 0] = -100
    return inputs | {"labels": labels}


def gradients(model: nn.Module, ids: Tensor, **inputs) -> dict[str, Tensor]:
    """The loss's gradient for every parameter, by its name on disk."""
    names = [on_disk(name) for name, _ in model.named_parameters()]
    loss = model(ids, **inputs).loss
    found = torch.autograd.grad(loss, [*model.parameters()])
    return dict(zip(names, found, strict=True))


def assert_equal_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = GRADIENTS
) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = relative(gradient, theirs[name])
        assert error <= tolerance, (name, error)


# -------------------------------------------------------------------------------- first divergence

INNER = (
    r"input_layernorm|self_attn|post_attention_layernorm|block_sparse_moe|block_sparse_moe\.router"
)


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor, **inputs: Tensor) -> dict[str, list[Tensor]]:
    """What each module returns, in the order of execution; of a router its logits and its weights.

    Starts with "embedding", the multiplied embeddings that enter the layers; ends with "logits".
    """
    seen: dict[str, list[Tensor]] = {}

    def after(name: str, module: nn.Module, args: tuple, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        tensors = [x for x in tensors if torch.is_tensor(x) and x.dim() > 1]
        floats = [x for x in tensors if x.is_floating_point()]
        if name.endswith("router"):  # E logits, K weights: releases return them in either order
            seen[name] = sorted(floats, key=lambda x: x.shape[-1], reverse=True)
        else:
            seen[name] = floats[:1]

    def before_layers(module: nn.Module, args: tuple) -> None:
        seen["embedding"] = [args[0]]

    handles = [model.model.layers[0].register_forward_pre_hook(before_layers)]
    for name, module in model.model.named_modules():
        if re.fullmatch(rf"norm|layers\.\d+(\.({INNER}))?", name):
            hook = functools.partial(after, name)
            handles.append(module.register_forward_hook(hook))
    try:
        seen["logits"] = [model(ids, **inputs).logits]
    finally:
        for handle in handles:
            handle.remove()
    return seen


def router_logits(seen: dict[str, list[Tensor]]) -> list[Tensor]:
    """Each layer's, out of what trace saw: transformers 5.17 does not return them."""
    return [tensors[0] for name, tensors in seen.items() if name.endswith("router")]


def first_divergence(
    ours: nn.Module, theirs: nn.Module, ids: Tensor, tolerance: float = LOGITS, **inputs: Tensor
) -> tuple[str, float] | None:
    """The first module in the order of execution whose result differs, and its relative error."""
    exact = trace(theirs, ids, **inputs)
    for name, tensors in trace(ours, ids, **inputs).items():
        for a, b in zip(tensors, exact[name], strict=False):  # older routers return no weights
            error = relative(tokens_only(a, inputs), tokens_only(b, inputs))
            if not error <= tolerance:
                return name, error
    return None


def assert_parity(ours: nn.Module, theirs: nn.Module, ids: Tensor, **inputs: Tensor) -> None:
    with torch.no_grad():
        a = ours(ids, **inputs).logits
        b = theirs(ids, **inputs).logits
    error = relative(tokens_only(a, inputs), tokens_only(b, inputs))
    if not error <= LOGITS:
        where = first_divergence(ours, theirs, ids, **inputs)
        pytest.fail(f"logits differ by {error:.1e}; the first module to differ: {where}")


def need_router_logits(theirs: nn.Module, ids: Tensor) -> None:
    """Skips the test where transformers (5.17 is one) returns none: it has no auxiliary loss."""
    with torch.no_grad():
        out = theirs(ids, output_router_logits=True)
    if out.router_logits is None:
        pytest.skip(f"transformers {transformers.__version__} returns no router logits")


# --------------------------------------------------------------- against transformers, in float32


def test_checkpoints_are_stored_as_they_say(pair):
    """Should save_pretrained stop doing as told, a spelling or the shards would go untested."""
    kind = pair.folder.name
    stored = []
    for file in pair.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored.extend(tensors.keys())
    expected = [name for name, _ in pair.theirs.named_parameters()]
    if "renamed" not in kind:
        expected = [on_disk(name) for name in expected]
    assert sorted(stored) == sorted(expected)
    assert (pair.folder / "model.safetensors.index.json").exists() == ("shards" in kind)


def test_checkpoints_can_show_a_fault(pair):
    """Guards the guards: no block is too weak to matter, and no choice of experts is so close that
    rounding decides it.

    Below 0.3 of the stream a block that is wrong by a hundredth moves the logits by little more
    than rounding in bfloat16 does; above 3 it drowns what the blocks before it did.
    """
    c = pair.ours.config
    states = trace(pair.theirs, random_ids(c))
    (x,) = states["embedding"]
    for layer in range(c.num_hidden_layers):
        for block in ("self_attn", "block_sparse_moe"):
            step = states[f"layers.{layer}.{block}"][0] * c.residual_multiplier
            assert 0.3 <= step.norm() / x.norm() <= 3, (layer, block)
            x = x + step
    logits = torch.cat(router_logits(states))
    descending = logits.sort(descending=True).values
    K = c.num_experts_per_tok
    margin = descending[:, K - 1] - descending[:, K]  # of the last chosen over the next
    assert margin.min() > 10 * LOGITS * logits.abs().max(), "choose another seed"


@sides
def test_forward(pair, side):
    """Logits, router logits, auxiliary loss and loss, with padding on either side."""
    ids = random_ids(pair.ours.config)
    inputs = padding(side)
    assert_parity(pair.ours, pair.theirs, ids, **inputs)
    need_router_logits(pair.theirs, ids)
    inputs = labelled(ids, inputs)
    ours = pair.ours(ids, output_router_logits=True, **inputs)
    theirs = pair.theirs(ids, output_router_logits=True, **inputs)
    for a, b in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert a.dtype == torch.float32
        assert relative(tokens_only(a, inputs), tokens_only(b, inputs)) <= LOGITS
    assert relative(ours.aux_loss, theirs.aux_loss) <= LOGITS
    assert relative(ours.loss, theirs.loss) <= LOGITS


@sides
def test_gradients(pair, side):
    """Of every parameter, auxiliary loss included: a detached router or a lost expert shows."""
    ids = random_ids(pair.ours.config)
    need_router_logits(pair.theirs, ids)
    inputs = labelled(ids, padding(side))
    ours = gradients(pair.ours, ids, output_router_logits=True, **inputs)
    theirs = gradients(pair.theirs, ids, output_router_logits=True, **inputs)
    assert ours.keys() == pair.ours.state_dict().keys()
    assert_equal_gradients(ours, theirs)


def test_position_ids(one):
    """Uneven ones. The mask of ones keeps transformers from taking gaps for packed sequences."""
    rng = torch.Generator().manual_seed(1)
    steps = torch.randint(1, 5, (B, T), generator=rng)
    inputs = {"position_ids": steps.cumsum(1), "attention_mask": torch.ones_like(steps)}
    assert_parity(one.ours, one.theirs, random_ids(one.ours.config), **inputs)


PACKED = [  # the lengths of the documents in each row
    [3, T - 3],
    [1, 4, T - 5],
    [T],
    [T - 1, 1],
    [2, 2, 2, 2, T - 8],
]


def packed(rows: list[list[int]]) -> Tensor:
    """Positions that start anew with each document."""
    positions = []
    for lengths in rows:
        documents = [torch.arange(n) for n in lengths]
        positions.append(torch.cat(documents))
    return torch.stack(positions)


WHERE = {  # documents begin
    "at 0": packed(PACKED),
    "later": packed(PACKED) + 5,
    "in all rows alike": packed(PACKED[1:2]),
    "where positions jump ahead": 3 * packed(PACKED),
}


@pytest.mark.parametrize("where", WHERE)
def test_packed_rows(pair, where, monkeypatch):
    """Logits and gradients as in transformers, which separates documents where it has no cache."""
    ids = random_ids(pair.ours.config)
    monkeypatch.setattr(pair.theirs.config, "use_cache", False)
    assert_parity(pair.ours, pair.theirs, ids, position_ids=WHERE[where])
    if pair.theirs.config.output_router_logits:
        need_router_logits(pair.theirs, ids)
    ours = gradients(pair.ours, ids, labels=ids, position_ids=WHERE[where])
    theirs = gradients(pair.theirs, ids, labels=ids, position_ids=WHERE[where])
    name = "model.embed_tokens.weight"  # others are 0 where each document is a single token
    assert relative(ours[name], theirs[name]) <= GRADIENTS


@pytest.mark.parametrize("attention", granitemoe.ATTENTION)
def test_each_document_is_as_if_alone(one, attention):
    """In every form of the attention; and its gradients do not reach another document."""
    model = with_backends(one.ours, attention, "loop")
    ids = random_ids(one.ours.config)
    logits = model(ids, position_ids=packed(PACKED)).logits
    for row, lengths in enumerate(PACKED):
        documents = ids[row].split(lengths)
        for document, together in zip(documents, logits[row].split(lengths), strict=True):
            alone = model(document[None]).logits[0]
            assert relative(together, alone) <= LOGITS
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    model.model.embed_tokens.register_forward_hook(lambda *_: x)
    logits = model(ids, position_ids=packed(PACKED)).logits
    logits[0, 3:].sum().backward()  # of the second document in the first row
    assert (x.grad[0, :3] == 0).all()
    assert (x.grad[0, 3:] != 0).all()


@pytest.mark.parametrize("keep", (0, 1, 4))
def test_logits_to_keep(one, keep):
    ids = random_ids(one.ours.config)
    ours = one.ours(ids, logits_to_keep=keep).logits
    theirs = one.theirs(ids, logits_to_keep=keep).logits
    assert ours.shape == theirs.shape
    assert relative(ours, theirs) <= LOGITS


@pytest.mark.parametrize("asked", (None, True, False))
def test_what_is_returned(pair, asked):
    """Router logits by argument, else by the config; losses only with labels."""
    ids = random_ids(pair.ours.config)
    if asked or (asked is None and pair.theirs.config.output_router_logits):
        need_router_logits(pair.theirs, ids)
    for labels in (None, ids):
        ours = pair.ours(ids, labels=labels, output_router_logits=asked)
        theirs = pair.theirs(ids, labels=labels, output_router_logits=asked)
        for field in ("loss", "aux_loss", "router_logits"):
            missing = getattr(ours, field) is None
            assert missing == (getattr(theirs, field) is None), field
        if labels is not None:
            assert relative(ours.loss, theirs.loss) <= LOGITS


# ------------------------------------------------------ our backends against "eager" and "loop"


@sides
@backends
def test_backends(one, attention, experts, side):
    """Forward and every gradient; flash, which takes no mask, says so and does not fall back."""
    plain = with_backends(one.ours, "eager", "loop")
    model = with_backends(one.ours, attention, experts)
    ids = random_ids(model.config)
    inputs = padding(side)
    if attention == "flash" and side:
        with pytest.raises(ValueError, match="padding mask.*'sdpa'"):
            model(ids, **inputs)
        return
    assert_parity(model, plain, ids, **inputs)
    inputs = labelled(ids, inputs)
    assert_equal_gradients(gradients(model, ids, **inputs), gradients(plain, ids, **inputs))


@pytest.mark.parametrize("side", (None, "left"))
@backends
@pytest.mark.parametrize("chunks", ([7], [1] * 7, [3, 1, 3]), ids=str)
@torch.no_grad()
def test_chunks_through_the_cache(one, chunks, attention, experts, side):
    """Guards against a causal triangle aligned to the first key, against positions that restart,
    and against a first chunk that is all padding in some rows."""
    if attention == "flash" and side:
        pytest.skip("flash takes no padding mask")
    model = with_backends(one.ours, attention, experts)
    ids = random_ids(model.config)[:, -7:]
    inputs = {name: x[:, -7:] for name, x in padding(side).items()}
    whole = model(ids, **inputs).logits
    cache = KVCache(model.config, B, 9)
    parts = []
    done = 0
    for size in chunks:
        end = done + size
        new = {}
        if inputs:
            new["attention_mask"] = inputs["attention_mask"][:, :end]  # covers cached tokens too
            new["position_ids"] = inputs["position_ids"][:, done:end]
        parts.append(model(ids[:, done:end], cache=cache, **new).logits)
        done = end
    chunked = torch.cat(parts, 1)
    assert cache.length == 7
    assert relative(tokens_only(chunked, inputs), tokens_only(whole, inputs)) <= LOGITS


@torch.no_grad()
def test_full_cache_refuses_and_keeps_what_it_holds(one):
    ids = random_ids(one.ours.config)
    cache = KVCache(one.ours.config, B, 8)
    one.ours(ids[:, :6], cache=cache)
    keys = cache.keys[:, :, :, :6]  # the rest is no number yet
    values = cache.values[:, :, :, :6]
    keys_before = keys.clone()
    values_before = values.clone()
    with pytest.raises(ValueError, match="8"):
        one.ours(ids[:, 6:9], cache=cache)
    assert cache.length == 6
    assert torch.equal(keys, keys_before)
    assert torch.equal(values, values_before)
    last = one.ours(ids[:, 6:8], cache=cache).logits
    whole = one.ours(ids[:, :8]).logits
    assert relative(last, whole[:, 6:]) <= LOGITS


@backends
def test_causality(one, attention, experts):
    """The logits at t depend on the embedding of every position up to t, and of none after."""
    model = with_backends(one.ours, attention, experts)
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, output: embedded.append(output))
    logits = model(random_ids(model.config)).logits
    for t in (0, 4, T - 1):
        size = logits[:, t].square().sum()
        (gradient,) = torch.autograd.grad(size, embedded, retain_graph=True)
        reached = gradient.norm(dim=-1)  # (B, T)
        assert (reached[:, : t + 1] > 1e-6).all()
        assert (reached[:, t + 1 :] == 0).all()


# ------------------------------------------------------------- bfloat16, judged by an oracle
# GraniteMoe from its equations in float64. In form it differs from the model where it can:
# rotations are complex numbers, the softmax over all experts comes before the choice, and every
# expert sees every token.


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def within(weights: dict, prefix: str) -> dict:
    """The weights of one module, by their names within it."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def exact_norm(c: GraniteMoeConfig, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    mean_square = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + c.rms_norm_eps) * weight


def exact_rotation(c: GraniteMoeConfig, x: np.ndarray) -> np.ndarray:
    """x (heads, T, C): a pair of numbers is a complex one, which its position's angle turns."""
    _, T, C = x.shape
    frequencies = c.rope_theta ** (-np.arange(0, C, 2) / C)
    angles = np.arange(T)[:, None] * frequencies
    real, imaginary = np.split(x, 2, -1)
    z = (real + 1j * imaginary) * np.exp(1j * angles)
    return np.concatenate((z.real, z.imag), -1)


def exact_attention(c: GraniteMoeConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """x (T, D) to (T, D) by the weights w of self_attn."""
    T, D = x.shape

    def heads(name: str) -> np.ndarray:  # (H or G, T, C)
        y = x @ w[name + ".weight"].T
        return y.reshape(T, -1, D // c.num_attention_heads).swapaxes(0, 1)

    queries_a_key = c.num_attention_heads // c.num_key_value_heads
    q = exact_rotation(c, heads("q_proj"))
    k = exact_rotation(c, heads("k_proj")).repeat(queries_a_key, 0)
    v = heads("v_proj").repeat(queries_a_key, 0)
    scores = q @ k.swapaxes(1, 2) * c.attention_multiplier
    ahead = np.triu(np.ones((T, T), bool), 1)
    scores[:, ahead] = -np.inf
    y = softmax(scores) @ v
    return y.swapaxes(0, 1).reshape(T, D) @ w["o_proj.weight"].T


def exact_experts(c: GraniteMoeConfig, w: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (T, D) to (T, D) and router logits (T, E) by the weights w of block_sparse_moe."""
    logits = x @ w["router.layer.weight"].T
    p = softmax(logits)
    kth = np.sort(p)[:, -c.num_experts_per_tok, None]
    p[p < kth] = 0
    p = p / p.sum(-1, keepdims=True)
    packed = np.einsum("td,epd->tep", x, w["input_linear.weight"])
    gate, up = np.split(packed, 2, -1)
    hidden = gate / (1 + np.exp(-gate)) * up * p[..., None]
    return np.einsum("tef,edf->td", hidden, w["output_linear.weight"]), logits


def oracle(c: GraniteMoeConfig, w: dict, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids (T,) to logits (T, V) and router logits (layers, T, E); w: all weights, float64, by their
    names on disk."""
    embedding = w["model.embed_tokens.weight"]
    x = embedding[ids] * c.embedding_multiplier
    router = []
    for i in range(c.num_hidden_layers):
        layer = within(w, f"model.layers.{i}.")
        h = exact_norm(c, x, layer["input_layernorm.weight"])
        x = x + exact_attention(c, within(layer, "self_attn."), h) * c.residual_multiplier
        h = exact_norm(c, x, layer["post_attention_layernorm.weight"])
        y, logits = exact_experts(c, within(layer, "block_sparse_moe."), h)
        x = x + y * c.residual_multiplier
        router.append(logits)
    head = w.get("lm_head.weight", embedding)
    logits = exact_norm(c, x, w["model.norm.weight"]) @ head.T / c.logits_scaling
    return logits, np.stack(router)


class Answer(NamedTuple):
    """What a model or the oracle says to ids (B, T), on the CPU."""

    logits: Tensor  # (B, T, V)
    router: Tensor  # router logits (layers, B*T, E)


def consult(model: GraniteMoeForCausalLM, ids: Tensor) -> Answer:
    """The oracle's answer for the model's weights."""
    weights = {name: x.double().numpy() for name, x in model.state_dict().items()}
    logits = []
    router = []
    for row in ids:
        row_logits, row_router = oracle(model.config, weights, row.numpy())
        logits.append(torch.tensor(row_logits))
        router.append(torch.tensor(row_router))
    return Answer(torch.stack(logits), torch.cat(router, 1))


def answer(model: nn.Module, ids: Tensor) -> Answer:
    """The same of a model, in its dtype and on its device."""
    seen = trace(model, ids.to(model.model.norm.weight.device))
    (logits,) = seen["logits"]
    return Answer(logits.cpu(), torch.stack(router_logits(seen)).cpu())


def test_oracle_agrees_with_transformers(pair):
    ids = random_ids(pair.ours.config)
    exact = consult(pair.ours, ids)
    theirs = answer(pair.theirs, ids)
    assert relative(theirs.logits, exact.logits) <= LOGITS
    assert relative(theirs.router, exact.router) <= LOGITS


class Case(NamedTuple):
    """A checkpoint, and the answers for it."""

    folder: Path
    ids: Tensor
    exact: Answer  # the oracle's
    theirs: Answer  # transformers', in bfloat16


@pytest.fixture(scope="session")
def judged(pairs) -> list[Case]:
    """Each checkpoint in bfloat16."""
    cases = []
    for folder, _, ours in pairs.values():
        ids = random_ids(ours.config, rows=96)
        model = generate.load_model(folder, dtype="bfloat16")
        theirs = Theirs.from_pretrained(folder, dtype=torch.bfloat16).eval()
        cases.append(Case(folder, ids, consult(model, ids), answer(theirs, ids)))
    return cases


def flipped(found: Answer, exact: Answer, K: int) -> Tensor:
    """(B, T), True for tokens that went to other experts than the oracle's in some layer."""
    chosen = found.router.topk(K).indices.sort().values  # (layers, B*T, K)
    right = exact.router.topk(K).indices.sort().values
    wrong = (chosen != right).any(-1).any(0)
    return wrong.view(exact.logits.shape[:2])


@pytest.mark.parametrize("device", DEVICES)
@backends
def test_bfloat16_error(judged, attention, experts, device):
    """Against the float64 oracle ours is at most 1.1 x that of transformers with its own default
    experts.

    Rounding may flip a near-tie in a router. Then the token's error is luck, and hides what is
    measured. So a token counts only if all three chose the same experts for it in every layer, and
    for the tokens before it. And our flips may exceed transformers' by no more than chance: three
    standard deviations of the difference of two counts.
    """
    kept = 0
    our_flips = 0
    their_flips = 0
    our_squares = 0.0
    their_squares = 0.0
    kinds = {"attention_backend": attention, "experts_backend": experts, "device": device}
    for folder, ids, exact, theirs in judged:
        model = generate.load_model(folder, dtype="bfloat16", **kinds)
        ours = answer(model, ids)
        our_wrong = flipped(ours, exact, model.config.num_experts_per_tok)
        their_wrong = flipped(theirs, exact, model.config.num_experts_per_tok)
        our_flips += int(our_wrong.sum())
        their_flips += int(their_wrong.sum())
        same = ~(our_wrong | their_wrong).cummax(1).values
        kept += int(same.sum())
        our_squares += relative(ours.logits[same], exact.logits[same]) ** 2
        their_squares += relative(theirs.logits[same], exact.logits[same]) ** 2
    assert kept >= 1000
    assert our_squares <= 1.1**2 * their_squares
    chance = (our_flips + their_flips) ** 0.5
    assert our_flips - their_flips <= 3 * chance


def test_dtypes_change_where_theirs_do(one):
    """The table of numerics: in bfloat16 the router's logits are float32, and all else is not."""
    theirs = Theirs.from_pretrained(one.folder, dtype=torch.bfloat16)
    ours = generate.load_model(one.folder, dtype="bfloat16")
    ids = random_ids(ours.config)
    our_states = trace(ours, ids)
    their_states = trace(theirs, ids)
    assert list(our_states) == list(their_states)
    for name in our_states:
        types = [torch.bfloat16]
        if name.endswith("router"):
            types = [torch.float32, torch.bfloat16]
        our_types = [x.dtype for x in our_states[name]]
        their_types = [x.dtype for x in their_states[name]]
        assert our_types == types, name
        assert their_types == types[: len(their_types)], name


@pytest.mark.parametrize("late_cast", (False, True), ids=("as it is", "mutated"))
def test_bfloat16_casts_where_theirs_does(one, monkeypatch, late_cast):
    """In bfloat16 all that comes before the first experts is equal bit for bit. (Their sum has
    another order.) With a norm that multiplies by its weight before the cast, it is not."""

    def late(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight.float() * y).to(x.dtype)

    expected = "layers.0.block_sparse_moe"
    if late_cast:
        expected = "layers.0.input_layernorm"
        monkeypatch.setattr(granitemoe.RMSNorm, "forward", late)
    kinds = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    theirs = Theirs.from_pretrained(one.folder, **kinds).eval()
    ours = generate.load_model(one.folder, dtype="bfloat16", attention_backend="eager")
    positions = 91 * torch.arange(T).expand(B, T)  # bfloat16 itself could not count so far
    inputs = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
    where = first_divergence(ours, theirs, random_ids(ours.config), tolerance=0.0, **inputs)
    assert where[0] == expected


# ----------------------------------------------------------------- the three forms of the experts

NAMES = ("loop", "grouped", "gathered")
forms = pytest.mark.parametrize("form", [granitemoe.EXPERTS[name] for name in NAMES], ids=NAMES)
ROUTINGS = {  # the chosen of 5 experts, a row for each token
    "every expert": [[0, 1], [2, 3], [4, 0], [3, 1], [1, 4], [2, 0], [4, 3]],
    "first, middle and last empty": [[1, 3], [3, 1], [1, 3]],
    "all on one": [[3]] * 7,
    "one token": [[4, 1]],
    "all chosen": [[2, 0, 1, 4, 3], [0, 1, 2, 3, 4]],
}
SIZES = ((16, 24), (10, 7))  # D and the width: the grouped kernel takes the first ones only
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def experts_dense(x, gate_up, down, weights, ids):
    """Every expert on every token; those not chosen weigh nothing."""
    weights_NE = weights.new_zeros(len(x), len(down)).scatter(1, ids, weights)
    gate, up = torch.einsum("nd,epd->nep", x, gate_up).chunk(2, -1)
    hidden = F.silu(gate) * up
    return torch.einsum("ne,nef,edf->nd", weights_NE, hidden, down)


def assert_equals_dense(form, routing: str, D: int, width: int, dtype, device: str) -> None:
    """A form of the experts equals the dense sum, and so do its gradients."""
    ids = torch.tensor(ROUTINGS[routing])
    N = len(ids)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=rng)
    gate_up = torch.randn(5, 2 * width, D, generator=rng)
    down = torch.randn(5, D, width, generator=rng)
    weights = torch.randn(ids.shape, generator=rng)
    upstream = torch.randn(N, D, generator=rng).to(dtype)
    inputs = [tensor.to(dtype) for tensor in (x, gate_up, down, weights)]

    def run(experts, device, dtype) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        y = experts(*leaves, ids.to(device))
        return [y, *torch.autograd.grad(y, leaves, upstream.to(device, dtype))]

    exact = run(experts_dense, "cpu", torch.float64)
    for ours, theirs in zip(run(form, device, dtype), exact, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, theirs) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("D, width", SIZES)
@pytest.mark.parametrize("routing", ROUTINGS)
@forms
def test_expert_forms(form, routing, D, width, dtype):
    """Each equals the dense sum, with the gradients of tokens, both weights and routing weights, in
    sizes that the grouped kernel takes and in others, for which there is a loop over runs."""
    assert_equals_dense(form, routing, D, width, dtype, "cpu")


@forms
def test_experts_by_hand(form):
    """Expert e: gate 1, up -(e + 1), down 2, all times the identity. From x = 100 on silu(x) is x,
    so y = -2 x^2 sum_k w_k (e_k + 1). silu of the negative "up" would be 0, so that a swap of gate
    and up shows."""
    x = torch.tensor([[100.0, 200.0, 300.0, 100.0], [400.0, 100.0, 200.0, 300.0]])
    one = torch.eye(4)
    gate_up = torch.stack([torch.cat((one, -(e + 1) * one)) for e in range(5)])
    down = torch.stack([2 * one] * 5)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    ids = torch.tensor([[2, 0], [3, 1]])
    # sum_k w_k (e_k + 1) is 0.75 * 3 + 0.25 * 1 = 2.5 for the first token, 0.5 * 4 + 0.5 * 2 = 3
    expected = [[-5e4, -2e5, -4.5e5, -5e4], [-9.6e5, -6e4, -2.4e5, -5.4e5]]
    got = form(x, gate_up, down, weights, ids).tolist()
    assert got == expected, (got, expected)


def test_the_loop_sums_in_float32():
    """Three equal experts that weigh 256, 1 and -256 are one that weighs 1. A sum in bfloat16 would
    round 257 to 256, and lose it."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(T, 16, generator=rng).bfloat16()
    gate_up = torch.randn(1, 20, 16, generator=rng).bfloat16().expand(3, 20, 16)
    down = torch.randn(1, 16, 10, generator=rng).bfloat16().expand(3, 16, 10)
    ids = torch.arange(3).expand(T, 3)
    weights = torch.tensor([256.0, 1.0, -256.0]).bfloat16().expand(T, 3)
    three = granitemoe.experts_loop(x, gate_up, down, weights, ids)
    single = granitemoe.experts_loop(x, gate_up, down, weights[:, 1:2], ids[:, 1:2])
    assert torch.equal(three, single)


def test_ties_in_the_router(one):
    """Equal logits: any K distinct experts may be chosen, and each weighs 1 / K."""
    config = one.ours.config
    K = config.num_experts_per_tok
    router = granitemoe.Router(config)
    nn.init.zeros_(router.layer.weight)
    _, weights, ids = router(torch.randn(T, config.hidden_size))
    assert torch.allclose(weights, torch.full((T, K), 1 / K))
    for row in ids.tolist():
        assert len(set(row)) == K


def test_the_pencil_example():
    failures, tried = doctest.testmod(granitemoe)
    assert failures == 0
    assert tried >= 5


# --------------------------------------------------------------------------- released configs


class Released(NamedTuple):
    """What released config.json files differ in."""

    size: str  # in SHAPES
    vocab_size: int
    positions: int
    theta: float
    coefficient: float  # of the auxiliary loss
    dtype: str | None


SHAPES = {
    "1b": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_local_experts": 32,
    },
    "3b": {
        "hidden_size": 1536,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_local_experts": 40,
    },
}
RELEASED = {
    "granite-3.0-1b-a400m-base": Released("1b", 49152, 4096, 10000, 0.001, None),
    "granite-3.0-1b-a400m-instruct": Released("1b", 49155, 4096, 10000, 0.0, "bfloat16"),
    "granite-3.0-3b-a800m-base": Released("3b", 49152, 4096, 10000, 0.001, None),
    "granite-3.0-3b-a800m-instruct": Released("3b", 49155, 4096, 10000, 0.001, "bfloat16"),
    "granite-3.1-1b-a400m-base": Released("1b", 49152, 131072, 1500000.0, 0.001, "bfloat16"),
    "granite-3.1-1b-a400m-instruct": Released("1b", 49155, 131072, 1500000.0, 0.0, "bfloat16"),
    "granite-3.1-3b-a800m-base": Released("3b", 49152, 131072, 10000000.0, 0.001, "bfloat16"),
    "granite-3.1-3b-a800m-instruct": Released("3b", 49155, 131072, 10000000.0, 0.0, "bfloat16"),
    "PowerMoE-3b": Released("3b", 49152, 4096, 10000, 0.001, "float32"),
}
PARAMETERS = {  # hidden size, vocabulary: total, and active for a token
    (1024, 49152): (1_334_625_280, 0.429e9),
    (1024, 49155): (1_334_628_352, 0.429e9),
    (1536, 49152): (3_298_788_864, 0.883e9),
    (1536, 49155): (3_298_793_472, 0.883e9),
}


def released_config(name: str) -> dict:
    """A released config.json as transformers 4 wrote it."""
    released = RELEASED[name]
    config = {
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
        "intermediate_size": 512,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 8,
        "vocab_size": released.vocab_size,
        "max_position_embeddings": released.positions,
        "rope_theta": released.theta,
        "rope_scaling": None,
        "router_aux_loss_coef": released.coefficient,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.02,
    }
    config |= SHAPES[released.size]
    if released.dtype is not None:
        config["torch_dtype"] = released.dtype
    if "3.1" in name and "base" in name:
        config["attention_dropout"] = 0.1
    if name == "PowerMoE-3b":
        config["activation_function"] = "silu"
        config["router_jitter_noise"] = 0.0
    else:
        config["hidden_act"] = "silu"
    return config


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name, tmp_path):
    """Each as transformers 4 wrote it and as transformers 5 rewrites it, and the model's size."""
    old = released_config(name)
    (tmp_path / "config.json").write_text(json.dumps(old))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    new = json.loads(theirs.to_json_string(use_diff=False))
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    assert "torch_dtype" not in new
    config = generate.checkpoint.read_config(tmp_path)
    assert config == GraniteMoeConfig.from_dict(old)
    assert config == GraniteMoeConfig.from_dict(new)
    fields = dataclasses.asdict(config)
    for field in fields.keys() & old.keys():
        assert fields[field] == old[field], field
    assert config.head_dim == 64
    assert config.hidden_act == "silu"
    assert config.dtype == old.get("torch_dtype")
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(config)
    total, active = PARAMETERS[config.hidden_size, config.vocab_size]
    assert model.num_parameters() == total
    assert model.num_parameters(active=True) == pytest.approx(active, abs=0.0005e9)
    assert len(model.state_dict()) == 9 * config.num_hidden_layers + 2


# ---------------------------------------------------------------------------------- mutations


def no_renormalisation(self, x):
    logits = self.layer(x).float()
    weights, ids = logits.softmax(-1).topk(self.top_k, -1)
    return logits, weights, ids


def one_expert_short(self, x):
    logits = self.layer(x).float()
    top, ids = logits.topk(self.top_k, -1)
    top[:, -1] = -math.inf
    return logits, top.softmax(-1), ids


def limited_capacity(x, gate_up, down, weights, ids):
    """An expert takes its fair share of the tokens, rounded up; what comes later is dropped."""
    choices = ids.flatten()
    share = math.ceil(len(choices) / len(down))
    places = F.one_hot(choices, len(down)).cumsum(0)  # (N*K, E), from 1 on
    place = places.gather(1, choices[:, None]).view_as(ids)
    return granitemoe.experts_loop(x, gate_up, down, weights * (place <= share), ids)


def interleaved(x, cos, sin):
    first_half = cos.chunk(2, -1)[0]
    cos = first_half.repeat_interleave(2, -1)
    first_half = sin.chunk(2, -1)[0]
    sin = first_half.repeat_interleave(2, -1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def tiled_heads(q, k, v, *rest):
    times = q.shape[1] // k.shape[1]
    k = k.repeat(1, times, 1, 1)
    v = v.repeat(1, times, 1, 1)
    return granitemoe.attend_eager(q, k, v, *rest)


def both_ways(q, k, v, mask, *rest):
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return granitemoe.attend_eager(q, k, v, everything, *rest)


def swapped(packed):
    up, gate = packed.chunk(2, -1)
    return F.silu(gate) * up


NORM = "layers.0.input_layernorm"
ATTEND = "layers.0.self_attn"
AFTER = "layers.0.post_attention_layernorm"
MOE = "layers.0.block_sparse_moe"
MUTATIONS = {  # what is wrong: a config field or a function, its wrong value, the module to name
    "embedding_multiplier 1": ("embedding_multiplier", 1.0, "embedding"),
    "attention_multiplier 1": ("attention_multiplier", 1.0, ATTEND),
    "attention 1/sqrt(C)": ("attention_multiplier", None, ATTEND),
    "residual_multiplier 1": ("residual_multiplier", 1.0, AFTER),
    "logits_scaling 1": ("logits_scaling", 1.0, "logits"),
    "rms_norm_eps 1e-6": ("rms_norm_eps", 1e-6, NORM),
    "rope_theta 10000": ("rope_theta", 1e4, ATTEND),
    "rope interleaved": ("granitemoe.rotate", interleaved, ATTEND),
    "key heads tiled": ("granitemoe.ATTENTION", {"sdpa": tiled_heads}, ATTEND),
    "no causal mask": ("granitemoe.ATTENTION", {"sdpa": both_ways}, ATTEND),
    "no renormalisation": ("granitemoe.Router.forward", no_renormalisation, MOE),
    "K - 1 experts": ("granitemoe.Router.forward", one_expert_short, MOE),
    "gate and up swapped": ("granitemoe.swiglu", swapped, MOE),
    "limited capacity": ("granitemoe.EXPERTS", {"loop": limited_capacity}, MOE),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_fail_parity_and_are_named(pair, monkeypatch, name):
    where, wrong, module = MUTATIONS[name]
    model = with_backends(pair.ours, "sdpa", "loop")
    if where.startswith("granitemoe."):
        monkeypatch.setattr(where, wrong)
    else:
        if name == "attention 1/sqrt(C)":
            wrong = model.config.head_dim**-0.5
        model = rebuilt(model, **{where: wrong})
    ids = random_ids(model.config)
    with torch.no_grad():
        assert relative(model(ids).logits, pair.theirs(ids).logits) > 1e-3
    with pytest.raises(pytest.fail.Exception, match=f"the first module to differ: .'{module}"):
        assert_parity(model, pair.theirs, ids)


@pytest.mark.parametrize(
    "name, module",
    (
        ("self_attn.k_proj", "self_attn"),
        ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
        ("block_sparse_moe.output_linear", "block_sparse_moe"),
    ),
)
def test_first_divergence_names_the_layer(one, name, module):
    """A single row of a single matrix, a hundredth off, in the second layer."""
    model = rebuilt(one.ours)
    ids = random_ids(model.config)
    assert first_divergence(model, one.theirs, ids) is None
    weight = model.get_parameter(f"model.layers.1.{name}.weight")
    weight.data[3].mul_(1.01)
    found, error = first_divergence(model, one.theirs, ids)
    assert found == f"layers.1.{module}"
    assert error > LOGITS


# --------------------------------------------------------------------------------- generation

PROMPTS = [[5, 17, 3, 41, 8], [60], [7, 7, 2, 33, 50, 12, 9, 28, 1, 64, 11], [24, 90, 13]]
SAMPLING = {
    "temperature": 1.3,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
}


def collect(model, prompts: list[list[int]], n: int, **options) -> list[list[int]]:
    """generate's ids, a list for each row."""
    steps = list(generate.generate(model, prompts, n, **options))
    rows = zip(*steps, strict=True)
    return [[i for i in row if i is not None] for row in rows]


def their_ids(theirs, prompts: list[list[int]], n: int, eos: int | None = None, **options):
    """The same from transformers' generate; prompts are padded on the left, an ended row is cut."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
    options |= {"pad_token_id": 0, "do_sample": False, "max_new_tokens": n}
    # its auxiliary loss cannot take the longer mask of a cached step
    options["output_router_logits"] = False
    if eos is not None:
        options["eos_token_id"] = eos
    out = theirs.generate(ids, attention_mask=mask, **options)
    return [cut(row, eos) for row in out[:, width:].tolist()]


def cut(row: list[int], eos: int | None) -> list[int]:
    """A row up to its first end token."""
    if eos not in row:
        return row
    return row[: row.index(eos) + 1]


@pytest.mark.parametrize("penalty", (1.0, 1.7))
def test_greedy_generation(pair, penalty):
    """A batch of mixed lengths equals theirs, row by row and end by end, and each prompt alone."""
    run = functools.partial(collect, pair.ours, n=12, repetition_penalty=penalty)
    rows = run(prompts=PROMPTS)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert [row] == run(prompts=[prompt])
        assert [row] == their_ids(pair.theirs, [prompt], 12, repetition_penalty=penalty)
    eos = rows[1][4]
    ended = run(prompts=PROMPTS, eos_token_ids=[eos])
    assert ended != rows
    assert ended == [cut(row, eos) for row in rows]
    if penalty == 1:  # older transformers penalise the padding too
        assert ended == their_ids(pair.theirs, PROMPTS, 12, eos)


@backends
def test_greedy_generation_with_each_backend(one, attention, experts, monkeypatch):
    """Flash alone takes rows of one length only; a long prompt is read in several pieces."""
    model = with_backends(one.ours, attention, experts)
    prompts = PROMPTS
    if attention == "flash":
        prompts = [[i, 3, 9, 4] for i in range(4)]
    expected = their_ids(one.theirs, prompts, 12)
    assert collect(model, prompts, 12) == expected
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 8)  # two columns of four rows at a time
    assert collect(model, prompts, 12) == expected


def test_generation_stops_where_the_context_ends(one):
    limit = one.ours.config.max_position_embeddings
    rows = collect(one.ours, [[1] * (limit - 3), [2] * (limit - 6)], 10)
    assert [len(row) for row in rows] == [3, 6]


def random_state() -> list:
    """Of all three global generators of random numbers."""
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def test_sampling_is_reproducible(one):
    """The same seed gives the same ids, whatever the neighbours, and nobody else's state moves."""
    before = random_state()
    run = functools.partial(collect, one.ours, n=12, **SAMPLING)
    rows = run(prompts=PROMPTS, seed=7)
    assert rows == run(prompts=PROMPTS, seed=7)
    assert rows != run(prompts=PROMPTS, seed=8)
    for i, prompt in enumerate(PROMPTS):
        assert run(prompts=[prompt], seed=7 + i) == [rows[i]]
    assert run(prompts=PROMPTS) != run(prompts=PROMPTS)
    assert random_state() == before


def their_filtered(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """Probabilities by transformers' warpers, one after the other in its order."""
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k > 0:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


def test_sampling_probs():
    """Over a grid; with ties, but without them where top-p is on, since transformers sorts
    unstably there."""
    smooth = 3 * torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    temperatures = (0.3, 1.0, 1.7)
    top_ks = (0, 1, 5, 99)
    top_ps = (1.0, 0.9, 0.3)
    min_ps = (0.0, 0.05, 0.5)
    for temperature, top_k, top_p, min_p in itertools.product(temperatures, top_ks, top_ps, min_ps):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        logits = smooth.round() if top_p == 1 else smooth
        ours = generate.sampling_probs(logits, **options)
        exact = their_filtered(logits, **options)
        assert torch.equal(ours == 0, exact == 0), options
        assert torch.allclose(ours, exact, rtol=1e-5, atol=0), options


def test_top_p_cuts_among_equals():
    """top_k keeps all ids that tie with its last; of these top_p then keeps half."""
    logits = torch.zeros(1, 1000)
    ours = generate.sampling_probs(logits, top_k=1, top_p=0.5)
    theirs = their_filtered(logits, top_k=1, top_p=0.5)
    assert ours.count_nonzero() == theirs.count_nonzero() == 500


def their_probs(theirs: nn.Module, prompt: list[int], **options) -> Tensor:
    """What transformers' own generate would sample the next id from, (V,)."""
    settings = {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "do_sample": True,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    settings |= options
    out = theirs.generate(torch.tensor([prompt]), **settings)
    return out.scores[0][0].softmax(-1)


@pytest.mark.parametrize("left_out", ("top_k", "top_p", "min_p", None))
def test_sampling_in_their_order(one, left_out):
    """Which filter comes first shows in what the next ones leave."""
    options = {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.2}
    options.pop(left_out, None)
    with torch.no_grad():
        logits = one.ours(torch.tensor(PROMPTS[:1])).logits[:, -1]
    (ours,) = generate.sampling_probs(logits, **options)
    theirs = their_probs(one.theirs, PROMPTS[0], **options)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=0)


def test_samples_follow_their_probabilities(one):
    """4,000 first ids, with every option on: chi-square, at five standard deviations."""
    n = 4000
    probs = their_probs(one.theirs, PROMPTS[2], **SAMPLING)
    rows = collect(one.ours, [PROMPTS[2]] * n, 1, seed=3, **SAMPLING)
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=len(probs))
    kept = probs > 0
    assert not counts[~kept].any()
    expected = n * probs[kept]
    free = len(expected) - 1
    assert free >= 5
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    assert chi_square < free + 5 * (2 * free) ** 0.5


# ------------------------------------------------------------------------- trained checkpoints

TINY = Path(__file__).parent / "tiny"
POWERMOE = os.environ.get("GRANITEMOE_POWERMOE_3B")
TEXTS = ["def ", "class Stack:\n    def push(self, x):\n        ", "naïve 😀, 12345\t\n"]


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="tiny/ is not trained yet")
def test_tiny():
    """The shipped checkpoint as its readers open it: text to ids, logits, greedy text."""
    ours = generate.load_model(TINY, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    our_tokenizer = generate.load_tokenizer(TINY)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompts = [our_tokenizer.encode(text).ids for text in TEXTS]
    assert prompts == [their_tokenizer(text).input_ids for text in TEXTS]
    assert our_tokenizer.decode_batch(prompts) == TEXTS
    assert their_tokenizer.batch_decode(prompts) == TEXTS
    for ids in prompts:
        assert_parity(ours, theirs, torch.tensor([ids]))
    end = theirs.generation_config.eos_token_id
    rows = collect(ours, prompts, 40, eos_token_ids=[end])
    assert rows == their_ids(theirs, prompts, 40, end)
    their_texts = their_tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert our_tokenizer.decode_batch(rows, skip_special_tokens=True) == their_texts


@pytest.mark.skipif(not POWERMOE, reason="GRANITEMOE_POWERMOE_3B names no folder with PowerMoE-3b")
def test_powermoe_3b():
    """Published values of eight well-known ids; they were made in half precision."""
    model = generate.load_model(POWERMOE, dtype="bfloat16")
    ids = torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]])
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    means = [-4.4005, -3.6689, -3.6187, -2.8308, -3.9871, -3.1001, -2.8738, -2.8063]
    first = [2.5479, -9.2124, -9.2121, -9.2175, -9.2122, -1.5024, -9.2121, -9.2122]
    first += [-9.2162, -9.2122, -6.3101, -3.6224, -3.6377, -5.2542, -5.2524]
    torch.testing.assert_close(logits.mean(-1), torch.tensor(means), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits[0, :15], torch.tensor(first), rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------------------- CUDA


@cuda
@backends
def test_cuda_equals_the_cpu(pair, attention, experts):
    """Logits and every gradient in float32, which flash refuses; for bfloat16 see the oracle."""
    model = with_backends(pair.ours, attention, experts).cuda()
    ids = random_ids(pair.ours.config)
    if attention == "flash":
        with pytest.raises(ValueError, match="on cuda.*use 'sdpa'"):
            model(ids.cuda())
        return
    for side in (None, "left", "right"):
        inputs = labelled(ids, padding(side))
        on_card = {name: x.cuda() for name, x in inputs.items()}
        with torch.no_grad():
            exact = pair.ours(ids, **inputs).logits
            logits = model(ids.cuda(), **on_card).logits.cpu()
        error = relative(tokens_only(logits, inputs), tokens_only(exact, inputs))
        assert error <= 2 * LOGITS  # the card sums in another order
        exact_gradients = gradients(pair.ours, ids, **inputs)
        card_gradients = gradients(model, ids.cuda(), **on_card)
        assert_equal_gradients(card_gradients, exact_gradients, 2 * GRADIENTS)


@cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@forms
def test_cuda_expert_forms(form, dtype):
    for routing in ROUTINGS:
        for D, width in SIZES:
            assert_equals_dense(form, routing, D, width, dtype, "cuda")


# --------------------------------------------------------------- parity of a checkpoint of your own
# python test_granitemoe.py FOLDER_OR_ID [--dtype float32] [--device auto]
# In 16 bits, our error to float32 may be so many times that of transformers. Over many tokens the
# tests ask for 1.1; of the 55 here the figure itself moves more. A wrong model is at 10 and beyond.
HALF = 1.5
COARSE = 0.1  # the error allowed in 16 bits where memory has no room for a float32 run


class Answers(NamedTuple):
    """What is compared, on the CPU: so memory holds one model at a time."""

    modules: dict[str, list[Tensor]]  # as trace returns them
    logits: dict[str, Tensor]  # (tokens, V), by what was asked for
    greedy: list[int]


def in_pieces(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of ids (B, T) in three pieces through a cache."""
    found, past = [], None
    if isinstance(model, GraniteMoeForCausalLM):
        past = KVCache(model.config, B, T, device=ids.device, dtype=model.model.norm.weight.dtype)
    for piece in ids.split((4, 1, T - 5), dim=1):
        if isinstance(model, GraniteMoeForCausalLM):
            out = model(piece, cache=past)
        else:
            out = model(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def ask(model: nn.Module, device: torch.device) -> Answers:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (B, T), generator=generator).to(device)
    left = {name: x.to(device) for name, x in padding("left").items()}
    modules = {name: [x.cpu() for x in each] for name, each in trace(model, ids).items()}
    logits = {
        "a prompt": tokens_only(modules["logits"][0], {}),
        "a padded batch": tokens_only(model(ids, **left).logits, left).cpu(),
        "cached pieces": tokens_only(in_pieces(model, ids), {}).cpu(),
    }
    n = min(32, model.config.max_position_embeddings - T)  # ours stops where the context ends
    if isinstance(model, GraniteMoeForCausalLM):
        (greedy,) = collect(model, [ids[0].tolist()], n, eos_token_ids=())
    else:
        model.generation_config.eos_token_id = None
        options = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
        out = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
        greedy = out[0, T:].tolist()
    return Answers(modules, logits, greedy)


def median_error(ours: Tensor, exact: Tensor) -> float:
    """Of the tokens' relative errors: in 16 bits a near-tie in a router may flip in a few."""
    errors = [relative(a, b) for a, b in zip(ours, exact, strict=True)]
    return sorted(errors)[len(errors) // 2]


def agreed(a: list, b: list) -> int:
    """How many items, or characters, are equal before the first that differs."""
    equal = [x == y for x, y in zip(a, b, strict=False)]
    return [*equal, False].index(False)


def same(what: str, ours: list, theirs: list) -> bool:
    """Prints whether they are equal or, of texts and lists of ids, what follows where they part."""
    print(f"  {what:16} {'equal' if ours == theirs else 'DIFFERENT'}")
    equal, place, a, b = ours == theirs, "", ours, theirs
    while a != b:
        n = agreed(a, b)
        place, inner = f"{place}[{n}]", isinstance(a, list) and n < min(len(a), len(b))
        if not inner or isinstance(a[n], int):
            print(f"    from {place} on: ours {a[n:]!a:.60}\n    theirs {b[n:]!a:.60}")
            break
        a, b = a[n], b[n]
    return equal


@contextlib.contextmanager
def opening():
    """What transformers raises of files that it cannot use, in one form."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"transformers: {str(error) or type(error).__name__}") from None


def room(device: torch.device) -> float:
    """Bytes of memory: a card's that are free, or all of the machine's; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def compare_text(folder: Path) -> bool:
    """Tokenizing, decoding and, where there is one, the chat template."""
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        print("  no tokenizer")
        return True
    ours = generate.load_tokenizer(folder)
    ids = [ours.encode(text).ids for text in TEXTS]
    with opening():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        exact_ids = [theirs(text).input_ids for text in TEXTS]
        texts = theirs.batch_decode(ids, True)
    good = same("tokenizing", ids, exact_ids)
    good &= same("decoding", ours.decode_batch(ids), texts)
    if theirs.chat_template is None:
        print("  no chat template")
        return good
    messages = [("user", TEXTS[2]), ("assistant", "yes"), ("user", "Why?")]
    given = [{"role": role, "content": text} for role, text in messages]
    how = {"add_generation_prompt": True, "return_dict": False}
    rendered = generate.load_chat_template(folder, ours)(messages)
    with opening():
        exact = theirs.apply_chat_template(given, **how)
    return same("chat template", rendered, exact) and good


def first_module(ours: Answers, theirs: Answers, most: float) -> str | None:
    """What first_divergence finds, from answers that were kept."""
    for name, tensors in ours.modules.items():
        for a, b in zip(tensors, theirs.modules[name], strict=False):
            if not median_error(a.flatten(0, -2), b.flatten(0, -2)) <= most:
                return name
    return None


def compare_numbers(ours: Answers, theirs: Answers, exact: Answers | None, half: bool) -> bool:
    """Logits and greedy ids; exact: of a float32 run of ours, if half (16 bits) and it had room."""
    good, bound = True, COARSE if half else LOGITS
    for what, logits in ours.logits.items():
        other = theirs.logits[what]
        error = median_error(logits, other) if half else relative(logits, other)
        shown = f"relative error {error:.1e}, bound {bound:.0e}"
        if exact is not None:
            error = median_error(logits, exact.logits[what])
            other_error = median_error(other, exact.logits[what])
            bound = HALF * other_error
            shown = f"off float32 {error:.2e}, theirs {other_error:.2e}, bound {HALF} x theirs"
        print(f"  {what:16} {shown}{'' if error <= bound else '  EXCEEDED'}")
        good &= error <= bound
    if not good:
        where = first_module(ours, theirs, 0.03 if half else LOGITS)
        print(f"  the first module that differs: {where}")
    what = f"{len(ours.greedy)} greedy ids"
    if not half:
        return same(what, ours.greedy, theirs.greedy) and good
    equal = agreed(ours.greedy, theirs.greedy)
    print(f"  {what:16} the first {equal} equal; in 16 bits a near-tie may fall either way")
    return good


def report(folder: Path, device: torch.device, dtype: torch.dtype) -> bool:
    with torch.device("meta"):
        size = GraniteMoeForCausalLM(generate.checkpoint.read_config(folder)).num_parameters()
    half = dtype.itemsize == 2
    exact, fits = None, size * 4.4 < room(device)  # a tenth for what a run holds beside weights
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {device}")
    need = size * (4 if fits else dtype.itemsize) / 1e9
    print(f"{size / 1e6:.1f} M parameters: up to {need:.2f} GB, a model at a time")
    good = compare_text(folder)
    if half and not fits:
        print("  memory has no room for a float32 run, so the bounds are coarse")
    elif half:
        exact = ask(generate.load_model(folder, device=device, dtype="float32"), device)
    ours = ask(generate.load_model(folder, device=device, dtype=dtype), device)
    with opening():
        model = Theirs.from_pretrained(folder, dtype=dtype).to(device).eval()
    return compare_numbers(ours, ask(model, device), exact, half) and good


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a checkpoint with transformers.")
    parser.add_argument("checkpoint", help="a folder, or a hub id")
    parser.add_argument("--dtype", default="float32", choices=generate.DTYPES)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    try:
        folder = generate.checkpoint.find_folder(args.checkpoint)
        device = generate.checkpoint.pick_device(args.device)
        good = report(folder, device, generate.DTYPES[args.dtype])
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error) or type(error).__name__
        print(f"error: {reason.splitlines()[0]}", file=sys.stderr)
        return 1
    print("equal within the bounds" if good else "NOT equal")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
