"""A checkpoint that somebody brings: found, checked by its headers, read into memory of our own.

Files are not trusted. What headers can show is refused before the model is built; what only values
show, while they are read. GraniteMoeConfig itself refuses features that the model does not have.
"""

import json
import math
import mmap
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from granitemoe import GraniteMoeConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_DISK = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SPELLINGS = {  # transformers' names in memory, which it can also write: those of the released files
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRAPPERS = {  # what prefixes names, and what saves the model without it
    "_orig_mod.": "model._orig_mod.save_pretrained(FOLDER)",
    "module.": "model.module.save_pretrained(FOLDER)",
    "_forward_module.": "model.module.save_pretrained(FOLDER)",
    "_fsdp_wrapped_module.": "take the full state dict",
    "base_model.model.": "model.merge_and_unload().save_pretrained(FOLDER)",
}
WRAPPED = re.compile(rf"(?:^|(?<=\.))({'|'.join(map(re.escape, WRAPPERS))})")
OURS = ("embed_tokens.", "layers.", "norm.")  # what names begin with, after "model."
BUFFER = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # older versions saved it
# What an index may name and no shard has: a buffer, or one of a tied pair.
ABSENT = re.compile(rf"{BUFFER}|lm_head\.weight|(model\.)?embed_tokens\.weight")
MAX_JSON = 10 * 2**20
MAX_HEADERS = 4 * 2**20  # bytes, of all shards: those of released models take 50 kB
MAX_LAYERS = 1000  # each costs time to build; released models have up to 32
READERS = 2  # threads


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not what it says; names the file and the field."""


def require(good: bool | Tensor, message: str) -> None:
    """An assert that python -O keeps: checks are most of this file."""
    if not good:
        raise ValueError(message)


def parse_json(raw: bytes, max_bytes: int = 2**20) -> dict:
    """A JSON object, strictly: no duplicate keys, no NaN, at most `max_bytes`; else ValueError."""

    def unique(pairs: list) -> dict:
        data = {}
        for key, value in pairs:
            require(key not in data, f"duplicate key {key!a:.60}")
            data[key] = value
        return data

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not JSON")

    require(len(raw) <= max_bytes, f"larger than {max_bytes} bytes")
    try:
        data = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    require(isinstance(data, dict), f"must be a JSON object, got {type(data).__name__}")
    return data


def shown(path: str | Path) -> str:
    """A path in ASCII, or its end where it would crowd out what is wrong there."""
    text = f"{str(path)!a}"
    return text if len(text) <= 120 else "..." + text[-117:]


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give every way in which reading a checkpoint can fail one form, with the path in it."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise CheckpointError(f"{shown(path)}: {reason}") from None
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{shown(path)}: {error}") from None


def is_there(path: Path) -> bool:
    """Also as a link that leads nowhere: opening it says so, and it does not count as absent."""
    return os.path.lexists(path)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; a FIFO would wait for ever."""
    if not path.exists() and path.is_symlink():
        raise ValueError("no such file: a link that leads nowhere")
    require(path.is_file(), "not a regular file" if path.exists() else "no such file")
    return path.open("rb")


def read_file(path: Path, max_bytes: int) -> bytes:
    """A file's bytes, and no more than it says that it has: the kernel's own, /proc/kmsg say, have
    none, and reading on would wait for ever. Raises ValueError for more than max_bytes."""
    with naming(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        require(size <= max_bytes, f"larger than {max_bytes} bytes")
        return file.read(size)


def read_json(path: Path) -> dict:
    with naming(path):
        return parse_json(read_file(path, MAX_JSON), MAX_JSON)


def read_config(folder: Path) -> GraniteMoeConfig:
    """config.json, with the end tokens of generation_config.json where that names some."""
    file, adapter = folder / "config.json", folder / "adapter_config.json"
    with naming(adapter):
        advice = "merge it: model.merge_and_unload().save_pretrained(FOLDER)"
        require(not is_there(adapter), f"an adapter, no model; {advice}")
    with naming(file):
        beside = beside_it(folder)
        require(is_there(file) or not beside, f"no such file{beside}")
        data = read_json(file)
        check_fields(data)
        config = GraniteMoeConfig.from_dict(data)
        head_dim = data.get("head_dim", config.head_dim)
        good = head_dim in (None, config.head_dim)
        require(good, f"head_dim: must be hidden_size / heads, got {head_dim!a:.60}")
        check_token_ids(config)
    if config.dtype:
        config = replace(config, dtype=config.dtype.removeprefix("torch."))
    return with_end_tokens(folder, config)


def check_fields(data: dict) -> None:
    """Types and ranges of the fields that the model uses, as transformers 4 or 5 spells them."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = data.get(name) or {}
        require(isinstance(rope, dict), f"{name}: only 'default' is supported, got {rope!a:.60}")
        if "rope_theta" in rope:
            check_number("rope_theta", rope["rope_theta"], float, 1e-18, 1e18)
    for name in ("dtype", "torch_dtype"):
        dtype = data.get(name)
        good = dtype is None or str(dtype).removeprefix("torch.") in DTYPES
        require(good, f"{name}: must be one of {[*DTYPES]}, got {dtype!a:.60}")
    for field in fields(GraniteMoeConfig):
        if field.name in data:
            check_field(field.name, field.type, data[field.name])


def check_field(name: str, kind: type, value: object) -> None:
    if kind is bool:
        require(type(value) is bool, f"{name}: must be true or false, got {value!a:.60}")
    elif kind is str:
        require(type(value) is str, f"{name}: must be a text, got {value!a:.60}")
    elif kind is int:
        check_number(name, value, int, 1, 2**31)
    elif name == "attention_dropout":
        check_number(name, value, float, 0, 1)
    elif name == "router_aux_loss_coef":
        check_number(name, value, float, 0, 1e18)
    elif kind is float:
        check_number(name, value, float, 1e-18, 1e18)


def check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    what = "an integer" if kind is int else "a number"
    good = type(value) in (int, kind) and low <= value <= high
    require(good, f"{name}: must be {what} from {low} to {high}, got {value!a:.60}")


def check_token_ids(config: GraniteMoeConfig) -> None:
    last = config.vocab_size - 1
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        several = name == "eos_token_id" and type(value) is list
        for i in value if several else [value]:
            good = i is None or (type(i) is int and 0 <= i <= last)
            require(good, f"{name}: must be null or from 0 to {last}, got {value!a:.60}")


def with_end_tokens(folder: Path, config: GraniteMoeConfig) -> GraniteMoeConfig:
    """generation_config.json may name other end tokens. An id that the model lacks ends nothing."""
    file = folder / "generation_config.json"
    if not is_there(file):
        return config
    ends = read_json(file).get("eos_token_id")
    if ends is None or ends == []:
        return config
    ends = ends if isinstance(ends, list) else [ends]
    possible = [i for i in ends if type(i) is not int or 0 <= i < config.vocab_size]
    config = replace(config, eos_token_id=possible)
    with naming(file):
        check_token_ids(config)
    return config


def find_folder(path: str | Path) -> Path:
    """A folder as it is; a hub id, `owner/name` or `owner/name@revision` where no local folder
    `owner` is, is downloaded."""
    folder, name = Path(path), str(path)
    with naming(path):
        found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w.][\w./-]*))?", name)
        if not found or folder.parent.exists():
            refuse_file(folder)
            require(name and folder.is_dir(), "no such folder, and not a hub id (owner/name)")
            return folder
    return download(name, found[1], found[2])


def beside_it(folder: Path) -> str:
    """For a message of what is missing: what is there instead."""
    others = [path.name for path in sorted(folder.glob("*.gguf"))]
    return f"; {others[0]!a:.40} is a GGUF, for llama.cpp" if others else ""


def refuse_file(path: Path) -> None:
    """Raises ValueError for a path to a file, which says what it is and what is wanted."""
    if not path.is_file():
        return
    kind = "a file"
    if path.suffix == ".gguf":
        kind = "a GGUF file, which only llama.cpp and its like read"
    elif path.suffix in (".bin", ".pt", ".pth"):
        kind = "a pickle, which is not supported, since it can run code"
    raise ValueError(f"is {kind}; name its folder, with config.json and *.safetensors")


NOT_FOUND = "not found on the hub: is it spelled right? If it is private, log in (hf auth login)"


def download(path: str, repo_id: str, revision: str | None) -> Path:
    """The folder of the hub's cache, after what is missing there was fetched."""
    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    reasons = {  # the first class that fits; the client's own message has many lines
        errors.GatedRepoError: "gated: ask for access on its page, and log in (hf auth login)",
        errors.RepositoryNotFoundError: NOT_FOUND,
        errors.RevisionNotFoundError: f"no branch, tag or commit {revision!a:.60}",
    }
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises dozens of classes
        known = [reason for kind, reason in reasons.items() if isinstance(error, kind)]
        reason = known[0] if known else other_reason(error)
        raise CheckpointError(f"{shown(path)}: cannot be downloaded: {reason}") from None


def other_reason(error: Exception) -> str:
    """Of a download that failed otherwise: offline, no way to the hub, or what the hub says."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE or isinstance(cause, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and downloads are off (HF_HUB_OFFLINE)"
    if status == 401:
        return "the hub wants a login: hf auth login"
    if status == 403:
        return "access is forbidden: ask for it on its page, and log in (hf auth login)"
    if status == 404:
        return NOT_FOUND
    if status is not None:
        return f"the hub answers with status {status}; try again later"
    lines = [line for line in str(cause).splitlines() if line.strip()] or [""]
    text = f"{type(cause).__name__}: {lines[0].strip()}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"it is not in the cache, and the hub cannot be reached: {text!a:.80}"
    return f"{text!a:.100}"


class Stored(NamedTuple):
    """A tensor as a safetensors file's header tells of it."""

    path: Path
    name: str
    dtype: str
    shape: tuple
    data: int  # where the tensors begin in the file
    offsets: list  # from there: where this one begins and ends
    state: tuple  # of the file: see state_of


def state_of(file: BinaryIO) -> tuple:
    """Changes if the file is replaced or written to."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_header(
    path: Path, wanted: Collection[str] | None = None, most: int = MAX_HEADERS
) -> tuple[dict[str, Stored], int]:
    """Each tensor of a safetensors file, or those wanted, and the header's size, of `most` bytes at
    the most; reads no tensor."""
    with naming(path), open_file(path) as file:
        state = state_of(file)
        rest = os.fstat(file.fileno()).st_size - 8
        start = file.read(8) if rest > 0 else b""
        require(start != b"version ", "a Git LFS pointer, not the weights; run: git lfs pull")
        size = int.from_bytes(start, "little")
        require(size <= rest and rest > 0, "not a safetensors file, or cut off")
        require(size <= most, f"headers of over {MAX_HEADERS} bytes")
        header = parse_json(file.read(size), MAX_HEADERS)
        header.pop("__metadata__", None)
        found = {}
        for name in [*header] if wanted is None else wanted & header.keys():
            entry = header.pop(name)  # or memory would hold each twice
            good = isinstance(entry, dict) and isinstance(entry.get("shape"), list)
            require(good, f"{name!a:.80}: not a tensor's entry")
            dtype, offsets = map(entry.get, ("dtype", "data_offsets"))
            place = (8 + size, offsets, state)
            found[name] = Stored(path, name, str(dtype), tuple(entry["shape"]), *place)
        return found, size


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Each stored tensor by its name in the released files: of model.safetensors or, without it, of
    the shard that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    with naming(folder):
        if is_there(single) or not is_there(index):
            pickles = [*folder.glob("*.bin*"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            advice = "pickle is not supported, since it can run code; convert to safetensors"
            require(is_there(single) or not pickles, advice)
            if not is_there(single):
                beside = beside_it(folder)
                raise ValueError(f"neither {single.name} nor {index.name} is there{beside}")
            with naming(single):
                stored, _ = read_header(single)
                refuse_wrapped(stored)
            return by_released_name(stored)
    weight_map = read_json(index).get("weight_map")
    with naming(index):
        good = isinstance(weight_map, dict) and weight_map
        require(good, "weight_map: must name a shard for each tensor")
        for name, shard in weight_map.items():
            good = isinstance(shard, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard)
            require(good, f"{name!a:.60}: must be a plain *.safetensors name, got {shard!a:.60}")
        refuse_wrapped(weight_map)
        spare = {shard for name, shard in weight_map.items() if ABSENT.fullmatch(name)}
        spare -= {shard for name, shard in weight_map.items() if not ABSENT.fullmatch(name)}
        shards = {s for s in weight_map.values() if s not in spare or (folder / s).exists()}
        named: dict[str, set[str]] = {shard: set() for shard in sorted(shards)}
        for name, shard in weight_map.items():
            named.get(shard, set()).add(name)
        headers = read_headers(folder, named)
        found = {name: headers.get(shard, {}).get(name) for name, shard in weight_map.items()}
        for name, tensor in found.items():
            good = tensor or ABSENT.fullmatch(name)
            require(good, f"{name!a:.60}: is not in {weight_map[name]!a:.60}")
    return by_released_name({name: tensor for name, tensor in found.items() if tensor})


def read_headers(folder: Path, shards: dict[str, set[str]]) -> dict[str, dict[str, Stored]]:
    """Of each shard, what the index says is in it. All headers together are bounded: a hundred
    links to one large file are a hundred files."""
    left, headers = MAX_HEADERS, {}
    for shard, names in shards.items():
        headers[shard], size = read_header(folder / shard, names, left)
        left -= size
    return headers


def refuse_wrapped(names: Iterable[str]) -> None:
    """Raises ValueError where a wrapper's prefix is in the names of what this model has."""
    for name in names:
        if found := WRAPPED.search(name):
            own = WRAPPED.sub("", name).removeprefix("model.")
            advice = f"names with {found[1]!r}, a wrapper's; without: {WRAPPERS[found[1]]}"
            require(not own.startswith((*OURS, "lm_head.")), advice)


def by_released_name(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The same tensors under the names of the released files, without what no model reads."""
    tensors: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if re.fullmatch(BUFFER, name):  # which every model computes
            continue
        prefix, marker, tail = name.partition(".block_sparse_moe.")
        released = prefix + marker + SPELLINGS[tail] if tail in SPELLINGS else name
        if released.startswith(OURS):  # saved through AutoModel
            released = "model." + released
        if released in tensors:
            with naming(tensor.path):
                raise ValueError(f"{released!a:.80}: stored under two names")
        tensors[released] = tensor
    return tensors


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else MPS, else the CPU. Raises ValueError for what this machine lacks."""
    available = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    wanted = {"auto": available[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in available:
        raise ValueError(f"device: must be auto or one of {available}, got {name!a:.40}")
    return torch.device(wanted)


def pick_dtype(
    dtype: str | torch.dtype | None, config: GraniteMoeConfig, stored: dict[str, Stored]
) -> torch.dtype:
    """None is what config.json names or, where it names none, what the embedding is stored in.
    Raises ValueError for what the model does not run in."""
    if dtype is None:
        dtype = config.dtype or ON_DISK[stored[EMBEDDING].dtype]
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"dtype: must be one of {list(DTYPES)}, got {dtype!a:.40}")
    return DTYPES.get(dtype, dtype)


def check(folder: Path, config: GraniteMoeConfig) -> dict[str, Stored]:
    """What is stored, by its name in the released files, or CheckpointError for all that headers
    can show. Nothing is built, and the work is bounded by what the files hold.

    A tied head may be stored beside the embedding or, under the head's name, in its place.
    """
    stored = find_tensors(folder)
    layers = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    with naming(folder / "config.json"):  # before anything is made by that number
        good = layers == config.num_hidden_layers
        require(good, f"num_hidden_layers: {config.num_hidden_layers}, but {layers} are stored")
        require(layers <= MAX_LAYERS, f"num_hidden_layers: over {MAX_LAYERS}, got {layers}")
    tied = config.tie_word_embeddings
    if tied and HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    needed = expected_shapes(config)
    with naming(folder):
        missing = [name for name in needed if name not in stored]
        require(not missing, f"{len(missing)} missing tensors: {some(missing)}")
        beside = {HEAD} if tied else set()
        expected = needed.keys() | beside
        unexpected = [at.name for name, at in stored.items() if name not in expected]
        require(not unexpected, f"{len(unexpected)} unexpected tensors: {some(unexpected)}")
    for name, at in stored.items():
        shape = needed.get(name, needed[EMBEDDING])
        with naming(at.path):
            good = at.shape == shape and all(type(n) is int for n in at.shape)
            require(good, f"{name}: shape must be {shape}, is {at.shape!a:.40}")
            good = at.dtype in ON_DISK
            require(good, f"{name}: dtype must be F32, F16 or BF16, is {at.dtype!a:.20}")
    for path in sorted({at.path for at in stored.values()}):
        with naming(path), safe_open(path, "pt", backend="pread"):
            """It looks at all entries, and whether each has a place of its own."""
    return stored


def some(names: list[str]) -> str:
    return ", ".join(f"{name!a:.45}" for name in names[:2])


def expected_shapes(config: GraniteMoeConfig) -> dict[str, tuple[int, ...]]:
    """The model's parameters. Letters are those of granitemoe.py's dimension key."""
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    E, GC = config.num_local_experts, config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (GC, D),
        "self_attn.v_proj": (GC, D),
        "self_attn.o_proj": (D, D),
        "post_attention_layernorm": (D,),
        "block_sparse_moe.input_linear": (E, 2 * F, D),
        "block_sparse_moe.output_linear": (E, D, F),
        "block_sparse_moe.router.layer": (E, D),
    }
    shapes = {EMBEDDING: (V, D), "model.norm.weight": (D,)}
    for i in range(config.num_hidden_layers):
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    if not config.tie_word_embeddings:
        shapes[HEAD] = (V, D)
    return shapes


def read(
    stored: dict[str, Stored], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own, finite and cast; the next ones are read meanwhile."""
    ahead: deque = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for name in sorted(stored, key=lambda name: (stored[name].path, stored[name].offsets)):
            ahead.append((name, pool.submit(read_tensor, name, stored[name])))
            if len(ahead) > READERS:
                name, raw = ahead.popleft()
                yield name, checked(name, stored[name], raw.result(), dtype).to(device)
        for name, raw in ahead:
            yield name, checked(name, stored[name], raw.result(), dtype).to(device)


def read_tensor(name: str, at: Stored) -> Tensor:
    """One of them as it is stored. Reading lets other threads run."""
    tensor = fresh(at.shape, ON_DISK[at.dtype])
    with naming(at.path), at.path.open("rb", buffering=0) as file:
        require(state_of(file) == at.state, f"{name}: changed while loading")
        file.seek(at.data + at.offsets[0])
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while rest:
            got = file.readinto(rest)
            require(got, f"{name}: changed while loading")
            rest = rest[got:]
        require(state_of(file) == at.state, f"{name}: changed while loading")
    return tensor


def checked(name: str, at: Stored, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite, and cast. Not by the threads that read: with PyTorch's own they would be too many."""
    with naming(at.path):
        for target in dict.fromkeys((tensor.dtype, dtype)):  # a cast can overflow too
            tensor = tensor.to(target)
            low, high = torch.aminmax(tensor)  # one pass; NaN shows in both
            finite = torch.isfinite(low) and torch.isfinite(high)
            require(finite, f"{name}: has NaN or infinite values (as {target})")
    return tensor


def fresh(shape: tuple, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, in huge pages where it fills some: those are ready much sooner."""
    size = math.prod(shape) * dtype.itemsize
    if size < 2**21 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def drop_tied_head(folder: Path, weights: dict[str, Tensor]) -> None:
    """Take out a stored copy of the embedding that is to be the head, if it is one."""
    if HEAD in weights:
        with naming(folder):
            same = torch.equal(weights.pop(HEAD), weights[EMBEDDING])
            require(same, f"{HEAD}: differs from the embedding that it is tied to")
