"""Load a GraniteMoe checkpoint and sample text from it.

    python generate.py "def fib(n):"                       the small model in tiny/
    python generate.py --model FOLDER_OR_HUB_ID --chat     a released one, as a conversation

Reading order: load_model (compare every name, shape and dtype, then fill), load_tokenizer,
sampling_probs, generate and _steps (prefill, then one token a step), chat_ids, and the command.
"""

import argparse
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":  # importing torch takes a second, in which Ctrl-C must end quietly too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

try:
    import torch
    from torch import Tensor

    import granitemoe
    from engine.checkpoint import (
        ON_DISK,
        CheckpointError,
        find_folder,
        find_tensors,
        match_tensors,
        naming,
        read_config,
        read_tensors,
        require,
    )
    from engine.tokenizer import END, chat_ids, decoder, encode, load_tokenizer
    from granitemoe import GraniteMoeForCausalLM, KVCache
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"generate.py: error: {error}; run: pip install -r requirements.txt")

if TYPE_CHECKING:  # imported where text is used, so that ids need no tokenizer
    from tokenizers import Tokenizer

__all__ = ("CheckpointError", "generate", "load_model", "load_tokenizer", "sampling_probs")

TINY = Path(__file__).resolve().parent / "tiny"
PROMPT = "def "
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFILL_TOKENS = 2048  # at a time: bounds the memory of a prefill, however long the prompts
CHAT_TOKENS = 16384  # of a conversation: its cache is allocated at once


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else MPS, else the CPU. Raises ValueError for what this machine lacks."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = [*cuda, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    wanted = {"auto": available[0], "cuda": "cuda:0"}.get(name, name)
    require(wanted in available, f"device: must be auto or one of {available}, got {name!a:.40}")
    return torch.device(wanted)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attention_backend: str = "sdpa",
    experts_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> GraniteMoeForCausalLM:
    """Read a checkpoint: a folder with config.json and model.safetensors or shards, or a hub id.

    device: as torch names it, or "auto".
    dtype: of the model; None keeps that of the config or, where it names none, of the embedding.
    progress: called after each tensor with how many are read, and of how many.
    Memory never holds more than the model and one tensor, and nothing stays tied to the files.
    Raises CheckpointError for what is missing, unexpected, damaged or not finite, and ValueError,
    of which it is one, for arguments.
    """
    folder, device = find_folder(path), pick_device(str(device))
    config = replace(
        read_config(folder), attention_backend=attention_backend, experts_backend=experts_backend
    )
    stored = find_tensors(folder)
    layers = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    with naming(folder / "config.json"):  # before anything is built by that number
        good = layers == config.num_hidden_layers
        require(good, f"num_hidden_layers: {config.num_hidden_layers}, but {layers} are stored")
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(config)
    names = match_tensors(folder, stored, model)
    dtype = dtype or config.dtype or ON_DISK[stored[names["model.embed_tokens.weight"]][1]]
    known = dtype in DTYPES or dtype in DTYPES.values()
    require(known, f"dtype: must be one of {list(DTYPES)}, got {dtype!a:.40}")
    dtype = DTYPES.get(dtype, dtype)
    weights: dict[str, Tensor] = {}
    for name, tensor in read_tensors(stored, names, dtype, device):
        weights[name] = tensor
        progress(len(weights), len(names))
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        with naming(folder):
            same = torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
            require(same, "lm_head.weight: differs from the embedding that it is tied to")
    model.load_state_dict(weights, assign=True)
    return model.eval()


SAMPLING = {  # argument: its type, its test, and what is allowed in words
    "temperature": (float, lambda x: x == 0 or 1e-4 <= x <= 1e4, "0 (greedy) or 1e-4 to 1e4"),
    "top_k": (int, lambda x: x >= 0, "an integer >= 0 (0 is off)"),
    "top_p": (float, lambda x: 0 < x <= 1, "over 0 and at most 1 (1 is off)"),
    "min_p": (float, lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
    "repetition_penalty": (float, lambda x: 1e-2 <= x <= 1e2, "from 0.01 to 100 (1 is off)"),
    "max_new_tokens": (int, lambda x: x >= 0, "an integer >= 0"),
    "seed": (int, lambda x: 0 <= x < 2**63, "an integer from 0 to 2^63 - 1"),
}


def check_sampling(**arguments: float | None) -> None:
    """Raises ValueError naming the argument, its value and what is allowed."""
    for name, value in arguments.items():
        kind, test, allowed = SAMPLING[name]
        good = type(value) in (int, kind) and test(value) or (name == "seed" and value is None)
        require(good, f"{name}: must be {allowed}, got {value!a:.60}")


def sampling_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Next-token probabilities (B, V), float32, from logits (B, V). Raises ValueError.

    In order: divide by the temperature (0 puts all on the most likely id, the lowest of several),
    keep the top_k largest, the smallest set that holds top_p of the mass (arXiv 1904.09751), and
    what has at least min_p of the largest probability (arXiv 2407.01082).
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        tail[..., -1] = False  # the largest always stays
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    if min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
    return logits.softmax(dim=-1)


def next_ids(
    logits: Tensor, uniform: Tensor, seen: Tensor, penalty: float, shape: dict[str, float]
) -> Tensor:
    """The next id of each row (B,), -1 where its logits (B, V) are not finite.

    uniform (B, 1): a number from 0 to 1 a row, which picks the id by the cumulative probabilities.
    seen (B, V): the ids that the penalty is for (arXiv 1909.05858). Never waits for the device.
    """
    finite = torch.isfinite(logits).all(dim=-1)
    if penalty != 1:
        punished = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, punished, logits)
    if shape["temperature"] == 0:
        new = logits.argmax(dim=-1)
    else:
        cumulative = sampling_probs(logits, **shape).to(uniform.dtype).cumsum(dim=-1)
        new = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        new = new.clamp(max=logits.shape[-1] - 1)  # rounding may reach the sum
    return torch.where(finite, new, -1)


def uniform_rows(seeds: list[int | None], device: torch.device) -> Callable[[], Tensor]:
    """A function that draws a number from 0 to 1 for each row (B, 1), from generators of their own:
    so a row does not depend on its neighbours, nor the caller's random state on us."""
    generators = [torch.Generator() for _ in seeds]
    for generator, seed in zip(generators, seeds, strict=True):
        generator.seed() if seed is None else generator.manual_seed(seed)

    def draw() -> Tensor:
        rows = [torch.rand(1, generator=each, dtype=torch.float64) for each in generators]
        kind = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
        return torch.stack(rows).to(device, kind)

    return draw


def check_prompts(prompts: list[list[int]], last: int, context: int) -> None:
    """Raises ValueError unless all are lists of ids from 0 to last, no longer than the context."""
    require(isinstance(prompts, list) and prompts, "prompts: must be a list of at least one prompt")
    for row, ids in enumerate(prompts):
        require(isinstance(ids, list) and ids, f"prompts[{row}]: must be a list of ids, not empty")
        wrong = [place for place, i in enumerate(ids) if type(i) is not int or not 0 <= i <= last]
        some = f"prompts[{row}][{wrong[0]}]: {ids[wrong[0]]!a:.40}" if wrong else ""
        require(not wrong, f"{some} must be an integer from 0 to {last}")
        fits = len(ids) <= context
        require(fits, f"prompts[{row}]: has {len(ids)} tokens, the context has room for {context}")


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
    eos_token_ids: Collection[int] | int | None = (),
    seed: int | None = None,
    cache: KVCache | None = None,
    graph: bool = False,
) -> Iterator[list[int | None]]:
    """Continue prompts (lists of ids, of any lengths); yields at each step one new id a row.

    A row ends after one of eos_token_ids (which it yields), after max_new_tokens, or where the
    context is full; from then on it yields None. Row i draws from a generator of its own, seeded
    with seed + i, so that it does not depend on its neighbours; seed None takes random ones.
    cache: continue after the tokens that it holds (one row only); the last id yielded is not in it.
    graph: run each step as one CUDA graph.
    Raises ValueError for bad arguments at once, and for logits that are not finite at their step.
    """
    shape = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    more = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    check_sampling(**shape, **more, seed=seed)
    held = cache.length if cache else 0
    limits = [model.config.max_position_embeddings, *([cache.max_length] if cache else [])]
    context = min(limits) - held
    check_prompts(prompts, model.config.vocab_size - 1, context)
    require(cache is None or len(prompts) == 1, "prompts: must be one with a cache")
    room = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    seeds = [None if seed is None else seed + row for row in range(len(prompts))]
    eos = frozenset([eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids or ())
    return _steps(model, prompts, room, shape, repetition_penalty, eos, seeds, cache, graph)


def compile_layers(model: GraniteMoeForCausalLM, batch_size: int = 1) -> float:
    """Compile the token step, one graph for all layers; returns the seconds that it took.

    The experts become "batched", whose fetch of weights then costs nothing. A prefill stays eager,
    since each prompt's length would be compiled anew. Needs a C++ compiler, or Triton on CUDA, and
    raises ValueError without.
    """
    model.config.experts_backend = "batched"
    cuda = model.model.norm.weight.device.type == "cuda"
    how = {"mode": "max-autotune-no-cudagraphs"} if cuda else {}
    forward = granitemoe.DecoderLayer.forward
    model.model.token_step = torch.compile(forward, fullgraph=True, **how)
    began = time.perf_counter()
    try:
        for size in (2, 3):  # a size that has varied is a symbol: any length of the cache will do
            prompts = [[0] * size, *[[0]] * (batch_size - 1)]
            list(generate(model, prompts, size + 1, graph=cuda))
    except RuntimeError as error:  # the compiler's own errors are of this class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compiling failed: {reason:.120}") from None
    return time.perf_counter() - began


class Steps:
    """Runs the model for the rows of one batch: tokens in, the next ids (B,) out.

    Rows are padded on the left; masks come from lengths, since the id that pads is a real one too.
    """

    def __init__(
        self,
        model: GraniteMoeForCausalLM,
        cache: KVCache,
        pads: Tensor,
        choose: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """pads (B, 1): how many slots of the cache each row leaves empty; choose: logits (B, V)
        and uniform numbers (B, 1) to ids (B,)."""
        self.model, self.cache, self.pads, self.choose = model, cache, pads, choose
        self.mask = torch.arange(cache.max_length, device=pads.device) >= pads  # (B, S)
        self.padded = bool(pads.any())

    def __call__(self, ids: Tensor, uniform: Tensor) -> Tensor:
        """ids (B, T), which the cache then holds."""
        inputs, end = {}, self.cache.length + ids.shape[1]
        if self.padded:
            slots = torch.arange(self.cache.length, end, device=ids.device)
            inputs["position_ids"] = (slots - self.pads).clamp(min=0)
            inputs["attention_mask"] = self.mask[:, :end]
        logits = self.model(ids, cache=self.cache, logits_to_keep=1, **inputs).logits
        return self.choose(logits[:, -1].float(), uniform)

    def capture(self, uniform: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The step of one token a row as a CUDA graph, sampling included: one launch a step.

        Every shape is fixed: the step writes the slot that a tensor names, and looks at the whole
        cache through the mask. The ids are those of the same kernels run one by one.
        """
        cache, filled = self.cache, self.cache.length
        ids, slot = torch.zeros_like(self.pads), torch.full_like(self.pads[0], filled)
        uniform = uniform.clone()

        def step() -> Tensor:
            inputs = {"attention_mask": self.mask, "position_ids": slot - self.pads}
            logits = self.model(ids, cache=cache, **inputs).logits
            return self.choose(logits[:, -1].float(), uniform)

        cache.write_at(slot)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate and compile at their first runs
            for _ in range(3):
                step()
                cache.length = filled
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            new = step()
        cache.length, cache.slots = filled, None

        def replay(new_ids: Tensor, new_uniform: Tensor) -> Tensor:
            ids.copy_(new_ids)
            uniform.copy_(new_uniform)
            slot.fill_(cache.length)
            graph.replay()
            cache.length += 1
            return new

        return replay


@torch.inference_mode()
def _steps(
    model: GraniteMoeForCausalLM,
    prompts: list[list[int]],
    room: list[int],
    shape: dict[str, float],
    penalty: float,
    eos: frozenset[int],
    seeds: list[int | None],
    cache: KVCache | None,
    graph: bool,
) -> Iterator[list[int | None]]:
    """Prefill, then one token a step; room: how many tokens each row may still get."""
    if max(room) < 1:
        return
    weight, B, longest = model.model.norm.weight, len(prompts), max(map(len, prompts))
    device, kind = weight.device, {"device": weight.device, "dtype": weight.dtype}
    cache = cache or KVCache(model.config, B, longest + max(room), **kind)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, ids] = True
    choose = functools.partial(next_ids, seen=seen, penalty=penalty, shape=shape)
    pads = torch.tensor([[longest - len(ids)] for ids in prompts], device=device)
    step = Steps(model, cache, pads, choose)
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    draw = uniform_rows(seeds, device)
    uniform = draw()
    for chunk in padded.split(max(1, PREFILL_TOKENS // B), dim=1):
        new = step(chunk, uniform)
    if graph and max(room) > 1:
        step = step.capture(uniform)
    for count in range(max(room)):
        ids = new.tolist()  # waits for the device
        require(-1 not in ids, f"logits: not finite at step {count}; a wider dtype may help")
        ids = [i if count < end else None for i, end in zip(ids, room, strict=True)]
        yield ids
        room = [0 if i in eos else end for i, end in zip(ids, room, strict=True)]
        if count + 1 >= max(room):
            return
        seen.scatter_(1, new[:, None], True)
        new = step(new[:, None], uniform if shape["temperature"] == 0 else draw())


class TextStream:
    """Ids in, text out as soon as it is certain: whole characters, and nothing of a stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: list[str]) -> None:
        self.decode, self.stops = decode, stops
        self.ids: list[int] = []  # since the last whole character
        self.text = ""  # not given out yet: it may become a stop text
        self.stopped = False

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        text = self.decode(self.ids)
        if text.endswith("\ufffd"):  # a character whose other bytes may still come
            return ""
        self.ids, self.text = [], self.text + text
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self.text[: min(found)]
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        held = max((len(start) for start in starts if self.text.endswith(start)), default=0)
        whole = len(self.text) - held
        text, self.text = self.text[:whole], self.text[whole:]
        return text

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        text = "" if self.stopped else self.text + self.decode(self.ids)
        self.ids, self.text = [], ""
        return text


def write(text: str) -> None:
    """To standard output at once; a terminal gets no control characters that a model made up."""
    require(sys.stdout is not None, "standard output: is closed")
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"standard output: {error.strerror}") from None


def note(text: str, end: str = "\n") -> None:
    if sys.stderr is not None:
        print(text, end=end, file=sys.stderr, flush=True)


def stream(
    model: GraniteMoeForCausalLM,
    prompts: list[list[int]],
    heads: list[str],
    decode: Callable[[list[int]], str],
    args: argparse.Namespace,
    cache: KVCache | None = None,
) -> list[list[int]]:
    """Generate and print: the first row as it is made, each other once those before it ended."""
    eos = model.config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    made: list[list[int]] = [[] for _ in prompts]
    streams = [TextStream(decode, args.stop) for _ in prompts]
    texts, ended, shown, times = list(heads), [False for _ in prompts], 0, [time.perf_counter()]
    options = {**args.sampling, "eos_token_ids": eos, "cache": cache}
    for ids in generate(model, prompts, args.max_new_tokens, **options):
        times.append(time.perf_counter())
        for row, token_id in enumerate(ids):
            if ended[row] or token_id is None:
                ended[row] = True
                continue
            made[row].append(token_id)
            ended[row] = token_id in eos
            texts[row] += "" if token_id in eos else streams[row].push(token_id)
            ended[row] |= streams[row].stopped
        while ended[shown] and shown + 1 < len(prompts):
            write(texts[shown] + streams[shown].finish() + "\n\n")
            shown += 1
        write(texts[shown])
        texts[shown] = ""
        if all(ended):
            break
    rest = zip(texts[shown:], streams[shown:], strict=True)
    write("\n\n".join(text + stream.finish() for text, stream in rest) + "\n")
    report(model, prompts, made, times)
    return made


def report(model: GraniteMoeForCausalLM, prompts: list, made: list, times: list[float]) -> None:
    """Speeds on standard error; times: before the prefill, then after each step."""
    read, new, steps = sum(map(len, prompts)), sum(map(len, made)), len(times) - 2
    if steps >= 0:
        first = times[1] - times[0]
        note(f"[first token {first:.3f} s; prompt {read} tokens, {read / first:.0f} tokens/s", "")
        if steps > 0:
            seconds = (times[-1] - times[1]) / steps
            active = model.num_parameters(active=True) * model.model.norm.weight.element_size()
            speed = f"{(new - len(prompts)) / steps / seconds:.1f} tokens/s"
            note(f"; {new} new, {speed}, weights at {active / seconds / 1e9:.2f} GB/s a row", "")
        note("]")
    context = model.config.max_position_embeddings
    if any(len(ids) + len(more) >= context for ids, more in zip(prompts, made, strict=True)):
        note(f"[the context of {context} tokens is full]")


def converse(
    model: GraniteMoeForCausalLM,
    tokenizer: "Tokenizer",
    decode: Callable[[list[int]], str],
    args: argparse.Namespace,
) -> None:
    """One message a line from standard input; the cache is kept from turn to turn."""
    weight, room = model.model.norm.weight, min(model.config.max_position_embeddings, CHAT_TOKENS)
    cache = KVCache(model.config, 1, room, device=weight.device, dtype=weight.dtype)
    messages = [("system", args.system)] if args.system else []
    unread: list[int] = []  # the end of the last reply, which the cache has not seen
    end = tokenizer.token_to_id(END)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    while True:
        if sys.stdin.isatty():
            note("> ", "")
        if not (line := sys.stdin.buffer.readline()):
            return
        try:
            text = decode_prompt(line.rstrip(b"\r\n"))
        except ValueError as error:
            note(f"[{error}]")
            continue
        ids = unread + chat_ids(tokenizer, [*messages, ("user", text)])
        if len(ids) >= room - cache.length:
            return note(f"[the conversation's {room} tokens are full: start a new one]")
        (made,) = stream(model, [ids], [""], decode, args, cache)
        messages = []
        if args.seed is not None:  # or each turn would draw the same numbers
            args.sampling["seed"] = (args.sampling["seed"] + 1) % 2**63
        unread = made[-1:] + ([] if made[-1:] == [end] else [end]) + newline


def decode_prompt(raw: bytes) -> str:
    """Raises ValueError if it is empty or not UTF-8."""
    try:
        prompt = raw.decode()
    except UnicodeDecodeError:
        raise ValueError("PROMPT: is not valid UTF-8") from None
    require(prompt.strip(), "PROMPT: is empty")
    return prompt


def read_prompt(prompt: str) -> str:
    """A prompt as typed, or standard input for -."""
    if prompt != "-":
        return decode_prompt(prompt.encode(errors="surrogateescape"))
    require(sys.stdin is not None, "PROMPT: standard input is closed")
    return decode_prompt(sys.stdin.buffer.read())


def parse_ids(prompt: str) -> list[int]:
    words = prompt.replace(",", " ").split()
    good = all(re.fullmatch(r"[0-9]{1,9}", word) for word in words)
    require(good, "--raw-ids: PROMPT must be integers from 0")
    return [int(word) for word in words]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error, and not the whole usage."""
        plain = message.encode("unicode_escape").decode()  # it may echo what was typed
        note(f"generate.py: error: {plain:.160} (see --help)")
        sys.exit(2)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="texts to continue, as one batch; - is stdin")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest; 0 keeps all")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest that hold P")
    add("--min-p", type=float, default=0.0, metavar="P", help="drop below P times the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="over 1: repeat less")
    add("--seed", type=int, metavar="S", help="the same seed gives the same text; default random")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--chat", action="store_true", help="Granite's chat format; no PROMPT: a conversation")
    add("--system", metavar="TEXT", help="the system message of --chat")
    add("--raw-ids", action="store_true", help="prompts and output are token ids")
    add("--device", default="auto", help="auto (default), cpu, mps, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add("--attention", choices=granitemoe.ATTENTION, default="sdpa", help="(default: sdpa)")
    add("--experts", choices=("auto", *granitemoe.EXPERTS), default="auto", help="(default: auto)")
    add("--compile", action="store_true", help="compile first, then decode faster")


def parse_args() -> argparse.Namespace:
    """The command's arguments, all of them checked; `sampling`: those that generate takes."""
    parser = Parser(description="Continue text with a GraniteMoe model.")
    add_options(parser)
    args = parser.parse_args()
    try:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        args.sampling = {name: getattr(args, name) for name in names}
        check_sampling(**args.sampling, max_new_tokens=args.max_new_tokens)
        args.device = pick_device(args.device)
        require(args.chat or args.system is None, "--system: needs --chat")
        good = not args.chat or (not args.raw_ids and len(args.prompts) <= 1)
        require(good, "--chat: takes one PROMPT or none, and no --raw-ids")
        good = "" not in args.stop and not (args.stop and args.raw_ids)
        require(good, "--stop: must be a text that is not empty, and not with --raw-ids")
        good = not args.compile or args.experts != "loop"
        require(good, "--compile: needs --experts auto or batched")
        good = not args.compile or args.attention != "flash" or args.device.type != "cuda"
        require(good, "--compile: a CUDA graph needs a mask, which flash does not take; use sdpa")
        args.prompts = [read_prompt(prompt) for prompt in args.prompts]
        if args.raw_ids:
            args.ids = [parse_ids(prompt) for prompt in args.prompts or ["0"]]
    except ValueError as error:
        parser.error(str(error))
    return args


def open_model(args: argparse.Namespace) -> tuple[GraniteMoeForCausalLM, "Tokenizer | None"]:
    """Load what the command asks for, and say what it is and how it runs."""
    began = time.perf_counter()

    def progress(done: int, of: int) -> None:
        if sys.stderr is not None and sys.stderr.isatty() and time.perf_counter() - began > 1:
            note(f"\rloading: {done} of {of} tensors", "\n" if done == of else "")

    folder = find_folder(args.model)
    tokenizer = None if args.raw_ids else load_tokenizer(folder)
    how = {"attention_backend": args.attention, "experts_backend": args.experts}
    model = load_model(folder, device=args.device, dtype=args.dtype, **how, progress=progress)
    loaded = time.perf_counter() - began
    if args.compile:
        note(f"[compiled in {compile_layers(model, max(1, len(args.prompts))):.1f} s]")
    args.sampling["graph"] = args.compile and args.device.type == "cuda"
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    total, active = (model.num_parameters(active=a) / 1e6 for a in (False, True))
    experts = granitemoe.pick_experts(model.config.experts_backend, args.device)
    note(
        f"[{total:.1f} M parameters, {active:.1f} M active; {args.device}, {dtype}, "
        f"{args.attention}, experts {experts}; loaded in {loaded:.2f} s]"
    )
    return model, tokenizer


def run(args: argparse.Namespace) -> None:
    model, tokenizer = open_model(args)
    decode = decoder(tokenizer)
    if args.raw_ids:
        stream(model, args.ids, [" ".join(map(str, ids)) for ids in args.ids], decode, args)
    elif not args.chat:
        texts = args.prompts or [PROMPT]
        stream(model, [encode(tokenizer, text) for text in texts], texts, decode, args)
    elif args.prompts:
        messages = [("system", args.system)] if args.system else []
        ids = chat_ids(tokenizer, [*messages, ("user", args.prompts[0])])
        stream(model, [ids], [""], decode, args)
    else:
        converse(model, tokenizer, decode, args)


def main() -> int:
    """Run the command; returns its exit status, after at most one line of error."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status, message = 0, ""
    try:
        if sys.stdout is not None:
            sys.stdout.reconfigure(errors="replace")
        run(parse_args())
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except ImportError as error:  # of what only some commands need
        status, message = 1, f"{error}; run: pip install -r requirements.txt"
    except (ValueError, OSError) as error:
        status, message = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        status, message = 1, "out of memory: try a shorter or smaller batch, or another --dtype"
    if status:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the exit would write the rest once more
        note(f"generate.py: error: {' '.join(message.split())}"[:200] if message else "")
    return status


if __name__ == "__main__":
    sys.exit(main())
