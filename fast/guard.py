"""Whether a model is the one that the compiled steps compute, and its memory where it was.

The compiled steps take addresses of weights and call none of the model's modules. So they would
not notice a hook or a changed layer, and would read memory that is gone. A Guard reads the whole
model once, which takes some milliseconds, and then looks before each step at what can change. A
look takes 60 us for 24 layers on one core: the lists that it goes through are made once, and
C code of Python goes through them.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from numbers import Integral, Real
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_torch

from granitemoe import (
    ATTENTION,
    EXPERTS,
    Attention,
    DecoderLayer,
    ExpertWeights,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeModel,
    KVCache,
    MoE,
    RMSNorm,
    Router,
    auto_experts,
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
)
SCALARS = (
    "rope_theta",
    "rms_norm_eps",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attention_dropout",
)
FORMS = ("attention_backend", "experts_backend")
# attributes of modules that a forward of granitemoe.py reads
READ = ("config", "residual_multiplier", "eps", "top_k", "max_norm", "training")
UNREAD = ("training", "padding_idx")  # these change no number of a step, or dropout's alone
CLASSES = (
    GraniteMoeForCausalLM,
    GraniteMoeModel,
    DecoderLayer,
    Attention,
    MoE,
    Router,
    ExpertWeights,
    RMSNorm,
    nn.Linear,
    nn.Embedding,
)


NAMES = [f"{each.__name__}.forward" for each in CLASSES]
NAMES += ["KVCache.append", "ATTENTION['sdpa']"]
NAMES += ["EXPERTS['loop']", "EXPERTS['grouped']", "EXPERTS['gathered']"]


def functions() -> list:
    """What granitemoe.py computes with, as far as others can replace it, by NAMES."""
    found = [each.forward for each in CLASSES]
    found += [KVCache.append, ATTENTION.get("sdpa")]
    found += [EXPERTS.get("loop"), EXPERTS.get("grouped"), EXPERTS.get("gathered")]
    return found


AS_READ = functions()


def refuse(what: str) -> None:
    raise ValueError(f"compiled steps compute the model as granitemoe.py has it; {what}")


def place(name: str) -> str:
    """A module's name in words: "model.layers.3.self_attn" is "layer 3's self_attn"."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 2:
        inner = ".".join(parts[3:])
        return f"layer {parts[2]}'s {inner}" if inner else f"layer {parts[2]}"
    return name or "the model"


# --------------------------------------------------------------------------- the parts of a model
def check_config(config: GraniteMoeConfig) -> None:
    """Numbers of the right kind, and the relations that the config's own check is for. A config
    can be changed after that check."""
    if type(config) is not GraniteMoeConfig:
        refuse(f"its config is a {type(config).__name__:.60}")
    for name in SIZES:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            refuse(f"{name} must be an integer of 1 or more, is {value!a:.40}")
    for name in SCALARS:
        value = getattr(config, name)
        if not isinstance(value, Real):
            refuse(f"{name} must be a number, is {value!a:.40}")
    replace(config)


def check_forms(config: GraniteMoeConfig, device: torch.device) -> None:
    """The forms of attention and experts that the compiled steps stand for."""
    allowed = ("auto", "batched", auto_experts(device))
    if config.attention_backend != "sdpa" or config.experts_backend not in allowed:
        asked = f"{config.attention_backend!a:.40} and {config.experts_backend!a:.40}"
        raise ValueError(f"compiled steps: have forms of their own; {asked} were asked for")
    for name, function, now in zip(NAMES, AS_READ, functions(), strict=True):
        if now is not function:
            refuse(f"{name} is another function")


def check_tensor(name: str, x: Tensor, shape: tuple, dtype: torch.dtype, device) -> None:
    """A plain tensor, whose numbers follow each other in memory that is there."""
    if type(x) not in (Tensor, nn.Parameter):
        refuse(f"{name} is a {type(x).__name__:.60}, not a plain tensor")
    if x.layout is not torch.strided or x.is_nested:
        refuse(f"{name} is not a dense tensor")
    if tuple(x.shape) != shape:
        refuse(f"{name} has shape {tuple(x.shape)}, not {shape}")
    if x.dtype != dtype:
        refuse(f"{name} is in {x.dtype}, not in {dtype}")
    if x.device != device:
        refuse(f"{name} is on {x.device}, not on {device}")
    if not x.is_contiguous() or x.is_neg() or x.is_conj():
        refuse(f"{name} is not contiguous, or a view that changes signs")
    end = (x.storage_offset() + x.numel()) * x.element_size()
    if x.untyped_storage().nbytes() < end:
        refuse(f"{name} has no memory for its numbers")


def check_module(module: nn.Module, like: nn.Module, name: str, config: GraniteMoeConfig) -> None:
    """A module against the one that the config describes: all but its tensors and its parts."""
    kind = type(like)
    if type(module) is not kind:
        refuse(f"{place(name)} is a {type(module).__name__:.60}, not a {kind.__name__}")
    if module._forward_hooks or module._forward_pre_hooks:
        refuse(f"{place(name)} has a forward hook")
    here, expected = vars(module), vars(like)
    for own in here.keys() - expected.keys():
        if hasattr(kind, own):
            refuse(f"{place(name)} has a {own:.40} of its own")
    for attribute in expected.keys() - {*UNREAD}:
        value, right = here.get(attribute), expected[attribute]
        if attribute[0] == "_" or value is right or equal(value, right):
            continue
        where = place(f"{name}.{attribute}".removeprefix("."))
        if attribute != "config":
            refuse(f"{where} is {value!a:.40}; the config's is {right!a:.40}")
        if not equal(value, config):
            refuse(f"{where} is not the model's")
    parts = present(expected["_modules"])
    if kind is nn.ModuleList:
        parts = {str(i) for i in range(config.num_hidden_layers)}
    differ = present(here["_modules"]) ^ parts
    differ |= present(here["_parameters"]) ^ present(expected["_parameters"])
    if differ:
        refuse(f"{place(name)} differs in its parts: {min(differ)!a:.40}")


def equal(value: object, right: object) -> bool:
    """Of plain values; a tensor, say, is equal to none."""
    plain = (int, float, str, tuple, GraniteMoeConfig)
    return isinstance(value, plain) and isinstance(right, plain) and value == right


def present(table: dict) -> set[str]:
    return {name for name, value in table.items() if value is not None}


def pairs(model: GraniteMoeForCausalLM, like: GraniteMoeForCausalLM) -> Iterator[tuple]:
    """Each module's name, the module, and that of `like`, whose one layer stands for all. A module
    comes before its parts, which are looked up after it was checked."""
    waiting = [("", model, like)]
    while waiting:
        name, module, expected = waiting.pop()
        yield name, module, expected
        parts = module._modules
        layers = type(expected) is nn.ModuleList
        for part, child in parts.items():
            inner = expected._modules["0" if layers else part]
            waiting.append((f"{name}.{part}".removeprefix("."), child, inner))


# ------------------------------------------------------------------------------------- the guard
class Guard:
    """Guard(model, cache, pads) raises ValueError, one line, where the compiled steps would not be
    this model's or not fit this cache. guard.look(ids) is to be called before each step."""

    def __init__(self, model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> None:
        self.model, self.cache = model, cache
        self.rows = len(pads)
        self.settings = None  # the config's fields, once they were read
        self.read()
        self.check_pads(pads)
        self.check_length(0)

    def look(self, ids: Tensor) -> bool:
        """Before a step for ids (B, T). Raises ValueError for what has changed since the last look
        and matters, and where the ids do not fit. Returns whether the memory of a weight or of the
        cache has moved, or the cache has another length: addresses have to be taken anew.
        `start` is then the slot of the first new token: the cache's length, read once."""
        moved = False
        if not self.as_before():
            before = self.memory
            self.read()
            moved = self.memory != before
        if ids.dtype != torch.int64 or ids.dim() != 2 or ids.device != self.device:
            raise ValueError(f"ids: must be int64 (B, T) on {self.device}, got {ids.dtype}")
        B, T = ids.shape
        if self.rows != B or T < 1:
            raise ValueError(f"ids: must be ({self.rows}, T), T at least 1, got ({B}, {T})")
        self.check_length(T)
        return moved

    def check_length(self, T: int) -> None:
        start = self.cache.length
        if not isinstance(start, Integral) or start < 0:
            raise ValueError(f"cache: length must be an integer from 0, got {start!a:.40}")
        if start + T > self.room:
            raise ValueError(f"cache: {start + T} tokens do not fit in {self.room}")
        self.start = int(start)

    def check_pads(self, pads: Tensor) -> None:
        check_tensor("pads", pads, (self.rows, 1), torch.int64, self.device)
        if int(pads.min()) < 0 or int(pads.max()) > self.room:
            raise ValueError(f"pads: must be from 0 to {self.room}, got {pads.flatten().tolist()}")

    # -------------------------------------------------------------------------- the whole, in full
    def read(self) -> None:
        """Check everything, and note what look compares."""
        self.check_model()
        self.check_cache()
        if torch.is_autocast_enabled(self.device.type):
            refuse("autocast would change its dtypes")
        if any(self.hooks[:2]):
            refuse("torch has a forward hook for all modules")
        self.held = (self.cache.keys, self.cache.values, self.cache.ids)
        self.memory = self.addresses()

    def check_model(self) -> None:
        model = self.model
        if type(model) is not GraniteMoeForCausalLM:
            refuse(f"this is a {type(model).__name__:.60}")
        config = model.config
        check_config(config)
        if self.settings is not None:
            self.compare_settings(config)
        with torch.device("meta"):  # without memory: what the config describes, with one layer
            like = GraniteMoeForCausalLM(replace(config, num_hidden_layers=1))
        found = []
        for name, module, expected in pairs(model, like):
            check_module(module, expected, name, config)
            found.append((name, module, expected))
        weight = model.model.norm.weight
        self.device, self.dtype = weight.device, weight.dtype
        check_forms(config, self.device)
        for name, module, expected in found:
            if type(module) is Attention and module.training and config.attention_dropout:
                refuse(f"{place(name)} has dropout in training; call model.eval() before")
            for key in present(expected._parameters):
                shape, x = tuple(expected._parameters[key].shape), module._parameters[key]
                where = place(f"{name}.{key}")
                check_tensor(where, x, shape, self.dtype, self.device)
        self.note([module for _, module, _ in found])

    def compare_settings(self, config: GraniteMoeConfig) -> None:
        """Raises ValueError where the config has changed since the step was made, in a field that
        the steps compute with."""
        for name in (*SIZES, *SCALARS, *FORMS):
            before, now = self.settings[0][name], getattr(config, name)
            if now is not before and now != before:
                refuse(f"the config's {name} was {before!a:.40}, is now {now!a:.40}")

    def check_cache(self) -> None:
        cache, c = self.cache, self.model.config
        if type(cache) is not KVCache or "append" in vars(cache):
            raise ValueError("cache: must be a KVCache of granitemoe.py, and append its own")
        room = cache.max_length
        if not isinstance(room, Integral) or room < 1:
            raise ValueError(f"cache: max_length must be an integer from 1, got {room!a:.40}")
        C, G = c.head_dim, c.num_key_value_heads
        shape = (c.num_hidden_layers, self.rows, G, int(room), C)
        check_tensor("cache.keys", cache.keys, shape, self.dtype, self.device)
        check_tensor("cache.values", cache.values, shape, self.dtype, self.device)
        check_tensor("cache.ids", cache.ids, (self.rows, int(room)), torch.int64, self.device)
        held = (cache.keys, cache.values, cache.ids)
        spans = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in held)
        shared = spans[0][1] > spans[1][0] or spans[1][1] > spans[2][0]
        if shared and self.device.type != "meta":
            raise ValueError("cache: keys, values and ids must not share memory")
        self.room = int(room)

    # -------------------------------------------------------------------------- what look compares
    def note(self, modules: list[nn.Module]) -> None:
        """The lists that look goes through. They hold what they compare: or another object could
        take its place, and its address."""
        self.modules = modules
        self.types = [*map(type, modules)]
        self.namespaces = [vars(each) for each in (self.cache, *modules)]
        self.names = sum(map(len, self.namespaces))
        self.hooks = [globals_of_torch._global_forward_hooks]
        self.hooks.append(globals_of_torch._global_forward_pre_hooks)
        for module in modules:
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        self.tables = [module._modules for module in modules if module._modules]
        self.parts = [*chain.from_iterable(map(dict.values, self.tables))]
        self.parameters = [m._parameters for m in modules if "weight" in m._parameters]
        self.weights = [each["weight"] for each in self.parameters]
        self.biases = [each for each in self.parameters if "bias" in each]
        self.configs = [self.model.config]
        for space in self.namespaces:
            config = space.get("config")
            if config is not None and all(config is not each for each in self.configs):
                self.configs.append(config)
        self.settings = [dict(vars(config)) for config in self.configs]
        read = READ if self.model.config.attention_dropout else READ[:-1]
        self.owners = [[repeat(name), [x for x in self.namespaces if name in x]] for name in read]
        self.values = self.attributes()

    def attributes(self) -> list:
        return [[*map(dict.get, owners, name)] for name, owners in self.owners]

    def addresses(self) -> tuple:
        cache = self.cache
        held = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.ids.data_ptr())
        return [*map(Tensor.data_ptr, self.weights)], held, cache.max_length

    def as_before(self) -> bool:
        """Whether nothing has changed, by what is cheap to see. A tensor that was given another
        shape on the same memory is not seen."""
        cache = self.cache
        held = (cache.keys, cache.values, cache.ids)
        return (
            not any(self.hooks)
            and [*map(type, self.modules)] == self.types
            and sum(map(len, self.namespaces)) == self.names
            and [*chain.from_iterable(map(dict.values, self.tables))] == self.parts
            and all(map(is_, map(dict.get, self.parameters, repeat("weight")), self.weights))
            and [*map(dict.get, self.biases, repeat("bias"))].count(None) == len(self.biases)
            and all(map(is_, held, self.held))
            and self.addresses() == self.memory
            and self.attributes() == self.values
            and [vars(config) for config in self.configs] == self.settings
            and functions() == AS_READ
            and not torch.is_autocast_enabled(self.device.type)
        )
