"""What bench.py compares: models on one set of weights, and the ways (modes) of running them.

Ours are two: the code that is read, and --compile. To add a mode: a class with new_cache and step
as here, or other arguments for one of these, and a name for it in MODES.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fast
import generate
from files import checkpoint
from granitemoe import GraniteMoeConfig, KVCache
from granitemoe import GraniteMoeForCausalLM as Model

SHARED = {
    "vocab_size": 49155, "intermediate_size": 512, "num_key_value_heads": 8,
    "num_experts_per_tok": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "embedding_multiplier": 12.0, "attention_multiplier": 1 / 64, "residual_multiplier": 0.22,
    "logits_scaling": 6.0, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_local_experts")
SIZES += ("rope_theta",)
DIMS = {  # Granite 3.1's instruct models, and one to try the benchmark itself with
    "1b": SHARED | dict(zip(SIZES, (1024, 24, 16, 32, 1.5e6), strict=True)),
    "3b": SHARED | dict(zip(SIZES, (1536, 32, 24, 40, 1e7), strict=True)),
    "tiny": SHARED | dict(zip(SIZES, (256, 3, 8, 12, 1e4), strict=True)) | {"vocab_size": 999},
}


def random_model(dims: str, device: torch.device) -> Model:
    """Ours in bfloat16, drawn as for training: normal with deviation 0.02, norms of 1."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Model(GraniteMoeConfig(**DIMS[dims]))
    torch.set_default_dtype(torch.float32)
    if device.type == "cpu":
        for parameter in model.parameters():  # where load_model puts them
            memory = checkpoint.fresh(tuple(parameter.shape), parameter.dtype)
            parameter.data = memory.copy_(parameter.data)
    return model.eval()


@functools.cache
def peer_of(model: Model, experts: str | None) -> Any:
    """transformers' model on our tensors, without a copy; each experts implementation has one."""
    import transformers

    fields = asdict(model.config)
    theta = [fields.pop(n) for n in ("attention_backend", "experts_backend", "rope_theta")][-1]
    rope = {"rope_type": "default", "rope_theta": theta}
    config = transformers.GraniteMoeConfig(**fields, rope_parameters=rope)
    with torch.device("meta"):
        other = transformers.GraniteMoeForCausalLM(config)
    weights = dict(model.state_dict())
    head = weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    for new, old in checkpoint.SPELLINGS.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    other.load_state_dict(weights, assign=True)
    rotary = type(other.model.rotary_emb)
    other.model.rotary_emb = rotary(config).to(head.device)  # its tables are no parameters
    if experts:
        other.set_experts_implementation(experts)
    shared = other.lm_head.weight.data_ptr() == head.data_ptr()
    if not shared or any(p.is_meta for p in other.parameters()):
        raise ValueError("weights: not shared")
    return other.eval()


class Ours:
    """Our model, through a step as generate's loop takes it: as it is read, or fast.step."""

    def __init__(self, model: Model, batch: int, make_step: Callable = generate.plain_step) -> None:
        self.module, self.make_step = model, make_step
        self.cache, self.advance = None, None  # a step is made for one cache

    def new_cache(self, batch: int, room: int) -> KVCache:
        self.cache = self.advance = None  # their memory goes first
        weight = self.module.model.norm.weight
        return KVCache(self.module.config, batch, room, device=weight.device, dtype=weight.dtype)

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (B, T) and a cache, which grows, to the last position's logits (B, V)."""
        if cache is not self.cache:
            pads = torch.zeros_like(ids[:, :1])
            self.cache, self.advance = cache, self.make_step(self.module, cache, pads)
        return self.advance(ids)


class Peer:
    """transformers with one of its experts implementations (None: what it chooses itself).

    compiled: its cache of fixed size and the whole forward compiled, with CUDA graphs on CUDA.
    """

    def __init__(
        self, model: Model, batch: int, experts: str | None = None, compiled: bool = False
    ) -> None:
        self.compiled = compiled
        self.module = self.call = peer_of(model, experts)
        if compiled:
            how = {"mode": "reduce-overhead"} if model.model.norm.weight.is_cuda else {}
            self.call = torch.compile(self.module, fullgraph=True, dynamic=False, **how)

    def new_cache(self, batch: int, room: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config = self.module.config
        fixed = self.compiled
        return StaticCache(config, max_cache_len=room) if fixed else DynamicCache(config=config)

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """As ours."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return self.call(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


class Mode(NamedTuple):
    """make: from a model and a batch size to an Ours or a Peer; the rest: where it is measured."""

    make: Callable[[Model, int], Ours | Peer]
    devices: str = "cpu cuda"
    prefill: bool = True  # else the token step only
    cpu_rows: int = 2**30  # the largest batch on a CPU without --full: compiling takes minutes


BOTH, part = "cpu cuda", functools.partial
MODES = {
    "ours read": Mode(Ours),
    "ours --compile": Mode(part(Ours, make_step=fast.step)),
    "transformers default": Mode(Peer),  # grouped_mm, and the cache that grows
    "transformers eager": Mode(part(Peer, experts="eager")),
    # This copies a whole expert for each assignment, so that a prefill would fill the memory.
    "transformers batched_mm": Mode(part(Peer, experts="batched_mm"), BOTH, False),
}
for way in ("batched_mm", "grouped_mm"):
    mode = Mode(part(Peer, experts=way, compiled=True), BOTH, False, 0)
    MODES[f"transformers compiled {way}"] = mode


def fill(cache: Any, source: KVCache) -> None:
    """Give the cache of any mode the keys and values of another."""
    n = source.length
    for i, (keys, values) in enumerate(zip(source.keys, source.values, strict=True)):
        keys, values = keys[:, :, :n], values[:, :, :n]
        if isinstance(cache, KVCache):
            cache.keys[i, :, :, :n], cache.values[i, :, :, :n], cache.length = keys, values, n
        elif n:
            cache.update(keys, values, i)
