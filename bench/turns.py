"""Our default mode in turn with another checkout of this project and with transformers.

bench.py --against PATH calls it. Each side is a process of its own, which loads one checkpoint and
then waits for a line of JSON: what to run. So the sides share nothing but the processor, one runs
at a time, and a checkout needs only what all have: generate.load_model, KVCache and the model.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"transformers default": None, "transformers eager": "eager"}  # its form of the experts
SEEN = 97  # of the logits every so many are compared
MAX_DIFFERENCE = 0.1  # of their norm, in bfloat16: where a near-tie is routed otherwise


# ------------------------------------------------------------------------------------ the processes
def load_ours(checkout: str, folder: str) -> tuple[torch.nn.Module, Callable, Callable]:
    """The model of a checkout, as its default mode runs; new_cache and step."""
    sys.path.insert(0, checkout)
    import generate
    import granitemoe

    if Path(granitemoe.__file__).resolve().parent != Path(checkout).resolve():
        raise ValueError(f"--against: {checkout} has no granitemoe.py")
    model = generate.load_model(folder, dtype="bfloat16")

    def new_cache(rows: int, room: int) -> Any:
        return granitemoe.KVCache(model.config, rows, room, dtype=torch.bfloat16)

    def step(ids: Tensor, cache: Any) -> Tensor:
        return model(ids, cache=cache, logits_to_keep=1).logits[:, -1]

    return model, new_cache, step


def load_peer(side: str, folder: str) -> tuple[torch.nn.Module, Callable, Callable]:
    """The same of transformers."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if PEERS[side]:
        model.set_experts_implementation(PEERS[side])

    def step(ids: Tensor, cache: Any) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return model, lambda rows, room: DynamicCache(config=model.config), step


class Side:
    """What a process does: rounds of an item."""

    def __init__(self, name: str, where: str, folder: str) -> None:
        load = load_peer if name in PEERS else load_ours
        model, self.new_cache, self.step = load(where, folder)
        for parameter in model.parameters():  # neither a file's pages nor huge ones
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self.vocabulary = model.config.vocab_size
        self.item, self.cache = None, None

    def ids(self, seed: int, rows: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (rows, tokens), generator=generator)

    def begin(self, item: dict[str, Any]) -> None:
        """A cache that holds what comes before; for a prefill there is nothing."""
        rows, past = item["batch"], item["past"]
        self.item, self.cache = item, self.new_cache(rows, item["room"])
        for piece in self.ids(0, rows, past).split(max(1, 2048 // rows), dim=1) if past else ():
            self.step(piece, self.cache)

    def round(self, item: dict[str, Any], turn: int) -> dict[str, Any]:
        """Seconds of a step, and some logits of the last one."""
        if item != self.item or not item["past"]:
            self.begin(item)
        size = (item["batch"], item["tokens"])
        ids = [self.ids(1 + turn * item["steps"] + n, *size) for n in range(item["steps"])]
        began = time.perf_counter()
        for new in ids:
            logits = self.step(new, self.cache)
            logits.argmax(dim=-1)
        took = (time.perf_counter() - began) / item["steps"]
        return {"seconds": took, "logits": logits[0, ::SEEN].tolist()}


@torch.inference_mode()
def serve(name: str, where: str, folder: str) -> None:
    side = Side(name, where, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(side.round(**json.loads(line))), flush=True)


# ---------------------------------------------------------------------------------- who starts them
def answer(name: str, side: subprocess.Popen) -> str:
    """The next line of a side. ValueError where its process has ended."""
    line = side.stdout.readline()
    if not line:
        raise ValueError(f"--against: {name!r} has ended; why is said above")
    return line


def ask(name: str, side: subprocess.Popen, item: dict[str, Any], turn: int) -> dict[str, Any]:
    """One round of a side."""
    print(json.dumps({"item": item, "turn": turn}), file=side.stdin, flush=True)
    return json.loads(answer(name, side))


def rounds_of(
    sides: dict[str, subprocess.Popen], item: dict[str, Any], rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step, by side, one a round, after a round that is not counted. Every other round
    goes backwards, so that none is always measured first. ValueError where logits differ."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        logits = {}
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            told = ask(name, sides[name], item, turn)
            logits[name] = torch.tensor(told["logits"])
            seconds[name] += [told["seconds"]] if turn else []
        exact = logits["ours"]
        for name, found in logits.items():
            if not (found - exact).norm() < MAX_DIFFERENCE * exact.norm():
                raise ValueError(f"{item['name']}, {name}: computes other logits than ours")
    return seconds


def measure(
    items: list[dict[str, Any]], other: Path, peer: bool, folder: str, rounds: int
) -> list[dict[str, Any]]:
    """A row an item and side: seconds, and how many times as long as ours, round for round."""
    where = {"ours": ROOT, "other checkout": other} | (
        dict(zip(PEERS, PEERS, strict=True)) if peer else {}
    )
    pipes, rows = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}, []
    with ExitStack() as stack:
        sides = {}
        for name, path in where.items():
            line = [sys.executable, __file__, name, str(path), folder]
            sides[name] = stack.enter_context(subprocess.Popen(line, **pipes))
        for name, side in sides.items():
            answer(name, side)  # it has loaded
        for item in items:
            seconds = rounds_of(sides, item, rounds)
            for name, found in seconds.items():
                ratios = [a / b for a, b in zip(found, seconds["ours"], strict=True)]
                row = {"item": item["name"], "side": name, "seconds": found}
                rows.append(row | {"ratios": ratios if name != "ours" else None})
                middle = statistics.median(found) * 1e3
                print(f"{item['name']}, {name}: {middle:.2f} ms a step", file=sys.stderr)
    return rows


if __name__ == "__main__":
    serve(*sys.argv[1:])
