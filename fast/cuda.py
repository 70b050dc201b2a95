"""The forward pass on CUDA: the kernels of kernels.py, their memory, and CUDA graphs of them.

What a card measured is in bench/RESULTS.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fast import Guard
from granitemoe import DecoderLayer, GraniteMoeConfig, GraniteMoeForCausalLM, KVCache, rope_tables

try:
    from triton import cdiv, next_power_of_2

    from fast import kernels
except ImportError:  # Windows, macOS and PyTorch's build for CPUs have no Triton
    kernels = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEPENDENT = True  # programmatic dependent launch where a card has it; off, profiles are plain
PIECE = 2048  # tokens of all rows that go through the kernels at once, at most
FEW_ROWS = 4  # up to so many, a step is organised by outputs
ONE_SORT = 128  # up to so many tokens are sorted by one program

# Block sizes, warps and stages of each kernel, as a sweep on a card chose them (bench/RESULTS.md).
FEW = {
    "embed": {"num_warps": 4},
    "attn_in": {"BN": 2, "num_warps": 1},
    "attend": {"BS": 64, "num_warps": 1, "num_stages": 4},
    "attn_out": {"BN": 4, "num_warps": 8},
    "route": {"BE": 2, "num_warps": 4},
    "gate_up": {"BN": 2, "num_warps": 2},
    "down": {"BN": 4, "num_warps": 8},
    "head": {"BN": 8, "num_warps": 4},
}
STEP = {  # one token of each of many rows
    "embed": {"num_warps": 4},
    "add_norm": {"num_warps": 8},
    "attn_in_many": {"BM": 16, "BN": 32, "BK": 256, "num_warps": 4, "num_stages": 3},
    "attend": {"BS": 64, "num_warps": 1, "num_stages": 3},
    "attn_out_many": {"BM": 64, "BN": 16, "BK": 256, "num_warps": 4, "num_stages": 4},
    "route": {"BE": 4, "num_warps": 4},
    "route_many": {"BM": 16, "BK": 256, "num_warps": 4, "num_stages": 3},
    "sort_by_expert": {"num_warps": 8},
    "gate_up_many": {"BM": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    "down_many": {"BM": 32, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
    "head_many": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
SHORT = {  # prompts of up to SHORT_PIECE tokens in all
    "embed": {"num_warps": 4},
    "add_norm": {"num_warps": 4},
    "attn_in_many": {"BM": 64, "BN": 32, "BK": 64, "num_warps": 4, "num_stages": 3},
    "attend_many": {"BM": 64, "BS": 64, "num_warps": 4, "num_stages": 3},
    "attn_out_many": {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    "route_many": {"BM": 16, "BK": 256, "num_warps": 4, "num_stages": 3},
    "sort_by_expert": {"num_warps": 4},
    "gate_up_many": {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    "down_many": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
    "head_many": {"BM": 16, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 4},
}
SHORT_PIECE = 512
LONG = SHORT | {
    "attn_in_many": {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    "attend_many": {"BM": 64, "BS": 128, "num_warps": 4, "num_stages": 3},
    "attn_out_many": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    "gate_up_many": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "down_many": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}


# ------------------------------------------------------------------------------------------ sizes
def check_sizes(c: GraniteMoeConfig, rows: int) -> None:
    """Raises ValueError for sizes that the kernels do not take."""
    if c.head_dim > 256:
        raise ValueError(f"compiled steps: head_dim is at most 256, got {c.head_dim}")
    if c.num_local_experts > 256:
        raise ValueError(f"compiled steps: at most 256 experts, got {c.num_local_experts}")
    tokens = max(PIECE, rows)
    K, D, F = c.num_experts_per_tok, c.hidden_size, c.intermediate_size
    places = max(tokens * K * max(D, F), rows * c.vocab_size, c.vocab_size * D)
    if places >= 2**31:
        raise ValueError(f"compiled steps: a tensor of {places} numbers is too large for them")


def letters(c: GraniteMoeConfig) -> dict[str, int]:
    """The sizes by their letters in kernels.py. Tensor cores take blocks of at least 16."""
    D, C, E, K = c.hidden_size, c.head_dim, c.num_local_experts, c.num_experts_per_tok
    H, G, F = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size
    sizes = {"V": c.vocab_size, "D": D, "H": H, "G": G, "C": C, "E": E, "K": K, "F": F, "R": H // G}
    for name in ("D", "F", "K"):
        sizes[name + "P"] = next_power_of_2(sizes[name])
    for name in ("C", "E", "R"):
        sizes[name + "P"] = max(16, next_power_of_2(sizes[name]))
    return sizes


def takes_few(c: GraniteMoeConfig, rows: int) -> bool:
    """Whether a step is organised by outputs: few rows, and sizes whose weights fit registers."""
    block = next_power_of_2(c.num_experts_per_tok) * next_power_of_2(c.intermediate_size)
    return rows <= FEW_ROWS and c.hidden_size <= 4096 and block <= 2**14


def splits(rows: int, G: int, room: int) -> int:
    """How many programs share a key head's slots: two for each of a card's processors, but not
    more than a cache of `room` slots has work for."""
    most = 8 if room <= 2048 else 32
    return max(1, min(most, next_power_of_2(cdiv(264, rows * G))))


# ------------------------------------------------------------------------------------- one forward
class Forward:
    """The kernels for T tokens of each of B rows, with memory of their own. The first call launches
    them one by one, which compiles what is not compiled; the second captures a CUDA graph."""

    def __init__(self, model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, T: int) -> None:
        c, B = model.config, len(pads)
        self.model, self.cache, self.B, self.T, self.N = model, cache, B, T, B * T
        self.sizes, self.few = letters(c), T == 1 and takes_few(c, B)
        self.options = FEW if self.few else STEP if T == 1 else SHORT
        if self.N > SHORT_PIECE and T > 1:
            self.options = LONG
        self.graph, self.calls = None, 0
        device, dtype = cache.keys.device, cache.keys.dtype
        newest = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self.sizes["PDL"] = DEPENDENT and newest and not torch.version.hip

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        D, H, G, C, E, K, F = (self.sizes[name] for name in "DHGCEKF")
        N, whole, single = self.N, torch.int32, torch.float32
        self.ids = zeros(B, T, of=torch.int64)
        self.at, self.live = zeros(1, of=whole), torch.full_like(zeros(1, of=whole), T)
        self.start = pads.flatten().to(whole)
        slots = torch.arange(cache.max_length, device=device)
        self.cos, self.sin = rope_tables(slots[None], c, dtype)
        self.x, self.h, self.y, self.q = zeros(N, D), zeros(N, D), zeros(N, D), zeros(N, H, C)
        self.hidden, self.logits = zeros(N * K, F), zeros(B, c.vocab_size, of=single)
        self.splits = splits(B, G, cache.max_length)
        self.ended = zeros(B * G, of=whole)  # of attend; 0 between launches
        self.shares = zeros(B * H * self.splits * (C + 2), of=single)
        self.chosen, self.w = zeros(N, K, of=whole), zeros(N, K)
        self.scores, self.routed = zeros(N, E, of=single), zeros(N, of=whole)  # 0 between launches
        if self.few:
            return
        self.by_token = T == 1 and N <= ONE_SORT  # the router, as with few rows
        self.block = next_power_of_2(N) if self.by_token else self.options["route_many"]["BM"]
        self.blocks = cdiv(N, self.block)
        rows = self.options["gate_up_many"]["BM"]
        self.tile_count = N * K // rows + min(E, N * K)  # at most; others are of no expert
        self.rows, self.order = zeros(N * K, D), zeros(N * K, of=whole)
        self.counts, self.tiles = (
            zeros(self.blocks, E, of=whole),
            zeros(3, self.tile_count, of=whole),
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """Up to T new tokens (B, any) to the logits (B, V) after the last of them; their keys and
        values go to the cache."""
        count = ids.shape[1]
        self.ids[:, :count] = ids
        self.at.fill_(self.cache.length)
        if self.T > 1:
            self.live.fill_(count)
        if self.calls == 1:
            self.graph = capture(self.run)
        self.calls += 1
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits

    def run(self) -> None:
        """Launch the kernels: GraniteMoeForCausalLM.forward."""
        body, c = self.model.model, self.model.config
        embedding = body.embed_tokens.weight
        self.launch("embed", (self.N,), self.ids, embedding, self.x, c.embedding_multiplier)
        head = embedding if c.tie_word_embeddings else self.model.lm_head.weight
        if self.few:
            for i, layer in enumerate(body.layers):
                self.few_layer(layer, i)
            grid = (self.blocks_of("head", "BN", c.vocab_size), self.B)
            norm, scalars = body.norm.weight, (c.rms_norm_eps, c.logits_scaling)
            self.launch("head", grid, self.x, norm, head, self.logits, *scalars)
            return
        norms = [layer.input_layernorm.weight for layer in body.layers] + [body.norm.weight]
        self.add_norm(norms[0], FIRST=True)
        for i, layer in enumerate(body.layers):
            self.many_attention(layer, i)
            self.many_experts(layer)
            self.add_norm(norms[i + 1], FIRST=False)
        grid = (
            self.blocks_of("head_many", "BN", c.vocab_size),
            self.blocks_of("head_many", "BM", self.B),
        )
        scalars = (c.logits_scaling, self.B, self.T)
        self.launch("head_many", grid, self.h, head, self.live, self.logits, *scalars)

    def few_layer(self, layer: DecoderLayer, i: int) -> None:
        """DecoderLayer.forward in six kernels, for few rows."""
        c, B, sizes, eps = self.model.config, self.B, self.sizes, self.model.config.rms_norm_eps
        attention, moe, factor = layer.self_attn, layer.block_sparse_moe, c.residual_multiplier
        keys, values = self.cache.keys[i], self.cache.values[i]
        heads = sizes["H"] + 2 * sizes["G"]
        grid = (self.blocks_of("attn_in", "BN", sizes["C"] // 2), heads, B)
        norm, weights = layer.input_layernorm.weight, projections(attention)
        places = (self.cos, self.sin, self.at, self.start, self.q, keys, values)
        self.launch("attn_in", grid, self.x, norm, *weights, *places, eps, self.cache.max_length)
        self.attend(keys, values)
        grid = (self.blocks_of("attn_out", "BN", sizes["D"]), B)
        self.launch("attn_out", grid, self.y, attention.o_proj.weight, self.x, factor)
        self.route(layer)
        grid = (self.blocks_of("gate_up", "BN", sizes["F"]), sizes["K"], B)
        self.launch("gate_up", grid, self.h, self.chosen, moe.input_linear.weight, self.hidden)
        grid, weight = (self.blocks_of("down", "BN", sizes["D"]), B), moe.output_linear.weight
        self.launch("down", grid, self.hidden, self.chosen, self.w, weight, self.x, factor)

    def route(self, layer: DecoderLayer) -> None:
        """The router, a token at a time."""
        grid = (self.blocks_of("route", "BE", self.sizes["E"]), self.N)
        norm = layer.post_attention_layernorm.weight
        weights = (norm, layer.block_sparse_moe.router.layer.weight)
        outputs = (self.h, self.scores, self.routed, self.chosen, self.w)
        self.launch("route", grid, self.x, *weights, *outputs, self.model.config.rms_norm_eps)

    def attend(self, keys: Tensor, values: Tensor) -> None:
        """Attention of one new token a row."""
        grid = (self.splits, self.sizes["G"], self.B)
        places = (self.q, keys, values, self.at, self.start, self.shares, self.ended, self.y)
        scalars = (self.model.config.attention_multiplier, self.cache.max_length)
        self.launch("attend", grid, *places, *scalars, SPLITS=self.splits)

    def many_attention(self, layer: DecoderLayer, i: int) -> None:
        """The first half of DecoderLayer.forward, for many tokens."""
        c, N, T, sizes, attention = self.model.config, self.N, self.T, self.sizes, layer.self_attn
        keys, values, room = self.cache.keys[i], self.cache.values[i], self.cache.max_length
        half = sizes["C"] // 2
        pairs = self.blocks_of("attn_in_many", "BN", sizes["H"] * half)
        pairs += 2 * self.blocks_of("attn_in_many", "BN", sizes["G"] * half)
        where = (self.at, self.start, self.live)
        arguments = (self.h, *projections(attention), self.cos, self.sin, *where)
        grid = (pairs, self.blocks_of("attn_in_many", "BM", N))
        self.launch("attn_in_many", grid, *arguments, self.q, keys, values, N, T, room)
        if T == 1:
            self.attend(keys, values)
        else:
            tokens = self.options["attend_many"]["BM"] // sizes["R"]
            arguments = (self.q, keys, values, *where, self.y, c.attention_multiplier)
            grid = (self.B * sizes["G"], cdiv(T, tokens))
            self.launch("attend_many", grid, *arguments, T, room)
        grid = (
            self.blocks_of("attn_out_many", "BN", sizes["D"]),
            self.blocks_of("attn_out_many", "BM", N),
        )
        arguments = (self.y, attention.o_proj.weight, self.x, self.live, c.residual_multiplier)
        self.launch("attn_out_many", grid, *arguments, N, T)

    def many_experts(self, layer: DecoderLayer) -> None:
        """The second half of DecoderLayer.forward but its sum, which is add_norm's, for many
        tokens."""
        sizes, N, tiles, moe = self.sizes, self.N, self.tile_count, layer.block_sparse_moe
        if self.by_token:
            self.route(layer)
        else:
            weights = (layer.post_attention_layernorm.weight, moe.router.layer.weight)
            arguments = (self.x, *weights, self.at, self.start, self.live, self.h, self.chosen)
            scalars = (self.model.config.rms_norm_eps, N, self.T)
            self.launch("route_many", (self.blocks,), *arguments, self.w, self.counts, *scalars)
        share = next_power_of_2(cdiv(tiles, self.blocks))
        more = {"BM": self.block, "ROWS": self.options["gate_up_many"]["BM"], "BX": share}
        arguments = (self.chosen, self.counts, self.order, self.tiles, N, self.blocks, tiles)
        more["COUNTED"] = not self.by_token
        self.launch("sort_by_expert", (self.blocks,), *arguments, **more)
        grid = (self.blocks_of("gate_up_many", "BN", sizes["F"]), tiles)
        arguments = (self.h, self.order, self.tiles, moe.input_linear.weight, self.hidden, tiles)
        self.launch("gate_up_many", grid, *arguments)
        grid = (self.blocks_of("down_many", "BN", sizes["D"]), tiles)
        weight = moe.output_linear.weight
        self.launch(
            "down_many", grid, self.hidden, self.order, self.tiles, weight, self.rows, tiles
        )

    def add_norm(self, norm: Tensor, FIRST: bool) -> None:
        """The sum over the chosen experts, but before the FIRST layer; then a norm."""
        c, arguments = self.model.config, (self.rows, self.chosen, self.w, self.x, norm, self.h)
        scalars = (c.rms_norm_eps, c.residual_multiplier)
        self.launch("add_norm", (self.N,), *arguments, *scalars, FIRST=FIRST)

    def blocks_of(self, name: str, letter: str, size: int) -> int:
        """How many programs of a kernel share so many outputs or tokens."""
        return cdiv(size, self.options[name][letter])

    def launch(self, name: str, grid: tuple, *arguments: Tensor | float, **more: int) -> None:
        """A kernel with these arguments, the sizes that it names, and its options."""
        kernel, options = getattr(kernels, name), dict(self.options[name])
        if self.x.dtype == torch.float32:  # twice the bytes
            options["num_stages"] = min(2, options.get("num_stages", 2))
            options["num_warps"] = max(4, options["num_warps"])
        if self.sizes["PDL"]:
            options["launch_pdl"] = True
        sizes = {n: v for n, v in (self.sizes | more).items() if n in kernel.arg_names}
        kernel[grid](*arguments, **sizes, **options)


def projections(attention: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """What run launches, as one CUDA graph. Other threads may go on allocating meanwhile."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    before.wait_stream(stream)
    return graph


# ------------------------------------------------------------------------------------------- step
def piece_size(count: int, rows: int) -> int:
    """How many tokens of each row a Forward takes, for `count` that are to come: a power of two, so
    that few sizes are compiled and captured. Places that are left over cost next to nothing."""
    most = 1 << (max(1, PIECE // rows).bit_length() - 1)
    least = min(most, max(2, 64 // rows))
    return min(most, max(least, 1 << (count - 1).bit_length()))


def step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Callable:
    """See fast.step. Kernels are compiled at their first launch, some seconds in all, and come from
    Triton's cache in later processes."""
    if kernels is None:
        raise ValueError("compiled steps: need Triton on a GPU (pip install triton)")
    weight, B = model.model.norm.weight, len(pads)
    if weight.dtype not in DTYPES:
        raise ValueError(f"compiled steps: need bfloat16, float16 or float32, got {weight.dtype}")
    check_sizes(model.config, B)
    guard, last_pad = Guard(model, cache, pads), int(pads.max())
    forwards: dict[int, Forward] = {}

    @torch.inference_mode()
    def advance(ids: Tensor) -> Tensor:
        if guard.look(ids):  # memory has moved: graphs hold addresses
            forwards.clear()
        count = ids.shape[1]
        T = 1 if count == 1 and cache.length >= last_pad else piece_size(count, B)
        for piece in ids.split(T, dim=1):
            if T not in forwards:
                forwards[T] = Forward(model, cache, pads, T)
            start, end = cache.length, cache.length + piece.shape[1]
            with torch.cuda.device_of(cache.keys):
                logits = one_line(forwards[T], piece)
            cache.ids[:, start:end] = piece
            cache.length = end
        return logits

    return advance


def one_line(forward: Forward, ids: Tensor) -> Tensor:
    """forward(ids); whatever a compiler or a capture raises, of dozens of classes, is ValueError in
    a line."""
    try:
        return forward(ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compiling or capturing failed: {reason:.120}") from None
