"""Parity of granitemoe.py and generate.py with transformers, both reading the same files from disk.

The random checkpoints have sizes of which no two are equal, scalars of which none is 1, and blocks
as strong as the residual stream, so that a transposed matrix, a dropped multiplier or a wrong expert
moves the logits by far more than the tolerance; MUTATIONS breaks the model in such ways and requires
parity to fail. Where it fails, `first_divergence` names the first module that differs.
"""

import dataclasses
import doctest
import functools
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import generate
import granitemoe
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache

transformers.utils.logging.disable_progress_bar()

LOGITS, GRADIENTS = 3e-6, 1e-5  # relative L2 errors allowed in float32
B, T = 5, 11
ATTENTION, EXPERTS = ("eager", "sdpa", "flash"), ("loop", "batched")
SAME_SPELLING = {  # transformers' names in memory: names on disk
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=cuda))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """L2 error relative to the size of `theirs`; NaN, which fails every bound, if either has one."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).norm() / theirs.norm())


def on_disk(name: str) -> str:
    for new, old in SAME_SPELLING.items():
        name = re.sub(rf"block_sparse_moe\.{re.escape(new)}$", f"block_sparse_moe.{old}", name)
    return name


# ---------------------------------------------------------------- random checkpoints


def random_config(seed: int) -> dict:
    """A config.json in which nothing equals anything, of a model that runs in milliseconds."""
    rng = random.Random(seed)
    while True:
        G, E, K, layers = (rng.choice(few) for few in ((2, 3), (7, 9, 10, 13), (2, 3, 4), (2, 3)))
        H, C, V = G * rng.randint(2, 4), 2 * rng.randint(3, 8), rng.randint(90, 130)
        width = 8 * rng.randint(2, 5)  # by eights, like H * C: transformers' experts demand it
        sizes = (B, T, V, H * C, H, G, C, E, K, width, 2 * width, layers)
        if len(set(sizes)) == len(sizes) and H * C % 8 == 0:
            break
    scalars = {
        "embedding_multiplier": rng.uniform(3, 9),
        "attention_multiplier": C**-0.5 * rng.choice((0.5, 1.8)) * rng.uniform(0.9, 1.1),
        "residual_multiplier": rng.uniform(0.2, 0.7),
        "logits_scaling": rng.uniform(1.5, 3),
        "rms_norm_eps": rng.uniform(0.02, 0.04),  # large enough to be missed when it is wrong
        "rope_theta": rng.uniform(100, 900),  # small, so that 11 positions turn more than one pair
        "router_aux_loss_coef": rng.uniform(0.1, 0.2),
    }
    return scalars | {
        "vocab_size": V, "hidden_size": H * C, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": H, "num_key_value_heads": G, "num_local_experts": E,
        "num_experts_per_tok": K, "max_position_embeddings": 64, "pad_token_id": rng.randint(3, 80),
        "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": seed % 2 == 0,
        "output_router_logits": seed % 3 == 0,
    }  # fmt: skip


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights that give each block's output the size of the residual stream, which is 1.

    Attention scores get a deviation of 1.5 and router logits of 2: neither uniform nor one-hot.
    """
    c, rng = model.config, torch.Generator().manual_seed(seed)
    sharp = (1.5 / (c.attention_multiplier * (c.hidden_size / c.num_attention_heads) ** 0.5)) ** 0.5
    gains = {
        "q_proj": sharp, "k_proj": sharp, "v_proj": 1.0, "o_proj": 1.8 / c.residual_multiplier,
        "input_linear": 1.4, "output_linear": 1.8 / c.residual_multiplier, "router.layer": 2.0,
        "lm_head": c.logits_scaling, "embed_tokens": c.hidden_size**0.5 / c.embedding_multiplier,
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=rng)
        else:
            gain = next(gain for key, gain in gains.items() if key in on_disk(name))
            parameter.data.normal_(0, gain * parameter.shape[-1] ** -0.5, generator=rng)


class Pair(NamedTuple):
    """One checkpoint on disk, opened by both."""

    folder: Path
    theirs: torch.nn.Module
    ours: GraniteMoeForCausalLM


CHECKPOINTS = {  # seed (even: tied head; multiple of 3: router logits by default), save_pretrained's options
    "tied": (2, {}),
    "untied-shards": (3, {"max_shard_size": "30KB"}),
    "tied-shards-renamed": (4, {"max_shard_size": "30KB", "save_original_format": False}),
    "untied-renamed": (5, {"save_original_format": False}),
}


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    @functools.cache
    def make(name: str) -> Pair:
        seed, options = CHECKPOINTS[name]
        folder = tmp_path_factory.mktemp(name)
        model = transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**random_config(seed)))
        fill(model, seed)
        model.save_pretrained(folder, **options)
        theirs = transformers.GraniteMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return Pair(folder, theirs, generate.load_model(folder, dtype="float32"))

    return make


@pytest.fixture(params=CHECKPOINTS)
def pair(request, make_pair) -> Pair:
    return make_pair(request.param)


@pytest.fixture
def one_pair(make_pair) -> Pair:
    return make_pair("untied-shards")


def rebuilt(model: GraniteMoeForCausalLM, **changes) -> GraniteMoeForCausalLM:
    """The same weights under a changed config."""
    twin = GraniteMoeForCausalLM(dataclasses.replace(model.config, **changes))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.model.norm.weight.dtype).eval()


def random_ids(config: GraniteMoeConfig, rows: int = B, seed: int = 0) -> Tensor:
    """(rows, T); some are the padding id where nothing is padded, which must count as any other."""
    ids = torch.randint(config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(seed))
    ids[0, 3] = ids[-1, T - 2] = config.pad_token_id
    return ids


def padding(side: str | None) -> dict[str, Tensor]:
    """Forward's arguments for rows of mixed lengths padded on a side."""
    if side is None:
        return {}
    lengths, at = torch.tensor([T, 4, 7, 1, T - 1])[:, None], torch.arange(T)
    mask = (at < lengths if side == "right" else at >= T - lengths).long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def real_rows(inputs: dict[str, Tensor]) -> Tensor:
    """Which of the B*T positions are tokens: what a padded position predicts is undefined."""
    return inputs.get("attention_mask", torch.ones(B, T)).flatten().bool()


# ---------------------------------------------------------------- first divergence


TRACED = r"norm|layers\.\d+(\.(input_layernorm|self_attn|post_attention_layernorm|block_sparse_moe(\.router)?))?"


@torch.no_grad()
def trace(model: torch.nn.Module, ids: Tensor, **inputs: Tensor) -> dict[str, list[Tensor]]:
    """What each module returns, in the order of execution; of the router its logits and its weights.

    Starts with "embedding", the multiplied embeddings that enter the layers, and ends with "logits".
    """
    seen, handles = {}, []

    def keep(name: str, output: object) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [x for x in outputs if torch.is_tensor(x) and x.is_floating_point() and x.dim() > 1]
        seen[name] = tensors[: 2 if name.endswith("router") else 1]

    for name, module in model.model.named_modules():
        if re.fullmatch(TRACED, name):
            hook = functools.partial(lambda name, module, args, output: keep(name, output), name)
            handles.append(module.register_forward_hook(hook))
    first = model.model.layers[0]
    handles.append(first.register_forward_pre_hook(lambda module, args: keep("embedding", args[0])))
    try:
        keep("logits", model(ids, **inputs).logits)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def first_divergence(
    ours: torch.nn.Module, theirs: torch.nn.Module, ids: Tensor, tolerance: float = LOGITS, **inputs: Tensor
) -> tuple[str, float] | None:
    """The first module, in the order of execution, whose result differs, with its relative error."""
    real = real_rows(inputs) if inputs else slice(None)
    reference = trace(theirs, ids, **inputs)
    for name, tensors in trace(ours, ids, **inputs).items():
        for a, b in zip(tensors, reference[name], strict=False):  # old routers return no weights
            error = relative(*(x.reshape(ids.numel(), -1)[real] for x in (a, b)))
            if not error <= tolerance:
                return name, error
    return None


def assert_parity(ours: torch.nn.Module, theirs: torch.nn.Module, ids: Tensor, **inputs: Tensor) -> None:
    with torch.no_grad():
        a, b = (model(ids, **inputs).logits.flatten(0, 1)[real_rows(inputs)] for model in (ours, theirs))
    error = relative(a, b)
    where = first_divergence(ours, theirs, ids, **inputs) if not error <= LOGITS else None
    assert error <= LOGITS, f"logits differ by {error:.1e}; the first module to differ is {where}"


# ---------------------------------------------------------------- against transformers, float32


def test_checkpoints_can_show_a_fault(pair):
    """Guards the guards: blocks too weak to matter, or routing so close that rounding decides it.

    Under 0.3 of the stream, a block could be wrong by 1 % and move the logits by too little to tell
    a fault from rounding in bfloat16; over 3, what came before it would be drowned instead.
    """
    ids, states = random_ids(pair.ours.config), trace(pair.theirs, random_ids(pair.ours.config))
    x = states["embedding"][0]
    for i, block in itertools.product(range(len(pair.ours.model.layers)), ("self_attn", "block_sparse_moe")):
        step = states[f"layers.{i}.{block}"][0] * pair.ours.config.residual_multiplier
        assert 0.3 <= step.square().mean().sqrt() / x.square().mean().sqrt() <= 3, (i, block)
        x = x + step
    with torch.no_grad():
        logits = torch.cat(pair.theirs(ids, output_router_logits=True).router_logits)
    sorted_logits = logits.sort(descending=True).values
    K = pair.ours.config.num_experts_per_tok
    margin = (sorted_logits[:, K - 1] - sorted_logits[:, K]).min()
    assert margin > 10 * LOGITS * logits.abs().max(), "a bad test: choose another seed"


@pytest.mark.parametrize("side", (None, "left", "right"))
def test_forward(pair, side):
    """Logits, router logits, auxiliary loss and loss, with padding on either side."""
    ids, inputs = random_ids(pair.ours.config), padding(side)
    assert_parity(pair.ours, pair.theirs, ids, **inputs)
    real = real_rows(inputs)
    a, b = (
        model(ids, labels=labels_of(ids, inputs), output_router_logits=True, **inputs)
        for model in (pair.ours, pair.theirs)
    )
    assert len(a.router_logits) == len(b.router_logits) == pair.ours.config.num_hidden_layers
    for x, y in zip(a.router_logits, b.router_logits, strict=True):
        assert x.dtype == torch.float32 and relative(x[real], y[real]) <= LOGITS
    assert relative(a.aux_loss, b.aux_loss) <= LOGITS and relative(a.loss, b.loss) <= LOGITS


def labels_of(ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """ids as labels, without padding, each row's first token (its prediction comes from nowhere) and
    a few more, so that the mean is over fewer than all."""
    labels = ids.masked_fill(~real_rows(inputs).view(B, T), -100)
    labels[:, 1::4] = -100
    if inputs:
        labels[inputs["position_ids"] == 0] = -100
    return labels


@pytest.mark.parametrize("side", (None, "left", "right"))
def test_gradients(pair, side):
    """Of every parameter, the auxiliary loss included: a detached router or a lost expert shows."""
    ids, inputs = random_ids(pair.ours.config), padding(side)
    labels = labels_of(ids, inputs)
    gradients = []
    for model in (pair.ours, pair.theirs):
        parameters = {on_disk(name): p for name, p in model.named_parameters()}
        loss = model(ids, labels=labels, output_router_logits=True, **inputs).loss
        gradients.append(dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True)))
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() == pair.ours.state_dict().keys()
    errors = {name: relative(ours[name], theirs[name]) for name in ours}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENTS, (worst, errors[worst])


def test_position_ids(one_pair):
    """Uneven ones; a mask of ones keeps transformers from taking the gaps for packed sequences."""
    steps = torch.randint(1, 5, (B, T), generator=torch.Generator().manual_seed(1))
    inputs = {"position_ids": steps.cumsum(1), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    assert_parity(one_pair.ours, one_pair.theirs, random_ids(one_pair.ours.config), **inputs)


@pytest.mark.parametrize("keep", (0, 1, 4))
def test_logits_to_keep(one_pair, keep):
    ids = random_ids(one_pair.ours.config)
    a, b = (model(ids, logits_to_keep=keep).logits for model in (one_pair.ours, one_pair.theirs))
    assert a.shape == b.shape and relative(a, b) <= LOGITS


def test_router_logits_and_losses_are_given_when_asked_for(pair):
    """By argument, else by the config's output_router_logits, which two of the checkpoints set."""
    ids = random_ids(pair.ours.config)
    for asked, labels in itertools.product((None, True, False), (None, ids)):
        a, b = (model(ids, labels=labels, output_router_logits=asked) for model in (pair.ours, pair.theirs))
        for field in ("loss", "aux_loss", "router_logits"):
            assert (getattr(a, field) is None) == (getattr(b, field) is None), (asked, field)
        assert labels is None or relative(a.loss, b.loss) <= LOGITS


# ---------------------------------------------------------------- our backends against "eager" + "loop"


@pytest.mark.parametrize("side", (None, "left", "right"))
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_backends(one_pair, attention, experts, side):
    """Forward and every gradient; flash, which takes no mask, must say so and not fall back."""
    plain = rebuilt(one_pair.ours, attention_backend="eager", experts_backend="loop")
    model = rebuilt(one_pair.ours, attention_backend=attention, experts_backend=experts)
    ids, inputs = random_ids(model.config), padding(side)
    if attention == "flash" and side:
        with pytest.raises(ValueError, match="padding mask.*'sdpa'"):
            model(ids, **inputs)
        return
    assert_parity(model, plain, ids, **inputs)
    labels = labels_of(ids, inputs)
    a, b = (torch.autograd.grad(m(ids, labels=labels, **inputs).loss, m.parameters()) for m in (model, plain))
    assert max(map(relative, a, b)) <= GRADIENTS


@pytest.mark.parametrize("side", (None, "left"))
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("chunks", ([7], [1] * 7, [3, 1, 3]), ids=str)
def test_chunks_through_the_cache(one_pair, chunks, attention, experts, side):
    """Guards against a causal triangle aligned to the first key, and against positions that restart."""
    if attention == "flash" and side:
        pytest.skip("flash takes no padding mask")
    model = rebuilt(one_pair.ours, attention_backend=attention, experts_backend=experts)
    ids, inputs = random_ids(model.config)[:, -7:], padding(side)
    mask, at = (inputs[k][:, -7:] if side else None for k in ("attention_mask", "position_ids"))
    cache, parts, done = KVCache(model.config, B, 9), [], 0
    with torch.no_grad():
        whole = model(ids, mask, at).logits
        for n in chunks:
            new = slice(done, done + n)
            done += n
            seen = None if mask is None else mask[:, :done]
            parts.append(model(ids[:, new], seen, None if at is None else at[:, new], cache).logits)
    real = slice(None) if mask is None else mask.bool()
    assert cache.length == 7 and relative(torch.cat(parts, 1)[real], whole[real]) <= LOGITS


def test_cache_with_fixed_shapes(one_pair):
    """`slots`, the form that a captured graph replays, writes and reads what the plain form does."""
    model, ids = one_pair.ours, random_ids(one_pair.ours.config)
    cache = KVCache(model.config, B, 16)
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(ids[:, :6], cache=cache).logits]
        for t in range(6, T):
            cache.slots = torch.tensor([t])
            parts.append(model(ids[:, t : t + 1], cache=cache).logits)
    assert cache.length == T and relative(torch.cat(parts, 1), whole) <= LOGITS


def test_full_cache_refuses_and_keeps_what_it_holds(one_pair):
    model, ids = one_pair.ours, random_ids(one_pair.ours.config)
    cache = KVCache(model.config, B, 8)
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        before = cache.keys.clone(), cache.values.clone()
        with pytest.raises(ValueError, match="8"):
            model(ids[:, 6:9], cache=cache)
        assert cache.length == 6 and torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])
        last = model(ids[:, 6:8], cache=cache).logits
        assert relative(last, model(ids[:, :8]).logits[:, 6:]) <= LOGITS


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_causality(one_pair, attention, experts):
    """The logits at t depend on the embeddings up to t, each of them, and on none after."""
    model = rebuilt(one_pair.ours, attention_backend=attention, experts_backend=experts)
    inputs = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, output: inputs.append(output))
    logits = model(random_ids(model.config)).logits
    for t in (0, 4, T - 1):
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), inputs, retain_graph=True)
        size = gradient.norm(dim=-1)  # (B, T)
        assert (size[:, : t + 1] > 1e-6).all() and (size[:, t + 1 :] == 0).all()


# ---------------------------------------------------------------- bfloat16, judged by an oracle


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(c: GraniteMoeConfig, w: dict[str, np.ndarray], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GraniteMoe from its equations in float64: ids (T,) to logits (T, V), router logits (layers, T, E).

    Differs from the model in form wherever it can: rotations as complex numbers, softmax over all
    experts before the choice, every expert on every token.
    """
    T, H, G, C = len(ids), c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    turn = np.exp(1j * np.arange(T)[:, None] * c.rope_theta ** (-np.arange(0, C, 2) / C))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * w[name + ".weight"]

    def heads(x: np.ndarray, name: str, rotated: bool) -> np.ndarray:  # to (heads, T, C)
        y = (x @ w[name + ".weight"].T).reshape(T, -1, C).swapaxes(0, 1)
        if rotated:
            z = (y[..., : C // 2] + 1j * y[..., C // 2 :]) * turn
            y = np.concatenate((z.real, z.imag), -1)
        return y if y.shape[0] == H else np.repeat(y, H // G, 0)

    x, router = w["model.embed_tokens.weight"][ids] * c.embedding_multiplier, []
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (heads(h, f"{at}self_attn.{n}_proj", n != "v") for n in "qkv")
        scores = q @ k.swapaxes(1, 2) * c.attention_multiplier + np.triu(np.full((T, T), -np.inf), 1)
        y = (softmax(scores) @ v).swapaxes(0, 1).reshape(T, -1)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T * c.residual_multiplier
        h = norm(x, at + "post_attention_layernorm")
        router.append(h @ w[at + "block_sparse_moe.router.layer.weight"].T)
        p = softmax(router[-1])
        p = np.where(p >= np.sort(p)[:, -c.num_experts_per_tok, None], p, 0)
        p = p / p.sum(-1, keepdims=True)
        gate_up = np.einsum("td,epd->tep", h, w[at + "block_sparse_moe.input_linear.weight"])
        gate, up = np.split(gate_up, 2, -1)
        out = np.einsum("tef,edf->ted", gate / (1 + np.exp(-gate)) * up, w[at + "block_sparse_moe.output_linear.weight"])
        x = x + np.einsum("te,ted->td", p, out) * c.residual_multiplier
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T / c.logits_scaling, np.stack(router)


def consult(model: GraniteMoeForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle's logits (B, T, V) and router logits (layers, B*T, E) for the model's own weights."""
    weights = {name: x.double().numpy() for name, x in model.state_dict().items()}
    logits, router = zip(*(oracle(model.config, weights, row.numpy()) for row in ids), strict=True)
    return torch.tensor(np.stack(logits)), torch.tensor(np.concatenate(router, 1))


def test_oracle_agrees_with_transformers(pair):
    ids = random_ids(pair.ours.config)
    with torch.no_grad():
        theirs = pair.theirs(ids, output_router_logits=True)
    logits, router = consult(pair.ours, ids)
    assert relative(theirs.logits, logits) <= LOGITS and relative(torch.stack(theirs.router_logits), router) <= LOGITS


ROWS = 48


@pytest.fixture(scope="session")
def bfloat16(make_pair):
    """For each checkpoint: folder, ids, and logits and choices of the oracle and of transformers."""

    def chosen(router: Tensor, K: int) -> Tensor:
        """(layers, B*T, E), True where an expert is chosen."""
        return torch.zeros_like(router).scatter(-1, router.topk(K).indices, 1).bool()

    cases = []
    for name in CHECKPOINTS:
        folder = make_pair(name).folder
        theirs = transformers.GraniteMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        ours = generate.load_model(folder, dtype="bfloat16")
        ids, choose = random_ids(ours.config, ROWS), functools.partial(chosen, K=ours.config.num_experts_per_tok)
        logits, router = consult(ours, ids)
        with torch.no_grad():
            b = theirs(ids, output_router_logits=True)
        cases.append((folder, ids, choose, (logits, choose(router)), (b.logits, choose(torch.stack(b.router_logits)))))
    return cases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_bfloat16_error(bfloat16, attention, experts, device):
    """To the float64 oracle no worse than 1.1 x transformers', with its own default experts.

    Rounding sometimes flips a near-tie in a router, and then a token's error is a matter of luck and
    hides what is measured. So only tokens are compared for which all three chose the same experts,
    at that token and before it, in all layers; and flips may not be more frequent than transformers'
    beyond chance (three standard deviations of a count).
    """
    squares, flips, kept = np.zeros(2), np.zeros(2), 0
    for folder, ids, choose, (truth, right), (their_logits, their_choice) in bfloat16:
        if device == "cuda" and attention == "flash" and GraniteMoeConfig.from_json(folder / "config.json").head_dim % 8:
            continue
        model = generate.load_model(
            folder, dtype="bfloat16", device=device, attention_backend=attention, experts_backend=experts
        )
        with torch.no_grad():
            a = model(ids.to(device), output_router_logits=True)
        choice = choose(torch.stack(a.router_logits).cpu())
        wrong = [(x != right).any(-1).any(0).view(ids.shape) for x in (choice, their_choice)]
        same = ~(wrong[0] | wrong[1]).cummax(1).values
        kept += int(same.sum())
        flips += [int(x.sum()) for x in wrong]
        squares += [relative(x[same.to(x.device)], truth[same]) ** 2 for x in (a.logits, their_logits)]
    assert kept >= 300 and squares[0] <= 1.1**2 * squares[1], (kept, np.sqrt(squares))
    assert flips[0] <= flips[1] + 3 * flips[1] ** 0.5, flips


def test_dtypes_change_where_theirs_do(one_pair):
    """The header's table of numerics: in bfloat16 the router's logits are float32, all else is not."""
    theirs = transformers.GraniteMoeForCausalLM.from_pretrained(one_pair.folder, dtype=torch.bfloat16)
    ours = generate.load_model(one_pair.folder, dtype="bfloat16")
    a, b = ({k: [x.dtype for x in v] for k, v in trace(m, random_ids(ours.config)).items()} for m in (ours, theirs))
    assert list(a) == list(b) and all(a[k][: len(b[k])] == b[k] for k in a)
    assert a["layers.1.block_sparse_moe.router"] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("late_cast", (False, True), ids=("ours", "mutated"))
def test_rms_norm_casts_before_the_weight(one_pair, monkeypatch, late_cast):
    """In bfloat16 bit-equal to theirs; multiplying in float32 and casting last is not."""
    if late_cast:
        late = lambda self, x: (self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)).to(x.dtype)  # noqa: E731
        monkeypatch.setattr(granitemoe.RMSNorm, "forward", late)
    ours, theirs = (getattr(one_pair, side).model.norm for side in ("ours", "theirs"))
    x = torch.randn(200, ours.weight.numel(), generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = ours.weight.detach().bfloat16()
    a, b = (torch.func.functional_call(norm, {"weight": weight}, (x,)) for norm in (ours, theirs))
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b) != late_cast


# ---------------------------------------------------------------- the three forms of the experts


FORMS = (granitemoe.experts_loop, granitemoe.experts_grouped, granitemoe.experts_gathered, granitemoe.experts_batched)
ROUTINGS = {  # the chosen of 5 experts, a row for each token
    "every expert": [[0, 1], [2, 3], [4, 0], [3, 1], [1, 4], [2, 0], [4, 3]],
    "empty first, middle and last": [[1, 3], [3, 1], [1, 3]],
    "all on one": [[3]] * 7,
    "one token": [[4, 1]],
    "all chosen": [[2, 0, 1, 4, 3], [0, 1, 2, 3, 4]],
}


def experts_dense(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Every expert on every token; those not chosen weigh nothing."""
    weights_NE = weights.new_zeros(len(x), len(down)).scatter(1, ids, weights)
    gate, up = torch.einsum("nd,epd->nep", x, gate_up).chunk(2, -1)
    return torch.einsum("ne,nef,edf->nd", weights_NE, F.silu(gate) * up, down)


TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    "device, dtype",
    [("cpu", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    + [pytest.param("cuda", dtype, marks=cuda) for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("D, width", ((16, 24), (10, 7)))
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_expert_forms(form, routing, D, width, device, dtype):
    """Each equals the dense sum, with the gradients of tokens, both weights and routing weights; in
    sizes that the grouped kernel takes as they are, and in others, which must be padded for it."""
    E, ids = 5, torch.tensor(routing)
    rng = torch.Generator().manual_seed(0)
    shapes = ((len(ids), D), (E, 2 * width, D), (E, D, width), ids.shape)
    inputs = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]
    upstream = torch.randn(len(ids), D, generator=rng, dtype=torch.float64).to(dtype)

    def run(f, kind, where):
        leaves = [x.to(where, kind).requires_grad_() for x in inputs]
        y = f(*leaves, ids.to(where))
        return y, *torch.autograd.grad(y, leaves, upstream.to(where, kind))

    for ours, exact in zip(run(form, dtype, device), run(experts_dense, torch.float64, "cpu"), strict=True):
        assert ours.dtype == dtype and relative(ours, exact) <= TOLERANCES[dtype]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_experts_by_hand(form):
    """Expert e: gate 1, up -(e + 1), down 2, all times the identity. With x >= 100, silu(x) is x, so
    y = -2 x^2 sum_k w_k (e_k + 1); silu of the negative "up" would be 0, so a swap shows."""
    x = torch.tensor([[100.0, 200.0, 300.0], [400.0, 100.0, 200.0]])
    identity = torch.eye(3)
    gate_up = torch.stack([torch.cat((identity, -(e + 1) * identity)) for e in range(4)])
    down = (2 * identity).expand(4, 3, 3).contiguous()
    weights, ids = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[2, 0], [3, 1]])
    # sum_k w_k (e_k + 1): 0.75 * 3 + 0.25 * 1 = 2.5 and 0.5 * 4 + 0.5 * 2 = 3
    expected = [[-5e4, -2e5, -4.5e5], [-9.6e5, -6e4, -2.4e5]]
    assert form(x, gate_up, down, weights, ids).tolist() == expected


def test_ties_in_the_router(one_pair):
    """Equal logits: any K distinct experts may be chosen, and each weighs 1 / K."""
    router = granitemoe.Router(one_pair.ours.config)
    torch.nn.init.zeros_(router.layer.weight)
    _, weights, ids = router(torch.randn(T, one_pair.ours.config.hidden_size))
    K = one_pair.ours.config.num_experts_per_tok
    assert torch.allclose(weights, torch.full((T, K), 1 / K)) and all(len(set(row)) == K for row in ids.tolist())


def test_the_pencil_example():
    failures, tried = doctest.testmod(granitemoe)
    assert failures == 0 and tried >= 5


# ---------------------------------------------------------------- released configs


RELEASED = {  # name: hidden, layers, heads, experts, vocabulary, positions, theta, aux coefficient, dtype
    "granite-3.0-1b-a400m-base": (1024, 24, 16, 32, 49152, 4096, 10000, 0.001, None),
    "granite-3.0-1b-a400m-instruct": (1024, 24, 16, 32, 49155, 4096, 10000, 0.0, "bfloat16"),
    "granite-3.0-3b-a800m-base": (1536, 32, 24, 40, 49152, 4096, 10000, 0.001, None),
    "granite-3.0-3b-a800m-instruct": (1536, 32, 24, 40, 49155, 4096, 10000, 0.001, "bfloat16"),
    "granite-3.1-1b-a400m-base": (1024, 24, 16, 32, 49152, 131072, 1500000.0, 0.001, "bfloat16"),
    "granite-3.1-1b-a400m-instruct": (1024, 24, 16, 32, 49155, 131072, 1500000.0, 0.0, "bfloat16"),
    "granite-3.1-3b-a800m-base": (1536, 32, 24, 40, 49152, 131072, 10000000.0, 0.001, "bfloat16"),
    "granite-3.1-3b-a800m-instruct": (1536, 32, 24, 40, 49155, 131072, 10000000.0, 0.0, "bfloat16"),
    "PowerMoE-3b": (1536, 32, 24, 40, 49152, 4096, 10000, 0.001, "float32"),
}
PARAMETERS = {  # hidden size, vocabulary: total, and active per token
    (1024, 49152): (1_334_625_280, 0.429e9),
    (1024, 49155): (1_334_628_352, 0.429e9),
    (1536, 49152): (3_298_788_864, 0.883e9),
    (1536, 49155): (3_298_793_472, 0.883e9),
}


def released_config(name: str) -> dict:
    """A released config.json as transformers 4 wrote it."""
    hidden, layers, heads, experts, vocab, positions, theta, coefficient, dtype = RELEASED[name]
    config = {
        "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "hidden_size": hidden,
        "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "num_local_experts": experts, "num_experts_per_tok": 8,
        "vocab_size": vocab, "max_position_embeddings": positions, "rope_theta": theta,
        "rope_scaling": None, "router_aux_loss_coef": coefficient, "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 6.0,
        "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.02,
        "attention_dropout": 0.1 if "3.1" in name and "base" in name else 0.0,
    }  # fmt: skip
    config |= {"torch_dtype": dtype} if dtype else {}
    power = {"activation_function": "silu", "router_jitter_noise": 0.0}
    return config | (power if name == "PowerMoE-3b" else {"hidden_act": "silu"})


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name, tmp_path):
    """Each in transformers 4's spelling and in what transformers 5 makes of it, and the sizes."""
    old = released_config(name)
    (tmp_path / "config.json").write_text(json.dumps(old))
    new = json.loads(transformers.AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
    assert "rope_parameters" in new and "rope_theta" not in new and "torch_dtype" not in new
    config = GraniteMoeConfig.from_dict(old)
    assert config == GraniteMoeConfig.from_dict(new) == GraniteMoeConfig.from_json(tmp_path / "config.json")
    for field in dataclasses.fields(config):
        if field.name in old:
            assert getattr(config, field.name) == old[field.name], field.name
    assert config.head_dim == 64 and config.hidden_act == "silu" and config.dtype == old.get("torch_dtype")
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(config)
    total, active = PARAMETERS[config.hidden_size, config.vocab_size]
    assert model.num_parameters() == total
    assert model.num_parameters(active=True) == pytest.approx(active, abs=0.0005e9)
    assert len(model.state_dict()) == 9 * config.num_hidden_layers + 2


# ---------------------------------------------------------------- mutations


def no_renormalisation(self, x_ND):
    logits = self.layer(x_ND).float()
    weights, ids = logits.softmax(-1).topk(self.top_k, -1)
    return logits, weights, ids


def one_expert_short(self, x_ND):
    logits = self.layer(x_ND).float()
    top, ids = logits.topk(self.top_k - 1, -1)
    return logits, top.softmax(-1), ids


def limited_capacity(x, gate_up, down, weights, ids):
    """Each expert takes at most its fair share, rounded up; what comes later is dropped."""
    slot = F.one_hot(ids.flatten(), len(down)).cumsum(0).gather(1, ids.flatten()[:, None]).view_as(ids)
    return granitemoe.experts_loop(x, gate_up, down, weights * (slot <= math.ceil(ids.numel() / len(down))), ids)


def interleaved(x, cos, sin):
    half = x.shape[-1] // 2
    pairs = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos[..., :half].repeat_interleave(2, -1) + pairs * sin[..., :half].repeat_interleave(2, -1)


def tiled_heads(q, k, v, *rest):
    copies = q.shape[1] // k.shape[1]
    return granitemoe.attend_eager(q, k.repeat(1, copies, 1, 1), v.repeat(1, copies, 1, 1), *rest)


def both_ways(q, k, v, mask, *rest):
    return granitemoe.attend_eager(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), *rest)


def swapped(packed):
    up, gate = packed.chunk(2, -1)
    return F.silu(gate) * up


MUTATIONS = {  # what is wrong: config fields or a replaced function, and the module that must be named
    "embedding_multiplier 1": ({"embedding_multiplier": 1.0}, "embedding"),
    "attention_multiplier 1": ({"attention_multiplier": 1.0}, "layers.0.self_attn"),
    "attention_multiplier 1/sqrt(C)": ({"attention_multiplier": None}, "layers.0.self_attn"),
    "residual_multiplier 1": ({"residual_multiplier": 1.0}, "layers.0.post_attention_layernorm"),
    "logits_scaling 1": ({"logits_scaling": 1.0}, "logits"),
    "rms_norm_eps 1e-6": ({"rms_norm_eps": 1e-6}, "layers.0.input_layernorm"),
    "rope_theta 10000": ({"rope_theta": 1e4}, "layers.0.self_attn"),
    "gate and up swapped": (("swiglu", swapped), "layers.0.block_sparse_moe"),
    "no renormalisation": (("Router.forward", no_renormalisation), "layers.0.block_sparse_moe.router"),
    "K - 1 experts": (("Router.forward", one_expert_short), "layers.0.block_sparse_moe.router"),
    "limited capacity": (("EXPERTS", {"loop": limited_capacity}), "layers.0.block_sparse_moe"),
    "rope interleaved": (("rotate", interleaved), "layers.0.self_attn"),
    "key heads tiled": (("ATTENTION", {"sdpa": tiled_heads}), "layers.0.self_attn"),
    "no causal mask": (("ATTENTION", {"sdpa": both_ways}), "layers.0.self_attn"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_fail_parity_and_are_named(pair, monkeypatch, name):
    change, module = MUTATIONS[name]
    model = pair.ours
    if isinstance(change, dict):
        default = model.config.head_dim**-0.5
        model = rebuilt(model, **{k: default if v is None else v for k, v in change.items()})
    else:
        monkeypatch.setattr(f"granitemoe.{change[0]}", change[1])
    ids = random_ids(model.config)
    with torch.no_grad():
        assert relative(model(ids).logits, pair.theirs(ids).logits) > 1e-3
    with pytest.raises(AssertionError, match=f"first module to differ is .'{module}"):
        assert_parity(model, pair.theirs, ids)


@pytest.mark.parametrize(
    "module, spoil",
    (
        ("layers.1.self_attn", lambda layer: layer.self_attn.k_proj.weight.data.mul_(1.01)),
        ("layers.1.block_sparse_moe.router", lambda layer: layer.block_sparse_moe.router.layer.weight.data.mul_(1.01)),
        ("layers.1.block_sparse_moe", lambda layer: layer.block_sparse_moe.output_linear.weight.data[3].mul_(1.01)),
        ("layers.1.post_attention_layernorm", lambda layer: setattr(layer, "residual_multiplier", 0.1)),
    ),
)
def test_first_divergence_names_the_layer(one_pair, module, spoil):
    """One number of one layer is a little off: a hundredth of one expert's output is enough."""
    model, ids = rebuilt(one_pair.ours), random_ids(one_pair.ours.config)
    assert first_divergence(model, one_pair.theirs, ids) is None
    spoil(model.model.layers[1])
    name, error = first_divergence(model, one_pair.theirs, ids)
    assert name == module and error > LOGITS
