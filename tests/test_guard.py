"""What the compiled steps are not made for: refused in one line, when a step is made and between
steps, and memory that moves is followed."""

import copy
import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import PROMPT, collect, needs_compiler
from test_fast_cpu import PROMPTS, build, no_pads, random_rows, relative
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fast
import generate
import granitemoe
from fast import cpu
from fast.guard import Guard
from granitemoe import GraniteMoeForCausalLM, KVCache

pytestmark = needs_compiler
SAME = "compiled steps compute the model as granitemoe.py has it; "


def small(dtype: torch.dtype = torch.float32) -> GraniteMoeForCausalLM:
    """Of several layers, with a head of its own."""
    return build(3, dtype, num_hidden_layers=3, tie_word_embeddings=False)


def refused(act: Callable, words: str) -> None:
    """One ValueError of one line."""
    with pytest.raises(ValueError, match=f"^{words}") as error:
        act()
    assert "\n" not in str(error.value) and len(str(error.value)) < 170


class Marked(Tensor):
    """A tensor of a class of its own."""


class OtherCache(KVCache):
    """A cache of a class of its own."""


def marked(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.data.as_subclass(Marked), requires_grad=False)


def other(name: str, make: Callable) -> Callable:
    """Replace the weight of a module by what `make` makes of it."""

    def change(model: GraniteMoeForCausalLM) -> None:
        module = model.get_submodule(name)
        made = make(module.weight)
        module.weight = made if isinstance(made, nn.Parameter) else nn.Parameter(made, False)

    return change


def attribute(name: str, key: str, value: object) -> Callable:
    return lambda model: setattr(model.get_submodule(name), key, value)


def half_of_the_layers(model: GraniteMoeForCausalLM) -> None:
    model.model.layers = model.model.layers[:2]


def fewer_experts(model: GraniteMoeForCausalLM) -> None:
    moe = model.model.layers[1].block_sparse_moe
    for module in (moe.input_linear, moe.output_linear, moe.router.layer):
        module.weight = nn.Parameter(module.weight.data[:2].clone())


def smaller_head(model: GraniteMoeForCausalLM) -> None:
    D, V = model.config.hidden_size, model.config.vocab_size
    model.lm_head = nn.Linear(D, V - 1, bias=False)


def own_config(model: GraniteMoeForCausalLM) -> None:
    attention = model.model.layers[1].self_attn
    attention.config = replace(attention.config, attention_multiplier=0.9)


def parametrised(model: GraniteMoeForCausalLM) -> None:
    router = model.model.layers[1].block_sparse_moe.router.layer
    parametrize.register_parametrization(router, "weight", nn.Identity())


def dropout(model: GraniteMoeForCausalLM) -> None:
    model.config.attention_dropout = 0.5
    model.train()


def no_memory(model: GraniteMoeForCausalLM) -> None:
    model.lm_head.weight.untyped_storage().resize_(0)


Q, ROUTER, MOE = (
    f"model.layers.1.{x}"
    for x in ("self_attn.q_proj", "block_sparse_moe.router", "block_sparse_moe")
)
HOOK, PRE_HOOK = "register_forward_hook", "register_forward_pre_hook"


def hooked(name: str, kind: str = HOOK) -> Callable:
    return lambda model: getattr(model.get_submodule(name), kind)(lambda *_: None)


CHANGES = {  # of a model, and what is said of it
    "layers dropped": (half_of_the_layers, "model.layers differs in its parts: '2'"),
    "fewer experts": (fewer_experts, "layer 1's block_sparse_moe.*weight has shape"),
    "a smaller head": (smaller_head, "lm_head.out_features is"),
    "a head on meta": (other("lm_head", lambda w: w.to("meta")), "lm_head.weight is on meta"),
    "a weight turned": (
        other(Q, lambda w: w.data.T), "layer 1's self_attn.q_proj.weight is not contiguous"),
    "a weight of pieces": (other("lm_head", lambda w: torch.cat((w, w), 1)[:, : w.shape[1]]),
                           "lm_head.weight is not contiguous"),
    "another dtype": (other(Q, lambda w: w.data.bfloat16()),
                      "layer 1's self_attn.q_proj.weight is in torch.bfloat16"),
    "a negative view": (other(Q, lambda w: torch._neg_view(w.data)),
                        "layer 1's self_attn.q_proj.weight is not contiguous"),
    "a class of tensor": (other(Q, marked), "layer 1's self_attn.q_proj.weight is a Marked"),
    "no memory": (no_memory, "lm_head.weight has no memory"),
    "another eps": (attribute("model.norm", "eps", 0.5), "model.norm.eps is 0.5"),
    "another top_k": (attribute(ROUTER, "top_k", 1), "layer 1's block_sparse_moe.router.top_k is"),
    "another multiplier": (attribute("model.layers.1", "residual_multiplier", 0.125),
                           "layer 1's residual_multiplier is 0.125"),
    "another config": (own_config, "layer 1's self_attn.config is not the model's"),
    "another class": (attribute("model.layers.1", "self_attn", nn.Identity()),
                      "layer 1's self_attn is a Identity"),
    "another forward": (attribute(MOE, "forward", lambda x: (x, x)),
                        "layer 1's block_sparse_moe has a forward of its own"),
    "a bias": (lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(m.config.vocab_size))),
               "lm_head differs in its parts: 'bias'"),
    "an adapter": (lambda model: model.get_submodule(Q).register_parameter("lora", nn.Parameter()),
                   "layer 1's self_attn.q_proj differs in its parts: 'lora'"),
    "parametrised": (parametrised, "layer 1's block_sparse_moe.router.layer is a Parametrized"),
    "compiled": (lambda model: model.model.layers[1].compile(),
                 "layer 1 has a _compiled_call_impl of its own"),
    "dropout": (dropout, "(layer 2's self_attn has dropout|the config's attention_dropout was)"),
    "a scalar of the config": (lambda model: setattr(model.config, "logits_scaling", "6"),
                               "(logits_scaling must be a number|the config's logits)"),
    "sizes of the config": (lambda model: setattr(model.config, "num_hidden_layers", 4),
                            "(model.layers differs|the config's num_hidden_layers was 3, is now)"),
    "a hook": (hooked(MOE), "layer 1's block_sparse_moe has a forward hook"),
    **{f"a hook before {name}": (hooked(name, PRE_HOOK), f".*{name[-5:]}.* has a forward hook")
       for name in ("", "lm_head", "model", "model.embed_tokens", Q, f"{MOE}.input_linear")},
}  # fmt: skip
UNSEEN = {"an adapter"}  # between steps: nothing of ours reads it
CHANGED_WITHOUT_A_NUMBER = {  # what a step computes is the same
    "a note": lambda model: setattr(model.model, "note", "mine"),
    "ends": lambda model: setattr(model.config, "eos_token_id", 3),
    "training": lambda model: model.train(),
    "a deep copy": lambda model: setattr(model, "model", copy.deepcopy(model.model)),
    "frozen": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_refused(name):
    """When the step is made, before anything is written; and the plain step is not touched."""
    model = small()
    change, words = CHANGES[name]
    change(model)
    cache = KVCache(model.config, 1, 9)
    refused(lambda: fast.step(model, cache, no_pads(1)), SAME + words)


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - UNSEEN))
@torch.no_grad()
def test_a_model_that_changes_is_refused(name):
    """Between two steps: a token, and a piece of a prompt."""
    change, words = CHANGES[name]
    for T in (1, 2):
        model = small()
        cache = KVCache(model.config, 1, 9)
        step = fast.step(model, cache, no_pads(1))
        step(random_rows(model, 1, 3))
        step(random_rows(model, 1, 1))
        change(model)
        refused(lambda T=T, m=model, step=step: step(random_rows(m, 1, T)), SAME + words)
        assert cache.length == 4


@pytest.mark.parametrize("name", CHANGED_WITHOUT_A_NUMBER)
@torch.no_grad()
def test_what_changes_no_number_is_not_refused(name):
    model = small()
    ids = random_rows(model, 1, 6)
    exact = model(ids).logits[:, -1]
    step = fast.step(model, KVCache(model.config, 1, 9), no_pads(1))
    for t in range(6):
        if t == 3:
            CHANGED_WITHOUT_A_NUMBER[name](model)
        logits = step(ids[:, t, None])
    assert relative(logits, exact) <= 1e-5
    fast.step(model, KVCache(model.config, 1, 9), no_pads(1))


def test_compiled_and_wrapped_models_are_refused():
    model = small()
    wrapped = torch.compile(model, backend="eager")
    cache = KVCache(model.config, 1, 9)
    refused(lambda: fast.step(wrapped, cache, no_pads(1)), SAME + "this is a OptimizedModule")


@pytest.mark.parametrize("what", ("a hook for all", "autocast", "a form", "a method"))
@torch.no_grad()
def test_what_is_not_the_models_is_refused(what, monkeypatch):
    """A hook of the whole process, autocast, a replaced function of granitemoe.py."""
    model = small()
    cache, ids = KVCache(model.config, 1, 9), random_rows(model, 1, 1)
    step, make = fast.step(model, cache, no_pads(1)), lambda: fast.step(model, cache, no_pads(1))
    if what == "a hook for all":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        acts, words = (make, lambda: step(ids)), "torch has a forward hook"
    elif what == "autocast":
        acts, words = (make, lambda: step(ids)), "autocast"
    elif what == "a form":
        monkeypatch.setitem(granitemoe.ATTENTION, "sdpa", granitemoe.attend_eager)
        acts, words = (make, lambda: step(ids)), r"ATTENTION\['sdpa'\] is another function"
    else:
        monkeypatch.setattr(granitemoe.Router, "forward", lambda *_: None)
        acts, words = (make, lambda: step(ids)), "Router.forward is another function"
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            for act in acts:
                refused(act, SAME + words)
    finally:
        if what == "a hook for all":
            handle.remove()
    assert cache.length == 0


# ------------------------------------------------------------------------------- caches and inputs


def pool_row(cache: KVCache) -> None:
    cache.keys = torch.cat((cache.keys, cache.keys), 1)[:, 1:2]


def longer(cache: KVCache) -> None:
    cache.max_length = 12


def shorter_values(cache: KVCache) -> None:
    cache.values = cache.values[..., :5, :].clone()


def one_memory(cache: KVCache) -> None:
    cache.values = cache.keys


def elsewhere(cache: KVCache) -> None:
    cache.keys = cache.keys.to("meta")


def in_bfloat16(cache: KVCache) -> None:
    cache.keys, cache.values = cache.keys.bfloat16(), cache.values.bfloat16()


CACHES = {
    "a row of a pool": (pool_row, ".*cache.keys is not contiguous"),
    "longer than it is": (longer, ".*cache.keys has shape"),
    "values of another length": (shorter_values, ".*cache.values has shape"),
    "one memory": (one_memory, "cache: keys, values and ids must not share memory"),
    "elsewhere": (elsewhere, ".*cache.keys is on meta"),
    "in bfloat16": (in_bfloat16, ".*cache.keys is in torch.bfloat16"),
    "length below 0": (lambda c: setattr(c, "length", -5), "cache: length must be .* got -5"),
    "length of no integer": (lambda c: setattr(c, "length", 1.0), "cache: length must be"),
    "length beyond": (lambda c: setattr(c, "length", 10), "cache: 1[01] tokens do not fit in 9"),
    "no length": (lambda c: setattr(c, "max_length", None), "cache: max_length must be"),
    "a method": (lambda c: setattr(c, "append", print), "cache: must be a KVCache"),
}


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_other_caches_are_refused(name):
    """When a step is made and between steps."""
    model = small()
    change, words = CACHES[name]
    cache = KVCache(model.config, 1, 9)
    change(cache)
    refused(lambda: fast.step(model, cache, no_pads(1)), words)
    cache = KVCache(model.config, 1, 9)
    step = fast.step(model, cache, no_pads(1))
    step(random_rows(model, 1, 1))
    change(cache)
    refused(lambda: step(random_rows(model, 1, 1)), words)


def test_caches_of_other_models_are_refused():
    model = small()
    sizes = ({"num_hidden_layers": 4}, {"hidden_size": 2 * model.config.hidden_size})
    for change in sizes:
        cache = KVCache(replace(model.config, **change), 1, 9)
        refused(lambda c=cache: fast.step(model, c, no_pads(1)), ".*cache.keys has shape")
    cache = KVCache(model.config, 2, 9)
    refused(lambda: fast.step(model, cache, no_pads(1)), ".*cache.keys has shape")
    refused(lambda: fast.step(model, OtherCache(model.config, 1, 9), no_pads(1)), "cache: must be")


@torch.no_grad()
def test_ids_and_pads_that_do_not_fit_are_refused():
    """C would read beyond the embedding, or the tables of the rotation."""
    model, V = small(), small().config.vocab_size
    cache = KVCache(model.config, 2, 9)
    step = fast.step(model, cache, no_pads(2))
    for T in (1, 2):
        zeros = torch.zeros(2, T, dtype=torch.long)
        for wrong in (zeros - 1, zeros + V):
            refused(lambda ids=wrong: step(ids), f"ids: must be from 0 to {V - 1}")
        narrow = zeros.int()
        refused(lambda ids=narrow: step(ids), "ids: must be int64")
        refused(lambda ids=zeros[:1]: step(ids), r"ids: must be \(2, T\)")
    refused(lambda: step(torch.zeros(2, 0, dtype=torch.long)), r"ids: must be \(2, T\)")
    refused(lambda: step(torch.zeros(2, dtype=torch.long)), "ids: must be int64 .B, T.")
    for pads in (no_pads(2) - 1, no_pads(2) + 10):
        refused(lambda pads=pads: fast.step(model, cache, pads), "pads: must be from 0 to 9")
    refused(lambda: fast.step(model, cache, torch.zeros(2, 1)), ".*pads is in torch.float32")
    assert cache.length == 0


# ----------------------------------------------------------------------------- memory that moves


def moved(model: GraniteMoeForCausalLM, cache: KVCache, how: str) -> None:
    if how == "shared":
        model.share_memory()
    elif how == "shared cache":
        cache.keys.share_memory_()
        cache.values.share_memory_()
    elif how == "other tensors":
        for each in model.parameters():
            each.data = each.data.clone()
    elif how == "other parameters":
        for module in model.modules():
            if "weight" in module._parameters:
                module.weight = nn.Parameter(module.weight.data.clone())
    elif how == "another layer":
        model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    else:  # a cache that has grown
        more = KVCache(model.config, 1, 64, dtype=cache.keys.dtype)
        for name in ("keys", "values"):
            getattr(more, name)[..., : cache.max_length, :] = getattr(cache, name)
        cache.keys, cache.values, cache.max_length = more.keys, more.values, 64
        cache.ids = torch.zeros(1, 64, dtype=torch.long)


MOVES = (
    "shared", "shared cache", "other tensors", "other parameters", "another layer", "grown"
)  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("how", MOVES)
@torch.no_grad()
def test_memory_that_moves_is_followed(how, dtype):
    """Between tokens, and before a piece of a prompt, after which tokens go on."""
    for pieces in ([3, 1, 1, 1, 1], [3, 1, 2, 1]):
        model = small(dtype)
        ids, found = random_rows(model, 1, 7), []
        for make in (cpu.step, generate.plain_step):
            cache = KVCache(model.config, 1, 9, dtype=dtype)
            step = make(model, cache, no_pads(1))
            for i, piece in enumerate(ids.split(pieces, dim=1)):
                if i == 2 and make is cpu.step:
                    moved(model, cache, how)
                    noise = [torch.full((500,), torch.nan) for _ in range(2000)]
                logits = step(piece)
            found.append(logits)
        assert relative(*found) <= (1e-5 if dtype == torch.float32 else 0.05) and noise


def test_a_look_says_what_has_moved():
    model = small()
    cache, ids = KVCache(model.config, 1, 9), torch.zeros(1, 1, dtype=torch.long)
    guard = Guard(model, cache, no_pads(1))
    assert not guard.look(ids) and not guard.look(ids)
    for how in MOVES[:-1]:
        moved(model, cache, how)
        assert guard.look(ids) and not guard.look(ids), how
    model.model.note = "mine"  # nothing has moved
    assert not guard.look(ids)


@torch.no_grad()
def test_a_step_holds_its_model():
    """For as long as it is kept, and no longer."""
    model = small()
    weight = weakref.ref(model.model.layers[1].block_sparse_moe.input_linear)
    ids = random_rows(model, 1, 4)
    exact = model(ids).logits[:, -1]
    step = fast.step(model, KVCache(model.config, 1, 9), no_pads(1))
    del model
    gc.collect()
    logits = [step(ids[:, t, None]) for t in range(4)][-1]
    assert relative(logits, exact) <= 1e-5
    del step
    gc.collect()
    assert weight() is None


def test_a_look_is_short():
    """It goes through lists that were made once: a hundredth of a reading in full, on any
    machine (50 us against 4 ms; the bound is a tenth)."""
    model = build(3, num_hidden_layers=24)
    cache, ids = KVCache(model.config, 1, 9), torch.zeros(1, 1, dtype=torch.long)
    guard = Guard(model, cache, no_pads(1))

    def least(act: Callable) -> float:
        times = []
        for _ in range(9):
            began = time.perf_counter()
            act()
            times.append(time.perf_counter() - began)
        return min(times)

    assert least(lambda: guard.look(ids)) <= least(guard.read) / 10


def test_a_reply_that_is_refused_half_way(folder):
    """By generate, with the ids so far."""
    model = generate.load_model(folder)
    reply = generate.generate(model, PROMPTS, 9, eos_token_ids=(), compiled=True)
    next(reply), next(reply)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    refused(lambda: list(reply), f"{SAME}layer 1's self_attn.o_proj has a forward hook$")
    assert len(collect(model, PROMPTS, 3)) == 3 and PROMPT
