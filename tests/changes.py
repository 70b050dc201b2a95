"""Ways to change a checkpoint's folder, of which test_checkpoint.py, test_tokenizer.py and fuzz.py
make their cases."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CONFIG, EMBED, INDEX, SHARDS, WEIGHTS, audited, pack, unpack
from safetensors.torch import load, save_file

from files.checkpoint import SPELLINGS, CheckpointError

Change = Callable[[Path], None]
LAYER = "model.layers.1."
MOE = LAYER + "block_sparse_moe."
KINDS = [
    EMBED, "model.norm.weight", LAYER + "input_layernorm.weight", LAYER + "self_attn.q_proj.weight",
    LAYER + "post_attention_layernorm.weight", LAYER + "self_attn.k_proj.weight",
    LAYER + "self_attn.v_proj.weight", LAYER + "self_attn.o_proj.weight",
    MOE + "input_linear.weight", MOE + "output_linear.weight", MOE + "router.layer.weight",
]  # fmt: skip
Q, NORM = KINDS[3], KINDS[1]


def put(name: str, raw: bytes = b"") -> Change:
    return lambda folder: (folder / name).write_bytes(raw)


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def instead(name: str, make: Callable[[Path], None]) -> Change:
    """Something that is no regular file where one is expected."""
    return lambda folder: [(folder / name).unlink(missing_ok=True), make(folder / name)]


def edit(name: str, change: Callable[[dict], object]) -> Change:
    """Change parsed JSON; what `change` returns is ignored."""

    def act(folder: Path) -> None:
        data = json.loads((folder / name).read_bytes())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return act


def config(*dropped: str, **changes) -> Change:
    return edit("config.json", lambda c: (c.update(changes), [c.pop(name) for name in dropped]))


def header(change: Callable[[dict], object]) -> Change:
    """Change the weights' header and leave the data."""

    def act(folder: Path) -> None:
        entries, data = unpack((folder / WEIGHTS).read_bytes())
        change(entries)
        (folder / WEIGHTS).write_bytes(pack(entries, data))

    return act


def tensors(change: Callable[[dict], object]) -> Change:
    """Change the tensors and write a file that fits them."""

    def act(folder: Path) -> None:
        state = load((folder / WEIGHTS).read_bytes())
        change(state)
        state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        save_file(state, folder / WEIGHTS)

    return act


def value(name: str, bad: float, place: int) -> Change:
    """Change one number of a tensor, at the start or the end (of the last expert, say)."""
    return tensors(lambda state: state[name].view(-1)[place].fill_(bad))


def shards(change: Callable[[dict], object] = lambda index: None) -> Change:
    """Split the weights in two with an index, and change that."""

    def act(folder: Path) -> None:
        state = load((folder / WEIGHTS).read_bytes())
        names = sorted(state)
        halves = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
        for shard, members in halves.items():
            save_file({name: state[name] for name in members}, folder / shard)
        (folder / WEIGHTS).unlink()
        index = {"weight_map": {name: shard for shard in SHARDS for name in halves[shard]}}
        index["metadata"] = {"total_size": 1}
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return act


def shard_of(name: str, shard: object) -> Change:
    return shards(lambda index: index["weight_map"].update({name: shard}))


def renamed(*names: str) -> Change:
    """transformers' spelling in memory of some layers' experts, which it can also write."""
    new = {stored: memory for memory, stored in SPELLINGS.items()}

    def spell(name: str) -> str:
        prefix, marker, tail = name.partition(".block_sparse_moe.")
        return prefix + marker + new[tail] if marker and name.startswith(names) else name

    return header(lambda h: h.update({spell(name): h.pop(name) for name in [*h]}))


def spelled(change: Callable[[str], str]) -> Change:
    """Change the names of all tensors."""

    def act(entries: dict) -> None:
        for name in [n for n in entries if n != "__metadata__"]:
            entries[change(name)] = entries.pop(name)

    return header(act)


def fifo(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    os.mkfifo(path)


def device(path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no /dev/zero")
    path.symlink_to("/dev/zero")


class Malicious:
    """A pickle that leaves a trace when it is opened."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("opened-the-pickle",)


PICKLE = pickle.dumps(Malicious())
NESTED = b'{"a":' * 100_000
INF = float("inf")
REQUIRED = [*CONFIG][1:16]  # the keys of config.json without a default


def assert_refused(loader: Callable, change: Change, words: str, folder: Path) -> None:
    """One error that names file and field, before anything outside the folder is touched."""
    change(folder)
    with audited(folder) as harm, pytest.raises(CheckpointError) as caught:
        loader(folder)
    message = str(caught.value)
    assert str(folder) in message and message.isprintable()
    rest = message.replace(str(folder), "")  # the name of the folder has the row's name in it
    assert all(word in rest for word in words.split()), message
    assert harm == [] and not (folder.parent / "opened-the-pickle").exists()
