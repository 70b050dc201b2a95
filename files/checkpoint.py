"""A stranger's folder: found, compared, read, owned. Every refusal of data is in this file."""

import json
import math
import mmap
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM

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


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; a FIFO would wait for ever."""
    require(path.is_file(), "not a regular file" if path.exists() else "no such file")
    return path.open("rb")


def read_json(path: Path) -> dict:
    with naming(path), open_file(path) as file:
        return parse_json(file.read(MAX_JSON + 1), MAX_JSON)


def read_config(folder: Path) -> GraniteMoeConfig:
    """config.json, with the end tokens of generation_config.json where that names some."""
    file, sampling = folder / "config.json", folder / "generation_config.json"
    with naming(adapter := folder / "adapter_config.json"):
        advice = "merge it: model.merge_and_unload().save_pretrained(FOLDER)"
        require(not adapter.exists(), f"an adapter, no model; {advice}")
    with naming(file):
        config = GraniteMoeConfig.from_dict(read_json(file))
    if sampling.exists():
        with naming(sampling):
            ends = read_json(sampling).get("eos_token_id")
            if isinstance(ends, int | list):  # an id that the model lacks ends nothing
                ends = ends if isinstance(ends, list) else [ends]
                possible = [i for i in ends if type(i) is not int or 0 <= i < config.vocab_size]
                ends = possible if ends else None
            config = config if ends is None else replace(config, eos_token_id=ends)
    return config


def find_folder(path: str | Path) -> Path:
    """A folder as it is; a hub id, `owner/name` where no local folder `owner` is, is downloaded."""
    folder, name = Path(path), str(path)
    with naming(path):
        is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not folder.parent.exists()
        if not is_id:
            require(name and folder.is_dir(), "no such folder, and not a hub id (owner/name)")
            return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises dozens of classes
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{shown(name)}: cannot be downloaded: {reason!a:.100}") from None


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
    """Another one for another file, or if it is written to."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_header(path: Path) -> dict[str, Stored]:
    """Each tensor of a safetensors file; reads none of them."""
    with naming(path), open_file(path) as file:
        state = state_of(file)
        start, rest = file.read(8), path.stat().st_size - 8
        require(start != b"version ", "a Git LFS pointer, not the weights; run: git lfs pull")
        size = int.from_bytes(start, "little")
        require(size <= min(rest, MAX_JSON) and rest > 0, "not a safetensors file, or cut off")
        header = parse_json(file.read(size), MAX_JSON)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            good = isinstance(entry, dict) and isinstance(entry.get("shape"), list)
            require(good, f"{name!a:.80}: not a tensor's entry")
            dtype, offsets = map(entry.get, ("dtype", "data_offsets"))
            place = (8 + size, offsets, state)
            header[name] = Stored(path, name, str(dtype), tuple(entry["shape"]), *place)
        return header


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Each stored tensor by its name in the released files: of model.safetensors or, without it, of
    the shard that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    with naming(folder):
        if single.exists() or not index.exists():
            pickles = [*folder.glob("*.bin*"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            advice = "pickle is not supported, since it can run code; convert to safetensors"
            require(single.exists() or not pickles, advice)
            require(single.exists(), f"neither {single.name} nor {index.name} is there")
            with naming(single):
                refuse_wrapped(stored := read_header(single))
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
        headers = {shard: read_header(folder / shard) for shard in sorted(shards)}
        found = {name: headers.get(shard, {}).get(name) for name, shard in weight_map.items()}
        for name, tensor in found.items():
            good = tensor or ABSENT.fullmatch(name)
            require(good, f"{name!a:.60}: is not in {weight_map[name]!a:.60}")
    return by_released_name({name: tensor for name, tensor in found.items() if tensor})


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


def own_dtype(config: GraniteMoeConfig, stored: dict[str, Stored]) -> str | torch.dtype:
    """What config.json names or, where it names none, what the embedding is stored in."""
    embedding = stored.get(EMBEDDING, stored.get(HEAD))
    return config.dtype or ON_DISK.get(embedding and embedding.dtype, torch.float32)


def empty_model(
    folder: Path, config: GraniteMoeConfig, stored: dict[str, Stored]
) -> GraniteMoeForCausalLM:
    """The model on the meta device, where tensors have shapes and no memory."""
    layers = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    with naming(folder / "config.json"):  # before anything is built by that number
        good = layers == config.num_hidden_layers
        require(good, f"num_hidden_layers: {config.num_hidden_layers}, but {layers} are stored")
        try:
            with torch.device("meta"):
                return GraniteMoeForCausalLM(config)
        except RuntimeError:
            raise ValueError("sizes: too large for any tensor") from None


def match_tensors(folder: Path, stored: dict[str, Stored], model: GraniteMoeForCausalLM) -> None:
    """Compare what is stored with what the model needs, before anything is allocated.

    A tied head may be stored beside the embedding or, under the head's name, in its place.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    allowed = dict(expected)
    if model.config.tie_word_embeddings:
        allowed[HEAD] = expected[EMBEDDING]
        if HEAD in stored and EMBEDDING not in stored:
            stored[EMBEDDING] = stored.pop(HEAD)
    with naming(folder):
        for problem, wrong in (
            ("missing", [name for name in expected if name not in stored]),
            ("unexpected", [t.name for name, t in stored.items() if name not in allowed]),
        ):
            some = ", ".join(f"{n!a:.45}" for n in wrong[:2])
            require(not wrong, f"{len(wrong)} {problem} tensors: {some}")
    for name, tensor in stored.items():
        with naming(tensor.path):
            good = tensor.shape == allowed[name] and all(type(n) is int for n in tensor.shape)
            require(good, f"{name}: shape must be {allowed[name]}, is {tensor.shape!a:.40}")
            good = tensor.dtype in ON_DISK
            require(good, f"{name}: dtype must be F32, F16 or BF16, is {tensor.dtype!a:.20}")


def read_tensors(
    stored: dict[str, Stored], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own, finite and cast; the next ones are read meanwhile."""
    for path in {at.path: None for at in stored.values()}:
        with naming(path), safe_open(path, "pt", backend="pread"):
            """It looks at all entries, and whether each has a place of its own."""
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
        return torch.empty(shape, dtype=dtype)
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
