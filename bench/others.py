"""What bench.py measures in turn with its modes and is not Python: a bare read, and llama.cpp."""

import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast import cpu
from files import checkpoint

Work = Callable[[int], float]  # from the number of a round to the seconds of a step


class Reader:
    """Reads memory in C, in as many threads as PyTorch has. ValueError without a compiler."""

    def __init__(self, numbers: int = 2**28) -> None:  # 1 GiB: no cache holds it
        self.memory = checkpoint.fresh((numbers,), torch.float32).fill_(1)  # as weights are
        with tempfile.TemporaryDirectory() as folder:
            file, source = f"{folder}/read.so", str(Path(__file__).with_name("read.c"))
            line = [*cpu.compiler(), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            try:
                subprocess.run([*line, source, "-o", file], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise ValueError(f"bare read: {error}") from None
            self.library = ctypes.CDLL(file)

    def touch(self, *tensors: Tensor) -> None:
        """All their bytes, as far as each is at hand in one piece."""
        for x in tensors:
            where, size = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.nbytes)
            self.library.read_all(where, size, torch.get_num_threads())

    def seconds(self, count: float) -> float:
        """How long so many bytes take, once the memory has been touched."""
        self.touch(self.memory)
        whole, rest = divmod(int(count), self.memory.nbytes)
        began = time.perf_counter()
        self.touch(*[self.memory] * whole, self.memory[: rest // 4])
        return time.perf_counter() - began


def run(program: Path, *arguments: Any) -> list[dict[str, Any]]:
    """The results of one of llama.cpp's benchmarks, which it prints as lines of JSON."""
    line = [str(program), *map(str, arguments)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"--llama-bench: {program.name}: {error}") from None
    return [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]


def llama(item: Any, program: Path, gguf: Path) -> Work:
    """llama.cpp on an item of bench.py: one row by llama-bench, more by its llama-batched-bench."""
    how = ["-m", gguf, "-t", torch.get_num_threads(), "-fa"]
    if item.batch == 1:
        what = (
            ["-p", 0, "-n", item.steps, "-d", item.past]
            if item.past
            else ["-p", item.tokens, "-n", 0]
        )
        alone = [1, "-r", 1, "-o", "jsonl", *what]
        return lambda turn: item.tokens / run(program, *how, *alone)[0]["avg_ts"]
    batched, room = program.with_name("llama-batched-bench"), item.batch * (item.past + item.steps)
    what = ["-npp", item.past, "-ntg", item.steps, "-npl", item.batch, "-c", room]
    return lambda turn: (
        run(batched, *how, "on", *what, "--output-format", "jsonl")[0]["t_tg"] / item.steps
    )
