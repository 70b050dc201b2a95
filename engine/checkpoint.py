"""A stranger's folder: found, compared, read, owned. Every refusal of data is in this file."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
MAX_JSON = 10 * 2**20


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
    with naming(folder / "config.json"):
        return GraniteMoeConfig.from_dict(read_json(folder / "config.json"))


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


def read_header(path: Path) -> dict[str, tuple[Path, str, tuple]]:
    """Each tensor of a safetensors file, with the file, its dtype and shape; reads no tensor."""
    with naming(path), open_file(path) as file:
        start, rest = file.read(8), path.stat().st_size - 8
        require(start != b"version ", "a Git LFS pointer, not the weights; run: git lfs pull")
        size = int.from_bytes(start, "little")
        require(size <= min(rest, MAX_JSON) and rest > 0, "not a safetensors file, or cut off")
        header = parse_json(file.read(size), MAX_JSON)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            good = isinstance(entry, dict) and isinstance(entry.get("shape"), list)
            require(good, f"{name!a:.80}: not a tensor's entry")
        return {n: (path, str(e.get("dtype")), tuple(e["shape"])) for n, e in header.items()}


def find_tensors(folder: Path) -> dict[str, tuple[Path, str, tuple]]:
    """Where each stored tensor is: in model.safetensors or, without it, in a shard of the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    with naming(folder):
        if single.exists() or not index.exists():
            pickles = [*folder.glob("*.bin*"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            advice = "pickle is not supported, since it can run code; convert to safetensors"
            require(single.exists() or not pickles, advice)
            require(single.exists(), f"neither {single.name} nor {index.name} is there")
            return read_header(single)
    weight_map = read_json(index).get("weight_map")
    with naming(index):
        good = isinstance(weight_map, dict) and weight_map
        require(good, "weight_map: must name a shard for each tensor")
        for name, shard in weight_map.items():
            good = isinstance(shard, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard)
            require(good, f"{name!a:.60}: must be a plain *.safetensors name, got {shard!a:.60}")
        headers = {shard: read_header(folder / shard) for shard in sorted({*weight_map.values()})}
        for name, shard in weight_map.items():
            require(name in headers[shard], f"{name!a:.60}: is not in {shard!a:.60}")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def own_dtype(config: GraniteMoeConfig, stored: dict) -> str | torch.dtype:
    """What config.json names or, where it names none, what the embedding is stored in."""
    _, on_disk, _ = stored.get("model.embed_tokens.weight", (None, "F32", None))
    return config.dtype or ON_DISK.get(on_disk, torch.float32)


def empty_model(folder: Path, config: GraniteMoeConfig, stored: dict) -> GraniteMoeForCausalLM:
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


def canonical(name: str) -> str:
    """A stored tensor's name in the spelling of the released files."""
    prefix, marker, tail = name.partition(".block_sparse_moe.")
    return prefix + marker + SPELLINGS.get(tail, tail)


def match_tensors(folder: Path, stored: dict, model: GraniteMoeForCausalLM) -> dict[str, str]:
    """Compare what is stored with what the model needs, before anything is allocated.

    Returns the stored name of each of the model's tensors, and of a tied head's copy if there.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    allowed = dict(expected)
    if model.config.tie_word_embeddings:
        allowed["lm_head.weight"] = expected["model.embed_tokens.weight"]
    names: dict[str, str] = {}
    with naming(folder):
        for name in stored:
            twice = names.setdefault(canonical(name), name) != name
            require(not twice, f"{canonical(name)!a:.80}: stored under two names")
        for problem, wrong in (
            ("missing", [n for n in expected if n not in names]),
            ("unexpected", [names[n] for n in names if n not in allowed]),
        ):
            some = ", ".join(f"{n!a:.45}" for n in wrong[:2])
            require(not wrong, f"{len(wrong)} {problem} tensors: {some}")
    for name in names:
        path, dtype, shape = stored[names[name]]
        with naming(path):
            good = shape == allowed[name] and all(type(size) is int for size in shape)
            require(good, f"{name}: shape must be {allowed[name]}, is {shape!a:.40}")
            require(dtype in ON_DISK, f"{name}: dtype must be F32, F16 or BF16, is {dtype!a:.20}")
    return names


def read_tensors(
    stored: dict, names: dict[str, str], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by itself, in memory of its own, finite and cast."""
    by_file = sorted(names, key=lambda name: stored[names[name]][0])
    for file, group in itertools.groupby(by_file, key=lambda name: stored[names[name]][0]):
        with naming(file), safe_open(file, "pt", backend="pread") as tensors:
            for name in group:
                tensor = tensors.get_tensor(names[name])
                require(tensor.shape == stored[names[name]][2], f"{name}: changed while loading")
                for target in dict.fromkeys((tensor.dtype, dtype)):  # a cast can overflow too
                    tensor = tensor.to(target)
                    low, high = torch.aminmax(tensor)  # one pass; NaN shows in both
                    finite = torch.isfinite(low) and torch.isfinite(high)
                    require(finite, f"{name}: has NaN or infinite values (as {target})")
                yield name, tensor.to(device)


def drop_tied_head(folder: Path, weights: dict[str, Tensor]) -> None:
    """Take out a stored copy of the embedding that is to be the head, if it is one."""
    if "lm_head.weight" in weights:
        with naming(folder):
            same = torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
            require(same, "lm_head.weight: differs from the embedding that it is tied to")
