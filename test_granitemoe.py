"""Parity of granitemoe.py and generate.py with transformers, both reading the same files from disk.

The random checkpoints have sizes of which no two are equal, scalars of which none is 1, and blocks
as strong as the residual stream, so that a transposed matrix, a dropped multiplier or one wrong
expert moves the logits by far more than the tolerance. MUTATIONS breaks the model in such ways and
requires parity to fail. Where it fails, `first_divergence` names the first module that differs.
"""

import dataclasses
import doctest
import functools
import itertools
import json
import math
import os
import random
import re
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

LOGITS, GRADIENTS = 3e-6, 1e-5  # relative L2 errors allowed in float32
B, T = 5, 11
LENGTHS = [T, 4, 7, 1, T - 1]  # of the rows, where they are padded
BACKENDS = [*itertools.product(("eager", "sdpa", "flash"), ("loop", "batched"))]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=cuda))
backends = pytest.mark.parametrize("attention, experts", BACKENDS)
sides = pytest.mark.parametrize("side", (None, "left", "right"))


def relative(ours: Tensor, exact: Tensor) -> float:
    """L2 error relative to the size of `exact`; NaN, which no bound admits, if either has one."""
    ours, exact = (x.detach().cpu().double() for x in (ours, exact))
    return float((ours - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------ random checkpoints


def random_config(seed: int) -> dict:
    """A config.json in which nothing equals anything, of a model that runs in milliseconds."""
    rng = random.Random(seed)
    while True:
        G, E, K, L = (rng.choice(few) for few in ((2, 3), (7, 9, 10, 13), (2, 3, 4), (2, 3)))
        H, C, V = G * rng.randint(2, 4), 2 * rng.randint(3, 8), rng.randint(90, 130)
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
        "pad_token_id": rng.randint(3, 80), "bos_token_id": None, "eos_token_id": None,
        "vocab_size": V, "hidden_size": H * C, "intermediate_size": width, "num_hidden_layers": L,
        "num_attention_heads": H, "num_key_value_heads": G, "num_local_experts": E,
        "num_experts_per_tok": K, "max_position_embeddings": 64,
    }  # fmt: skip


def on_disk(name: str) -> str:
    """The name in released files of a parameter that transformers has renamed in memory."""
    prefix, _, tail = name.partition("block_sparse_moe.")
    new = {"experts.gate_up_proj": "input_linear.weight", "router.weight": "router.layer.weight"}
    new["experts.down_proj"] = "output_linear.weight"
    return name.replace(tail, new.get(tail, tail)) if tail else prefix


def fill(model: nn.Module, seed: int) -> None:
    """Random weights that give each block's output the size of the residual stream, which is 1.

    Attention scores get a deviation of 1.5 and router logits of 2: neither uniform nor one-hot.
    """
    c, rng = model.config, torch.Generator().manual_seed(seed)
    C = c.hidden_size // c.num_attention_heads
    sharp, strong = (1.5 / (c.attention_multiplier * C**0.5)) ** 0.5, 1.8 / c.residual_multiplier
    gains = {
        "q_proj": sharp, "k_proj": sharp, "v_proj": 1.0, "o_proj": strong, "router.layer": 2.0,
        "input_linear": 1.4, "output_linear": strong, "lm_head": c.logits_scaling,
        "embed_tokens": c.hidden_size**0.5 / c.embedding_multiplier,
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=rng)
        else:
            gain = next(gain for key, gain in gains.items() if key in on_disk(name))
            parameter.data.normal_(0, gain * parameter.shape[-1] ** -0.5, generator=rng)


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
        model = Theirs(transformers.GraniteMoeConfig(**random_config(seed)))
        fill(model, seed)
        model.save_pretrained(folder := tmp_path_factory.mktemp(name), **options)
        theirs = Theirs.from_pretrained(folder, dtype=torch.float32).eval()
        made[name] = Pair(folder, theirs, generate.load_model(folder, dtype="float32"))
    return made


@pytest.fixture(params=CHECKPOINTS)
def pair(request, pairs) -> Pair:
    return pairs[request.param]


@pytest.fixture
def one(pairs) -> Pair:
    return pairs["untied-shards"]


def rebuilt(model: GraniteMoeForCausalLM, **changes) -> GraniteMoeForCausalLM:
    """The same float32 weights under a changed config."""
    twin = GraniteMoeForCausalLM(dataclasses.replace(model.config, **changes)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def with_backends(model, attention: str, experts: str) -> GraniteMoeForCausalLM:
    return rebuilt(model, attention_backend=attention, experts_backend=experts)


def random_ids(config: GraniteMoeConfig, rows: int = B) -> Tensor:
    """(rows, T), a few of them the padding id, which counts as any other where the mask is 1."""
    ids = torch.randint(config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = ids[-1, T - 2] = config.pad_token_id
    return ids


def padding(side: str | None) -> dict[str, Tensor]:
    """Forward's mask and positions for rows of LENGTHS, padded on a side."""
    if side is None:
        return {}
    lengths, at = torch.tensor(LENGTHS)[:, None], torch.arange(T)
    mask = (at < lengths if side == "right" else at >= T - lengths).long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def real(inputs: dict[str, Tensor]) -> Tensor | slice:
    """Which of the flattened positions are tokens: what padding predicts is undefined."""
    return inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else slice(None)


def labels_of(ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """ids without padding, without each padded row's first token, which no token predicts, and
    without every fourth, so that a mean over too many shows."""
    labels = ids.clone()
    labels[:, 1::4] = -100
    if inputs:
        labels[(inputs["attention_mask"] == 0) | (inputs["position_ids"] == 0)] = -100
    return labels


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

    def keep(name: str, module: nn.Module | None, args: tuple, output: object = None) -> None:
        output = args[0] if output is None else output
        tensors = output if isinstance(output, tuple) else (output,)
        floats = [
            x for x in tensors if torch.is_tensor(x) and x.is_floating_point() and x.dim() > 1
        ]
        seen[name] = floats if name.endswith("router") else floats[:1]

    handles = [
        module.register_forward_hook(functools.partial(keep, name))
        for name, module in model.model.named_modules()
        if re.fullmatch(rf"norm|layers\.\d+(\.({INNER}))?", name)
    ]
    enter = functools.partial(keep, "embedding")
    handles.append(model.model.layers[0].register_forward_pre_hook(enter))
    try:
        keep("logits", None, (model(ids, **inputs).logits,))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def first_divergence(
    ours: nn.Module, theirs: nn.Module, ids: Tensor, tolerance: float = LOGITS, **inputs: Tensor
) -> tuple[str, float] | None:
    """The first module in the order of execution whose result differs, and its relative error."""
    exact = trace(theirs, ids, **inputs)
    for name, tensors in trace(ours, ids, **inputs).items():
        for a, b in zip(tensors, exact[name], strict=False):  # older routers return no weights
            error = relative(*(x.reshape(ids.numel(), -1)[real(inputs)] for x in (a, b)))
            if not error <= tolerance:
                return name, error
    return None


def assert_parity(ours: nn.Module, theirs: nn.Module, ids: Tensor, **inputs: Tensor) -> None:
    with torch.no_grad():
        logits = (model(ids, **inputs).logits for model in (ours, theirs))
        error = relative(*(x.flatten(0, 1)[real(inputs)] for x in logits))
    if not error <= LOGITS:
        where = first_divergence(ours, theirs, ids, **inputs)
        pytest.fail(f"logits differ by {error:.1e}; the first module to differ: {where}")


# --------------------------------------------------------------- against transformers, in float32


def test_checkpoints_are_stored_as_they_say(pair):
    """Else a spelling or the shards go untested, in case save_pretrained stops to do as told."""
    names, kind = [], pair.folder.name
    for file in pair.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    parameters = [name for name, _ in pair.theirs.named_parameters()]
    assert sorted(names) == sorted(parameters if "renamed" in kind else map(on_disk, parameters))
    assert (pair.folder / "model.safetensors.index.json").exists() == ("shards" in kind)


def test_checkpoints_can_show_a_fault(pair):
    """Guards the guards: blocks too weak to matter, or routing so close that rounding decides it.

    Below 0.3 of the stream a block that is wrong by a hundredth moves the logits by little more
    than rounding in bfloat16 does; above 3 it drowns what the blocks before it did.
    """
    ids, c = random_ids(pair.ours.config), pair.ours.config
    states = trace(pair.theirs, ids)
    (x,) = states["embedding"]
    for layer, block in itertools.product(
        range(c.num_hidden_layers), ("self_attn", "block_sparse_moe")
    ):
        step = states[f"layers.{layer}.{block}"][0] * c.residual_multiplier
        assert 0.3 <= step.norm() / x.norm() <= 3, (layer, block)
        x = x + step
    with torch.no_grad():
        logits = torch.cat(pair.theirs(ids, output_router_logits=True).router_logits)
    kth, next_one = logits.sort(descending=True).values[:, c.num_experts_per_tok - 1 :].T[:2]
    assert (kth - next_one).min() > 10 * LOGITS * logits.abs().max(), "choose another seed"


@sides
def test_forward(pair, side):
    """Logits, router logits, auxiliary loss and loss, with padding on either side."""
    ids, inputs = random_ids(pair.ours.config), padding(side)
    assert_parity(pair.ours, pair.theirs, ids, **inputs)
    more = {"labels": labels_of(ids, inputs), "output_router_logits": True} | inputs
    a, b = (model(ids, **more) for model in (pair.ours, pair.theirs))
    for x, y in zip(a.router_logits, b.router_logits, strict=True):
        assert x.dtype == torch.float32 and relative(x[real(inputs)], y[real(inputs)]) <= LOGITS
    assert relative(a.aux_loss, b.aux_loss) <= LOGITS and relative(a.loss, b.loss) <= LOGITS


@sides
def test_gradients(pair, side):
    """Of every parameter, auxiliary loss included: a detached router or a lost expert shows."""
    ids, inputs = random_ids(pair.ours.config), padding(side)
    more = {"labels": labels_of(ids, inputs), "output_router_logits": True} | inputs

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(model(ids, **more).loss, parameters)
        return dict(zip(map(on_disk, names), found, strict=True))

    ours, theirs = gradients(pair.ours), gradients(pair.theirs)
    assert ours.keys() == theirs.keys() == pair.ours.state_dict().keys()
    worst = max((relative(ours[name], theirs[name]), name) for name in ours)
    assert worst[0] <= GRADIENTS, worst


def test_position_ids(one):
    """Uneven ones; a mask of ones keeps transformers from taking the gaps for packed sequences."""
    steps = torch.randint(1, 5, (B, T), generator=torch.Generator().manual_seed(1))
    inputs = {"position_ids": steps.cumsum(1), "attention_mask": torch.ones_like(steps)}
    assert_parity(one.ours, one.theirs, random_ids(one.ours.config), **inputs)


PACKED = [
    (3, T - 3),
    (1, 4, T - 5),
    (T,),
    (T - 1, 1),
    (2,) * 4 + (T - 8,),
]  # the lengths of the documents in each row


def packed(rows: list[tuple[int, ...]]) -> Tensor:
    """Positions that start anew with each document."""
    return torch.tensor([[i for n in lengths for i in range(n)] for lengths in rows])


WHERE = {  # documents begin
    "at 0": packed(PACKED), "later": packed(PACKED) + 5, "in all rows alike": packed(PACKED[1:2]),
    "where positions jump ahead": 3 * packed(PACKED),
}  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
def test_packed_rows(pair, where, monkeypatch):
    """Logits and gradients as in transformers, which separates documents where it has no cache."""
    ids, inputs = random_ids(pair.ours.config), {"position_ids": WHERE[where]}
    monkeypatch.setattr(pair.theirs.config, "use_cache", False)
    assert_parity(pair.ours, pair.theirs, ids, **inputs)
    a, b = (
        torch.autograd.grad(m(ids, labels=ids, **inputs).loss, m.model.embed_tokens.weight)[0]
        for m in (pair.ours, pair.theirs)
    )
    assert relative(a, b) <= GRADIENTS


@pytest.mark.parametrize("attention", (*granitemoe.ATTENTION,))
def test_each_document_is_as_if_alone(one, attention):
    """In every form of the attention, and its gradients do not reach another document."""
    model, ids = with_backends(one.ours, attention, "loop"), random_ids(one.ours.config)
    logits = model(ids, position_ids=packed(PACKED)).logits
    for row, lengths in enumerate(PACKED):
        for end, n in zip(itertools.accumulate(lengths), lengths, strict=True):
            alone = model(ids[row : row + 1, end - n : end]).logits[0]
            assert relative(logits[row, end - n : end], alone) <= LOGITS
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    model.model.embed_tokens.register_forward_hook(lambda *_: x)
    model(ids, position_ids=packed(PACKED)).logits[0, 3:].sum().backward()
    assert (x.grad[0, :3] == 0).all() and (x.grad[0, 3:] != 0).all()


@pytest.mark.parametrize("keep", (0, 1, 4))
def test_logits_to_keep(one, keep):
    ids = random_ids(one.ours.config)
    a, b = (model(ids, logits_to_keep=keep).logits for model in (one.ours, one.theirs))
    assert a.shape == b.shape and relative(a, b) <= LOGITS


@pytest.mark.parametrize("asked", (None, True, False))
def test_what_is_returned(pair, asked):
    """Router logits by argument, else by the config; losses only with labels."""
    ids = random_ids(pair.ours.config)
    for labels in (None, ids):
        more = {"labels": labels, "output_router_logits": asked}
        a, b = (model(ids, **more) for model in (pair.ours, pair.theirs))
        for field in ("loss", "aux_loss", "router_logits"):
            assert (getattr(a, field) is None) == (getattr(b, field) is None), field
        assert labels is None or relative(a.loss, b.loss) <= LOGITS


# ------------------------------------------------------ our backends against "eager" and "loop"


@sides
@backends
def test_backends(one, attention, experts, side):
    """Forward and every gradient; flash, which takes no mask, says so and does not fall back."""
    plain, model = (
        with_backends(one.ours, "eager", "loop"),
        with_backends(one.ours, attention, experts),
    )
    ids, inputs = random_ids(model.config), padding(side)
    if attention == "flash" and side:
        with pytest.raises(ValueError, match="padding mask.*'sdpa'"):
            model(ids, **inputs)
        return
    assert_parity(model, plain, ids, **inputs)
    more = {"labels": labels_of(ids, inputs)} | inputs
    a, b = (torch.autograd.grad(m(ids, **more).loss, m.parameters()) for m in (model, plain))
    assert max(map(relative, a, b)) <= GRADIENTS


@pytest.mark.parametrize("side", (None, "left"))
@backends
@pytest.mark.parametrize("chunks", ([7], [1] * 7, [3, 1, 3]), ids=str)
def test_chunks_through_the_cache(one, chunks, attention, experts, side):
    """Guards against a causal triangle aligned to the first key, against positions that restart,
    and against a first chunk that is all padding in some rows."""
    if attention == "flash" and side:
        pytest.skip("flash takes no padding mask")
    model, ids = with_backends(one.ours, attention, experts), random_ids(one.ours.config)[:, -7:]
    inputs = {name: x[:, -7:] for name, x in padding(side).items()}
    cache, parts = KVCache(model.config, B, 9), []
    with torch.no_grad():
        whole = model(ids, **inputs).logits
        for done, end in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
            start = {"attention_mask": 0, "position_ids": done}  # the mask covers cached tokens
            new = {name: x[:, start[name] : end] for name, x in inputs.items()}
            parts.append(model(ids[:, done:end], cache=cache, **new).logits)
    chunked = torch.cat(parts, 1).flatten(0, 1)[real(inputs)]
    assert cache.length == 7 and relative(chunked, whole.flatten(0, 1)[real(inputs)]) <= LOGITS


@torch.no_grad()
def test_full_cache_refuses_and_keeps_what_it_holds(one):
    ids, cache = random_ids(one.ours.config), KVCache(one.ours.config, B, 8)
    one.ours(ids[:, :6], cache=cache)
    filled = [x[:, :, :, :6] for x in (cache.keys, cache.values)]  # the rest is no number yet
    before = torch.stack(filled)
    with pytest.raises(ValueError, match="8"):
        one.ours(ids[:, 6:9], cache=cache)
    assert cache.length == 6 and torch.equal(torch.stack(filled), before)
    last = one.ours(ids[:, 6:8], cache=cache).logits
    assert relative(last, one.ours(ids[:, :8]).logits[:, 6:]) <= LOGITS


@backends
def test_causality(one, attention, experts):
    """The logits at t depend on the embedding of every position up to t, and of none after."""
    model, embedded = with_backends(one.ours, attention, experts), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, output: embedded.append(output))
    logits = model(random_ids(model.config)).logits
    for t in (0, 4, T - 1):
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), embedded, retain_graph=True)
        size = gradient.norm(dim=-1)  # (B, T)
        assert (size[:, : t + 1] > 1e-6).all() and (size[:, t + 1 :] == 0).all()


# ------------------------------------------------------------- bfloat16, judged by an oracle


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(c: GraniteMoeConfig, w: dict, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GraniteMoe from its equations in float64, on the weights w by their names on disk.

    ids (T,) to logits (T, V) and router logits (layers, T, E). In form it differs from the model
    where it can: rotations are complex numbers, the softmax over all experts comes before the
    choice, and every expert sees every token."""
    T, H, G = len(ids), c.num_attention_heads, c.num_key_value_heads
    C = c.hidden_size // H
    turn = np.exp(1j * np.arange(T)[:, None] * c.rope_theta ** (-np.arange(0, C, 2) / C))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * w[name + ".weight"]

    def heads(x: np.ndarray, name: str) -> np.ndarray:  # (H or G, T, C)
        return (x @ w[name + ".weight"].T).reshape(T, -1, C).swapaxes(0, 1)

    def rotated(x: np.ndarray) -> np.ndarray:
        z = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * turn
        return np.concatenate((z.real, z.imag), -1)

    x, router = w["model.embed_tokens.weight"][ids] * c.embedding_multiplier, []
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (heads(h, f"{at}self_attn.{n}_proj") for n in "qkv")
        k, v = np.repeat(rotated(k), H // G, 0), np.repeat(v, H // G, 0)
        scores = rotated(q) @ k.swapaxes(1, 2) * c.attention_multiplier
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        y = (softmax(scores) @ v).swapaxes(0, 1).reshape(T, -1)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T * c.residual_multiplier
        h, at = norm(x, at + "post_attention_layernorm"), at + "block_sparse_moe."
        router.append(h @ w[at + "router.layer.weight"].T)
        p = softmax(router[-1])
        p[p < np.sort(p)[:, -c.num_experts_per_tok, None]] = 0
        gate, up = np.split(np.einsum("td,epd->tep", h, w[at + "input_linear.weight"]), 2, -1)
        hidden = gate / (1 + np.exp(-gate)) * up * (p / p.sum(-1, keepdims=True))[..., None]
        y = np.einsum("tef,edf->td", hidden, w[at + "output_linear.weight"])
        x = x + y * c.residual_multiplier
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T / c.logits_scaling, np.stack(router)


def consult(model: GraniteMoeForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle's logits (B, T, V) and router logits (layers, B*T, E) for the model's weights."""
    weights = {name: x.double().numpy() for name, x in model.state_dict().items()}
    logits, router = zip(*(oracle(model.config, weights, row.numpy()) for row in ids), strict=True)
    return torch.tensor(np.stack(logits)), torch.tensor(np.concatenate(router, 1))


@torch.no_grad()
def answer(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a model, on the CPU."""
    out = model(ids.to(model.model.norm.weight.device), output_router_logits=True)
    return out.logits.cpu(), torch.stack(out.router_logits).cpu()


def test_oracle_agrees_with_transformers(pair):
    ids = random_ids(pair.ours.config)
    for exact, theirs in zip(consult(pair.ours, ids), answer(pair.theirs, ids), strict=True):
        assert relative(theirs, exact) <= LOGITS


@pytest.fixture(scope="session")
def judged(pairs) -> list[tuple]:
    """Of each checkpoint in bfloat16: folder, ids, what the oracle says, what transformers says."""
    cases = []
    for folder, _, ours in pairs.values():
        ids, model = random_ids(ours.config, rows=96), generate.load_model(folder, dtype="bfloat16")
        theirs = Theirs.from_pretrained(folder, dtype=torch.bfloat16).eval()
        cases.append((folder, ids, consult(model, ids), answer(theirs, ids)))
    return cases


@pytest.mark.parametrize("device", DEVICES)
@backends
def test_bfloat16_error(judged, attention, experts, device):
    """To the float64 oracle no worse than 1.1 x transformers', with its own default experts.

    Rounding may flip a near-tie in a router; then the token's error is luck, and hides what is
    measured. So only tokens count for which all three chose the same experts in every layer, at
    that token and at those before it; and our flips may exceed transformers' by no more than
    chance, three standard deviations of the difference of two counts.
    """
    squares, flips, kept = np.zeros(2), np.zeros(2), 0
    for folder, ids, exact, theirs in judged:
        kinds = {"attention_backend": attention, "experts_backend": experts, "device": device}
        model = generate.load_model(folder, dtype="bfloat16", **kinds)
        answers, K = (answer(model, ids), theirs), model.config.num_experts_per_tok
        right, *found = (r.topk(K).indices.sort().values for _, r in (exact, *answers))
        wrong = [(choice != right).any(-1).any(0).view(ids.shape) for choice in found]
        same = ~(wrong[0] | wrong[1]).cummax(1).values
        kept += int(same.sum())
        flips += [int(x.sum()) for x in wrong]
        squares += [relative(logits[same], exact[0][same]) ** 2 for logits, _ in answers]
    assert kept >= 1000 and squares[0] <= 1.1**2 * squares[1], (kept, squares**0.5)
    assert flips[0] - flips[1] <= 3 * flips.sum() ** 0.5, flips


def test_dtypes_change_where_theirs_do(one):
    """The table of numerics: in bfloat16 the router's logits are float32, and all else is not."""
    theirs = Theirs.from_pretrained(one.folder, dtype=torch.bfloat16)
    ours = generate.load_model(one.folder, dtype="bfloat16")
    a, b = (trace(model, random_ids(ours.config)) for model in (ours, theirs))
    assert list(a) == list(b)
    for name in a:
        types = [torch.float32, torch.bfloat16] if name.endswith("router") else [torch.bfloat16]
        assert [x.dtype for x in a[name]] == types, name
        assert [x.dtype for x in b[name]] == types[: len(b[name])], name


@pytest.mark.parametrize("late_cast", (False, True), ids=("as it is", "mutated"))
def test_bfloat16_casts_where_theirs_does(one, monkeypatch, late_cast):
    """In bfloat16 all that comes before the first experts, whose sum has another order, is equal
    bit for bit; with a norm that multiplies by its weight before the cast, it is not."""

    def late(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight.float() * y).to(x.dtype)

    if late_cast:
        monkeypatch.setattr(granitemoe.RMSNorm, "forward", late)
    kinds = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    theirs = Theirs.from_pretrained(one.folder, **kinds).eval()
    ours = generate.load_model(one.folder, dtype="bfloat16", attention_backend="eager")
    positions = 91 * torch.arange(T).expand(B, T)  # bfloat16 itself could not count so far
    inputs = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
    where = first_divergence(ours, theirs, random_ids(ours.config), tolerance=0.0, **inputs)
    assert where[0] == ("layers.0.input_layernorm" if late_cast else "layers.0.block_sparse_moe")


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
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def experts_dense(x, gate_up, down, weights, ids):
    """Every expert on every token; those not chosen weigh nothing."""
    weights_NE = weights.new_zeros(len(x), len(down)).scatter(1, ids, weights)
    gate, up = torch.einsum("nd,epd->nep", x, gate_up).chunk(2, -1)
    return torch.einsum("ne,nef,edf->nd", weights_NE, F.silu(gate) * up, down)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("D, width", ((16, 24), (10, 7)))
@pytest.mark.parametrize("routing", ROUTINGS)
@forms
def test_expert_forms(form, routing, D, width, dtype, device="cpu"):
    """Each equals the dense sum, with the gradients of tokens, both weights and routing weights, in
    sizes that the grouped kernel takes and in others, for which there is a loop over runs."""
    rng, ids = torch.Generator().manual_seed(0), torch.tensor(ROUTINGS[routing])
    shapes = ((len(ids), D), (5, 2 * width, D), (5, D, width), ids.shape, (len(ids), D))
    *inputs, upstream = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)

    def run(experts, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        y = experts(*leaves, ids.to(device))
        return y, *torch.autograd.grad(y, leaves, upstream.to(device, dtype))

    exact = run(experts_dense, "cpu", torch.float64)
    for ours, theirs in zip(run(form, device, dtype), exact, strict=True):
        assert ours.dtype == dtype and relative(ours, theirs) <= TOLERANCES[dtype]


@forms
def test_experts_by_hand(form):
    """Expert e: gate 1, up -(e + 1), down 2, all times the identity. From x = 100 on silu(x) is x,
    so y = -2 x^2 sum_k w_k (e_k + 1); silu of the negative "up" would be 0: a swap shows."""
    x = torch.tensor([[100.0, 200.0, 300.0, 100.0], [400.0, 100.0, 200.0, 300.0]])
    one = torch.eye(4)
    gate_up = torch.stack([torch.cat((one, -(e + 1) * one)) for e in range(5)])
    weights, ids = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[2, 0], [3, 1]])
    # sum_k w_k (e_k + 1) is 0.75 * 3 + 0.25 * 1 = 2.5 for the first token, 0.5 * 4 + 0.5 * 2 = 3
    expected = [[-5e4, -2e5, -4.5e5, -5e4], [-9.6e5, -6e4, -2.4e5, -5.4e5]]
    got = form(x, gate_up, torch.stack([2 * one] * 5), weights, ids).tolist()
    assert got == expected, (got, expected)


def test_ties_in_the_router(one):
    """Equal logits: any K distinct experts may be chosen, and each weighs 1 / K."""
    config = one.ours.config
    router, K = granitemoe.Router(config), config.num_experts_per_tok
    nn.init.zeros_(router.layer.weight)
    _, weights, ids = router(torch.randn(T, config.hidden_size))
    assert torch.allclose(weights, torch.full((T, K), 1 / K))
    assert all(len(set(row)) == K for row in ids.tolist())


def test_the_pencil_example():
    failures, tried = doctest.testmod(granitemoe)
    assert failures == 0 and tried >= 5


# --------------------------------------------------------------------------- released configs

SMALL, LARGE = (1024, 24, 16, 32), (1536, 32, 24, 40)
RELEASED = {  # hidden, layers, heads, experts; vocabulary, positions, theta, aux coefficient, dtype
    "granite-3.0-1b-a400m-base": (*SMALL, 49152, 4096, 10000, 0.001, None),
    "granite-3.0-1b-a400m-instruct": (*SMALL, 49155, 4096, 10000, 0.0, "bfloat16"),
    "granite-3.0-3b-a800m-base": (*LARGE, 49152, 4096, 10000, 0.001, None),
    "granite-3.0-3b-a800m-instruct": (*LARGE, 49155, 4096, 10000, 0.001, "bfloat16"),
    "granite-3.1-1b-a400m-base": (*SMALL, 49152, 131072, 1500000.0, 0.001, "bfloat16"),
    "granite-3.1-1b-a400m-instruct": (*SMALL, 49155, 131072, 1500000.0, 0.0, "bfloat16"),
    "granite-3.1-3b-a800m-base": (*LARGE, 49152, 131072, 10000000.0, 0.001, "bfloat16"),
    "granite-3.1-3b-a800m-instruct": (*LARGE, 49155, 131072, 10000000.0, 0.0, "bfloat16"),
    "PowerMoE-3b": (*LARGE, 49152, 4096, 10000, 0.001, "float32"),
}
PARAMETERS = {  # hidden size, vocabulary: total, and active for a token
    (1024, 49152): (1_334_625_280, 0.429e9),
    (1024, 49155): (1_334_628_352, 0.429e9),
    (1536, 49152): (3_298_788_864, 0.883e9),
    (1536, 49155): (3_298_793_472, 0.883e9),
}


def released_config(name: str) -> dict:
    """A released config.json as transformers 4 wrote it."""
    D, layers, heads, experts, vocab, positions, theta, coefficient, dtype = RELEASED[name]
    power = {"activation_function": "silu", "router_jitter_noise": 0.0}
    return {
        "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "hidden_size": D,
        "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "num_local_experts": experts, "num_experts_per_tok": 8,
        "vocab_size": vocab, "max_position_embeddings": positions, "rope_theta": theta,
        "rope_scaling": None, "router_aux_loss_coef": coefficient, "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 6.0,
        "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
        "use_cache": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "initializer_range": 0.02, "attention_dropout": 0.1 if re.search("3.1.*base", name) else 0,
        **({"torch_dtype": dtype} if dtype else {}),
        **(power if name == "PowerMoE-3b" else {"hidden_act": "silu"}),
    }  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name, tmp_path):
    """Each as transformers 4 wrote it and as transformers 5 rewrites it, and the model's size."""
    old, file = released_config(name), tmp_path / "config.json"
    file.write_text(json.dumps(old))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    new = json.loads(theirs.to_json_string(use_diff=False))
    assert "rope_parameters" in new and not {"rope_theta", "torch_dtype"} & new.keys()
    config = generate.checkpoint.read_config(tmp_path)
    assert config == GraniteMoeConfig.from_dict(old) == GraniteMoeConfig.from_dict(new)
    fields = dataclasses.asdict(config)
    for name in fields.keys() & old.keys():
        assert fields[name] == old[name], name
    assert config.head_dim == 64 and config.hidden_act == "silu"
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
    return logits, *logits.softmax(-1).topk(self.top_k, -1)


def one_expert_short(self, x):
    logits = self.layer(x).float()
    top, ids = logits.topk(self.top_k, -1)
    top[:, -1] = -math.inf
    return logits, top.softmax(-1), ids


def limited_capacity(x, gate_up, down, weights, ids):
    """An expert takes its fair share of the tokens, rounded up; what comes later is dropped."""
    share, choices = math.ceil(ids.numel() / len(down)), ids.flatten()
    place = F.one_hot(choices, len(down)).cumsum(0).gather(1, choices[:, None]).view_as(ids)
    return granitemoe.experts_loop(x, gate_up, down, weights * (place <= share), ids)


def interleaved(x, cos, sin):
    cos, sin = (y.chunk(2, -1)[0].repeat_interleave(2, -1) for y in (cos, sin))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def tiled_heads(q, k, v, *rest):
    k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
    return granitemoe.attend_eager(q, k, v, *rest)


def both_ways(q, k, v, mask, *rest):
    return granitemoe.attend_eager(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), *rest)


def swapped(packed):
    up, gate = packed.chunk(2, -1)
    return F.silu(gate) * up


NORM, ATTEND, MOE = "layers.0.input_layernorm", "layers.0.self_attn", "layers.0.block_sparse_moe"
MUTATIONS = {  # what is wrong: a config field or a function, its wrong value, the module to name
    "embedding_multiplier 1": ("embedding_multiplier", 1.0, "embedding"),
    "attention_multiplier 1": ("attention_multiplier", 1.0, ATTEND),
    "attention 1/sqrt(C)": ("attention_multiplier", None, ATTEND),
    "residual_multiplier 1": ("residual_multiplier", 1.0, "layers.0.post_attention_layernorm"),
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
        model = rebuilt(model, **{where: model.config.head_dim**-0.5 if wrong is None else wrong})
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
    model, ids = rebuilt(one.ours), random_ids(one.ours.config)
    assert first_divergence(model, one.theirs, ids) is None
    model.get_parameter(f"model.layers.1.{name}.weight").data[3].mul_(1.01)
    found, error = first_divergence(model, one.theirs, ids)
    assert found == f"layers.1.{module}" and error > LOGITS


# --------------------------------------------------------------------------------- generation

PROMPTS = [[5, 17, 3, 41, 8], [60], [7, 7, 2, 33, 50, 12, 9, 28, 1, 64, 11], [24, 90, 13]]
SAMPLING = {
    "temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2
}  # fmt: skip


def collect(model, prompts: list[list[int]], n: int, **options) -> list[list[int]]:
    """generate's ids, a list for each row."""
    steps = list(generate.generate(model, prompts, n, **options))
    return [[i for i in row if i is not None] for row in zip(*steps, strict=True)]


def their_ids(theirs, prompts: list[list[int]], n: int, eos: int | None = None, **options):
    """The same from transformers' generate; prompts are padded on the left, an ended row is cut."""
    width = max(map(len, prompts))
    ids, mask = (
        torch.tensor([[0] * (width - len(p)) + row(p) for p in prompts])
        for row in (list, lambda p: [1] * len(p))
    )
    # its auxiliary loss cannot take the longer mask of a cached step
    options |= {"pad_token_id": 0, "output_router_logits": False}
    options |= {} if eos is None else {"eos_token_id": eos}
    out = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, **options)
    return [cut(row, eos) for row in out[:, width:].tolist()]


def cut(row: list[int], eos: int | None) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row


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
    assert ended == [cut(row, eos) for row in rows] != rows
    if penalty == 1:  # older transformers penalise the padding too
        assert ended == their_ids(pair.theirs, PROMPTS, 12, eos)


@backends
def test_greedy_generation_with_each_backend(one, attention, experts, monkeypatch):
    """Flash alone takes rows of one length only; a long prompt is read in several pieces."""
    model = with_backends(one.ours, attention, experts)
    prompts = [[i, 3, 9, 4] for i in range(4)] if attention == "flash" else PROMPTS
    expected = their_ids(one.theirs, prompts, 12)
    assert collect(model, prompts, 12) == expected
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 8)  # two columns of four rows at a time
    assert collect(model, prompts, 12) == expected


def test_generation_stops_where_the_context_ends(one):
    limit = one.ours.config.max_position_embeddings
    rows = collect(one.ours, [[1] * (limit - 3), [2] * (limit - 6)], 10)
    assert [len(row) for row in rows] == [3, 6]


def test_sampling_is_reproducible(one):
    """The same seed gives the same ids, whatever the neighbours, and nobody else's state moves."""

    def state() -> list:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    run, before = functools.partial(collect, one.ours, n=12, **SAMPLING), state()
    rows = run(prompts=PROMPTS, seed=7)
    assert rows == run(prompts=PROMPTS, seed=7) != run(prompts=PROMPTS, seed=8)
    for i, prompt in enumerate(PROMPTS):
        assert run(prompts=[prompt], seed=7 + i) == [rows[i]]
    assert run(prompts=PROMPTS) != run(prompts=PROMPTS)
    assert state() == before


def test_sampling_probs():
    """Against transformers' warpers one by one, over a grid, with ties; but without them where
    top-p is on, since it sorts unstably."""
    t, scale = transformers, 3 * torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    grid = ((0.3, 1.0, 1.7), (0, 1, 5, 99), (1.0, 0.9, 0.3), (0.0, 0.05, 0.5))
    for case in itertools.product(*grid):
        options = dict(zip(("temperature", "top_k", "top_p", "min_p"), case, strict=True))
        warpers = t.LogitsProcessorList([t.TemperatureLogitsWarper(case[0])])
        warpers += [t.TopKLogitsWarper(case[1])] if case[1] else []
        warpers += [t.TopPLogitsWarper(case[2])] if case[2] < 1 else []
        warpers += [t.MinPLogitsWarper(case[3])] if case[3] else []
        logits = scale.round() if case[2] == 1 else scale
        ours, exact = generate.sampling_probs(logits, **options), warpers(None, logits).softmax(-1)
        assert torch.equal(ours == 0, exact == 0), options
        assert torch.allclose(ours, exact, rtol=1e-5, atol=0), options


def their_probs(theirs: nn.Module, prompt: list[int], **options) -> Tensor:
    """What transformers' own generate would sample the next id from, (V,)."""
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "do_sample": True, "max_new_tokens": 1}
    settings |= {"output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    return theirs.generate(torch.tensor([prompt]), **settings | options).scores[0][0].softmax(-1)


@pytest.mark.parametrize("left_out", ("top_k", "top_p", "min_p", None))
def test_sampling_in_their_order(one, left_out):
    """Which filter comes first shows in what the next ones leave."""
    options = {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.2}
    options.pop(left_out, None)
    with torch.no_grad():
        logits = one.ours(torch.tensor(PROMPTS[:1])).logits[:, -1]
    (ours,) = generate.sampling_probs(logits, **options)
    assert torch.allclose(ours, their_probs(one.theirs, PROMPTS[0], **options), rtol=1e-4, atol=0)


def test_samples_follow_their_probabilities(one):
    """4,000 first ids, with every option on: chi-square, at five standard deviations."""
    n, probs = 4000, their_probs(one.theirs, PROMPTS[2], **SAMPLING)
    drawn = torch.tensor(collect(one.ours, [PROMPTS[2]] * n, 1, seed=3, **SAMPLING)).flatten()
    counts, kept = torch.bincount(drawn, minlength=len(probs)), probs > 0
    assert not counts[~kept].any() and (free := int(kept.sum()) - 1) >= 5
    chi_square = ((counts - n * probs)[kept] ** 2 / (n * probs[kept])).sum()
    assert chi_square < free + 5 * (2 * free) ** 0.5


# ------------------------------------------------------------------------- trained checkpoints

TINY, POWERMOE = Path(__file__).parent / "tiny", os.environ.get("GRANITEMOE_POWERMOE_3B")
TEXTS = ["def ", "class Stack:\n    def push(self, x):\n        ", "naïve 😀, 12345\t\n"]


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="tiny/ is not trained yet")
def test_tiny():
    """The shipped checkpoint as its readers open it: text to ids, logits, greedy text."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ours, tokenizer = generate.load_model(TINY, dtype="float32"), generate.load_tokenizer(TINY)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    assert prompts == [their_tokenizer(text).input_ids for text in TEXTS]
    assert tokenizer.decode_batch(prompts) == their_tokenizer.batch_decode(prompts) == TEXTS
    for ids in prompts:
        assert_parity(ours, theirs, torch.tensor([ids]))
    end = theirs.generation_config.eos_token_id
    rows = collect(ours, prompts, 40, eos_token_ids=[end])
    assert rows == their_ids(theirs, prompts, 40, end)
    their_texts = their_tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert tokenizer.decode_batch(rows, skip_special_tokens=True) == their_texts


@pytest.mark.skipif(not POWERMOE, reason="GRANITEMOE_POWERMOE_3B names no folder with PowerMoE-3b")
def test_powermoe_3b():
    """Published values of eight well-known ids; they were made in half precision."""
    model = generate.load_model(POWERMOE, dtype="bfloat16")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]])).logits[0].float()
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
    model, ids = with_backends(pair.ours, attention, experts).cuda(), random_ids(pair.ours.config)
    if attention == "flash":
        with pytest.raises(ValueError, match="on cuda.*use 'sdpa'"):
            model(ids.cuda())
        return
    for side in (None, "left", "right"):
        inputs = padding(side)
        more = {"labels": labels_of(ids, inputs)} | inputs
        exact, out = (
            pair.ours(ids, **more),
            model(ids.cuda(), **{k: x.cuda() for k, x in more.items()}),
        )
        a, b = (x.logits.cpu().flatten(0, 1)[real(inputs)] for x in (out, exact))
        assert relative(a, b) <= 2 * LOGITS  # the card sums in another order
        a, b = (
            torch.autograd.grad(x.loss, m.parameters())
            for x, m in ((out, model), (exact, pair.ours))
        )
        assert max(map(relative, a, b)) <= 2 * GRADIENTS


@cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@forms
def test_cuda_expert_forms(form, dtype):
    for routing, sizes in itertools.product(ROUTINGS, ((16, 24), (10, 7))):
        test_expert_forms(form, routing, *sizes, dtype, "cuda")
