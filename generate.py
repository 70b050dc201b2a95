"""Load a GraniteMoe checkpoint and sample text from it.

    python generate.py "def fib(n):"                       the small model in tiny/
    python generate.py --model FOLDER_OR_HUB_ID --chat     a released one, as a conversation

Reading order: load_model, generate and its steps, how the next id is chosen, text as it is made, a
conversation, the command. Reading untrusted files is in files/; the steps of --compile in fast/.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path

from files import terminal

with terminal.starting(__name__):
    import torch
    from torch import Tensor

    import fast
    from files import checkpoint
    from files.chat import load_chat_template
    from files.checkpoint import DTYPES, CheckpointError  # noqa: F401  (what load_model raises)
    from files.tokenizer import decoder, encode, load_tokenizer
    from granitemoe import ATTENTION, EXPERTS, GraniteMoeForCausalLM, KVCache, auto_experts

TINY = terminal.TINY
PREFILL_TOKENS = 2048  # at a time: bounds the memory of a prefill, however long the prompts
CHAT_TOKENS = 16384  # of a conversation: its cache is allocated at once


# ---------------------------------------------------------------------------------------- loading
def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attention_backend: str = "auto",
    experts_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> GraniteMoeForCausalLM:
    """Read a checkpoint: a folder with config.json and model.safetensors or shards, or a hub id.

    device: as torch names it, or "auto".
    dtype: of the model; None keeps that of the config or, where it names none, of the embedding.
    attention_backend, experts_backend: names in granitemoe's ATTENTION and EXPERTS, "batched", or
    "auto", which suits the device: see model.config for what it took.
    progress: called after each tensor with how many are read, and of how many.
    Memory never holds more than the model and a few tensors, and nothing stays tied to the files.
    Raises CheckpointError for what is missing, unexpected, damaged or not finite, and its base
    class ValueError for arguments."""
    folder = checkpoint.find_folder(path)
    device = checkpoint.pick_device(str(device))
    config = checkpoint.read_config(folder)
    stored = checkpoint.check(folder, config)  # headers alone
    dtype = checkpoint.pick_dtype(dtype, config, stored)
    attention = "sdpa" if attention_backend == "auto" else attention_backend
    experts = auto_experts(device) if experts_backend == "auto" else experts_backend
    config = replace(config, attention_backend=attention, experts_backend=experts)
    q = torch.zeros(1, 2, 2, config.head_dim, dtype=dtype, device=device)
    ATTENTION[attention](q, q, q, None, 1.0, 0.0)  # a try: ValueError if it cannot run here
    with torch.device("meta"):  # where tensors have shapes and no memory
        model = GraniteMoeForCausalLM(config)
    weights = {}
    for name, tensor in checkpoint.read(stored, dtype, device):  # by their names in released files
        weights[name] = tensor
        progress(len(weights), len(stored))
    if config.tie_word_embeddings:
        checkpoint.drop_tied_head(folder, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


# ------------------------------------------------------------------------------------- generation
def generate(
    model: GraniteMoeForCausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_ids: Collection[int] | int | None = None,
    seed: int | None = None,
    cache: KVCache | None = None,
    compiled: bool = False,
) -> Iterator[list[int | None]]:
    """Continue prompts (lists of ids, of any lengths); yields at each step one new id a row.

    A row ends after one of eos_token_ids (which it yields), after max_new_tokens, or where the
    context is full; from then on it yields None. eos_token_ids None is the model's own, () none.
    Row i draws from a generator of its own, seeded with seed + i, so that it does not depend on
    its neighbours; seed None takes random ones.
    cache: continue after the tokens that it holds (one row only); the last id yielded is not in it.
    compiled: take the steps of fast.step.
    Raises ValueError for bad arguments at once; at the first step, where there is no compiled form;
    and at its step, for logits that are not finite.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    context = model.config.max_position_embeddings
    if cache is not None:
        context = min(context, cache.max_length) - cache.length
    check_prompts(prompts, model.config.vocab_size - 1, context)
    if cache is not None and max(len(prompts), len(cache.ids)) > 1:
        raise ValueError("prompts: must be one with a cache, and the cache of one row")
    prompts = [[int(i) for i in ids] for ids in prompts]  # NumPy's integers would wrap round
    limits = [min(int(max_new_tokens), context - len(ids)) for ids in prompts]
    ends = end_tokens(model, eos_token_ids)
    return continued(model, prompts, limits, sampling, ends, cache, compiled)


@torch.inference_mode()
def continued(model, prompts, limits, sampling, ends, cache, compiled) -> Iterator:
    """The loop of generate; limits: how many ids each row may still get."""
    if max(limits) < 1:
        return
    weight = model.model.norm.weight
    device = weight.device
    B = len(prompts)
    longest = max(map(len, prompts))
    if cache is None:
        room = longest + max(limits)
        cache = KVCache(model.config, B, room, device=device, dtype=weight.dtype)
    # pad on the left, so that all rows go on at the same slot of the cache
    pads = torch.tensor([[longest - len(ids)] for ids in prompts], device=device)
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    # (B, V), for the repetition penalty
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, cache.ids[row, : cache.length].tolist() + ids] = True
    generators = row_generators(sampling.seed, B)
    # prefill in pieces; the logits of the last one count
    make_step = fast.step if compiled else plain_step
    step = make_step(model, cache, pads)
    for piece in padded.split(max(1, PREFILL_TOKENS // B), dim=1):
        logits = step(piece)
    for count in range(max(limits)):
        ids, finite = sample(logits, seen, sampling, generators)
        new, good = torch.stack((ids, finite)).tolist()  # the only wait for the device
        if not all(good):
            raise ValueError(f"logits: not finite at step {count}; a wider dtype may help")
        row_ids = [i if count < limit else None for i, limit in zip(new, limits, strict=True)]
        yield row_ids
        limits = [0 if i in ends else limit for i, limit in zip(row_ids, limits, strict=True)]
        if count + 1 >= max(limits):
            return
        seen.scatter_(1, ids[:, None], True)
        logits = step(ids[:, None])


def plain_step(model: GraniteMoeForCausalLM, cache: KVCache, pads: Tensor) -> fast.Step:
    """A function from new ids (B, T), which the cache then holds, to the logits (B, V) after the
    last of them, in float32: granitemoe.py's own forward. pads (B, 1): how many slots each row
    leaves empty on the left. Masks come from them, since the id that pads is a real one too."""
    slots = torch.arange(cache.max_length, device=pads.device)
    mask = slots >= pads  # (B, max_length)
    padded = bool(pads.any())

    def step(ids: Tensor) -> Tensor:
        inputs, end = {}, cache.length + ids.shape[1]
        if padded:
            positions = (slots[cache.length : end] - pads).clamp(min=0)
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions}
        output = model(ids, cache=cache, logits_to_keep=1, **inputs)
        return output.logits[:, -1].float()

    return step


def check_prompts(prompts, last, context) -> None:
    """Raises ValueError unless all are lists of ids from 0 to last, no longer than the context."""
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("prompts: must be a list of at least one prompt")
    for row, ids in enumerate(prompts):
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"prompts[{row}]: must be a list of ids, not empty")
        if len(ids) > context:
            raise ValueError(f"prompts[{row}]: has {len(ids)} tokens, room is for {context}")
        for at, i in enumerate(ids):
            if not is_number(i, Integral, 0, last):
                raise ValueError(f"prompts[{row}][{at}]: {i!a:.40} must be an id from 0 to {last}")


def end_tokens(model: GraniteMoeForCausalLM, given) -> set[int]:
    """Those given or, for None, the model's own: its config names none, one or several."""
    ends = model.config.eos_token_id if given is None else given
    if isinstance(ends, Integral):
        return {ends}
    return set(ends or ())


# ------------------------------------------------------------------------------------ the next id
def is_number(value, kind, low, high=torch.inf) -> bool:
    """Integral or Real, from low to high; NaN and booleans are not."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Sampling:
    """generate's arguments of these names. Raises ValueError."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.max_new_tokens, Integral, 0):
            self.refuse("max_new_tokens", "an integer >= 0")
        if not is_number(self.temperature, Real, 0, 1e4) or 0 < self.temperature < 1e-4:
            self.refuse("temperature", "0 (greedy) or 1e-4 to 1e4")
        if not is_number(self.top_k, Integral, 0):
            self.refuse("top_k", "an integer >= 0 (0 is off)")
        if not is_number(self.top_p, Real, 0, 1) or self.top_p == 0:
            self.refuse("top_p", "over 0 and at most 1 (1 is off)")
        if not is_number(self.min_p, Real, 0, 1):
            self.refuse("min_p", "from 0 (off) to 1")
        if not is_number(self.repetition_penalty, Real, 0.01, 100):
            self.refuse("repetition_penalty", "from 0.01 to 100 (1 is off)")
        if self.seed is not None and not is_number(self.seed, Integral, 0, 2**63 - 1):
            self.refuse("seed", "an integer from 0 to 2^63 - 1")

    def refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{name}: must be {allowed}, got {getattr(self, name)!a:.60}")


def sampling_probs(logits: Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
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
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1, stable=True)
        mass_up_to = ascending.softmax(dim=-1).cumsum(dim=-1)
        dropped = mass_up_to <= 1 - sampling.top_p
        dropped[..., -1] = False  # the largest always stays
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    if sampling.min_p > 0:
        probs = logits.softmax(dim=-1)
        least = sampling.min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, -torch.inf)
    return logits.softmax(dim=-1)


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, generators: list) -> tuple:
    """The next id of each row (B,), and whether its logits (B, V) were finite (B,). Does not
    synchronise. seen (B, V): True for ids that the penalty is for (arXiv 1909.05858)."""
    finite = torch.isfinite(logits).all(dim=-1)
    penalty = sampling.repetition_penalty
    if penalty != 1:
        punished = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, punished, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), finite
    uniform = uniform_rows(generators, logits.device)
    cumulative = filtered_probs(logits, sampling).to(uniform.dtype).cumsum(dim=-1)
    drawn = uniform * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
    return ids.clamp(max=logits.shape[-1] - 1), finite  # rounding may reach the sum


def row_generators(seed, rows) -> list:
    """One for each row: its samples do not depend on other rows, nor the caller's random state on
    us."""
    generators = [torch.Generator() for _ in range(rows)]
    for row, generator in enumerate(generators):
        generator.seed() if seed is None else generator.manual_seed(int(seed) + row)
    return generators


def uniform_rows(generators: list, device: torch.device) -> Tensor:
    """A number from 0 to 1 for each row (B, 1), in float64 where the device has it."""
    numbers = [torch.rand(1, generator=each, dtype=torch.float64) for each in generators]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack(numbers).to(device, dtype)


# ----------------------------------------------------------------------------- text as it is made
class TextStream:
    """A row's ids in, its text out as soon as it is certain: decode(prompt + new) from the prompt's
    end on, in whole characters, without a stop text and what comes after an end."""

    def __init__(self, decode, stops, ends, prompt) -> None:
        self.decode, self.stops, self.ends = decode, stops, ends
        self.made = 0  # how many new ids, an end included
        self.known = prompt  # the last ids with a known text
        self.unread = []  # the ids after them
        self.held = ""  # a known text that may become a stop
        self.text = ""  # what was given out
        self.ended = False

    def push(self, token_id: int | None) -> str:
        """The row's next id, or None after its last; returns what can be shown now."""
        self.ended = self.ended or token_id is None
        if self.ended:
            return ""
        self.made += 1
        self.ended = token_id in self.ends
        if self.ended:
            return ""
        self.unread.append(token_id)
        text = self.unread_text()
        if not text or text.endswith("\ufffd"):  # a character whose other bytes may still come
            return ""
        self.known, self.unread = self.unread, []
        self.held += text
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.held = self.held[: min(found)]
            self.ended = True
            return self.give(len(self.held))
        starts = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        begun = [len(start) for start in starts if self.held.endswith(start)]
        return self.give(len(self.held) - max(begun, default=0))

    def unread_text(self) -> str:
        """Decoded after the ids before them, on which it can depend."""
        before = self.decode(self.known)
        return self.decode(self.known + self.unread)[len(before) :]

    def give(self, count: int) -> str:
        given = self.held[:count]
        self.held = self.held[count:]
        self.text += given
        return given

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        self.held += self.unread_text()
        self.known, self.unread = self.unread, []
        return self.give(len(self.held))


def stream(model, prompts, heads, decode, args, cache=None) -> list[TextStream]:
    """Generate and print, after heads: the first row as it is made, the others in turn."""
    ends = end_tokens(model, None)
    rows = [TextStream(decode, args.stop, ends, ids) for ids in prompts]
    texts = list(heads)  # not shown yet
    first = 0  # the row that is shown as it is made
    times = [time.perf_counter()]
    options = asdict(args.sampling)
    for ids in generate(model, prompts, **options, cache=cache, compiled=args.compile):
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
    rest = [text + row.finish() for text, row in zip(texts[first:], rows[first:], strict=True)]
    terminal.write("\n\n".join(rest) + "\n")
    terminal.report(model, prompts, rows, times)
    return rows


# --------------------------------------------------------------------------------- a conversation
def converse(model, chat, messages, decode, args) -> None:
    """One message a line from standard input; tokens that the cache holds are not read again."""
    weight = model.model.norm.weight
    room = min(model.config.max_position_embeddings, CHAT_TOKENS)
    cache = KVCache(model.config, 1, room, device=weight.device, dtype=weight.dtype)
    for text in terminal.typed_messages():
        messages.append(("user", text))
        ids = chat(messages)
        if len(ids) >= room:
            return terminal.note(f"[the conversation's {room} tokens are full: start a new one]")
        held = cache.ids[0, : cache.length].tolist()
        cache.length = len(os.path.commonprefix([held, ids[:-1]]))  # a template may rewrite turns
        (reply,) = stream(model, [ids[cache.length :]], [""], decode, args, cache)
        messages.append(("assistant", reply.text))
        seed = args.sampling.seed
        if seed is not None:  # or each turn would draw the same numbers
            args.sampling = replace(args.sampling, seed=(seed + 1) % 2**63)


# ------------------------------------------------------------------------------------ the command
def complete(args: argparse.Namespace) -> None:
    """Check those of the command's arguments that are generate's and load_model's."""
    names = [field.name for field in fields(Sampling)]
    args.sampling = Sampling(**{name: getattr(args, name) for name in names})
    args.device = checkpoint.pick_device(args.device)


def open_model(args: argparse.Namespace, folder: Path) -> GraniteMoeForCausalLM:
    """Load what the command asks for, and say what it is and how it runs."""
    began = time.perf_counter()
    forms = {"attention_backend": args.attention, "experts_backend": args.experts}
    how = {"device": args.device, "dtype": args.dtype, "progress": terminal.progress()}
    model = load_model(folder, **how, **forms)
    loaded = time.perf_counter() - began
    if args.compile:
        trial = fast.trial(model, len(args.prompts))
        list(generate(model, trial, 2, eos_token_ids=(), compiled=True))
        terminal.note(f"[compiled in {time.perf_counter() - began - loaded:.1f} s]")
        runs = f"compiled: {fast.description(model)}"
    else:
        runs = f"attention: {model.config.attention_backend}"
        runs += f", experts: {model.config.experts_backend}"
        if fast.pays(model):
            runs += "; --compile decodes 3 x as fast"  # bench/RESULTS.md
    terminal.introduce(model, runs, loaded)
    return model


def run() -> None:
    """The command: text to ids, ids to text."""
    tables = {"dtypes": DTYPES, "attention": ATTENTION, "experts": EXPERTS}
    args = terminal.parse_args(sys.argv[1:], complete, **tables)
    folder = checkpoint.find_folder(args.model)
    tokenizer = None
    if not args.raw_ids:
        tokenizer = load_tokenizer(folder)
    if args.chat:
        chat = load_chat_template(folder, tokenizer)
    decode = decoder(tokenizer)
    model = open_model(args, folder)
    if args.raw_ids:
        stream(model, args.ids, [decode(ids).strip() for ids in args.ids], decode, args)
        return
    if not args.chat:
        texts, V = args.prompts or [terminal.PROMPT], model.config.vocab_size
        stream(model, [encode(tokenizer, text, V) for text in texts], texts, decode, args)
        return
    messages = []
    if args.system is not None:
        messages.append(("system", args.system))
    if not args.prompts:
        converse(model, chat, messages, decode, args)
        return
    messages.append(("user", args.prompts[0]))
    stream(model, [chat(messages)], [""], decode, args)


def main() -> int:
    """Run the command; returns its exit status, after at most one line of error."""
    return terminal.run(run)


if __name__ == "__main__":
    sys.exit(main())
