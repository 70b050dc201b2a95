"""Load a GraniteMoe checkpoint and sample text from it.

    python generate.py "def fib(n):"                       the small model in tiny/
    python generate.py --model DIR_OR_HUB_ID --chat        a released one, as a conversation

Reading order: load_model (check every name, shape and dtype, then fill), load_tokenizer,
sampling_probs, generate (prefill, then one token a step), and the command line.
"""

import argparse
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # importing torch takes a second, in which Ctrl-C must end quietly too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor

    from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, KVCache, parse_json, pick_experts
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"generate.py: error: {error}; run: pip install -r requirements.txt")

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_DISK = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SPELLINGS = {  # transformers' names in memory, which it can also write: the names of the released files
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}
START, ROLE_END, END = "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"
PROMPT = "def "
CHAT_TOKENS = 16384  # of a conversation, whatever the context; the cache is allocated at once
MAX_JSON = 10 * 2**20
PREFILL_TOKENS = 2048  # at a time; bounds the memory of a prefill whatever the prompt's length


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not what it says; the message names file and field."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give every way in which reading a file can fail one form, with the file's name in it."""
    try:
        if not path.is_file():
            kind = "not a regular file" if path.exists() else "no such file"
            raise CheckpointError(kind)
        yield
    except OSError as error:
        raise CheckpointError(f"{str(path)!a}: {(error.strerror or 'cannot be read').lower()}") from None
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!a}: {error}") from None


def find_folder(path: str | Path) -> Path:
    """A folder as it is; a hub id, `owner/name` with no local folder `owner`, is downloaded."""
    folder = Path(path)
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    if folder.is_dir() or not looks_like_id or folder.parent.exists():
        if not str(path) or not folder.is_dir():
            raise CheckpointError(f"{str(path)!a}: no such folder, and not a hub id (owner/name)")
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises dozens of classes, all meaning: not to be had
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{str(path)!a}: cannot be downloaded: {reason}") from None


def read_header(path: Path) -> dict[str, tuple[torch.dtype | str, tuple[int, ...]]]:
    """Names of a safetensors file with dtype and shape, read strictly and without its tensors."""
    with naming(path), path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError("a Git LFS pointer, not the weights; run: git lfs pull")
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(MAX_JSON, path.stat().st_size - 8):
            raise ValueError("not a safetensors file, or cut off")
        header = parse_json(file.read(size))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
                raise ValueError(f"{name!a:.80}: not a tensor's entry")
            dtype = str(entry.get("dtype"))
            found[name] = (ON_DISK.get(dtype, dtype), tuple(entry["shape"]))
        return found


def find_tensors(folder: Path) -> dict[str, tuple[Path, torch.dtype | str, tuple[int, ...]]]:
    """Where each stored tensor is: model.safetensors or, without it, the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        if not single.exists() and (pickles := sorted(folder.glob("*.bin*")) + sorted(folder.glob("*.pt*"))):
            raise CheckpointError(
                f"{str(pickles[0])!a}: pickle is not supported, since it can run code; convert to safetensors"
            )
        return {name: (single, *entry) for name, entry in read_header(single).items()}
    with naming(index):
        weight_map = parse_json(index.read_bytes()[: MAX_JSON + 1]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map: must be an object that names a shard for each tensor")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
                raise ValueError(f"{name!a:.60}: shard must be a plain *.safetensors name, got {shard!a:.60}")
    headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{str(folder / shard)!a}: lacks {name!a:.80}, which the index puts there")
    return {name: (folder / shard, *headers[shard][name]) for name, shard in weight_map.items()}


def canonical(name: str) -> str:
    """A stored tensor's name in the spelling of the released files."""
    prefix, marker, tail = name.partition(".block_sparse_moe.")
    return prefix + marker + SPELLINGS.get(tail, tail)


def match_tensors(folder: Path, stored: dict, model: GraniteMoeForCausalLM) -> dict[str, str]:
    """Compare what is stored with what the model needs, before anything is allocated.

    Returns the stored name of each of the model's tensors, and of a tied head's copy if there is one.
    """
    where = str(folder)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    optional = {}
    if model.config.tie_word_embeddings:
        optional["lm_head.weight"] = expected["model.embed_tokens.weight"]
    names: dict[str, str] = {}
    for name in stored:
        if names.setdefault(canonical(name), name) != name:
            raise CheckpointError(f"{where!a}: {canonical(name)!a:.80} is stored under two names")
    for problem, wrong in (
        ("missing", [n for n in expected if n not in names]),
        ("unexpected", [names[n] for n in names if n not in expected and n not in optional]),
    ):
        if wrong:
            some = ", ".join(f"{n!a:.50}" for n in wrong[:3])
            raise CheckpointError(f"{where!a}: {len(wrong)} {problem} tensors: {some}")
    for name, shape in (expected | optional).items():
        if name in names:
            path, dtype, found = stored[names[name]]
            if found != shape:
                raise CheckpointError(f"{str(path)!a}: {name}: shape {found!a:.60}, expected {shape}")
            if not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"{str(path)!a}: {name}: dtype {dtype!a:.20}, expected {list(ON_DISK)}")
    return names


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    low, high = torch.aminmax(tensor)  # the one cheap look at every value: both are NaN if any is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(f"{str(path)!a}: {name}: NaN or infinite values (as {tensor.dtype})")


def read_tensors(
    stored: dict, names: dict[str, str], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by itself, in the process's own memory, finite and cast."""
    by_file = sorted(names, key=lambda name: stored[names[name]][0])
    for file, group in itertools.groupby(by_file, key=lambda name: stored[names[name]][0]):
        with naming(file), safe_open(file, "pt", backend="pread") as tensors:
            for name in group:
                tensor = tensors.get_tensor(names[name])
                if tuple(tensor.shape) != stored[names[name]][2]:
                    raise ValueError(f"{name}: changed while loading")
                check_finite(file, name, tensor)
                if tensor.dtype != dtype:
                    tensor = tensor.to(dtype)
                    check_finite(file, name, tensor)
                yield name, tensor.to(device)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attention_backend: str = "sdpa",
    experts_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> GraniteMoeForCausalLM:
    """Read a checkpoint: a folder with config.json and model.safetensors or its shards, or a hub id.

    dtype: of the model; None keeps that of the config or, where it names none, of the file.
    progress: called after each tensor with how many are read, and of how many.
    Memory never holds more than the model and one tensor, and nothing stays tied to the files.
    Raises CheckpointError (a ValueError) for anything missing, unexpected, damaged or not finite.
    """
    folder = find_folder(path)
    with naming(folder / "config.json"):
        config = GraniteMoeConfig.from_json(folder / "config.json")
    config = replace(config, attention_backend=attention_backend, experts_backend=experts_backend)
    stored = find_tensors(folder)
    layers = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    if layers != config.num_hidden_layers:  # before anything is built by that number
        where = f"{str(folder / 'config.json')!a}: num_hidden_layers"
        raise CheckpointError(f"{where}: {config.num_hidden_layers}, but {layers} layers are stored")
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(config)
    names = match_tensors(folder, stored, model)
    dtype = dtype or config.dtype or stored[names["model.embed_tokens.weight"]][1]
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    weights: dict[str, Tensor] = {}
    for name, tensor in read_tensors(stored, names, dtype, device):
        weights[name] = tensor
        progress(len(weights), len(names))
    copy = weights.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if copy is not None and not torch.equal(copy, weights["model.embed_tokens.weight"]):
        raise CheckpointError(f"{str(folder)!a}: lm_head.weight differs from the embedding it is tied to")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_tokenizer(path: str | Path) -> "Tokenizer":  # noqa: F821
    """The checkpoint's tokenizer: tokenizer.json, or vocab.json, merges.txt and added_tokens.json.

    Raises CheckpointError, also where it has ids that the model of the folder's config.json lacks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = find_folder(path)
    whole, vocab, merges, added = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
    )
    try:
        if whole.exists() or not vocab.exists():
            with naming(whole):
                tokenizer = Tokenizer.from_file(str(whole))
        else:
            with naming(vocab), naming(merges):
                tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
            tokenizer.decoder = decoders.ByteLevel()
            extra = {END: tokenizer.token_to_id(END)}
            if added.exists():
                with naming(added):
                    extra |= parse_json(added.read_bytes())
            for token, token_id in sorted(extra.items(), key=lambda item: item[1]):
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
                if tokenizer.token_to_id(token) != token_id:
                    raise CheckpointError(f"{str(added)!a}: {token!a:.60}: id {token_id} is not the next")
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        tokenizer.encode("a 1")  # some damage shows only in use
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # the library's own errors are bare Exceptions, its panics not even
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{str(whole)!a}: not a usable tokenizer: {reason:.80}") from None
    with naming(folder / "config.json"):
        size = GraniteMoeConfig.from_json(folder / "config.json").vocab_size
        if max(ids, default=size) >= size:
            raise ValueError(f"vocab_size: {size}, but the tokenizer has an id {max(ids, default=size)}")
    return tokenizer


SAMPLING = {  # argument: its test, and what is allowed in words
    "temperature": (lambda x: x == 0 or 1e-4 <= x <= 1e4, "0 (greedy) or from 1e-4 to 1e4"),
    "top_k": (lambda x: type(x) is int and x >= 0, "an integer >= 0 (0 is off)"),
    "top_p": (lambda x: 0 < x <= 1, "over 0 and at most 1 (1 is off)"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
    "repetition_penalty": (lambda x: 1e-2 <= x <= 1e2, "from 0.01 to 100 (1 is off)"),
    "max_new_tokens": (lambda x: type(x) is int and x >= 0, "an integer >= 0"),
    "seed": (lambda x: x is None or type(x) is int and 0 <= x < 2**63, "an integer from 0 to 2^63 - 1"),
}


def check_sampling(**arguments: float | int | None) -> None:
    """Raises ValueError naming the argument, its value and what is allowed."""
    for name, value in arguments.items():
        good, allowed = SAMPLING[name]
        number = type(value) in (int, float) or (name == "seed" and value is None)
        if not number or not good(value):
            raise ValueError(f"{name}: must be {allowed}, got {value!r:.60}")


def sampling_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Next-token probabilities (B, V), float32, from logits (B, V).

    In order: divide by the temperature (0 puts all on the most likely id, the lowest of several),
    keep the top_k largest, the smallest set that holds top_p of the mass (arXiv 1904.09751), and what
    has at least min_p of the largest probability (arXiv 2407.01082). Raises ValueError.
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


def pick(probs: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One id a row, (B,): where the row's own uniform number falls in its cumulative distribution."""
    cumulative = probs.double().cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    target = uniform.to(probs.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make ids that a row has seen less likely: seen (B, V) bool (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


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
    eos_token_ids: Collection[int] = (),
    seed: int | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts (lists of ids, of any lengths); yields at each step one new id a row.

    A row ends after one of eos_token_ids (which it yields), after max_new_tokens, or where the
    context is full; from then on it yields None. Row i draws from its own generator, seeded with
    seed + i, so that it does not depend on its neighbours; seed None takes random ones.
    cache: continue after the tokens that it holds (one row only); the last id yielded is not in it.
    Raises ValueError for bad arguments at once, and for logits that are not finite at their step.
    """
    shape = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    check_sampling(**shape, repetition_penalty=repetition_penalty, max_new_tokens=max_new_tokens, seed=seed)
    config, held = model.config, cache.length if cache else 0
    if not prompts or (cache and len(prompts) != 1):
        raise ValueError("prompts: must be a list of at least one prompt, and of one with a cache")
    for row, ids in enumerate(prompts):
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"prompts[{row}]: must be a list of at least one id, got {ids!r:.60}")
        for place, i in enumerate(ids):
            if type(i) is not int or not 0 <= i < config.vocab_size:
                allowed = f"an integer from 0 to {config.vocab_size - 1}"
                raise ValueError(f"prompts[{row}][{place}]: must be {allowed}, got {i!r:.60}")
        if held + len(ids) > config.max_position_embeddings:
            limit = f"the context is {config.max_position_embeddings}"
            raise ValueError(f"prompts[{row}]: has {held + len(ids)} tokens, {limit}")
    limits = [min(max_new_tokens, config.max_position_embeddings - held - len(p)) for p in prompts]
    seeds = [None if seed is None else seed + row for row in range(len(prompts))]
    eos = frozenset(eos_token_ids)
    return _steps(model, prompts, limits, shape, repetition_penalty, eos, seeds, cache)


@torch.inference_mode()
def _steps(
    model: GraniteMoeForCausalLM,
    prompts: list[list[int]],
    limits: list[int],
    shape: dict,
    penalty: float,
    eos: frozenset[int],
    seeds: list[int | None],
    cache: KVCache | None,
) -> Iterator[list[int | None]]:
    """Prefill, then one token a step; rows are padded on the left, and masks come from lengths."""
    if max(limits) < 1:
        return
    weight = model.model.norm.weight
    B, longest, device = len(prompts), max(map(len, prompts)), weight.device
    pads = torch.tensor([longest - len(p) for p in prompts])
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    if cache is None:
        room = longest + max(limits)
        cache = KVCache(model.config, B, room, device=device, dtype=weight.dtype)
    mask = (torch.arange(longest + max(limits)) >= pads[:, None]).to(device) if pads.any() else None

    def predict(ids: Tensor) -> Tensor:
        start, T = cache.length, ids.shape[1]
        if mask is None:
            return model(ids.to(device), cache=cache, logits_to_keep=1).logits[:, -1]
        positions = (torch.arange(start, start + T) - pads[:, None]).clamp(min=0)
        inputs = ids.to(device), mask[:, : start + T], positions.to(device)
        return model(*inputs, cache=cache, logits_to_keep=1).logits[:, -1]

    generators = [torch.Generator() for _ in prompts]
    for generator, seed in zip(generators, seeds, strict=True):
        generator.seed() if seed is None else generator.manual_seed(seed)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    for chunk in ids.split(max(1, PREFILL_TOKENS // B), dim=1):
        logits = predict(chunk)
    for step in range(max(limits)):
        logits = logits.float()
        if not torch.isfinite(logits).all():
            raise ValueError(f"logits: not finite at step {step}: the weights or the dtype overflow")
        if penalty != 1:
            logits = penalise(logits, seen.to(device), penalty)
        greedy = shape["temperature"] == 0
        new = logits.argmax(dim=-1) if greedy else pick(sampling_probs(logits, **shape), generators)
        new = new.cpu()
        seen[torch.arange(B), new] = True
        row_ids = [i if step < limit else None for i, limit in zip(new.tolist(), limits, strict=True)]
        yield row_ids
        limits = [0 if i in eos else limit for i, limit in zip(row_ids, limits, strict=True)]
        if step + 1 >= max(limits):
            return
        logits = predict(new[:, None])


class TextStream:
    """Ids in, text out as soon as it is certain: whole characters, and nothing of a stop text."""

    def __init__(self, tokenizer: "Tokenizer", stops: list[str]) -> None:  # noqa: F821
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []  # since the last whole character
        self.held = ""  # may turn out to be the start of a stop text
        self.stopped = False

    def push(self, token_id: int) -> str:
        if self.tokenizer.id_to_token(token_id) is None:  # a padded vocabulary has ids without a token
            return self._release("\ufffd")
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):  # bytes of a character whose other bytes are still to come
            return ""
        self.ids = []
        return self._release(text)

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        text = self.held + self.tokenizer.decode(self.ids)
        self.ids, self.held = [], ""
        return "" if self.stopped else text

    def _release(self, text: str) -> str:
        self.held += text
        ends = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            self.stopped, certain = True, min(ends)
        else:
            certain = len(self.held)
            for stop in self.stops:
                for size in range(1, len(stop)):
                    if self.held.endswith(stop[:size]):
                        certain = min(certain, len(self.held) - size)
        text, self.held = self.held[:certain], self.held[certain:]
        return text


class IdStream:
    """The same for --raw-ids: numbers instead of text, and no tokenizer."""

    stopped = False

    def push(self, token_id: int) -> str:
        return f" {token_id}"

    def finish(self) -> str:
        return ""


def chat_ids(tokenizer: "Tokenizer", messages: list[tuple[str, str]]) -> list[int]:  # noqa: F821
    """Granite's chat format for (role, content) messages, ending where the assistant speaks.

    Contents are text: a control token that a user types is encoded as its characters.
    """
    control = {name: tokenizer.token_to_id(name) for name in (START, ROLE_END, END)}
    if None in control.values():
        raise CheckpointError(f"the tokenizer has no {START}: --chat needs an instruct model")

    def plain(text: str) -> list[int]:
        tokenizer.encode_special_tokens = True  # that is: as ordinary text
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            tokenizer.encode_special_tokens = False

    ids = []
    for role, content in messages:
        ids += [control[START], *plain(role), control[ROLE_END]]
        ids += [*plain(content), control[END], *plain("\n")]
    return [*ids, control[START], *plain("assistant"), control[ROLE_END]]


def write(text: str) -> None:
    """To standard output at once; a terminal gets no control characters that a model made up."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA, else MPS, else the CPU. Raises ValueError for what this machine lacks."""
    available = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device("cuda:0" if "cuda:0" in available else available[-1])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise ValueError(f"--device: must be auto or one of {available}, got {name!a:.40}")
    return torch.device(wanted)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue text with a GraniteMoe model.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="texts to continue, as one batch; - reads one")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest; 0 keeps all")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest that hold P")
    add("--min-p", type=float, default=0.0, metavar="P", help="drop below P of the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="X")
    add("--seed", type=int, help="the same seed gives the same text (default: random)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--chat", action="store_true", help="Granite's chat format; no PROMPT: a conversation")
    add("--system", metavar="TEXT", help="the system message of --chat")
    add("--raw-ids", action="store_true", help="prompts and output are token ids")
    add("--device", default="auto", help="auto (default), cpu, mps, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add("--attention", choices=("eager", "sdpa", "flash"), default="sdpa")
    add("--experts", choices=("auto", "loop", "batched"), default="auto")
    args = parser.parse_args()
    try:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        args.sampling = {name: getattr(args, name) for name in (*names, "seed")}
        check_sampling(**args.sampling, max_new_tokens=args.max_new_tokens)
        args.device = pick_device(args.device)
        args.prompts = [read_prompt(prompt) for prompt in args.prompts]
        if args.system is not None and not args.chat:
            raise ValueError("--system: needs --chat")
        if args.chat and (args.raw_ids or len(args.prompts) > 1):
            raise ValueError("--chat: takes one prompt or none, and no --raw-ids")
        if "" in args.stop or (args.stop and args.raw_ids):
            raise ValueError("--stop: must be a text that is not empty, without --raw-ids")
    except ValueError as error:
        parser.error(str(error))
    return args


def read_prompt(prompt: str) -> str:
    """A prompt as typed, or - for standard input. Raises ValueError if it is empty or not UTF-8."""
    try:
        if prompt != "-":
            prompt.encode()
        elif sys.stdin is None:
            raise ValueError("PROMPT: standard input is closed")
        else:
            prompt = sys.stdin.buffer.read().decode()
    except UnicodeError:
        raise ValueError("PROMPT: is not valid UTF-8") from None
    if not prompt.strip():
        raise ValueError("PROMPT: is empty")
    return prompt


def parse_ids(prompt: str) -> list[int]:
    try:
        return [int(word) for word in prompt.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--raw-ids: PROMPT must be integers, got {prompt!a:.60}") from None


def report(model: GraniteMoeForCausalLM, prompt_ids: int, rows: list[int], times: list[float]) -> None:
    """Speeds on standard error; times: before the prefill, then after each step."""
    if len(times) < 2:
        return
    first = times[1] - times[0]
    line = f"[first token {first:.3f} s; prompt {prompt_ids} tokens, {prompt_ids / first:.0f} tokens/s"
    if len(times) > 2:
        steps_a_second = (len(times) - 2) / (times[-1] - times[1])
        active = model.num_parameters(active=True) * model.model.norm.weight.element_size()
        line += f"; {sum(rows)} new tokens, {steps_a_second * len(rows):.1f} tokens/s"
        line += f", {steps_a_second * active / 1e9:.1f} GB/s of one token's active weights"
    note(line + "]")


def stream(
    model: GraniteMoeForCausalLM,
    prompts: list[list[int]],
    outputs: list,
    heads: list[str],
    args: argparse.Namespace,
    cache: KVCache | None = None,
) -> list[list[int]]:
    """Generate and print: the first row as it is made, each next one when those before have ended."""
    eos = model.config.eos_token_id
    eos = () if eos is None else (eos if isinstance(eos, list) else [eos])
    made: list[list[int]] = [[] for _ in prompts]
    texts, done, shown = list(heads), [False] * len(prompts), 0
    times = [time.perf_counter()]
    steps = generate(model, prompts, args.max_new_tokens, **args.sampling, eos_token_ids=eos, cache=cache)
    for ids in steps:
        times.append(time.perf_counter())
        for row, token_id in enumerate(ids):
            if token_id is None or done[row]:
                continue
            made[row].append(token_id)
            texts[row] += "" if token_id in eos and not args.raw_ids else outputs[row].push(token_id)
            done[row] = token_id in eos or outputs[row].stopped
        while done[shown] and shown + 1 < len(prompts):
            write(texts[shown] + outputs[shown].finish() + "\n\n")
            shown += 1
        write(texts[shown])
        texts[shown] = ""
        if all(done):
            break
    for row in range(shown, len(prompts)):
        write(texts[row] + outputs[row].finish() + ("\n" if row + 1 == len(prompts) else "\n\n"))
    report(model, sum(map(len, prompts)), [len(ids) for ids in made], times)
    held = 0 if cache is None else cache.length
    for prompt, ids in zip(prompts, made, strict=True):
        if cache is None and len(prompt) + len(ids) >= model.config.max_position_embeddings:
            note(f"[the context of {model.config.max_position_embeddings} tokens is full]")
    return made


def converse(model: GraniteMoeForCausalLM, tokenizer: "Tokenizer", args: argparse.Namespace) -> None:  # noqa: F821
    """One message a line from standard input; the cache is kept from turn to turn."""
    config = model.config
    room = min(config.max_position_embeddings, CHAT_TOKENS)
    model.config.max_position_embeddings = room
    weight = model.model.norm.weight
    cache = KVCache(config, 1, room, device=weight.device, dtype=weight.dtype)
    messages = [("system", args.system)] if args.system else []
    unread: list[int] = []  # the last reply's end, which the cache has not seen
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            text = read_prompt(line.decode().rstrip("\n"))
        except ValueError as error:
            note(f"[{error}]")
            continue
        ids = unread + chat_ids(tokenizer, [*messages, ("user", text)])
        messages = []
        (made,) = stream(model, [ids], [TextStream(tokenizer, args.stop)], [""], args, cache)
        end = tokenizer.token_to_id(END)
        unread = made[-1:] + ([] if made[-1:] == [end] else [end])
        unread += tokenizer.encode("\n").ids


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty() and time.perf_counter() - began > 1:
            print(f"\rloading {done} of {of} tensors", end="\n" * (done == of), file=sys.stderr, flush=True)

    tokenizer = None if args.raw_ids else load_tokenizer(args.model)
    how = {"attention_backend": args.attention, "experts_backend": args.experts}
    model = load_model(args.model, device=args.device, dtype=args.dtype, **how, progress=progress)
    experts = pick_experts(args.experts, args.device)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters, {model.num_parameters(active=True) / 1e6:.1f} M active"
    kind = f"{model.model.norm.weight.dtype}".removeprefix("torch.")
    seconds = time.perf_counter() - began
    note(f"[{size}; {args.device}, {kind}, {args.attention}, experts {experts}; loaded in {seconds:.2f} s]")
    if args.chat and not args.prompts:
        return converse(model, tokenizer, args)
    texts = args.prompts or [PROMPT]
    if args.raw_ids:
        texts = args.prompts or ["0"]
        prompts = [parse_ids(text) for text in texts]
        heads = [" ".join(map(str, ids)) for ids in prompts]
        stream(model, prompts, [IdStream() for _ in prompts], heads, args)
        return
    if args.chat:
        system = [("system", args.system)] if args.system else []
        prompts, texts = [chat_ids(tokenizer, [*system, ("user", texts[0])])], [""]
    else:
        prompts = [tokenizer.encode(text).ids for text in texts]
    stream(model, prompts, [TextStream(tokenizer, args.stop) for _ in prompts], texts, args)


def main() -> int:
    """Run the command; returns its exit status, with at most one line of error."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")
    status, message = 0, ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(parse_args())
    except KeyboardInterrupt:
        status, message = 130, "\n"
    except BrokenPipeError:
        status = 141
    except (ValueError, OSError) as error:
        status, message = 1, f"generate.py: error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        status, message = 1, "generate.py: error: out of memory: try fewer prompts or a smaller --dtype"
    if status:  # what could not be written must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if message:
            note(" ".join(message.split())[:200])
    return status


if __name__ == "__main__":
    sys.exit(main())
