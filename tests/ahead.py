"""Compile the kernels of fast/kernels.py ahead of time, for a card that is not there.

    python tests/ahead.py CAPABILITY [1b|3b] [bfloat16|float16|float32] [STEP ...]

Each launch of a forward pass goes through Triton's own binding and compiling, behind a driver that
only says which card it would be. A line a kernel: registers, spills (stack), shared memory, and how
many of its loads are of 16 bytes. STEP is rows x tokens, such as 1x1 or 1x2048.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast import cuda
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache, rope_tables

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
STEPS = ("1x1", "64x1", "1x256", "1x2048")
WIDE = r"ld\.global[^;]*v4|cp\.async\.cg|cp\.async[^;]*, 0x10"


class Pretended:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def config(size: str) -> GraniteMoeConfig:
    """A layer of a released size."""
    D, H, E = {"1b": (1024, 16, 32), "3b": (1536, 24, 40)}[size]
    return GraniteMoeConfig(
        vocab_size=49155,
        hidden_size=D,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=8,
        num_local_experts=E,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        embedding_multiplier=12.0,
        attention_multiplier=1 / 64,
        residual_multiplier=0.22,
        logits_scaling=6.0,
        tie_word_embeddings=True,
    )


def forward(size: str, dtype: torch.dtype, rows: int, tokens: int) -> cuda.Forward:
    """A pass whose tensors have no values."""
    c = config(size)
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(c)
    model = model.to(dtype).to_empty(device="cpu")
    cache = KVCache(c, rows, max(600, tokens), dtype=dtype)
    rope = rope_tables(torch.arange(cache.max_length)[None], c, dtype)
    return cuda.Forward(model, cache, torch.zeros(rows, 1, dtype=torch.long), rope, tokens)


def facts(kernel) -> dict:
    """What a compiled kernel takes of a processor."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "wide": len(re.findall(WIDE, ptx)),
        "loads": len(re.findall(r"ld\.global|cp\.async\.c[ag]\.", ptx)),
        "wgmma": "wgmma" in ptx,
    }


def compiled(capability: int, size: str, dtype: torch.dtype, rows: int, tokens: int) -> dict:
    """Each kernel of a pass, by its name: its options and facts."""
    triton.runtime.driver.set_active(Pretended(capability))
    one, found = forward(size, dtype, rows, tokens), {}
    one.dependent = capability >= 90
    one.options = cuda.adapted(one.options, one.sizes, dtype, capability // 10)
    real = cuda.kernels

    def instead(name: str) -> SimpleNamespace:
        kernel = getattr(real, name)

        def launch(*arguments, **options) -> None:
            if name not in found or name == "add_norm":
                done = kernel.warmup(*arguments, grid=(1,), **options)
                found[name] = facts(done) | {"options": one.options[name]}

        return SimpleNamespace(arg_names=kernel.arg_names, launch=launch)

    class Kernels:
        def __getattr__(self, name: str):
            kernel = instead(name)

            class Launcher:
                arg_names = kernel.arg_names

                def __getitem__(self, grid):
                    return kernel.launch

            return Launcher()

    cuda.kernels = Kernels()
    try:
        one.run()
    finally:
        cuda.kernels = real
    return found


def main() -> None:
    capability, *words = int(sys.argv[1]), *sys.argv[2:]  # one a process: Triton keeps kernels
    sizes = [word for word in words if word in ("1b", "3b")] or ["1b", "3b"]
    names = ("bfloat16", "float16", "float32")
    dtypes = [word for word in words if word in names] or ["bfloat16"]
    steps = [word for word in words if "x" in word] or STEPS
    for size, dtype, step in itertools.product(sizes, dtypes, steps):
        rows, tokens = map(int, step.split("x"))
        made = compiled(capability, size, getattr(torch, dtype), rows, tokens)
        for name, fact in made.items():
            print(json.dumps([capability, size, dtype, step, name, fact]), flush=True)


if __name__ == "__main__":
    main()
