"""The model in C, on a CPU: how the C texts are built, and what is filled in for them.

cpu.c computes a step of one token a row, prompt.c attention and experts of a prompt. Reasons with a
figure are of two cores of an AMD EPYC with AVX-512 (bench/RESULTS.md).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.guard import Guard
from granitemoe import (
    Attention,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    KVCache,
    MoE,
    attend_sdpa,
    rope_tables,
    rotate,
    sort_by_expert,
    visible,
)

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "prompt.c", "numbers.h")]
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fopenmp-simd",  # sums that say so may be in any order; no library is needed
]
NATIVE = (["-march=native"], ["-mcpu=native"])  # the second where the first is not known
FLOAT = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are: C relies on it
WHOLE = {"dtype": torch.int64, "device": "cpu"}
OPENMP = {True: ["-fopenmp"], False: []}
FUNCTIONS = ("step", "attention", "experts")  # of the library
CPUINFO = Path("/proc/cpuinfo")
CPU_SECONDS = 120  # of a compiler, which takes one or two
DTYPES = {torch.bfloat16: [], torch.float32: ["-DWEIGHT=float"]}


def compiler() -> list[str]:
    """The command that compiles C: $CC, else cc."""
    wanted = os.environ.get("CC", "")
    try:
        return shlex.split(wanted) or ["cc"]
    except ValueError:  # a quotation mark without its other one: no such command is found
        return [wanted]


def has_compiler() -> bool:
    return shutil.which(compiler()[0]) is not None


def compile_step(dtype: torch.dtype, file: Path, parallel: bool) -> None:
    """Build the C texts for this processor into a file, which then can be loaded. Or ValueError."""
    if not has_compiler():
        raise ValueError(
            f"compiled steps: need a C compiler; tried {compiler()[0]!a:.60} ($CC, cc)"
        )
    texts = [str(each) for each in SOURCES if each.suffix == ".c"]
    said = []
    for native in NATIVE:
        line = [*compiler(), *FLAGS, *native, *OPENMP[parallel], *DTYPES[dtype], *texts]
        done = run_limited([*line, "-o", str(file), "-lm"])
        said += done.stderr.decode(errors="replace").strip().splitlines()[:1]
        if done.returncode == 0:
            if loaded(file) is not None:  # zig cc builds with an OpenMP that is not there
                return
            said.append("it built no library that can be loaded")
    reason = ascii((said or ["no message"])[0])[1:-1]
    raise ValueError(f"compiled steps: {compiler()[0]!a:.60} failed: {reason:.120}")


def run_limited(line: list[str]) -> subprocess.CompletedProcess:
    """Run a compiler, which may outlive this process, but not by more than its CPU time."""
    if os.name == "posix":  # the shell sets the limit: Python in a forked child could block
        limit = f'ulimit -t {CPU_SECONDS} 2>/dev/null; exec "$@"'
        line = ["/bin/sh", "-c", limit, "sh", *line]
    return subprocess.run(line, capture_output=True, input=b"")


def loaded(file: Path) -> ctypes.CDLL | None:
    """A library with all functions of ours, or None."""
    with contextlib.suppress(OSError):
        found = ctypes.CDLL(str(file))
        if all(hasattr(found, name) for name in FUNCTIONS):
            return found
    return None


def processor() -> object:
    """What -march=native depends on: by the system or, where it does not say, by the compiler."""
    if CPUINFO.exists():
        named = ("model name", "flags", "Features")
        return sorted({x for x in CPUINFO.read_text().splitlines() if x.startswith(named)})
    macros = ["-dM", "-E", "-x", "c", os.devnull]
    with contextlib.suppress(OSError):
        return [run_limited([*compiler(), *native, *macros]).stdout for native in NATIVE]
    return None


def built_name(dtype: torch.dtype, parallel: bool) -> str:
    """The beginning of a file name, which changes with all that can change the library."""
    texts = [file.read_bytes() for file in SOURCES]
    machine = (platform.machine(), platform.processor(), processor())
    what = (texts, compiler(), FLAGS, OPENMP[parallel], DTYPES[dtype], machine)
    return f"step-{hashlib.sha256(repr(what).encode()).hexdigest()[:20]}-"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


# ---------------------------------------------------------------------------- where it is kept
def ours(path: Path, kind: Callable) -> bool:
    """Whether a path is no link, of this kind, and nobody else's to write."""
    found = path.lstat()
    private = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return private and kind(found.st_mode)


def nobody_elses(path: Path) -> bool:
    """Whether no other user but root can replace what is in a folder."""
    found = path.stat()
    open_to_all = found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and not open_to_all


def kept_in() -> Path:
    """The folder for what is built, which is made if need be. Raises OSError or RuntimeError where
    there is none that only this user can write: what is in it is executed."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = named if named.is_absolute() else Path.home() / ".cache"
    folder = base / "granitemoe"
    if not hasattr(os, "geteuid"):
        raise OSError("this system does not say whose a folder is")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid == os.geteuid() and not folder.is_symlink():
        folder.chmod(0o700)
    if not ours(folder, stat.S_ISDIR) or not all(map(nobody_elses, folder.resolve().parents)):
        raise OSError(f"{folder} is not this user's alone")
    return folder


def find(folder: Path, name: str) -> ctypes.CDLL | None:
    """The library of this name, if it is whole: its digest is the rest of its name."""
    for file in sorted(folder.glob(f"{name}*.so")):
        if ours(file, stat.S_ISREG) and file.name == f"{name}{digest(file.read_bytes())}.so":
            found = loaded(file)
            if found is not None:
                return found
        with contextlib.suppress(OSError):  # cut off, say: it is built anew
            file.unlink()
    return None


def keep(file: Path, folder: Path, name: str) -> None:
    """Move a library there at once, since another process may be building it too, and written
    through to the disk, so that no part of it is there after a crash."""
    with file.open("rb+") as opened:
        data = opened.read()
        os.fsync(opened.fileno())
    file.chmod(0o700)
    file.rename(folder / f"{name}{digest(data)}.so")


def build(dtype: torch.dtype, folder: Path, parallel: bool, keeping: bool) -> ctypes.CDLL:
    """From the folder, if it is there, or built; and kept there."""
    name = built_name(dtype, parallel)
    found = find(folder, name) if keeping else None
    if found is None:
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            file = Path(unfinished, "step.so")
            compile_step(dtype, file, parallel)
            found = loaded(file)  # what is loaded stays loaded
            if keeping:
                keep(file, folder, name)
    return found


def parallel_or_not(dtype: torch.dtype, folder: Path, keeping: bool) -> ctypes.CDLL:
    """With OpenMP, or without where the compiler cannot do it."""
    try:
        return build(dtype, folder, True, keeping)
    except ValueError as with_openmp:
        try:
            return build(dtype, folder, False, keeping)
        except ValueError:
            raise with_openmp from None


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The C texts as a library, from the user's cache if it was built before. Or ValueError."""
    try:
        return parallel_or_not(dtype, kept_in(), True)
    except (OSError, RuntimeError):  # no home, or nothing can be written or executed there
        with tempfile.TemporaryDirectory() as folder:
            return parallel_or_not(dtype, Path(folder), False)


SIZES = ("V", "D", "F", "L", "H", "G", "C", "E", "K", "B", "S", "at", "threads")
SCALARS = {  # by their names in C and in the config
    "eps": "rms_norm_eps",
    "embedding_multiplier": "embedding_multiplier",
    "attention_multiplier": "attention_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
}
TENSORS = (
    "layers",
    "embed_tokens",
    "norm",
    "head",
    "cos",
    "sin",
    "keys",
    "values",
    "ids",
    "pads",
    "every",
    "x",
    "q",
    "k",
    "v",
    "scores",
    "y",
    "logits_NE",
    "weights_NK",
    "rows_MP",
    "rows_MD",
    "logits",
    "normed",
    "mixed",
    "hidden_MF",
    "expert_ids_NK",
    "order_M",
    "tokens_M",
    "ends_E",
    "tied",
)
LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "block_sparse_moe.input_linear",
    "block_sparse_moe.output_linear",
    "block_sparse_moe.router.layer",
)


def struct(sizes: Sequence[str], scalars: Iterable[str], tensors: Sequence[str]) -> type:
    """A struct of the C texts: these fields in this order; of tensors, the addresses."""
    fields = [(name, ctypes.c_int64) for name in sizes]
    fields += [(name, ctypes.c_float) for name in scalars]
    fields += [(name, ctypes.c_void_p) for name in tensors]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


Model = struct(SIZES, SCALARS, TENSORS)


def weights_of(model: GraniteMoeForCausalLM) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The weights outside the layers, by their names in C, and those of the layers in order. A step
    keeps these tensors until it takes addresses anew. A Guard has read them."""
    body = model.model
    head = body.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    outer = {"embed_tokens": body.embed_tokens, "norm": body.norm, "head": head}
    inner = [layer.get_submodule(name) for layer in body.layers for name in LAYER]
    found = {name: module.weight.detach() for name, module in outer.items()}
    return found, [module.weight.detach() for module in inner]


def buffers(B: int, S: int, c: GraniteMoeConfig) -> dict[str, Tensor]:
    """What a step computes, by its names in C; an Activation has 4 bytes or fewer."""
    D, E, K, F = c.hidden_size, c.num_local_experts, c.num_experts_per_tok, c.intermediate_size
    H, kv, M = c.num_attention_heads, c.num_key_value_heads * c.head_dim, B * K
    floats = {
        "x": B * D,
        "q": B * D,
        "k": B * kv,
        "v": B * kv,
        "scores": B * H * (S + 3),
        "y": B * D,
        "logits_NE": (B, E),
        "weights_NK": (B, K),
        "rows_MP": M * 2 * F,
        "rows_MD": M * D,
        "normed": B * D,
        "mixed": B * D,
        "hidden_MF": M * F,
    }
    whole = {"expert_ids_NK": (B, K), "order_M": M, "tokens_M": M, "ends_E": E, "tied": 1}
    made = {name: torch.empty(size, **FLOAT) for name, size in floats.items()}
    made |= {name: torch.empty(size, **WHOLE) for name, size in whole.items()}
    return made | {"every": torch.arange(M + H, **WHOLE)}


def model_in_c(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Model:
    """Filled in but for what changes with a step: `at`, `threads`, `ids` and `logits`."""
    c, (L, B, G, S, C) = model.config, cache.keys.shape
    outer, inner = weights_of(model)
    cos, sin = rope_tables(torch.arange(S, **WHOLE)[None], c, cache.keys.dtype)
    cached = {"keys": cache.keys, "values": cache.values, "pads": pads}
    held = outer | {"cos": cos, "sin": sin} | cached | buffers(B, S, c)
    layers = (ctypes.c_void_p * len(inner))(*[x.data_ptr() for x in inner])
    sizes = {"V": c.vocab_size, "D": c.hidden_size, "F": c.intermediate_size, "L": L, "G": G}
    sizes |= {"H": c.num_attention_heads, "C": C, "E": c.num_local_experts, "B": B, "S": S}
    m = Model(**sizes, K=c.num_experts_per_tok, layers=ctypes.addressof(layers))
    for name, field in SCALARS.items():
        setattr(m, name, getattr(c, field))
    for name, tensor in held.items():
        setattr(m, name, tensor.data_ptr())
    m.held, m.inner, m.pointers = held, inner, layers  # it holds addresses; these, the memory
    return m


def one_token(m: Model, cache: KVCache, start: int, ids: Tensor) -> Tensor:
    """The step of one token a row in C: from ids (B, 1), for slot `start`, to logits (B, V)."""
    ids, logits = ids[:, 0].contiguous(), torch.empty(m.B, m.V, **FLOAT)
    m.ids, m.logits = ids.data_ptr(), logits.data_ptr()
    m.at, m.threads = start, torch.get_num_threads()
    run, tied = library(cache.keys.dtype).step, m.held["tied"]
    tied[0] = -1
    run(ctypes.byref(m))
    while tied[0] >= 0:  # a layer's choice of experts is ambiguous: as Router makes it
        top = m.held["logits_NE"].topk(m.K, dim=-1)
        m.held["expert_ids_NK"][:] = top.indices
        m.held["weights_NK"][:] = top.values.softmax(dim=-1)
        run(ctypes.byref(m))
    cache.ids[:, start] = ids
    cache.length = start + 1
    return logits


# ---------------------------------------------------------------------------------------- prompts
RUN, KEYS, MOST_C = 256, 96, 128  # as in prompt.c
AttentionInC = struct(
    ("B", "H", "G", "T", "S", "C", "threads"), ("scale",), ("q", "k", "values", "y", "pads")
)
ExpertsInC = struct(
    ("E", "D", "F", "Y", "threads"),
    (),
    ("gate_up_EPD", "down_EDF", "x_ND", "tokens_M", "ends_E", "weights_M", "y_ND", "x", "hidden"),
)


def attend_in_c(q: Tensor, k: Tensor, v: Tensor, pads: Tensor, scale: float) -> Tensor:
    """Causal attention of q (B, H, T, C) on k, v (B, G, S, C) from each row's first slot on, pads
    (B, 1). Returns (B, H, T, C)."""
    (B, H, T, C), (_, G, S, _) = q.shape, k.shape
    if C > MOST_C:  # too large for a thread's stack
        slots = torch.arange(S, **WHOLE)
        return attend_sdpa(q, k, v, visible(slots[S - T :], slots >= pads), scale, 0.0)
    values = F.pad(v, (0, 0, 0, -S % KEYS)).unflatten(2, (-1, KEYS)).transpose(-1, -2)
    y = q.new_empty(B, T, H, C)
    held = [q.contiguous(), k.contiguous(), values.contiguous(), y, pads.contiguous()]
    addresses = [x.data_ptr() for x in held]
    a = AttentionInC(B, H, G, T, S, C, torch.get_num_threads(), scale, *addresses)
    library(q.dtype).attention(ctypes.byref(a))
    return y.transpose(1, 2)


def experts_in_c(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_loop in C. Returns y_ND."""
    (N, D), (E, _, F) = x_ND.shape, down_EDF.shape
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, E)
    weights_M = weights_NK.flatten()[order_M].float()
    # 16 more: whole ROWS fit, and rows 4 KB apart would meet in the cache
    y_ND = torch.zeros(N, D + 16, **FLOAT)
    x, hidden = torch.empty(RUN * (D + 1), **FLOAT), torch.empty(RUN * (F + 1), **FLOAT)
    held = [gate_up_EPD, down_EDF, x_ND.contiguous(), tokens_M, ends_E.long(), weights_M, y_ND]
    addresses = [tensor.data_ptr() for tensor in (*held, x, hidden)]
    p = ExpertsInC(E, D, F, D + 16, torch.get_num_threads(), *addresses)
    library(x_ND.dtype).experts(ctypes.byref(p))
    return y_ND[:, :D].to(x_ND.dtype)


def attention_block(
    attention: Attention, x: Tensor, rope: list, pads: Tensor, cache: KVCache, layer: int
) -> Tensor:
    """Attention.forward with attend_in_c."""
    B, T, C = x.shape[0], x.shape[1], attention.config.head_dim
    q = attention.q_proj(x).view(B, T, -1, C).transpose(1, 2)
    k = attention.k_proj(x).view(B, T, -1, C).transpose(1, 2)
    v = attention.v_proj(x).view(B, T, -1, C).transpose(1, 2)
    k, v = cache.append(layer, rotate(k, *rope), v)
    y = attend_in_c(rotate(q, *rope), k, v, pads, attention.config.attention_multiplier)
    return attention.o_proj(y.transpose(1, 2).flatten(2))


def experts_block(moe: MoE, x_BTD: Tensor) -> Tensor:
    """MoE.forward with experts_in_c."""
    x_ND = x_BTD.flatten(0, 1)
    _, weights_NK, expert_ids_NK = moe.router(x_ND)
    matrices = (moe.input_linear.weight, moe.output_linear.weight)
    return experts_in_c(x_ND, *matrices, weights_NK, expert_ids_NK).view_as(x_BTD)


def read_prompt(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, ids: Tensor) -> Tensor:
    """GraniteMoeForCausalLM.forward for ids (B, T), with attention and experts in C. Returns the
    logits (B, V) after the last of them."""
    c, body = model.config, model.model
    start, end = cache.length, cache.length + ids.shape[1]
    positions = (torch.arange(start, end, **WHOLE) - pads).clamp(min=0)
    rope = rope_tables(positions, c, cache.keys.dtype)
    x = body.embed_tokens(ids) * c.embedding_multiplier
    for i, layer in enumerate(body.layers):
        y = attention_block(layer.self_attn, layer.input_layernorm(x), rope, pads, cache, i)
        x = x + y * c.residual_multiplier
        y = experts_block(layer.block_sparse_moe, layer.post_attention_layernorm(x))
        x = x + y * c.residual_multiplier
    cache.ids[:, start:end] = ids
    cache.length = end
    head = body.embed_tokens if c.tie_word_embeddings else model.lm_head
    return (F.linear(body.norm(x[:, -1]), head.weight) / c.logits_scaling).float()


# ------------------------------------------------------------------------------------------- both
class Step:
    """See fast.step. The first one of a process builds the C texts, in a second or two."""

    def __init__(self, model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> None:
        self.guard = Guard(model, cache, pads)
        device, dtype = self.guard.device, self.guard.dtype
        if device.type != "cpu" or dtype not in DTYPES:
            got = f"{device}, {str(dtype).removeprefix('torch.')}"
            need = "need CUDA, or a CPU and bfloat16 or float32"
            raise ValueError(f"compiled steps: {need}; got {got}")
        self.model, self.cache = model, cache
        self.pads = pads.clone(memory_format=torch.contiguous_format)
        self.last_pad = int(pads.max())
        library(dtype)
        self.m = model_in_c(model, cache, self.pads)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        model, cache, V = self.model, self.cache, self.model.config.vocab_size
        if self.guard.look(ids):
            self.m = model_in_c(model, cache, self.pads)
        low, high = ids.aminmax()
        if low < 0 or high >= V:  # C would read beyond the embedding
            raise ValueError(f"ids: must be from 0 to {V - 1}, got {int(low)} to {int(high)}")
        if ids.shape[1] == 1 and self.guard.start >= self.last_pad:
            return one_token(self.m, cache, self.guard.start, ids)
        return read_prompt(model, cache, self.pads, ids)


step = Step  # the name that each part has


def parallel(dtype: torch.dtype) -> bool:
    """Whether the library was built with OpenMP. Raises ValueError where it cannot be built."""
    runtimes = ("GOMP_parallel", "__kmpc_fork_call")
    return any(hasattr(library(dtype), name) for name in runtimes)
