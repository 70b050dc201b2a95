"""What bench.py measures in turn with its modes and is not Python: a bare read, and llama.cpp."""

import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from generate import cpu

Work = Callable[[int], float]  # from the number of a round to the seconds of a step


def bare_read() -> Callable[[int], int] | None:
    """A function that reads so many bytes of memory, in C; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        file, source = f"{folder}/read.so", str(Path(__file__).with_name("read.c"))
        line = [*cpu.compiler(), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run([*line, source, "-o", file], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        read_all = ctypes.CDLL(file).read_all
    memory = torch.ones(2**28)  # 1 GiB: no cache holds it
    threads, start = torch.get_num_threads(), ctypes.c_void_p(memory.data_ptr())

    def read(count: int) -> int:
        whole, rest = divmod(int(count), memory.nbytes)
        for size in [memory.nbytes] * whole + [rest]:
            read_all(start, ctypes.c_int64(size), threads)
        return memory.nbytes  # which keeps it

    return read


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
