"""The forward pass on CUDA: the kernels of kernels.py, their memory, and CUDA graphs of them.

What a card measured is in bench/RESULTS.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fast.guard import Guard
from granitemoe import DecoderLayer, GraniteMoeConfig, GraniteMoeForCausalLM, KVCache, rope_tables

try:
    from triton import cdiv, next_power_of_2
    from triton.runtime.errors import OutOfResources

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
    "attend_many": {"BM": 64, "BS": 128, "num_warps": 4, "num_stages": 3},
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
    "attn_out_many": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    "gate_up_many": {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
    "down_many": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}


# ------------------------------------------------------------------------------------------ sizes
def check_sizes(c: GraniteMoeConfig, rows: int) -> None:
    """Raises ValueError for sizes that the kernels do not take."""
    V, D, F = c.vocab_size, c.hidden_size, c.intermediate_size
    E, K = c.num_local_experts, c.num_experts_per_tok
    if c.head_dim > 256:
        raise ValueError(f"compiled steps: head_dim must be at most 256, got {c.head_dim}")
    if E > 256:
        raise ValueError(f"compiled steps: num_local_experts must be at most 256, got {E}")
    if rows * K > 2**20 or rows >= 2**16:
        raise ValueError(f"compiled steps: {rows} rows are too many for them")
    assignments = max(PIECE, rows) * K
    largest = max(assignments * max(D, F), V * max(D, rows), D * max(D, F))
    if largest >= 2**31:  # places are numbers of 32 bits
        sizes = f"vocab_size {V}, hidden_size {D}, intermediate_size {F}"
        raise ValueError(f"compiled steps: {sizes} are too large for {rows} rows")


def letters(c: GraniteMoeConfig) -> dict[str, int]:
    """The sizes by their letters in kernels.py. Tensor cores take blocks of at least 16."""
    sizes = {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "H": c.num_attention_heads,
        "G": c.num_key_value_heads,
        "C": c.head_dim,
        "R": c.num_attention_heads // c.num_key_value_heads,
        "E": c.num_local_experts,
        "K": c.num_experts_per_tok,
        "F": c.intermediate_size,
    }
    for name in ("D", "F", "K"):
        sizes[name + "P"] = next_power_of_2(sizes[name])
    for name in ("C", "R", "E"):
        sizes[name + "P"] = max(16, next_power_of_2(sizes[name]))
    return sizes


def takes_few(sizes: dict[str, int], rows: int) -> bool:
    """Whether a step is organised by outputs: few rows, and sizes whose weights fit registers."""
    return rows <= FEW_ROWS and sizes["D"] <= 4096 and sizes["KP"] * sizes["FP"] <= 2**14


def adapted(
    options: dict[str, dict], sizes: dict[str, int], dtype: torch.dtype, capability: int
) -> dict[str, dict]:
    """A copy of a table of options, for numbers of 4 bytes, large heads and other cards."""
    options = {name: dict(own) for name, own in options.items()}
    for own in options.values():
        if dtype == torch.float32:
            own["num_warps"] = max(4, min(8, 2 * own["num_warps"]))
            own["num_stages"] = min(2, own.get("num_stages", 2))
    most_bytes = 8192 if capability >= 10 else 16384  # of a block of keys; more would spill
    for name in ("attend", "attend_many"):
        if name in options:
            most = most_bytes // (sizes["CP"] * dtype.itemsize)
            options[name]["BS"] = max(16, min(options[name]["BS"], most))
    if "route_many" in options:  # its blocks of h and of the router's weight, in shared memory
        most = max(16, 2**15 // (sizes["EP"] * dtype.itemsize))
        options["route_many"]["BK"] = min(options["route_many"]["BK"], most)
    if "attend_many" in options:  # a block holds at least a token, with all its heads of a key head
        options["attend_many"]["BM"] = max(options["attend_many"]["BM"], sizes["RP"])
    return options


def splits(rows: int, G: int, room: int) -> int:
    """How many programs share a key head's slots: two for each of a card's processors, but not
    more than a cache of `room` slots has work for."""
    most = 8 if room <= 2048 else 32
    return max(1, min(most, next_power_of_2(cdiv(264, rows * G))))


# ------------------------------------------------------------------------------------- one forward
class Forward:
    """The kernels for T tokens of each of B rows, with memory of their own. The first call launches
    them one by one, which compiles what is not compiled; the second captures a CUDA graph."""

    def __init__(
        self,
        model: GraniteMoeForCausalLM,
        cache: KVCache,
        pads: Tensor,
        rope: list[Tensor],
        T: int,
    ) -> None:
        """rope: rope_tables of all slots of the cache."""
        device, dtype = cache.keys.device, cache.keys.dtype
        self.model, self.cache = model, cache
        self.cos, self.sin = rope
        self.T, self.B = T, len(pads)
        self.N = self.B * T
        self.sizes = letters(model.config)
        self.few = T == 1 and takes_few(self.sizes, self.B)
        self.by_token = T == 1 and self.N <= ONE_SORT  # the router goes token by token
        options = STEP if T == 1 else SHORT if self.N <= SHORT_PIECE else LONG
        capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        self.options = adapted(FEW if self.few else options, self.sizes, dtype, capability)
        self.dependent = DEPENDENT and capability >= 9 and not torch.version.hip
        self.graph, self.launched = None, False
        self.allocate(pads.flatten().to(torch.int32), device, dtype)

    def allocate(self, start: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """What the kernels read and write, by their names there."""
        B, N, D, H, G, C, E, K, F = self.B, self.N, *(self.sizes[name] for name in "DHGCEKF")
        like = {"device": device, "dtype": dtype}
        single = {"device": device, "dtype": torch.float32}
        whole = {"device": device, "dtype": torch.int32}
        self.ids = torch.zeros(B, self.T, device=device, dtype=torch.int64)
        self.at = torch.zeros(1, **whole)
        self.live = torch.full((1,), self.T, **whole)
        self.start = start
        self.x = torch.zeros(N, D, **like)
        self.h = torch.zeros(N, D, **like)
        self.q = torch.zeros(N, H, C, **like)
        self.y = torch.zeros(N, D, **like)
        if self.T == 1:
            self.splits = splits(B, G, self.cache.max_length)
            self.shares = torch.zeros(B * H * self.splits * (C + 2), **single)
            self.attended = torch.zeros(B * G, **whole)  # 0 between launches, as `routed`
        self.scores = torch.zeros(N, E, **single)
        self.routed = torch.zeros(N, **whole)
        self.chosen = torch.zeros(N, K, **whole)
        self.w = torch.zeros(N, K, **like)
        self.hidden = torch.zeros(N * K, F, **like)
        self.logits = torch.zeros(B, self.sizes["V"], **single)
        if not self.few:
            block = self.options["route_many"]["BM"]
            self.block = next_power_of_2(N) if self.by_token else block
            self.blocks = cdiv(N, self.block)
            rows = self.options["gate_up_many"]["BM"]
            self.tile_count = N * K // rows + min(E, N * K)  # at most; others are of no expert
            self.counts = torch.zeros(self.blocks, E, **whole)
            self.order = torch.zeros(N * K, **whole)
            self.tiles = torch.zeros(3, self.tile_count, **whole)
            self.rows = torch.zeros(N * K, D, **like)

    def __call__(self, ids: Tensor) -> Tensor:
        """Up to T new tokens (B, any) to the logits (B, V) after the last of them; their keys and
        values go to the cache."""
        count = ids.shape[1]
        self.ids[:, :count] = ids
        self.at.fill_(self.cache.length)
        if self.T > 1:
            self.live.fill_(count)
        if self.launched and self.graph is None:
            self.graph = capture(self.run)
        if self.graph is None:
            self.run()
            self.launched = True  # not where that was interrupted: something may not be compiled
        else:
            self.graph.replay()
        return self.logits

    def run(self) -> None:
        """GraniteMoeForCausalLM.forward: launch its kernels."""
        body, c = self.model.model, self.model.config
        embedding = body.embed_tokens.weight
        head = embedding if c.tie_word_embeddings else self.model.lm_head.weight
        self.launch("embed", (self.N,), self.ids, embedding, self.x, c.embedding_multiplier)
        if self.few:
            for i, layer in enumerate(body.layers):
                self.few_layer(layer, i)
            self.few_head(body.norm.weight, head)
        else:
            norms = [layer.input_layernorm.weight for layer in body.layers] + [body.norm.weight]
            self.add_norm(norms[0], first=True)
            for i, layer in enumerate(body.layers):
                self.many_attention(layer, i)
                self.many_experts(layer)
                self.add_norm(norms[i + 1], first=False)
            self.many_head(head)

    # -- few rows
    def few_layer(self, layer: DecoderLayer, i: int) -> None:
        """DecoderLayer.forward in six kernels."""
        c, sizes, B = self.model.config, self.sizes, self.B
        attention = layer.self_attn
        moe = layer.block_sparse_moe
        keys, values = self.cache.keys[i], self.cache.values[i]
        pairs = self.share("attn_in", "BN", sizes["C"] // 2)
        self.launch(
            "attn_in",
            (pairs, sizes["H"] + 2 * sizes["G"], B),
            self.x,
            layer.input_layernorm.weight,
            *projections(attention),
            *(self.cos, self.sin, self.at, self.start),
            *(self.q, keys, values),
            c.rms_norm_eps,
            self.cache.max_length,
        )
        self.attend(keys, values)
        outputs = self.share("attn_out", "BN", sizes["D"])
        arguments = (self.y, attention.o_proj.weight, self.x, c.residual_multiplier)
        self.launch("attn_out", (outputs, B), *arguments)
        self.route(layer)
        grid = (self.share("gate_up", "BN", sizes["F"]), sizes["K"], B)
        self.launch("gate_up", grid, self.h, self.chosen, moe.input_linear.weight, self.hidden)
        self.launch(
            "down",
            (self.share("down", "BN", sizes["D"]), B),
            *(self.hidden, self.chosen, self.w),
            moe.output_linear.weight,
            self.x,
            c.residual_multiplier,
        )

    def few_head(self, norm: Tensor, head: Tensor) -> None:
        c, grid = self.model.config, (self.share("head", "BN", self.sizes["V"]), self.B)
        arguments = (self.x, norm, head, self.logits, c.rms_norm_eps, c.logits_scaling)
        self.launch("head", grid, *arguments)

    # -- few rows, and one token of each of many
    def attend(self, keys: Tensor, values: Tensor) -> None:
        """Attention of one new token a row."""
        self.launch(
            "attend",
            (self.splits, self.sizes["G"], self.B),
            *(self.q, keys, values),
            *(self.at, self.start),
            *(self.shares, self.attended, self.y),
            self.model.config.attention_multiplier,
            self.cache.max_length,
            SPLITS=self.splits,
        )

    def route(self, layer: DecoderLayer) -> None:
        """The router, token by token."""
        self.launch(
            "route",
            (self.share("route", "BE", self.sizes["E"]), self.N),
            self.x,
            layer.post_attention_layernorm.weight,
            layer.block_sparse_moe.router.layer.weight,
            *(self.h, self.scores, self.routed, self.chosen, self.w),
            self.model.config.rms_norm_eps,
        )

    # -- many tokens
    def many_attention(self, layer: DecoderLayer, i: int) -> None:
        """The first half of DecoderLayer.forward."""
        c, N, T, sizes, attention = self.model.config, self.N, self.T, self.sizes, layer.self_attn
        keys, values = self.cache.keys[i], self.cache.values[i]
        S = self.cache.max_length
        of_q = self.share("attn_in_many", "BN", sizes["H"] * sizes["C"] // 2)
        of_k = self.share("attn_in_many", "BN", sizes["G"] * sizes["C"] // 2)
        self.launch(
            "attn_in_many",
            (of_q + 2 * of_k, self.share("attn_in_many", "BM", N)),
            self.h,
            *projections(attention),
            *(self.cos, self.sin, self.at, self.start, self.live),
            *(self.q, keys, values),
            *(N, T, S),
        )
        if T == 1:
            self.attend(keys, values)
        else:
            tokens = self.options["attend_many"]["BM"] // sizes["R"]
            self.launch(
                "attend_many",
                (self.B * sizes["G"], cdiv(T, tokens)),
                *(self.q, keys, values),
                *(self.at, self.start, self.live),
                self.y,
                c.attention_multiplier,
                *(T, S),
            )
        outputs = self.share("attn_out_many", "BN", sizes["D"])
        grid = (outputs, self.share("attn_out_many", "BM", N))
        arguments = (self.y, attention.o_proj.weight, self.x, self.live, c.residual_multiplier)
        self.launch("attn_out_many", grid, *arguments, N, T)

    def many_experts(self, layer: DecoderLayer) -> None:
        """The second half of DecoderLayer.forward, but for its sum, which is add_norm's."""
        sizes, tiles, moe = self.sizes, self.tile_count, layer.block_sparse_moe
        if self.by_token:
            self.route(layer)
        else:
            self.route_many(layer)
        self.launch(
            "sort_by_expert",
            (self.blocks,),
            *(self.chosen, self.counts, self.order, self.tiles),
            *(self.N, self.blocks, tiles),
            BM=self.block,
            ROWS=self.options["gate_up_many"]["BM"],
            BX=next_power_of_2(cdiv(tiles, self.blocks)),
            COUNTED=not self.by_token,
        )
        grid = (self.share("gate_up_many", "BN", sizes["F"]), tiles)
        arguments = (self.h, self.order, self.tiles, moe.input_linear.weight, self.hidden)
        self.launch("gate_up_many", grid, *arguments, tiles)
        grid = (self.share("down_many", "BN", sizes["D"]), tiles)
        arguments = (self.hidden, self.order, self.tiles, moe.output_linear.weight, self.rows)
        self.launch("down_many", grid, *arguments, tiles)

    def route_many(self, layer: DecoderLayer) -> None:
        """The router, a block of tokens at a time."""
        self.launch(
            "route_many",
            (self.blocks,),
            self.x,
            layer.post_attention_layernorm.weight,
            layer.block_sparse_moe.router.layer.weight,
            *(self.at, self.start, self.live),
            *(self.h, self.chosen, self.w, self.counts),
            self.model.config.rms_norm_eps,
            *(self.N, self.T),
        )

    def add_norm(self, norm: Tensor, first: bool) -> None:
        """The sum over the chosen experts, but before the first layer; then a norm."""
        self.launch(
            "add_norm",
            (self.N,),
            *(self.rows, self.chosen, self.w),
            *(self.x, norm, self.h),
            self.model.config.rms_norm_eps,
            self.model.config.residual_multiplier,
            FIRST=first,
        )

    def many_head(self, head: Tensor) -> None:
        logits = self.share("head_many", "BN", self.sizes["V"])
        grid = (logits, self.share("head_many", "BM", self.B))
        scaling = self.model.config.logits_scaling
        self.launch(
            "head_many", grid, self.h, head, self.live, self.logits, scaling, self.B, self.T
        )

    # -- launching
    def share(self, name: str, block: str, size: int) -> int:
        """How many programs of a kernel share so many outputs or tokens."""
        return cdiv(size, self.options[name][block])

    def launch(self, name: str, grid: tuple, *arguments: Tensor | float, **more: int) -> None:
        """A kernel with these arguments, the sizes that it names, and its options. On a card with
        less memory for a program, with fewer stages."""
        kernel, options = getattr(kernels, name), self.options[name]
        more |= {"PDL": self.dependent}
        sizes = {key: value for key, value in self.sizes.items() if key in kernel.arg_names}
        given = options | sizes | more
        if self.dependent:
            given["launch_pdl"] = True
        try:
            kernel[grid](*arguments, **given)
        except OutOfResources:
            if options.get("num_stages", 1) == 1:
                raise
            options["num_stages"] -= 1
            self.launch(name, grid, *arguments, **more)


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
    least = min(most, 1 << (max(2, 64 // rows).bit_length() - 1))
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
    rope, forwards = [], {}

    @torch.inference_mode()
    def advance(ids: Tensor) -> Tensor:
        if guard.look(ids):  # memory has moved: graphs hold addresses
            rope.clear()
            forwards.clear()
        if not rope:
            slots = torch.arange(cache.max_length, device=cache.keys.device)
            rope.extend(rope_tables(slots[None], model.config, cache.keys.dtype))
        count = ids.shape[1]
        T = 1 if count == 1 and cache.length >= last_pad else piece_size(count, B)
        for piece in ids.split(T, dim=1):
            if T not in forwards:
                forwards[T] = Forward(model, cache, pads, rope, T)
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
