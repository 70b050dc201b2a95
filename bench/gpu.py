"""What bench/gpu.sh asks of a card, a probe a process: prints facts, and keeps rows for its table.

python bench/gpu.py env|kernels|plain|memory|speed|table     or: step ROWS
"""

import gc
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import modes
import report
import torch
from torch.profiler import ProfilerActivity, profile

import bench
import fast
import generate
from granitemoe import ATTENTION

DRY, DIMS, OUT = os.environ.get("DRY"), os.environ.get("DIMS", "1b"), os.environ.get("OUT", ".")
DEVICE = torch.device("cpu" if DRY else "cuda:0")
SIZE = 32 if DRY else 512  # tokens before a step, or of a prompt
make_step = generate.plain_step if DRY else fast.step
RATIOS = {  # of an item: how many times as fast as what we are to be, at least
    "decode 1": (("transformers eager", 25), ("transformers compiled batched_mm", 3)),
    "decode 64": (("transformers eager", 10), ("transformers default", 6)),
    "prefill 2048": (("transformers default", 1.5),),
}
SHARES = {"decode 1": (0.26, 0.35), "decode 64": (0.4, 0.54)}  # of the limit: must, target


def keep(
    what: str, measured: float, must: float | None = None, target: float | None = None
) -> None:
    """A row of the table at the end."""
    row = {"goal": what, "measured": measured, "must": must, "target": target}
    print(what, round(measured, 4))
    with (Path(OUT) / "rows.jsonl").open("a") as file:
        print(json.dumps(row), file=file)


def env() -> None:
    print(json.dumps(report.environment(DEVICE)))
    if DEVICE.type == "cuda":
        print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
        print("compute capability", torch.cuda.get_device_capability(DEVICE))
        print(f"memory {torch.cuda.get_device_properties(DEVICE).total_memory / 1e9:.0f} GB")


def kernels() -> None:
    """Which kernel each kind of attention gets, of a released model's sizes."""
    cases = ((1, 513, 0), (1, 513, 1), (512, 512, 0), (512, 512, 1), (512, 1030, 0), (512, 1030, 1))
    for dtype in (torch.bfloat16, torch.float32):
        for queries, keys, masked in cases:
            like = {"device": DEVICE, "dtype": dtype}
            q, k = torch.randn(2, 16, queries, 64, **like), torch.randn(2, 8, keys, 64, **like)
            mask = torch.ones(2, 1, queries, keys, dtype=torch.bool, device=DEVICE)
            with profile(activities=[ProfilerActivity.CPU]) as run:
                ATTENTION["sdpa"](q, k, k, mask if masked else None, 1 / 64, 0.0)
            found = dict.fromkeys(x.name[6:] for x in run.events() if "::_" in x.name)
            names = [name for name in found if "attention" in name]
            print(f"{dtype} {queries:4} {keys:4} {'mask' * masked:4}", *names)


def ready(rows: int, room: int, filled: int) -> tuple:
    """The model, a cache that holds random tokens, and the ids of a step."""
    model, make = modes.random_model(DIMS, DEVICE), torch.Generator().manual_seed(rows)
    cache = modes.Ours(model, rows).new_cache(rows, room)
    size = (rows, filled + 1)
    ids = torch.randint(model.config.vocab_size, size, generator=make).to(DEVICE)
    for chunk in ids[:, :filled].split(max(1, 2048 // rows), dim=1):
        model(chunk, cache=cache, logits_to_keep=1)
    return model, cache, ids[:, filled:]


def seconds(step: Callable, count: int) -> list[float]:
    return [bench.timed(step, DEVICE) for _ in range(count)]


def plain() -> None:
    """Steps of the code that is read, one by one: each meets a new length."""
    model, cache, ids = ready(1, 2 * SIZE, SIZE)
    times = seconds(lambda: model(ids, cache=cache), 8 if DRY else 48)[2:]
    middle = statistics.median(times)
    keep("plain step: ms", middle * 1e3)
    keep("plain step: largest over median", max(times) / middle, 5)


def memory() -> None:
    """MB that replies to one conversation leave behind."""
    model, cache, _ = ready(1, 40 * 16, 1)
    held = []
    for turn in range(8):
        how = {"eos_token_ids": (), "cache": cache, "compiled": not DRY}
        list(generate.generate(model, [[5, turn]], 9, **how))
        gc.collect()
        held.append(0 if DRY else torch.cuda.memory_allocated(DEVICE) / 2**20)
    print("MB after each reply", held)
    keep("memory growth from the third reply to the eighth, MB", held[-1] - held[2], 0)


def launches(step: Callable, layers: int, what: str) -> None:
    """Of one step: kernels a layer, the time that the card is busy, the largest kernels."""
    kind = ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA
    with profile(activities=[kind]) as run:
        bench.timed(step, DEVICE)
    count, busy = Counter(), Counter()
    for event in run.events():
        if DRY or event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            busy[event.name] += event.cpu_time if DRY else event.device_time
    keep(f"{what}: launches a layer, head included", count.total() / layers)
    keep(f"{what}: busy, ms", busy.total() / 1e3)
    for name, spent in busy.most_common(14):
        print(f"{spent:8.0f} us {count[name]:5} x {name[:120]}")


def step(rows: str) -> None:
    """A step of --compile: early in its cache and, for one row, late in a long one."""
    room = 2 * SIZE if rows != "1" else 128 if DRY else 16384
    what = f"--compile, {rows} rows"
    for filled in (SIZE, room - 48)[: 1 + (rows == "1")]:
        one_step(what, ready(2 if DRY else int(rows), room, filled))


def one_step(what: str, at: tuple) -> None:
    """Whether it is right, how long it takes, and of which kernels it is made."""
    model, cache, ids = at
    filled, layers = cache.length, model.config.num_hidden_layers
    exact = model(ids, cache=cache, logits_to_keep=1).logits[:, -1].float()
    cache.length = filled
    made, found = make_step(model, cache, torch.zeros_like(ids)), []
    first = bench.timed(lambda: found.append(made(ids).clone()), DEVICE)
    print(f"first step, with capturing: {first:.1f} s")
    keep(f"{what}, {filled} tokens: error", float((found[0] - exact).norm() / exact.norm()), 0.1)
    times = seconds(lambda: made(ids), 4 if DRY else 30)
    keep(f"{what}, {filled} tokens: ms", statistics.median(times) * 1e3)
    if filled == SIZE:
        launches(lambda: made(ids), layers, what)


def speed() -> None:
    """Prompts and steps in turn with transformers, and what of it the targets name."""
    model = modes.random_model(DIMS, DEVICE)
    for name in ("transformers compiled grouped_mm", "transformers batched_mm"):
        modes.MODES.pop(name, None)  # slow ones
    run = bench.Bench(model, True, DEVICE, bool(DRY), bool(DRY), False)
    run.look_at_limits()
    wanted = ("decode 1", "decode 64", "prefill 2048", "prefill 8192")
    run.full = True
    items = [i for i in bench.items(run, False) if DRY or i.name in wanted]
    run.full = False
    for item in sorted(items, key=lambda item: item.name):
        if item.name == "decode 64":  # takes too long, twice
            modes.MODES.pop("transformers compiled batched_mm", None)
        run.measure(item)
    report.derive(run.rows, *run.limits)
    limits = dict(zip(("bytes_per_second", "flops_per_second"), run.limits, strict=True))
    out = {"rows": run.rows, "limits": limits, "environment": report.environment(DEVICE)}
    out |= {"startup": [], "load": [], "profile": [], "goals": []}
    print(report.markdown(out))
    for row in report.goals(out, "cuda", DIMS):
        keep(row["goal"], row["measured"], row["must"], row["target"])
    for name in dict.fromkeys(row["item"] for row in run.rows):
        found = {row["mode"]: row for row in run.rows if row["item"] == name}
        best = min((r for m, r in found.items() if m[:4] == "ours"), key=lambda r: r["median"])
        keep(f"{name}, {best['mode']}: share of the limit", best["of_limit"], *SHARES.get(name, ()))
        for peer, must in RATIOS.get(name, ()):
            if peer in found:
                times = found[peer]["median"] / best["median"]
                keep(f"{name}, {best['mode']}: times {peer}", times, must)


def table() -> None:
    """All that was kept, against must and target: the higher the better, but where it is named."""
    lower = ("launches", "error", "growth", "largest")
    print("| what | measured | must | target | |\n| --- | --- | --- | --- | --- |")
    for line in (Path(OUT) / "rows.jsonl").read_text().splitlines():
        what, measured, must, target = json.loads(line).values()
        sign = -1 if any(word in what for word in lower) else 1
        met = [goal is None or sign * measured >= sign * goal for goal in (must, target)]
        verdict = "" if (must, target) == (None, None) else "met" if all(met) else "short of target"
        verdict = "MISSED" if not met[0] else verdict
        goals = ("" if goal is None else f"{goal:g}" for goal in (must, target))
        print(f"| {what} | {measured:.4g} | {' | '.join(goals)} | {verdict} |")


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    probes = (env, kernels, plain, memory, step, speed, table)
    with torch.inference_mode():
        {probe.__name__: probe for probe in probes}[name](*rest)
