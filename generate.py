"""Load a GraniteMoe checkpoint and sample text from it.

    python generate.py "def fib(n):"                       the small model in tiny/
    python generate.py --model FOLDER_OR_HUB_ID --chat     a released one, as a conversation

Reading order: load_model, generate and its steps, how the next id is chosen, text as it is made, a
conversation, the command. Strangers' files and the faster forms of a step are in engine/.
"""

import argparse
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from files import terminal

with terminal.starting(__name__):
    import torch
    from torch import Tensor

    from fast import cpu, cuda, prompt  # whose forms go into the open tables
    from fast.cuda import Step
    from files import checkpoint
    from files.chat import load_chat_template
    from files.checkpoint import CheckpointError  # noqa: F401  (what load_model raises)
    from files.tokenizer import decoder, encode, load_tokenizer
    from granitemoe import ATTENTION, GraniteMoeForCausalLM, KVCache, choose_experts

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFILL_TOKENS = 2048  # at a time: bounds the memory of a prefill, however long the prompts
CHAT_TOKENS = 16384  # of a conversation: its cache is allocated at once


# ---------------------------------------------------------------------------------------- loading
def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None,
    attention_backend: str = "auto", experts_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> GraniteMoeForCausalLM:  # fmt: skip
    """Read a checkpoint: a folder with config.json and model.safetensors or shards, or a hub id.

    device: as torch names it, or "auto".
    dtype: of the model; None keeps that of the config or, where it names none, of the embedding.
    attention_backend, experts_backend: names in granitemoe's ATTENTION and EXPERTS, "batched", or
    "auto", which names the fastest for device and dtype: see model.config for what it took.
    progress: called after each tensor with how many are read, and of how many.
    Memory never holds more than the model and one tensor, and nothing stays tied to the files.
    Raises CheckpointError for what is missing, unexpected, damaged or not finite, and its base
    class ValueError for arguments."""
    folder, device = checkpoint.find_folder(path), pick_device(str(device))
    config, stored = checkpoint.read_config(folder), checkpoint.find_tensors(folder)
    dtype = pick_dtype(dtype or checkpoint.own_dtype(config, stored))
    attention, experts = pick_forms((attention_backend, experts_backend), device, dtype)
    config = replace(config, attention_backend=attention, experts_backend=experts)
    model = checkpoint.empty_model(folder, config, stored)
    checkpoint.match_tensors(folder, stored, model)
    q, k = (torch.zeros(1, n, 2, config.head_dim, dtype=dtype, device=device) for n in (2, 1))
    ATTENTION[attention](q, k, k, None, 1.0, 0.0)  # a try: ValueError if it cannot run here
    weights: dict[str, Tensor] = {}
    for name, tensor in checkpoint.read_tensors(stored, dtype, device):
        weights[name] = tensor
        progress(len(weights), len(stored))
    if config.tie_word_embeddings:
        checkpoint.drop_tied_head(folder, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else MPS, else the CPU. Raises ValueError for what this machine lacks."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = [*gpus, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    wanted = {"auto": available[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in available:
        raise ValueError(f"device: must be auto or one of {available}, got {name!a:.40}")
    return torch.device(wanted)


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"dtype: must be one of {list(DTYPES)}, got {dtype!a:.40}")
    return DTYPES.get(dtype, dtype)


def pick_forms(forms: tuple[str, str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of attention and experts, with "auto" replaced by the fastest for device and dtype.
    Names that granitemoe.py lacks are the engine's; all forms give the same numbers."""
    attention = "blocks" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
    fastest = ("fused", "batched") if device.type == "cuda" else (attention, "runs")
    return [best if form == "auto" else form for form, best in zip(forms, fastest, strict=True)]


# ------------------------------------------------------------------------------------- generation
def generate(
    model: GraniteMoeForCausalLM, prompts: list[list[int]], max_new_tokens: int, *,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    repetition_penalty: float = 1.0, eos_token_ids: Collection[int] | int | None = (),
    seed: int | None = None, cache: KVCache | None = None, compiled: bool = False,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Continue prompts (lists of ids, of any lengths); yields at each step one new id a row.

    A row ends after one of eos_token_ids (which it yields), after max_new_tokens, or where the
    context is full; from then on it yields None. Row i draws from a generator of its own, seeded
    with seed + i, so that it does not depend on its neighbours; seed None takes random ones.
    cache: continue after the tokens that it holds (one row only); the last id yielded is not in it.
    compiled: run steps of one token a row, and prompts on a CPU, as the engine compiles them.
    Raises ValueError for bad arguments at once, and for logits that are not finite, at their step.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    context = model.config.max_position_embeddings
    context = min(context, cache.max_length) - cache.length if cache else context
    check_prompts(prompts, model.config.vocab_size - 1, context)
    if cache and len(prompts) > 1:
        raise ValueError(f"prompts: must be one with a cache, got {len(prompts)}")
    limits = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    eos = frozenset([eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids or ())
    return _steps(model, prompts, limits, sampling, eos, cache, compiled)


@torch.inference_mode()
def _steps(
    model: GraniteMoeForCausalLM, prompts: list[list[int]], limits: list[int],
    sampling: "Sampling", eos: frozenset[int], cache: KVCache | None, compiled: bool,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Prefill, then one token a step; limits: how many tokens each row may still get."""
    if max(limits) < 1:
        return
    weight, B, longest = model.model.norm.weight, len(prompts), max(map(len, prompts))
    device, like = weight.device, {"device": weight.device, "dtype": weight.dtype}
    cache = cache or KVCache(model.config, B, longest + max(limits), **like)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, cache.ids[row, : cache.length].tolist() + ids] = True
    choose = functools.partial(next_ids, seen=seen, sampling=sampling)
    pads = torch.tensor([[longest - len(ids)] for ids in prompts], device=device)
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    draw = uniform_rows(sampling.seed, B, device)
    prefill = prompt.for_prompts(model) if compiled else model
    step, uniform = plain_step(prefill, cache, pads, choose), draw()
    for chunk in padded.split(max(1, PREFILL_TOKENS // B), dim=1):
        new = step(chunk, uniform)  # the last chunk's counts
    if compiled and max(limits) > 1:
        step = (cuda if device.type == "cuda" else cpu).token_step(model, cache, pads, choose)
    elif cuda.CAPTURE_ALWAYS and device.type == "cuda":
        step = cuda.capture(model, cache, pads, choose)
    for count in range(max(limits)):
        ids = new.tolist()  # synchronises with the host
        if -1 in ids:  # next_ids' mark
            raise ValueError(f"logits: not finite at step {count}; a wider dtype may help")
        ids = [i if count < limit else None for i, limit in zip(ids, limits, strict=True)]
        yield ids
        limits = [0 if i in eos else limit for i, limit in zip(ids, limits, strict=True)]
        if count + 1 >= max(limits):
            return
        seen.scatter_(1, new[:, None], True)
        new = step(new[:, None], uniform if sampling.temperature == 0 else draw())


def plain_step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor, choose: Step) -> Step:
    """A step: from ids (B, T), which the cache then holds, and uniform numbers (B, 1) to new ids.
    pads (B, 1): how many slots of the cache each row leaves empty on the left; masks come from
    them, since the id that pads is a real one too. choose: from logits (B, V) and the numbers."""
    mask = torch.arange(cache.max_length, device=pads.device) >= pads  # (B, S)
    padded = bool(pads.any())

    def step(ids: Tensor, uniform: Tensor) -> Tensor:
        inputs, end = {}, cache.length + ids.shape[1]
        if padded:
            slots = torch.arange(cache.length, end, device=ids.device)
            inputs = {"attention_mask": mask[:, :end], "position_ids": (slots - pads).clamp(min=0)}
        logits = model(ids, cache=cache, logits_to_keep=1, **inputs).logits
        return choose(logits[:, -1].float(), uniform)

    return step


def check_prompts(prompts: list[list[int]], last: int, context: int) -> None:
    """Raises ValueError unless all are lists of ids from 0 to last, no longer than the context."""
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("prompts: must be a list of at least one prompt")
    for row, ids in enumerate(prompts):
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"prompts[{row}]: must be a list of ids, not empty")
        for at, i in enumerate(ids):
            if type(i) is not int or not 0 <= i <= last:
                raise ValueError(f"prompts[{row}][{at}]: {i!a:.40} must be an id from 0 to {last}")
        if len(ids) > context:
            raise ValueError(f"prompts[{row}]: has {len(ids)} tokens, room is for {context}")


# ------------------------------------------------------------------------------------ the next id
def option(default: float | None, test: Callable, allowed: str, *help: str) -> float | None:
    """A field of Sampling: its test, what is allowed in words, the command's letter and help."""
    return field(default=default, metadata={"test": test, "allowed": allowed, "help": help})


@dataclass(frozen=True)
class Sampling:
    """generate's arguments of these names, and the command's options. Raises ValueError."""

    max_new_tokens: int = option(128, lambda x: x >= 0,
        "an integer >= 0", "N", "how many at the most (default: 128)")  # fmt: skip
    temperature: float = option(0.0, lambda x: x == 0 or 1e-4 <= x <= 1e4,
        "0 (greedy) or 1e-4 to 1e4", "T", "0 (default): the likeliest; else sampled")  # fmt: skip
    top_k: int = option(0, lambda x: x >= 0,
        "an integer >= 0 (0 is off)", "K", "keep the K likeliest; 0 keeps all")  # fmt: skip
    top_p: float = option(1.0, lambda x: 0 < x <= 1,
        "over 0 and at most 1 (1 is off)", "P", "keep the likeliest that hold P of it")  # fmt: skip
    min_p: float = option(0.0, lambda x: 0 <= x <= 1,
        "from 0 (off) to 1", "P", "drop what is below P times the likeliest")  # fmt: skip
    repetition_penalty: float = option(1.0, lambda x: 0.01 <= x <= 100,
        "from 0.01 to 100 (1 is off)", "X", "over 1: repeat less")  # fmt: skip
    seed: int | None = option(None, lambda x: 0 <= x < 2**63,
        "an integer from 0 to 2^63 - 1", "S", "the same seed, the same samples")  # fmt: skip

    def __post_init__(self) -> None:
        for each in fields(self):
            value, kinds = getattr(self, each.name), (int, float) if each.type is float else (int,)
            good = type(value) in kinds and each.metadata["test"](value)
            if not good and (value is not None or each.default is not None):
                allowed = each.metadata["allowed"]
                raise ValueError(f"{each.name}: must be {allowed}, got {value!a:.60}")


def sampling_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Next-token probabilities (B, V), float32, from logits (B, V). Raises ValueError.

    In order: divide by the temperature (0 puts all on the most likely id, the lowest of several),
    keep the top_k largest, the smallest set that holds top_p of the mass (arXiv 1904.09751), and
    what has at least min_p of the largest probability (arXiv 2407.01082)."""
    return filtered_probs(logits.float(), Sampling(0, temperature, top_k, top_p, min_p))


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """What sampling_probs computes, for options that are checked already."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    likely, V = None, logits.shape[-1]
    if 0 < sampling.top_k < V:
        top = logits.topk(min(sampling.top_k + 64, V), dim=-1)  # room for ties with the K-th
        likely = top.indices.sort(dim=-1).values
        logits = logits.masked_fill(logits < top.values[..., sampling.top_k - 1, None], -torch.inf)
    if sampling.top_p < 1:  # of the whole vocabulary, sorting would take longer than the model
        kept = logits if likely is None else logits.gather(-1, likely)
        ascending, order = kept.sort(dim=-1, stable=True)
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        tail[..., -1] = False  # the largest always stays
        kept = kept.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
        logits = kept if likely is None else logits.scatter(-1, likely, kept)
    if sampling.min_p > 0:
        probs = logits.softmax(dim=-1)
        low = probs < sampling.min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(low, -torch.inf)
    return logits.softmax(dim=-1)


def next_ids(logits: Tensor, uniform: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """The next id of each row (B,), -1 where its logits (B, V) are not finite.

    uniform (B, 1): a number from 0 to 1 a row, which picks the id by the cumulative probabilities.
    seen (B, V): True for ids that the penalty is for (arXiv 1909.05858). Does not synchronise."""
    finite = torch.isfinite(logits).all(dim=-1)
    if (penalty := sampling.repetition_penalty) != 1:
        punished = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, punished, logits)
    if sampling.temperature == 0:
        new = logits.argmax(dim=-1)
    else:
        cumulative = filtered_probs(logits, sampling).to(uniform.dtype).cumsum(dim=-1)
        new = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        new = new.clamp(max=logits.shape[-1] - 1)  # rounding may reach the sum
    return torch.where(finite, new, -1)


def uniform_rows(seed: int | None, rows: int, device: torch.device) -> Callable[[], Tensor]:
    """A function that draws a number from 0 to 1 for each row (B, 1), from generators of their own:
    so a row does not depend on its neighbours, nor the caller's random state on us."""
    generators = [torch.Generator() for _ in range(rows)]
    for row, generator in enumerate(generators):
        generator.seed() if seed is None else generator.manual_seed(seed + row)

    def draw() -> Tensor:
        numbers = [torch.rand(1, generator=each, dtype=torch.float64) for each in generators]
        wide = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
        return torch.stack(numbers).to(device, wide)

    return draw


# ----------------------------------------------------------------------------- text as it is made
Decode = Callable[[list[int]], str]


class TextStream:
    """A row's ids in, its text out as soon as it is certain: decode(prompt + new) from the prompt's
    end on, in whole characters, without a stop text and what comes after an end."""

    def __init__(
        self, decode: Decode, stops: list[str], ends: Collection[int], prompt: list[int]
    ) -> None:
        self.decode, self.stops, self.ends = decode, stops, ends
        self.made: list[int] = []
        self.ids, self.begin, self.read = [*prompt], 0, len(prompt)  # read: those with a known text
        self.held, self.text, self.ended = "", "", False  # held: may become a stop; text: given out

    def push(self, token_id: int | None) -> str:
        """The row's next id, or None after its last; returns what can be shown now."""
        self.made += [] if self.ended or token_id is None else [token_id]
        self.ended = self.ended or token_id is None or token_id in self.ends
        if self.ended:
            return ""
        self.ids.append(token_id)
        text = self.unread()
        if not text or text.endswith("\ufffd"):  # a character whose other bytes may still come
            return ""
        self.begin, self.read, self.held = self.read, len(self.ids), self.held + text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.ended = self.held[: min(found)], True
            return self.give(0)
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        return self.give(max((len(x) for x in starts if self.held.endswith(x)), default=0))

    def unread(self) -> str:
        """The text of the last ids, decoded after those before them, on which it can depend."""
        before = self.decode(self.ids[self.begin : self.read])
        return self.decode(self.ids[self.begin :])[len(before) :]

    def give(self, keep: int) -> str:
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.text += text
        return text

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        self.held, self.read = self.held + self.unread(), len(self.ids)
        return self.give(0)


def stream(
    model: GraniteMoeForCausalLM, prompts: list[list[int]], heads: list[str],
    decode: Decode, args: argparse.Namespace, cache: KVCache | None = None,
) -> list[TextStream]:  # fmt: skip
    """Generate and print, after heads: the first row as it is made, the others in turn."""
    eos = ids if isinstance(ids := model.config.eos_token_id, list) else [ids]
    rows = [TextStream(decode, args.stop, eos, ids) for ids in prompts]
    texts, first, times = list(heads), 0, [time.perf_counter()]  # texts: not shown yet
    how = {**asdict(args.sampling), "eos_token_ids": eos, "cache": cache, "compiled": args.compile}
    for ids in generate(model, prompts, **how):
        times.append(time.perf_counter())
        for row, token_id in enumerate(ids):
            texts[row] += rows[row].push(token_id)
        while rows[first].ended and first + 1 < len(rows):
            terminal.write(texts[first] + rows[first].finish() + "\n\n")
            first += 1
        terminal.write(texts[first])
        texts[first] = ""
        if all(row.ended for row in rows):
            break
    rest = zip(texts[first:], rows[first:], strict=True)
    terminal.write("\n\n".join(text + row.finish() for text, row in rest) + "\n")
    terminal.report(model, prompts, [row.made for row in rows], times)
    return rows


# --------------------------------------------------------------------------------- a conversation
def converse(
    model: GraniteMoeForCausalLM, chat: Callable, messages: list[tuple[str, str]], decode: Decode,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """One message a line from standard input; tokens that the cache holds are not read again."""
    weight, room = model.model.norm.weight, min(model.config.max_position_embeddings, CHAT_TOKENS)
    cache = KVCache(model.config, 1, room, device=weight.device, dtype=weight.dtype)
    while line := terminal.read_line():
        try:
            messages.append(("user", terminal.decode_prompt(line.rstrip(b"\r\n"))))
        except ValueError as error:
            terminal.note(f"[{error}]")
            continue
        if len(ids := chat(messages)) >= room:
            return terminal.note(f"[the conversation's {room} tokens are full: start a new one]")
        held = cache.ids[0, : cache.length].tolist()
        cache.length = len(os.path.commonprefix([held, ids[:-1]]))  # a template may rewrite turns
        (reply,) = stream(model, [ids[cache.length :]], [""], decode, args, cache)
        messages.append(("assistant", reply.text))
        if (seed := args.sampling.seed) is not None:  # or each turn would draw the same numbers
            args.sampling = replace(args.sampling, seed=(seed + 1) % 2**63)


# ------------------------------------------------------------------------------------ the command
PROMPT = "class Stack:"  # without a prompt; without any argument, DEMO
DEMO = f'"{PROMPT}" --temperature 0.8 --top-p 0.9 --seed 40 --max-new-tokens 92 --dtype float32'


def parse_args(given: list[str]) -> argparse.Namespace:
    """The command's arguments, all of them checked; `sampling`: those that generate takes."""
    parser = terminal.Parser(description="Continue text with a GraniteMoe model.")
    add_options(parser)
    args = parser.parse_args(given)
    try:
        names = [each.name for each in fields(Sampling)]
        args.sampling = Sampling(**{name: getattr(args, name) for name in names})
        args.device = pick_device(args.device)
        for bad, message in (
            (args.system is not None and not args.chat, "--system: needs --chat"),
            (any("\ud800" <= c <= "\udfff" for c in args.system or ""), "--system: is not UTF-8"),
            (args.chat and (args.raw_ids or len(args.prompts) > 1),
             "--chat: takes one PROMPT or none, and no --raw-ids"),
            ("" in args.stop or (args.stop and args.raw_ids),
             "--stop: must be a text that is not empty, and not with --raw-ids"),
            (args.compile and args.experts not in ("auto", "batched"),
             "--compile: needs --experts auto or batched"),
        ):  # fmt: skip
            if bad:
                raise ValueError(message)
        args.prompts = terminal.read_prompts(args.prompts, piped=not args.chat)
        if not args.prompts and not given:
            terminal.note(f"[python generate.py {DEMO}]")
            return parse_args(shlex.split(DEMO))
        if args.raw_ids:
            args.ids = [terminal.parse_ids(prompt) for prompt in args.prompts or ["0"]]
    except ValueError as error:
        parser.error(str(error))
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="texts to continue, as one batch; - is stdin")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    for each in fields(Sampling):
        how = {"type": float if each.type is float else int, "default": each.default}
        letter, help = each.metadata["help"]
        add("--" + each.name.replace("_", "-"), metavar=letter, help=help, **how)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--chat", action="store_true", help="the model's chat format; no PROMPT: a conversation")
    add("--system", metavar="TEXT", help="the system message of --chat")
    add("--raw-ids", action="store_true", help="prompts and output are token ids")
    add("--device", default="auto", help="auto (default), cpu, mps, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    forms = "same numbers, another speed (default: auto)"
    add("--attention", choices=("auto", *ATTENTION), default="auto", help=forms)
    add("--experts", choices=("auto", "batched", "loop", "runs"), default="auto", help=forms)
    add("--compile", action="store_true", help="compile first, then run faster")


def open_model(args: argparse.Namespace, folder: Path) -> GraniteMoeForCausalLM:
    """Load what the command asks for, and say what it is and how it runs."""
    began = time.perf_counter()
    how = {"attention_backend": args.attention, "experts_backend": args.experts}
    how |= {"device": args.device, "dtype": args.dtype, "progress": terminal.progress()}
    model = load_model(folder, **how)
    loaded = time.perf_counter() - began
    if args.compile:  # several prompts are seldom of one length: compiled as rows with padding
        list(generate(model, [[0, 0], *[[0]] * (len(args.prompts) - 1)], 2, compiled=True))
        terminal.note(f"[compiled in {time.perf_counter() - began - loaded:.1f} s]")
    c, dtype = model.config, str(model.model.norm.weight.dtype).removeprefix("torch.")
    total, active = (model.num_parameters(active=a) / 1e6 for a in (False, True))
    E, engine = c.num_local_experts, cuda if args.device.type == "cuda" else cpu
    forms = [choose_experts(c.experts_backend, args.device, M, E) for M in (1, E + 1)]
    names = f"attention: {c.attention_backend}, experts: {'/'.join(dict.fromkeys(forms))}"
    names += engine.remark(model, max(1, len(args.prompts)) if args.compile else 0)
    size = f"{total:.1f} M parameters, {active:.1f} M active"
    terminal.note(f"[{size}; {args.device}, {dtype}, {names}; loaded in {loaded:.2f} s]")
    return model


def run(args: argparse.Namespace) -> None:
    folder = checkpoint.find_folder(args.model)
    tokenizer = None if args.raw_ids else load_tokenizer(folder)
    decode, chat = decoder(tokenizer), args.chat and load_chat_template(folder, tokenizer)
    messages = [("system", args.system)] if args.system is not None else []
    model = open_model(args, folder)
    if args.raw_ids:
        stream(model, args.ids, [" ".join(map(str, ids)) for ids in args.ids], decode, args)
    elif not args.chat:
        texts, size = args.prompts or [PROMPT], model.config.vocab_size
        stream(model, [encode(tokenizer, text, size) for text in texts], texts, decode, args)
    elif args.prompts:
        stream(model, [chat([*messages, ("user", args.prompts[0])])], [""], decode, args)
    else:
        converse(model, chat, messages, decode, args)


def main() -> int:
    """Run the command; returns its exit status, after at most one line of error."""
    return terminal.run(lambda: run(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
