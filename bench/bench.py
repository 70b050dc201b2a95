"""Measure this implementation beside transformers: one process, one set of weights, in turn.

    python bench/bench.py --dims 1b --peer transformers       random weights of a released size
    python bench/bench.py --model FOLDER --peer transformers  a checkpoint
    ... --scale                              our modes only, against length, batch and capacity
    ... --profile                            where the time goes
    ... --against CHECKOUT                   our default mode, another checkout's and transformers'
    ... --llama-bench PATH --gguf FILE       llama.cpp too: see README.md here

Random weights are made in memory and shared by both, so that neither disk nor page cache is
measured. In each item every mode (modes.py) runs once, its logits are compared with those of the
code that is read, and only then are the rounds A B A B ... timed. Figures are medians, with the
lowest and the highest. A prefill's step is its time to the first token.

"of limit" is the least time in which the machine could do it over the time that it took. The least
is the larger of bytes / (bytes a second of a sum or a copy) and FLOPs / (FLOPs a second of a
matmul), timed in the same run. The bytes are what a step has to read once: attention, router and
head, of the experts those that its tokens chose, cached keys and values. "bare read" is a C program
that reads as many bytes, in turn with the modes: where it runs, it is the limit of them.
"peak MB" is the memory that a mode's first step added, its cache included.
--against is another way to measure: each side is a process of its own (turns.py), in nine rounds.
"""

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing that is timed looks at the network
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # compiling takes a first time's

import report  # noqa: E402
import torch  # noqa: E402
import turns  # noqa: E402
from modes import DIMS, MODES, Ours, fill, peer_of, random_model  # noqa: E402
from others import Reader, Work, llama  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.nn.modules.module import (  # noqa: E402
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

import generate  # noqa: E402
from fast import cpu  # noqa: E402
from granitemoe import GraniteMoeForCausalLM as Model  # noqa: E402
from granitemoe import KVCache  # noqa: E402

TINY = ROOT / "tiny"
MAX_ROUNDS = 12
MAX_DIFFERENCE = 0.1  # of the logits' norm, in bfloat16: where a near-tie is routed otherwise
ACTIVITIES = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
PIPELINE = """
import sys
from transformers import pipeline
pipe = pipeline("text-generation", model=sys.argv[1], device="cpu")
print(pipe("def ", max_new_tokens=1, do_sample=False)[0]["generated_text"])
"""


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until it is done, launching and waiting for a GPU included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measure_limits(device: torch.device, quick: bool) -> tuple[float, float]:
    """Bytes a second, summed or copied (read and written); FLOPs a second of a matmul in bfloat16
    or, where that is faster, as on a CPU without matrix units, in float32."""
    numbers, side = 2**28, 8192 if device.type == "cuda" else 4096
    if quick:
        numbers, side = 2**24, 1024
    x, a = torch.ones(numbers, device=device), torch.randn(side, side, device=device)
    y, b = torch.empty_like(x), a.bfloat16()

    def rate(work: Callable[[], object], amount: int) -> float:
        return amount / min(timed(work, device) for _ in range(3))

    reads = max(rate(x.sum, x.nbytes), rate(lambda: y.copy_(x), 2 * x.nbytes))
    flops = max(rate(lambda: a @ a, 2 * side**3), rate(lambda: b @ b, 2 * side**3))
    return reads, flops


def memory_bytes(field: str) -> int:
    """VmRSS, what this process holds in memory, or VmHWM, the most it ever held (Linux).

    Not getrusage's ru_maxrss: that begins with what the parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(work: Callable[[], object], device: torch.device) -> int | None:
    """The bytes that work adds at its peak; None where the machine does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        before = memory_bytes("VmRSS")
    except OSError:
        before = None
    work()
    return None if before is None else memory_bytes("VmHWM") - before


@dataclass(frozen=True)
class Item:
    """A row of the table: steps of `tokens` new ids in each of `batch` rows, after `past` ones."""

    name: str
    batch: int
    tokens: int
    past: int = 0  # 0 is a prefill, and a new cache at every step
    steps: int = 1  # a round
    spare: int = 1  # times the cache's capacity that it needs

    def room_for(self, rounds: int) -> int:
        steps = self.steps * rounds if self.past else 1
        return self.spare * (self.past + self.tokens * steps)

    @property
    def room(self) -> int:  # a step and a round run before those that are timed
        return self.room_for(MAX_ROUNDS + 2)


def needs(model: Model, item: Item, experts: float) -> dict[str, float]:
    """What a step takes, `experts` distinct ones a layer: bytes to read, and FLOPs."""
    c, width = model.config, model.model.norm.weight.element_size()
    expert = c.num_hidden_layers * 3 * c.intermediate_size * c.hidden_size  # one in every layer
    table = c.vocab_size * c.hidden_size
    rest = model.num_parameters() - c.num_local_experts * expert - table  # attention, router, norms
    rest -= 0 if c.tie_word_embeddings else table  # of which a lookup reads a few rows
    new = item.batch * item.tokens
    cached = item.batch * (item.past + item.tokens)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * cached
    pairs = new * (item.past + (item.tokens + 1) / 2)  # of queries and the keys that they see
    products = new * (rest + c.num_experts_per_tok * expert) + item.batch * table
    flops = 2 * products + 4 * c.num_hidden_layers * c.hidden_size * pairs
    return {"bytes": (rest + table + experts * expert + kv) * width, "flops": flops}


@dataclass
class Bench:
    """What all items share, and the rows that they gave."""

    model: Model
    peer: bool  # measure transformers too
    device: torch.device
    quick: bool
    brief: bool  # nothing is compiled on a CPU, unless
    full: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    limits: tuple[float, float] = (0.0, 0.0)
    reader: Reader | None = None
    llama: tuple[Path, Path] | None = None  # the program, and the model's file

    def ids(self, *shape: int) -> Tensor:
        """Random ids: no two rows alike, and the same ones for every mode."""
        generator = torch.Generator().manual_seed(sum(shape))
        ids = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        return ids.to(self.device)

    def modes_for(self, item: Item) -> list[str]:
        """The names of the modes that do this item, on this device, in the time that there is."""
        device, most = self.device.type, item.batch + self.brief
        return [
            name
            for name, mode in MODES.items()
            if (self.peer or name.startswith("ours"))
            and device in mode.devices
            and (item.past or mode.prefill)
            and (device != "cpu" or self.full or most <= mode.cpu_rows)
        ]

    def look_at_limits(self) -> None:
        """Keeps the best seen: whatever else the machine does can only slow it down."""
        self.limits = tuple(map(max, self.limits, measure_limits(self.device, self.quick)))

    def reference(self, item: Item, ids: Tensor) -> tuple[KVCache, Tensor, dict[str, Any]]:
        """A cache of what comes before, the right logits after ids, and what is known of both."""
        model, B, K = self.model, item.batch, self.model.config.num_experts_per_tok
        cache = Ours(model, B).new_cache(B, item.past + item.tokens)
        for chunk in self.ids(B, item.past).split(max(1, 2048 // B), dim=1) if item.past else ():
            model(chunk, cache=cache, logits_to_keep=1)
        out = model(ids, cache=cache, logits_to_keep=1, output_router_logits=True)
        cache.length = item.past
        experts = statistics.mean(x.topk(K).indices.unique().numel() for x in out.router_logits)
        known = {"item": item.name, "batch": B, "context": item.past + item.tokens}
        known |= {"tokens": B * item.tokens, "experts": experts, **needs(model, item, experts)}
        return cache, out.logits[:, -1].float(), known

    def prepare(
        self, name: str, item: Item, ids: Tensor, source: KVCache, truth: Tensor
    ) -> tuple[Callable[[int], float], dict[str, Any]]:
        """Run a mode's first step; returns how to time a round of it, and what the step told."""
        made, seconds = [], []

        def first() -> None:
            mode = MODES[name].make(self.model, item.batch)
            cache = mode.new_cache(item.batch, item.room)
            fill(cache, source)
            made.extend((mode, cache, mode.step(ids[-1, 0], cache).float()))

        peak = peak_of(lambda: seconds.append(timed(first, self.device)), self.device)
        mode, cache, logits = made
        difference = float((logits - truth).norm() / truth.norm())
        if not difference < MAX_DIFFERENCE:
            raise ValueError(f"{name}: logits differ by {difference}")

        def work(turn: int) -> float:
            def run() -> None:
                kept = cache if item.past else mode.new_cache(item.batch, item.room)
                for new in ids[turn]:
                    mode.step(new, kept).argmax(dim=-1)

            return timed(run, self.device) / item.steps

        work(MAX_ROUNDS)
        row = {"mode": name, "difference": difference}
        eager = "compile" not in name  # else it compiled in there
        return work, row | {"peak": peak if eager else None, "first": None if eager else seconds[0]}

    def others(self, item: Item, known: dict[str, Any]) -> dict[str, Work]:
        """What is no mode, and is measured in turn with them."""
        works: dict[str, Work] = {}
        if self.reader and item.past:
            works["bare read"] = lambda turn: self.reader.seconds(known["bytes"])
        if self.llama:
            works["llama.cpp"] = llama(item, *self.llama)
        return works

    def alternate(self, works: dict[str, Work]) -> dict[str, list[float]]:
        """Seconds of each work, in turn: three rounds (two that last minutes), more if short."""
        times: dict[str, list[float]] = {name: [] for name in works}
        least, budget = (2, 0) if self.quick else (3, 15)  # rounds, seconds
        began = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            spent = time.perf_counter() - began
            if (turn >= least and spent > budget) or (turn >= 2 and spent > 4 * budget):
                break
            if self.reader:  # while another program ran, a system may have put the weights aside
                self.reader.touch(*self.model.parameters())
            for name, work in works.items():
                times[name].append(work(turn))
        return times

    def measure(self, item: Item) -> None:
        """A row for each mode: the seconds of a step, round for round.

        What decoding is fed was drawn beforehand, so that all modes route alike; the argmax over
        the vocabulary is taken too.
        """
        torch.compiler.reset()  # every shape is compiled by itself, and its time is the item's
        ids = self.ids(MAX_ROUNDS + 2, item.steps, item.batch, item.tokens)
        source, truth, known = self.reference(item, ids[-1, 0])
        works, rows = {}, {}
        for name in self.modes_for(item):
            try:
                works[name], rows[name] = self.prepare(name, item, ids, source, truth)
            except (RuntimeError, NotImplementedError) as error:  # a mode that this machine lacks
                if not name.startswith("transformers"):
                    raise ValueError(f"{name}: {error}") from None
                note(f"{item.name}, {name}: {str(error).strip().splitlines()[0]:.120}")
        for name, work in self.others(item, known).items():
            works[name], rows[name] = work, dict.fromkeys(("difference", "peak", "first"))
            rows[name]["mode"] = name
        for name, seconds in self.alternate(works).items():
            self.rows.append(known | rows[name] | {"seconds": seconds})
            note(f"{item.name}, {name}: {statistics.median(seconds) * 1e3:.2f} ms a step")
        self.look_at_limits()


def items(bench: Bench, scale: bool) -> list[Item]:
    """What to measure; what the model's context is too short for is left out."""
    prompts, batches, capacities, past, steps = (512, 2048, 8192), (1, 8, 64), (), 512, 8
    if bench.quick:
        prompts, batches, capacities, past, steps = (32,), (1, 3), (4,), 32, 2
    elif scale:
        prompts, batches = (512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32, 64)
        capacities = (4, 16, 64)
    elif not bench.full:
        prompts, batches = prompts[:2], batches[:2]
    found = [Item(f"prefill {T}", 1, T) for T in prompts]
    found += [Item(f"decode {B}", B, 1, past, max(2, steps // B)) for B in batches]
    if scale:
        found += [Item(f"after {T}", 1, 1, T, steps) for T in prompts]
        found += [Item(f"capacity x {n}", 1, 1, past, steps, n) for n in capacities]
    context = bench.model.config.max_position_embeddings
    return [item for item in found if item.past + item.tokens <= context]


@contextmanager
def marked_modules() -> Iterator[None]:
    """Let every module's forward appear in a profile, under the name of its class."""
    opened: list[record_function] = []

    def enter(module: nn.Module, _: Any) -> None:
        opened.append(record_function(f"in {type(module).__name__.removeprefix('GraniteMoe')}"))
        opened[-1].__enter__()

    hooks = [register_module_forward_pre_hook(enter)]
    hooks.append(register_module_forward_hook(lambda *_: opened.pop().__exit__(None, None, None)))
    yield
    for hook in hooks:
        hook.remove()


def module_of(event: Any) -> str:
    """The two innermost modules that an operator ran in."""
    names = []
    while event:
        names += [event.name[3:]] * event.name.startswith("in ")
        event = event.cpu_parent
    return " / ".join(names[1::-1])


def measure_profile(bench: Bench, steps: int = 4) -> list[dict[str, Any]]:
    """Where the time of a step goes: the largest operators, by themselves, by module."""
    rows, cuda, T = [], bench.device.type == "cuda", 32 if bench.quick else 512
    clock = operator.attrgetter(f"self_{'device' if cuda else 'cpu'}_time_total")  # microseconds
    for item in (Item(f"prefill {T}", 1, T), Item("decode 1", 1, 1, T)):
        ids = bench.ids(steps + 1, 1, item.tokens)
        for name in bench.modes_for(item):
            if "compile" in name:  # which takes no hooks
                continue
            mode = MODES[name].make(bench.model, 1)
            caches = [mode.new_cache(1, T + steps + 1) for _ in range(steps + 1)]
            if item.past:
                caches = caches[:1] * len(caches)
                mode.step(bench.ids(1, T), caches[0])
            mode.step(ids[0], caches[0])  # warms up
            with marked_modules(), profile(activities=ACTIVITIES[: 1 + cuda]) as run:
                for new, cache in zip(ids[1:], caches[1:], strict=True):
                    mode.step(new, cache)
            sums = Counter()
            for event in run.events():
                if event.device_type == DeviceType.CPU:
                    what = "Python" if event.name.startswith("in ") else event.name
                    sums[module_of(event), what] += clock(event) / 1e6 / steps
            for (module, what), seconds in sums.most_common(8):
                row = {"item": item.name, "mode": name, "module": module, "operator": what}
                rows.append(row | {"seconds": seconds, "share": seconds / sums.total()})
    return rows


def run_in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[tuple[float, str]]]:
    """Seconds and last line of Python commands, in turn, after a round to fill the page cache.

    Raises ValueError for one that fails.
    """
    runs: dict[str, list[tuple[float, str]]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *command], capture_output=True, input=b"")
            took = time.perf_counter() - began
            said = done.stderr if done.returncode else done.stdout
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            if done.returncode:
                raise ValueError(f"{name}: {last:.200}")
            runs[name].append((took, last))
    return {name: found[1:] or found for name, found in runs.items()}


def measure_startup(folder: Path, peer: bool) -> list[dict[str, Any]]:
    """Seconds of whole processes up to the first token of a small checkpoint, on the CPU."""
    mine = [str(ROOT / "generate.py"), "def ", "--model", str(folder), "--device", "cpu"]
    commands = {"import torch": ["-c", "import torch"], "ours": [*mine, "--max-new-tokens", "1"]}
    if peer:
        commands["transformers"] = ["-c", PIPELINE, str(folder)]
    runs = run_in_turn(commands, rounds=5)
    return [{"side": name, "seconds": [s for s, _ in found]} for name, found in runs.items()]


@contextmanager
def written(model: Model) -> Iterator[str]:
    """A folder with the model as a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        kind = {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"]}
        kept = {name: x for name, x in asdict(model.config).items() if "_backend" not in name}
        (Path(folder) / "config.json").write_text(json.dumps(kept | kind))
        weights = dict(model.state_dict())
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        yield folder


def measure_against(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """See turns.py. The model here is given up once it is written."""
    chosen = [each for each in items(bench, False) if each.name.startswith(args.only or "")]
    asked = [{"name": each.name, "room": each.room_for(args.rounds + 1)} for each in chosen]
    for item, each in zip(asked, chosen, strict=True):
        item |= {"batch": each.batch, "tokens": each.tokens}
        item |= {"past": each.past, "steps": each.steps}
    if bench.peer:
        import transformers  # noqa: F401  (whose version the report tells)
    with written(bench.model) as folder:
        bench.model = None
        return turns.measure(asked, args.against, bench.peer, folder, args.rounds)


def measure_load(bench: Bench) -> list[dict[str, Any]]:
    """What load_alone tells of each side, in processes by themselves, in turn."""
    with written(bench.model) as folder:
        how = ["--load-alone", folder, str(bench.device)]
        sides = ["ours"] + ["transformers"] * bench.peer
        commands = {side: [__file__, *how, side] for side in sides}
        runs = run_in_turn(commands, rounds=0 if bench.quick else 3)
    rows = []
    for side, found in runs.items():
        told = [json.loads(line) for _, line in found]
        rows.append({"side": side} | {key: [each[key] for each in told] for key in told[0]})
    return rows


def load_alone(folder: str, device: str, side: str) -> dict[str, float]:
    """Load, then 8 tokens after a prompt of 256: seconds and bytes. Imports are not timed."""
    ids, cuda = [list(range(1, 257))], torch.device(device).type == "cuda"
    if side == "transformers":
        from transformers import AutoModelForCausalLM, GraniteMoeForCausalLM  # noqa: F401
    began = time.perf_counter()
    if side == "ours":
        model = generate.load_model(folder, device=device, dtype="bfloat16")
        run = lambda new: list(generate.generate(model, ids, new, eos_token_ids=()))  # noqa: E731
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").to(device).eval()
        how = {"inputs": torch.tensor(ids, device=device), "do_sample": False, "pad_token_id": 0}
        run = lambda new: model.generate(**how, max_new_tokens=new, min_new_tokens=new)  # noqa: E731
    loaded = time.perf_counter()
    run(1)
    first = time.perf_counter()
    run(8)
    peak = torch.cuda.max_memory_allocated() if cuda else memory_bytes("VmHWM")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds = {"load": loaded - began, "first_token": first - began}
    return seconds | {"peak": peak, "weights": weights}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this implementation beside transformers.")
    add = parser.add_argument
    what, default = parser.add_mutually_exclusive_group(), "cuda" * torch.cuda.is_available()
    what.add_argument("--dims", choices=DIMS, help="random weights of a released size (default 1b)")
    what.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint instead")
    add("--peer", choices=("transformers", "none"), default="transformers")
    add("--device", type=torch.device, default=default or "cpu", help="default: CUDA if there")
    add("--full", action="store_true", help="on a CPU too: 8,192 tokens, batch 64, all compiled")
    add("--quick", action="store_true", help="a few tokens, to try the benchmark itself")
    add("--profile", action="store_true", help="only: where the time goes")
    add("--scale", action="store_true", help="only: our side against length, batch and capacity")
    add("--only", metavar="TEXT", help="only: items whose names begin so, as 'decode'")
    add("--against", type=Path, metavar="CHECKOUT", help="only: in turn with another checkout, CPU")
    add("--rounds", type=int, default=9, metavar="N", help="of --against (default 9)")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    add("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program, to measure it too")
    add("--gguf", type=Path, metavar="FILE", help="the same weights for it: see bench/README.md")
    add("--load-alone", nargs=3, help=argparse.SUPPRESS)  # how it calls itself
    args = parser.parse_args()
    if bool(args.llama_bench) != bool(args.gguf):
        raise ValueError("--llama-bench, --gguf: needs both")
    if not args.model and not args.dims:
        args.dims = "1b"
    if args.against and (args.model or args.device.type != "cpu"):
        raise ValueError("--against: needs random weights (--dims) and --device cpu")
    if args.rounds < 1:
        raise ValueError(f"--rounds: must be at least 1, got {args.rounds}")
    return args


def main() -> None:
    args = parse_args()
    if args.load_alone:
        return print(json.dumps(load_alone(*args.load_alone)))
    device, peer = args.device, args.peer == "transformers" and not args.scale
    out: dict[str, Any] = {"startup": [], "load": [], "profile": [], "against": []}
    whole = not (args.profile or args.scale or args.only or args.against)
    if whole and not args.quick and (TINY / "model.safetensors").exists():
        out["startup"] = measure_startup(TINY, peer)
    if args.model:
        model = generate.load_model(args.model, device=device, dtype="bfloat16")
    else:
        model = random_model(args.dims, device)
    note(f"model: {model.num_parameters() / 1e6:.0f} M parameters")
    if peer and not args.against:
        peer_of(model, None)  # its imports take memory that is no step's
    bench = Bench(model, peer, device, args.quick, args.quick or args.scale, args.full)
    if device.type == "cpu" and not args.against:
        if cpu.has_compiler():
            bench.reader = Reader(2**22 if args.quick else 2**28)
        bench.llama = args.gguf and (args.llama_bench, args.gguf)
    if whole:
        out["load"] = measure_load(bench)
    if args.against:
        del model
        out["against"] = measure_against(bench, args)
    elif args.profile:
        out["profile"] = measure_profile(bench)
    else:
        bench.look_at_limits()
        for item in items(bench, args.scale):
            if item.name.startswith(args.only or ""):
                bench.measure(item)
    out |= {"environment": report.environment(device), "rows": bench.rows}
    out["limits"] = dict(zip(("bytes_per_second", "flops_per_second"), bench.limits, strict=True))
    report.derive(out["rows"], *bench.limits)
    out["goals"] = report.goals(out, device.type, args.dims)
    print(report.markdown(out))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    try:
        with torch.inference_mode():
            main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: error: {error}")
