"""What bench/gpu.sh runs in one process: what a card does with this model, against the targets.

    first     the first reply, before anything else has built kernels: seconds to its first token
    right     --compile against the code that is read, and both against float32, on four layers
    step      a token in each of 1, 8 and 64 rows; what generate() adds to it
    prompts   the time to the first token after 2,048 and 8,192
    profile   the kernels of a step and of a prompt, none of which starts before another ends

Each figure is printed and kept in $OUT at once: rows.jsonl has all, table.md those of this run.
What fails says so in one line, and in errors.log at length; the rest goes on.
"""

import argparse
import copy
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import modes
import report
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bench
import fast
import generate
from fast import cpu
from granitemoe import GraniteMoeForCausalLM as Model
from granitemoe import KVCache

DRY, OUT = bool(os.environ.get("DRY")), Path(os.environ.get("OUT", "/tmp/gpu"))
DEVICE = torch.device("cpu" if DRY else "cuda:0")
COMPILED = not DRY or cpu.has_compiler()  # else the step that is read stands in for fast.step
LIMIT = 230  # seconds for all
ROUNDS, MOST, ROUND = 3, 40, 0.25  # of a figure: rounds, steps in one at most, seconds of one

STEPS = {  # rows, tokens in the cache before
    "1 row": (1, 512), "1 row after 16,000": (1, 16000), "8 rows": (8, 512), "64 rows": (64, 512),
}  # fmt: skip
PROMPTS = {"prompt of 2,048": 2048, "prompt of 8,192": 8192}
LAYERS = 4  # of the model that is compared with float32
if DRY:
    STEPS = {name: (min(rows, 5), min(past // 16, 64)) for name, (rows, past) in STEPS.items()}
    PROMPTS = {name: tokens // 64 for name, tokens in PROMPTS.items()}
    LAYERS, MOST, ROUND = 2, 3, 0.01

# ---------------------------------------------------------------------------------------- targets
SPEED = {  # must, target, stretch: tokens a second of --compile on an H200
    "1b": {
        "1 row": (1300, 1700, 2200), "1 row after 16,000": (950, 1300, 1600),
        "64 rows": (32e3, 40e3, 48e3), "prompt of 2,048": (150e3, 300e3, 450e3),
        "prompt of 8,192": (250e3, 400e3, 500e3),
    },
    "3b": {"1 row": (800, 1000, 1250), "64 rows": (16e3, 20e3, 24e3)},
}  # fmt: skip
H100 = 0.71  # of an H200's speed, where bytes decide: in steps
PEERS = "times the faster transformers"
OTHER = {  # item and what is measured of it: must, target
    ("1 row", PEERS): (60,), ("64 rows", PEERS): (10,), ("prompt of 2,048", PEERS): (2.5,),
    ("first reply", "kernels not built"): (10, 5), ("first reply", "kernels built"): (0.3, 0.1),
    ("generate", "adds, greedy"): (0.12,), ("generate", "adds, sampled"): (0.5,),
}  # fmt: skip
TWICE = "off float32, times what is read"  # of --compile; noise alone makes a third more or less
LOWER = ("first reply", "generate", "right")  # the lower the better
VERDICTS = ("MISSED", "must met", "target met", "stretch met")


@dataclass
class Run:
    """What all sections share, and the figures so far."""

    peers: bool  # measure transformers too
    ends: float  # when the time is over, as time.monotonic counts
    began: float = field(default_factory=time.monotonic)
    dims: str = ""
    model: Model | None = None
    card: str = ""
    limits: tuple[float, float] = (1.0, 1.0)  # bytes copied, and FLOPs, a second
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def value(self, item: str, what: str) -> float | None:
        """A figure that is known already."""
        found = [row for row in self.rows if (row["item"], row["what"]) == (item, what)]
        return next((row["value"] for row in found if row["dims"] == self.dims), None)


def goals(run: Run, item: str, what: str) -> list[float]:
    """Must, target and stretch, as far as there are any, on this card."""
    if what == "ours --compile":
        slower = H100 if "H100" in run.card and item in STEPS else 1
        return [goal * slower for goal in SPEED.get(run.dims, {}).get(item, ())]
    return [2] if what == TWICE else list(OTHER.get((item, what), ()))


def keep(run: Run, item: str, what: str, value: float, unit: str, **more: Any) -> None:
    """Print a figure, and write it down."""
    row = {"dims": run.dims, "item": item, "what": what, "value": value, "unit": unit, **more}
    row["goals"] = goals(run, item, what)
    row["verdict"] = ""
    if row["goals"]:
        sign = -1 if item.startswith(LOWER) else 1
        row["verdict"] = VERDICTS[sum(sign * value >= sign * goal for goal in row["goals"])]
    run.rows.append(row)
    notes = "".join(f", {name} {x:.4g}" for name, x in more.items() if isinstance(x, float))
    print(f"{run.dims} {item}, {what}: {value:.4g} {unit}{notes} {row['verdict']}".rstrip())
    with (OUT / "rows.jsonl").open("a") as file:
        print(json.dumps({"at": time.strftime("%F %T"), "card": run.card, **row}), file=file)
    (OUT / "table.md").write_text(table(run))


def table(run: Run) -> str:
    """All figures; the targets with their verdicts once more below."""
    lines = [f"{run.card}: figures\n", "| | item | what | | unit | ms | of the limit |"]
    lines.append("|---" * 7 + "|")
    for row in run.rows:
        ms, share = row.get("ms", ""), row.get("share", "")
        cells = [row["dims"], row["item"], row["what"], f"{row['value']:.5g}", row["unit"]]
        cells += [ms and f"{ms:.4g}", share and f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{run.card}: targets\n", "| | item | what | | must | target | stretch | |"]
    lines.append("|---" * 8 + "|")
    for row in run.rows:
        if row["goals"]:
            cells = [row["dims"], row["item"], row["what"], f"{row['value']:.5g}"]
            cells += [f"{goal:g}" for goal in row["goals"]] + [""] * (3 - len(row["goals"]))
            lines.append(f"| {' | '.join([*cells, row['verdict']])} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------ how it goes
class Late(Exception):
    """The time of one job is over."""


def alarm(*_: Any) -> None:
    raise Late("its time was over")


def guarded(run: Run, name: str, job: Callable[[], Any], seconds: int = 0) -> Any:
    """What the job returns; or None where it fails or, with seconds, takes longer."""
    left = run.ends - time.monotonic()
    try:
        if left < 2:
            raise Late("left out, there is no time")
        if seconds:
            signal.alarm(max(1, int(min(seconds, left))))
        return job()
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        print(f"!!! {name}: {line:.200}")
        run.failed.append(name)
        with (OUT / "errors.log").open("a") as file:
            print(f"\n=== {name}\n{traceback.format_exc()}", file=file)
        return None
    finally:
        if seconds:
            signal.alarm(0)


def free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def compiled_step(model: Model, cache: KVCache, pads: Tensor) -> fast.Step:
    make = fast.step if COMPILED else generate.plain_step
    return make(model, cache, pads)


def random_ids(model: Model, rows: int, tokens: int) -> Tensor:
    """No two rows alike: each chooses experts of its own."""
    rng = torch.Generator().manual_seed(rows + tokens)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=rng).to(DEVICE)


def random_cache(model: Model, rows: int, room: int, filled: int) -> KVCache:
    """All its slots hold random numbers, under which attention is neither uniform nor one-hot."""
    cache = KVCache(model.config, rows, room, device=DEVICE, dtype=torch.bfloat16)
    torch.manual_seed(rows + filled)
    cache.keys.normal_(std=8)
    cache.values.normal_(std=4)
    cache.ids.zero_()
    cache.length = filled
    return cache


# ------------------------------------------------------------------------------------ environment
def driver() -> str:
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(line, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def environment(run: Run) -> None:
    """What is here, and what the card can do at most."""
    if run.peers:
        import transformers  # noqa: F401  (whose version the report tells)
    found = report.environment(DEVICE) | {"triton": version("triton")}
    run.card = found["device"]
    if DEVICE.type == "cuda":
        about = torch.cuda.get_device_properties(DEVICE)
        found |= {"driver": driver(), "CUDA": torch.version.cuda, "GB": about.total_memory / 1e9}
        found |= {"processors": about.multi_processor_count, "capability": about.major}
    print(json.dumps(found))
    numbers, side = (2**22, 512) if DRY else (2**30, 8192)
    x = torch.ones(numbers, device=DEVICE, dtype=torch.bfloat16)
    y, a = torch.empty_like(x), torch.randn(side, side, device=DEVICE).bfloat16()
    copied = min(bench.timed(lambda: y.copy_(x), DEVICE) for _ in range(5))
    multiplied = min(bench.timed(lambda: a @ a, DEVICE) for _ in range(5))
    run.limits = (2 * x.nbytes / copied, 2 * side**3 / multiplied)
    keep(run, "limits", "copy, read and write", run.limits[0] / 1e12, "TB/s")
    keep(run, "limits", "matmul in bfloat16", run.limits[1] / 1e12, "TFLOP/s")


# ------------------------------------------------------------------------------------ first reply
def forget() -> None:
    """Import fast/ anew, as another process would: with its functions go the kernels they keep."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("fast.")}
    for name in before:
        del sys.modules[name]
        vars(fast).pop(name.removeprefix("fast."), None)
    try:
        for name in before:
            setattr(fast, name.removeprefix("fast."), importlib.import_module(name))
    except Exception:  # what cannot be imported twice stays for those that come next
        for name, module in before.items():
            sys.modules[name] = module
            setattr(fast, name.removeprefix("fast."), module)
        raise
    free()


def first(run: Run) -> None:
    """Seconds from the call to the first id. On disk Triton finds no kernels, then its own."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
    prompt = random_ids(run.model, 1, 8 if DRY else 64).tolist()
    for state in ("kernels not built", "kernels built", "at once again"):
        if state != "at once again":
            forget()
        began = time.perf_counter()
        steps = generate.generate(run.model, prompt, 3, eos_token_ids=(), compiled=COMPILED)
        next(steps)
        took = time.perf_counter() - began
        next(steps)
        second = time.perf_counter() - began - took
        keep(run, "first reply", state, took, "s", second_token=second)
        steps.close()


# ------------------------------------------------------------------------------------------ right
class Case(NamedTuple):
    """Pieces that a step is given one after the other."""

    rows: int
    filled: int  # slots of the cache before
    pieces: list[int]
    pads: tuple[int, ...] = ()


CASES = {
    "one row": Case(1, 512, [1] * 8),
    "64 rows": Case(64, 512, [1, 1]),
    "padded rows": Case(4, 0, [512, 1, 1, 1, 1], (0, 7, 200, 511)),
    "prompt of 2,048": Case(1, 0, [2048, 1, 1, 1, 1]),
    "two turns": Case(1, 0, [700, 1, 1, 300, 1, 1]),
}
if DRY:
    for title, (count, held, parts, left) in CASES.items():
        parts = [max(1, part // 32) for part in parts]
        CASES[title] = Case(min(count, 5), held // 16, parts, tuple(pad // 33 for pad in left))


@contextmanager
def stronger(model: Model) -> Iterator[None]:
    """Matrices twice as large, and norms that are not 1, so that what is wrong in a block shows."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        elif "embed" not in name:
            parameter.mul_(2)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            elif "embed" not in name:
                parameter.div_(2)


def shallow(model: Model, dtype: torch.dtype) -> Model:
    """The first layers; in float32 a copy, in the forms that are the definition."""
    with torch.device("meta"):
        part = Model(replace(model.config, num_hidden_layers=LAYERS))
    part.load_state_dict(model.state_dict(), assign=True, strict=False)
    if dtype == torch.float32:
        part = copy.deepcopy(part).float()
        part.config.attention_backend, part.config.experts_backend = "eager", "loop"
    return part.eval()


def logits_of(model: Model, make: Callable, case: Case) -> Tensor:
    """After each piece, in each row: (pieces * B, V)."""
    room = case.filled + sum(case.pieces)
    cache = random_cache(model, case.rows, room, case.filled)
    dtype = model.model.norm.weight.dtype
    cache.keys, cache.values = cache.keys.to(dtype), cache.values.to(dtype)
    pads = torch.tensor(case.pads or (0,) * case.rows, device=DEVICE)[:, None]
    ids, found = random_ids(model, case.rows, sum(case.pieces)), []
    step = make(model, cache, pads)
    for piece in ids.split(case.pieces, dim=1):
        found.append(step(piece).float().clone())
    return torch.cat(found)


def right(run: Run, name: str, case: Case) -> None:
    """Relative errors of logits, the median of rows: a near-tie in a router spoils a few of them.
    In bfloat16 both are off float32; --compile should be by no more than what is read."""

    def off(a: Tensor, b: Tensor) -> float:
        return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())

    with stronger(run.model):
        model, exact = (shallow(run.model, dtype) for dtype in (torch.bfloat16, torch.float32))
        read, ours = (logits_of(model, make, case) for make in (generate.plain_step, compiled_step))
        truth = logits_of(exact, generate.plain_step, case)
    if not ours.isfinite().all():
        raise ValueError(f"not finite in {int((~ours.isfinite()).any(-1).sum())} of {len(ours)}")
    same = float((ours.argmax(-1) == read.argmax(-1)).float().mean())
    more = {"ours": off(ours, truth), "read": off(read, truth), "ours_off_read": off(ours, read)}
    ratio = more["ours"] / more["read"]
    keep(run, f"right: {name}", TWICE, ratio, "x", **more, same_choice=same)


def same_ids(run: Run) -> None:
    """How many ids of a greedy reply are equal before the first that is not."""
    prompt, count = random_ids(run.model, 1, 32).tolist(), 8 if DRY else 48
    how = {"eos_token_ids": (), "repetition_penalty": 1.7}  # or a random model soon repeats itself
    with stronger(run.model):
        replies = [
            [ids for (ids,) in generate.generate(run.model, prompt, count, compiled=way, **how)]
            for way in (False, COMPILED)
        ]
    equal = [a == b for a, b in zip(*replies, strict=True)]
    keep(run, "right: greedy reply", "equal ids", (equal + [False]).index(False), f"of {count}")


# -------------------------------------------------------------------------------------- in turn
SIDES = {
    "ours read": modes.Ours,
    "ours --compile": functools.partial(modes.Ours, make_step=compiled_step),
    "transformers default": modes.MODES["transformers default"].make,
    "transformers eager": modes.MODES["transformers eager"].make,
}


class Work:
    """One way of doing an item, again and again: steps after each other, or the same prompt."""

    def __init__(self, run: Run, name: str, item: bench.Item, source: KVCache) -> None:
        self.mode, self.item = SIDES[name](run.model, item.batch), item
        self.room, self.at = source.max_length, 0
        self.ids = random_ids(run.model, item.batch, self.room - item.past)
        self.cache = self.mode.new_cache(item.batch, self.room)
        modes.fill(self.cache, source)
        self.most = generate.PREFILL_TOKENS if name[:4] == "ours" else self.room

    def once(self) -> Tensor:
        """Logits after one more step, or after the prompt, read in pieces as generate does."""
        if self.item.past:
            self.at += 1
            return self.mode.step(self.ids[:, self.at - 1 : self.at], self.cache)
        if isinstance(self.cache, KVCache):
            self.cache.length = 0
        else:
            self.cache = self.mode.new_cache(1, self.room)
        for piece in self.ids.split(self.most, dim=1):
            logits = self.mode.step(piece, self.cache)
        return logits

    def start(self) -> Tensor:
        """Warm up, and see how many fit in a round; returns the first logits."""
        kept = []
        self.first = bench.timed(lambda: kept.append(self.once().float().clone()), DEVICE)
        bench.timed(self.once, DEVICE)
        took = bench.timed(self.once, DEVICE)
        self.count = max(1, min(MOST, int(ROUND / took)))
        return kept[0]

    def round(self) -> float:
        """Seconds of one, of several without a wait between them."""
        return bench.timed(lambda: [self.once() for _ in range(self.count)], DEVICE) / self.count


def in_turn(run: Run, item: bench.Item) -> None:
    """Ours read, ours --compile and transformers' two, round by round."""
    steps = 4 + ROUNDS * MOST if item.past else item.tokens
    source = random_cache(run.model, item.batch, item.past + steps, item.past)
    works, firsts = {}, {}
    for name in SIDES:
        if run.peers or name.startswith("ours"):
            box = 60 if name == "ours --compile" else 12
            start = functools.partial(begun, run, name, item, source)
            if found := guarded(run, f"{run.dims} {item.name}, {name}", start, box):
                works[name], firsts[name] = found
    times = defaultdict(list)
    for _ in range(ROUNDS):
        for name, work in [*works.items()]:
            took = guarded(run, f"{run.dims} {item.name}, {name}", work.round, 20)
            if took is None:
                del works[name]
            else:
                times[name].append(took)
    for name, seconds in times.items():
        exact = firsts.get("ours read", firsts[name])
        off = float((firsts[name] - exact).norm() / exact.norm())
        tell(run, item, name, seconds, off=off, first_s=works[name].first if name in works else 0.0)
    peers = [statistics.median(x) for name, x in times.items() if name.startswith("transformers")]
    if peers and "ours --compile" in times:
        ratio = min(peers) / statistics.median(times["ours --compile"])
        keep(run, item.name, PEERS, ratio, "x")


def begun(run: Run, name: str, item: bench.Item, source: KVCache) -> tuple[Work, Tensor]:
    work = Work(run, name, item, source)
    return work, work.start()


def tell(run: Run, item: bench.Item, name: str, seconds: list[float], **more: float) -> None:
    """Tokens a second, and the share of what the card allows."""
    c, middle, tokens = run.model.config, statistics.median(seconds), item.batch * item.tokens
    E, K = c.num_local_experts, c.num_experts_per_tok
    needs = bench.needs(run.model, item, E * (1 - (1 - K / E) ** tokens))
    least = max(needs["bytes"] / run.limits[0], needs["flops"] / run.limits[1])
    more |= {"ms": middle * 1e3, "low": min(seconds) * 1e3, "high": max(seconds) * 1e3}
    keep(run, item.name, name, tokens / middle, "tokens/s", **more, share=least / middle)


def new_step(run: Run, item: bench.Item) -> None:
    """A prompt as the first thing that a new step is given, which a reply's always is."""
    source = random_cache(run.model, 1, item.tokens, 0)
    times = []
    for _ in range(ROUNDS):
        work = Work(run, "ours --compile", item, source)
        times.append(bench.timed(work.once, DEVICE))
    keep(
        run, item.name, "--compile, a new step", item.tokens / statistics.median(times), "tokens/s"
    )


def replies(run: Run) -> None:
    """Milliseconds a token of generate(), and how many of them are not the step's."""
    every = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "seed": 0}
    prompt, count = random_ids(run.model, 1, STEPS["1 row"][1]).tolist(), 4 if DRY else 64
    step = run.value("1 row", "ours --compile")
    for name, how in (("greedy", {}), ("sampled", every | {"repetition_penalty": 1.1})):
        how |= {"eos_token_ids": (), "compiled": COMPILED}
        times = []
        for _ in generate.generate(run.model, prompt, 8 + count, **how):
            times.append(time.perf_counter())
        ms = (times[-1] - times[-1 - count]) / count * 1e3
        keep(run, "generate", name, ms, "ms a token")
        if step:
            keep(run, "generate", f"adds, {name}", ms - 1e3 / step, "ms a token")


# ---------------------------------------------------------------------------------------- profile
@contextmanager
def apart() -> Iterator[None]:
    """No kernel of ours starts before another ends: or its time would include the waiting."""
    try:
        part = importlib.import_module("fast.cuda")
    except ImportError:
        part = None
    before = getattr(part, "DEPENDENT", None)
    if before is not None:
        part.DEPENDENT = False
    try:
        yield
    finally:
        if before is not None:
            part.DEPENDENT = before


def kernels(run: Run, item: bench.Item) -> None:
    """Of one step or prompt: each kernel's number, its median and its sum in microseconds."""
    with apart():
        source = random_cache(run.model, item.batch, item.past + max(8, item.tokens), item.past)
        work = Work(run, "ours --compile", item, source)
        for _ in range(3):
            took = bench.timed(work.once, DEVICE)
        kind = ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA
        with profile(activities=[kind]) as record:
            bench.timed(work.once, DEVICE)
    times = defaultdict(list)
    for event in record.events():
        if DRY or event.device_type == DeviceType.CUDA:
            times[event.name].append(event.self_cpu_time_total if DRY else event.device_time)
    sums = Counter({name: sum(each) for name, each in times.items()})
    launches = sum(map(len, times.values()))
    more = {"ms": took * 1e3, "a_layer": launches / run.model.config.num_hidden_layers}
    more["kernels"] = {name: [len(each), sum(each)] for name, each in times.items()}
    keep(run, f"profile: {item.name}", "card busy", sums.total() / 1e3, "ms", **more)
    for name, spent in sums.most_common(8 if DRY else 24):
        each = times[name]
        middle, most = statistics.median(each), max(each)
        print(f"{spent:9.1f} us {len(each):5} x {middle:8.2f} (most {most:8.2f}) {name[:90]}")


# -------------------------------------------------------------------------------------------- all
Job = tuple[str, Callable[[], Any], int]  # its name, what it does, its seconds (0: it minds them)


def jobs(run: Run, section: str) -> Iterator[Job]:
    """What a section does for a model, one after the other."""
    steps = [bench.Item(name, rows, 1, past) for name, (rows, past) in STEPS.items()]
    prompts = [bench.Item(name, 1, tokens) for name, tokens in PROMPTS.items()]
    part = functools.partial
    if section == "first":
        yield "first reply", part(first, run), 60
    elif section == "right":
        for name, case in CASES.items():
            yield name, part(right, run, name, case), 40
        yield "greedy reply", part(same_ids, run), 20
    elif section == "step":
        for item in steps:
            yield item.name, part(in_turn, run, item), 0
        yield "generate", part(replies, run), 20
    elif section == "prompts":
        for item in prompts:
            yield item.name, part(in_turn, run, item), 0
            yield f"{item.name}, a new step", part(new_step, run, item), 15
    else:
        for item in (steps[0], steps[-1], prompts[0]):
            yield item.name, part(kernels, run, item), 30


SECTIONS = ("first", "right", "step", "prompts", "profile")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a card does with this model.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--dims", default="1b,3b", help="released sizes (default 1b,3b)")
    parser.add_argument("--no-transformers", action="store_true", help="ours alone")
    parser.add_argument("--seconds", type=int, default=LIMIT, help=f"for all (default {LIMIT})")
    args = parser.parse_args()
    args.sections, args.dims = args.sections or SECTIONS, args.dims.split(",")
    if unknown := {*args.sections} - {*SECTIONS} | {*args.dims} - {*SPEED}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return args


def one_model(run: Run, sections: list[str]) -> None:
    make = functools.partial(modes.random_model, "tiny" if DRY else run.dims, DEVICE)
    run.model = guarded(run, f"{run.dims} model", make, 30) if sections else None
    for section in sections if run.model else ():
        for name, job, seconds in jobs(run, section):
            print(f"--- {run.dims} {section}: {name}, at {time.monotonic() - run.began:.0f} s")
            guarded(run, f"{run.dims} {section}: {name}", job, seconds)
            free()
    run.model = None
    modes.peer_of.cache_clear()
    free()


def main() -> int:
    args = parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, alarm)
    run = Run(not args.no_transformers, time.monotonic() + args.seconds)
    guarded(run, "environment", functools.partial(environment, run), 60)
    for chosen in (SECTIONS[:-1], SECTIONS[-1:]):  # a profiler may slow down what comes after it
        for run.dims in args.dims:
            one_model(run, [section for section in chosen if section in args.sections])
    print(
        f"\n{table(run)}\n{time.monotonic() - run.began:.0f} s; failed: {run.failed or 'nothing'}"
    )
    return bool(run.failed)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
