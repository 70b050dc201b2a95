"""The same numbers sooner on a CPU: forms for granitemoe.py's open tables, and what is in C.

Reasons with a figure are of two cores of an AMD EPYC with AVX-512 (bench/RESULTS.md).
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.cuda import Step
from granitemoe import (
    ATTENTION,
    EXPERTS,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    KVCache,
    Mask,
    attend_sdpa,
    rope_tables,
    sort_by_expert,
    swiglu,
)

BLOCK = 128  # queries


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, drop: float) -> Tensor:
    """attend_eager for 128 queries at a time, whose scores stay in the processor's cache.

    In bfloat16, a prompt takes 3/4 of PyTorch's kernel's time. One query is left to attend_sdpa.
    A mask, where there is one, must be causal too, as the model's is.
    """
    T, G, S = q.shape[2], k.shape[1], k.shape[2]
    if T == 1:
        return attend_sdpa(q, k, v, mask, scale, drop)
    grouped = q.unflatten(1, (G, -1)).flatten(0, 1)  # the query heads of one key head in a row
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    blocks = []
    for start in range(0, T, BLOCK):
        queries = grouped[:, :, start : start + BLOCK]
        heads, t = queries.shape[1:3]
        end, rows = S - T + start + t, queries.flatten(1, 2)  # the last query sees `end` keys
        scores = torch.baddbmm(q.new_zeros(1), rows, k[:, :, :end], beta=0, alpha=scale)
        by_head = scores.view(-1, G, heads, t, end)
        if mask is None:  # only these queries' own keys are hidden from some of them
            by_head[..., end - t :] += q.new_full((t, t), -math.inf).triu(1)
        else:
            by_head.masked_fill_(~mask[:, :, None, start : start + t, :end], -math.inf)
        probs = F.dropout(scores.softmax(dim=-1), drop)
        blocks.append((probs @ v[:, :end]).view_as(queries))
    return torch.cat(blocks, dim=2).view_as(q)


def experts_runs(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """experts_loop with the assignments sorted once: each expert's are one run. Returns y_ND.

    Many rows in 16 bits are filled up to a multiple of 16, since oneDNN compiles a kernel for each
    number of rows, half a millisecond each: it would double the time of a process's first prompt.
    """
    if len(x_ND) == 1:
        return experts_one_token(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)
    order_M, tokens_M, ends_E = sort_by_expert(expert_ids_NK, len(gate_up_EPD))
    weights_M = weights_NK.flatten()[order_M]
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if start < end:
            tokens, count = tokens_M[start:end], end - start
            rows = x_ND[tokens]
            if count > 64 and count % 16 and rows.element_size() == 2:
                rows = F.pad(rows, (0, 0, 0, -count % 16))
            rows = F.linear(swiglu(F.linear(rows, gate_up_EPD[e])), down_EDF[e])[:count]
            y_ND.index_add_(0, tokens, rows.to(y_ND.dtype) * weights_M[start:end, None])
        start = end
    return y_ND.to(x_ND.dtype)


def experts_one_token(
    x_ND: Tensor, gate_up_EPD: Tensor, down_EDF: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor
) -> Tensor:
    """For N = 1 there is nothing to sort, and one swiglu serves all K experts. Returns y_ND."""
    experts = expert_ids_NK[0].tolist()
    rows_KP = torch.cat([F.linear(x_ND, gate_up_EPD[e]) for e in experts])
    hidden_KF = swiglu(rows_KP)
    rows_KD = torch.cat(
        [F.linear(h, down_EDF[e]) for e, h in zip(experts, hidden_KF.split(1), strict=True)]
    )
    return weights_NK @ rows_KD


ATTENTION["blocks"] = attend_blocks
EXPERTS["runs"] = experts_runs


# --------------------------------------------------------------------------------------------- in C

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "prompt.c", "numbers.h")]
FLAGS = ["-std=gnu11", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
         "-fno-signed-zeros", "-fassociative-math"]  # fmt: skip
NATIVE = (["-march=native"], ["-mcpu=native"])  # the second where the first is not known
FLOAT = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are: C relies on it
WHOLE = {"dtype": torch.int64, "device": "cpu"}
DTYPES = {torch.bfloat16: [], torch.float32: ["-DWEIGHT=float"]}


def compiler() -> list[str]:
    """The command that compiles C: $CC, else cc."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def compile_step(dtype: torch.dtype, file: Path) -> None:
    """Build the C texts for this processor, with OpenMP if the compiler has it, or ValueError."""
    said, texts = [], [str(file) for file in SOURCES if file.suffix == ".c"]
    for parallel, native in itertools.product((["-fopenmp"], []), NATIVE):
        line = [*compiler(), *FLAGS, *native, *parallel, *DTYPES[dtype], *texts]
        try:
            done = subprocess.run([*line, "-o", str(file), "-lm"], capture_output=True, input=b"")
        except OSError as error:
            tried = f"{compiler()[0]!a:.60} ($CC, else cc): {error.strerror}"
            raise ValueError(f"compiled steps: need a C compiler; tried {tried}") from None
        if done.returncode == 0:
            with contextlib.suppress(OSError):  # zig cc builds with an OpenMP that is not there
                if parallel:
                    ctypes.CDLL(str(file))
                return
        said += done.stderr.decode(errors="replace").strip().splitlines()[:1] or ["no message"]
    raise ValueError(f"compiled steps: {compiler()[0]!a:.60} failed: {ascii(said[0])[1:-1]:.120}")


def built_name(dtype: torch.dtype) -> str:
    """Another one for whatever may make another library: the processor, too."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    machine = (platform.machine(), platform.processor(), found)
    texts = [file.read_bytes() for file in SOURCES]
    what = (texts, compiler(), FLAGS, DTYPES[dtype], machine)
    return f"step-{hashlib.sha256(repr(what).encode()).hexdigest()[:20]}.so"


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The C texts as a library, from the user's cache if it was built before. Or ValueError."""
    name = built_name(dtype)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "granitemoe")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                compile_step(dtype, file := Path(unfinished, name))
                file.rename(folder / name)  # at once: another process may be building it too
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError):  # no home, or nothing can be written or executed there
        with tempfile.TemporaryDirectory() as folder:  # what is loaded stays loaded
            compile_step(dtype, file := Path(folder, name))
            return ctypes.CDLL(str(file))


SIZES = ("V", "D", "F", "L", "H", "G", "C", "E", "K", "B", "S", "at", "threads")
SCALARS = {  # by their names in C and in the config
    "eps": "rms_norm_eps", "embedding_multiplier": "embedding_multiplier",
    "attention_multiplier": "attention_multiplier", "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
}  # fmt: skip
TENSORS = ("layers", "embed_tokens", "norm", "head", "cos", "sin", "keys", "values", "ids", "pads",
           "every", "x", "q", "k", "v", "scores", "y", "logits_NE", "weights_NK", "rows_MP",
           "rows_MD", "logits", "normed", "mixed", "hidden_MF", "expert_ids_NK", "order_M",
           "tokens_M", "ends_E", "tied")  # fmt: skip
LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
         "self_attn.o_proj", "post_attention_layernorm", "block_sparse_moe.input_linear",
         "block_sparse_moe.output_linear", "block_sparse_moe.router.layer")  # fmt: skip


def struct(sizes: Sequence[str], scalars: Iterable[str], tensors: Sequence[str]) -> type:
    """A struct of the C texts: these fields in this order; of tensors, the addresses."""
    fields = [(name, ctypes.c_int64) for name in sizes]
    fields += [(name, ctypes.c_float) for name in scalars]
    fields += [(name, ctypes.c_void_p) for name in tensors]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


Model = struct(SIZES, SCALARS, TENSORS)


def weights_of(model: GraniteMoeForCausalLM) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Those outside the layers by their names in C, and those of the layers in turn, as they are
    now: a step keeps them, whatever becomes of the model. Raises ValueError for other models."""
    body, tied = model.model, model.config.tie_word_embeddings
    head = body.embed_tokens if tied else model.lm_head
    outer = {"embed_tokens": body.embed_tokens.weight, "norm": body.norm.weight}
    inner, expected = [], [f"{name}.weight" for name in LAYER]
    for layer in body.layers:
        own = dict(layer.named_parameters())
        if odd := sorted({*own} ^ {*expected}):
            raise ValueError(f"compiled steps: take Granite's own layers; {odd[0]!a:.60} differs")
        inner += [own[name].detach() for name in expected]
    outer = {name: x.detach() for name, x in (outer | {"head": head.weight}).items()}
    if {x.dtype for x in (*outer.values(), *inner)} != {outer["norm"].dtype}:
        raise ValueError("compiled steps: need weights of one dtype")
    if not all(x.is_contiguous() for x in (*outer.values(), *inner)):
        raise ValueError("compiled steps: need contiguous weights")
    return outer, inner


def buffers(B: int, S: int, c: GraniteMoeConfig) -> dict[str, Tensor]:
    """What a step computes, by its names in C; an Act there has 4 bytes or fewer."""
    D, E, K, F = c.hidden_size, c.num_local_experts, c.num_experts_per_tok, c.intermediate_size
    H, kv, M = c.num_attention_heads, c.num_key_value_heads * c.head_dim, B * K
    floats = {"x": B * D, "q": B * D, "k": B * kv, "v": B * kv, "scores": B * H * (S + 3),
              "y": B * D, "logits_NE": (B, E), "weights_NK": (B, K), "rows_MP": M * 2 * F,
              "rows_MD": M * D, "normed": B * D, "mixed": B * D, "hidden_MF": M * F}  # fmt: skip
    whole = {"expert_ids_NK": (B, K), "order_M": M, "tokens_M": M, "ends_E": E, "tied": 1}
    made = {name: torch.empty(size, **FLOAT) for name, size in floats.items()}
    made |= {name: torch.empty(size, **WHOLE) for name, size in whole.items()}
    return made | {"every": torch.arange(M + H, **WHOLE)}


def model_in_c(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> Model:
    """Filled in but for what changes with a step: `at`, `threads`, `ids` and `logits`."""
    c, (L, B, G, S, C) = model.config, cache.keys.shape
    outer, inner = weights_of(model)
    cos, sin = rope_tables(torch.arange(S, **WHOLE)[None], c, cache.keys.dtype)
    cached = {"keys": cache.keys, "values": cache.values, "pads": pads.clone()}
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


def check(x: Tensor) -> None:
    """Raises ValueError unless there is C for x's device and dtype."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        what = f"{x.device}, {str(x.dtype).removeprefix('torch.')}"
        raise ValueError(f"compiled steps: need CUDA, or a CPU and bfloat16 or float32; got {what}")


def token_step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """The step of one token a row in C; see generate.plain_step for the arguments.

    Raises ValueError where it cannot be built, or not for this model.
    """
    check(cache.keys)
    run, m = library(cache.keys.dtype).step, model_in_c(model, cache, pads)
    names = ("logits_NE", "expert_ids_NK", "weights_NK", "tied")
    logits_NE, expert_ids_NK, weights_NK, tied = (m.held[name] for name in names)

    def step(ids: Tensor, uniform: Tensor) -> Tensor:
        if cache.length >= cache.max_length:
            raise ValueError(f"cache: {cache.length + 1} tokens do not fit in {cache.max_length}")
        ids, logits = ids[:, 0].contiguous(), torch.empty(m.B, m.V, **FLOAT)
        m.ids, m.logits = ids.data_ptr(), logits.data_ptr()
        m.at, m.threads = cache.length, torch.get_num_threads()
        tied[0] = -1
        run(ctypes.byref(m))
        while tied[0] >= 0:  # a layer's choice of experts is ambiguous: as Router makes it
            top = logits_NE.topk(m.K, dim=-1)
            expert_ids_NK[:], weights_NK[:] = top.indices, top.values.softmax(dim=-1)
            run(ctypes.byref(m))
        cache.ids[:, cache.length] = ids
        cache.length += 1
        return choose(logits, uniform)

    return step


def remark(model: GraniteMoeForCausalLM, rows: int) -> str:
    """For the command: what the compiled steps of so many rows are or, of none, what they would
    bring (measured: bench/RESULTS.md). To build them pays where there are many parameters."""
    weight = model.model.norm.weight
    if rows:
        built = library(weight.dtype)
        parallel = any(hasattr(built, name) for name in ("GOMP_parallel", "__kmpc_fork_call"))
        return ", compiled prompts and steps: C" + ", in one thread (no OpenMP)" * (not parallel)
    large = model.num_parameters() > 1e8 and weight.device.type == "cpu" and weight.dtype in DTYPES
    return "; --compile decodes 3 x as fast" if large and shutil.which(compiler()[0]) else ""
