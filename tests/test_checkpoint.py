"""What a checkpoint may hold, and what is refused: a table of bad ones, a list of good variants.

The table runs twice: here through the library, where an audit hook watches, and as a script under
`python -O`, which would drop asserts, through the command, each case in a process of its own:

    python -O tests/test_checkpoint.py table [EVERY]
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from changes import (
    INF,
    KINDS,
    LAYER,
    MOE,
    NESTED,
    NORM,
    PICKLE,
    REQUIRED,
    Change,
    Q,
    assert_refused,
    both,
    config,
    device,
    fifo,
    header,
    instead,
    put,
    remove,
    renamed,
    shard_of,
    shards,
    spelled,
    tensors,
    value,
)  # fmt: skip
from conftest import (
    CONFIG,
    EMBED,
    HEAD,
    IDS,
    INDEX,
    SHARDS,
    TESTS,
    WEIGHTS,
    audited,
    checkpoint,
    collect,
    command,
    forked,
    logits_of,
    make_tensors,
    on_linux,
    on_posix,
    pack,
    problem,
    representing,
    rss,
    thorough,
    unpack,
    write_files,
)  # fmt: skip
from safetensors.torch import load, save_file
from test_tokenizer import ROWS as TOKENIZERS

from files import checkpoint as checkpoint_file
from files.checkpoint import READERS
from generate import CheckpointError, load_model, load_tokenizer

# --------------------------------------------------------------------------------- the bad folders

MANY = b"{" + b",".join(b'"x%d":{"dtype":"F32","shape":[0]}' % i for i in range(100_000)) + b"}"
DEEP = (b'"model.layers.%d.x":{"dtype":"F32","shape":[0]}' % i for i in range(5000))
DEEP = b"{" + b",".join(DEEP) + b"}"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
TEXT = json.dumps(CONFIG)
WRONG = {
    "string": "8", "true": True, "list": [8], "object": {}, "null": None, "negative": -1,
    "zero": 0, "1e40": 1e40, "10^30": 10**30, "10^400": 10**400, "NaN": INF - INF,
    "Infinity": INF,
}  # fmt: skip
BAD_SHARDS = [
    "../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "C:\\x.safetensors",
    "\\\\srv\\x.safetensors", "", ".", "..", "x\0.safetensors", "x.bin", "config.json",
    "/etc/passwd", ".safetensors", "x.safetensors\n", "x\x1b[2J.safetensors", 5, None, [], {},
]  # fmt: skip
BAD_NAMES = {
    "escape": "\x1b[2Jx", "newline": "a\nb", "right to left": "\u202eabc", "surrogate": "\ud800",
    "1 MB": "x" * 2**20, "adapter": "base_model.model.lora_A.weight", "bias": Q[:-6] + "bias",
    "other model": "transformer.h.0.attn.weight",
}  # fmt: skip
BAD_DTYPES = ("I8", "I64", "U8", "U64", "BOOL", "F64", "C64", "F8_E4M3", "F4", "bogus", 5, None)


def forty_links(folder: Path) -> None:
    """Of 3.6 MB each, which together are more than anybody's."""
    (folder / "0.safetensors").write_bytes(pack(MANY, b"x"))
    for n in range(1, 40):
        (folder / f"{n}.safetensors").symlink_to("0.safetensors")
    index = {"weight_map": {f"x{n}": f"{n}.safetensors" for n in range(40)}}
    (folder / INDEX).write_text(json.dumps(index))


# Each row: its name, what is done to a good folder, and words that the error must hold.
FOLDERS = [
    ("no config.json", remove("config.json"), "config.json no such"),
    ("no weights", remove(WEIGHTS), f"neither {WEIGHTS} {INDEX}"),
    *[(f"{name} is a {kind}", instead(name, make), f"{name} regular")
      for name in ("config.json", WEIGHTS)
      for kind, make in (("folder", Path.mkdir), ("FIFO", fifo), ("device", device))],
    *[(f"only {name}", both(remove(WEIGHTS), put(name, PICKLE)), "pickle convert safetensors")
      for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")],
    *[(f"{name} is a link that leads nowhere", instead(name, lambda p: p.symlink_to("no such")),
       f"{name} link") for name in ("config.json", WEIGHTS, "generation_config.json")],
    ("only a GGUF", both(remove(WEIGHTS), put("x.gguf", b"GGUF")), "x.gguf GGUF"),
    ("a GGUF without config.json", both(remove(WEIGHTS, "config.json"), put("x.gguf")), "GGUF"),
    ("an adapter", both(remove("config.json", WEIGHTS), put("adapter_config.json", b"{}")),
     "adapter_config.json adapter merge"),
    ("an adapter beside a model", put("adapter_config.json"), "adapter_config.json adapter merge"),
]  # fmt: skip
CONFIGS = [
    *[(f"config: {name}", put("config.json", raw), f"config.json {why}") for name, raw, why in (
        ("empty", b"", "JSON"), ("HTML", b"<html>", "JSON"), ("cut", TEXT[:-9].encode(), "JSON"),
        ("trailing", TEXT.encode() + b"x", "JSON"), ("UTF-16", TEXT.encode("utf-16"), "JSON"),
        ("BOM", TEXT.encode("utf-8-sig"), "JSON"), ("not UTF-8", b'{"\xff": 1}', "JSON"),
        ("list", b"[]", "object"), ("null", b"null", "object"), ("number", b"7", "object"),
        ("nested", NESTED, "JSON"), ("2^20", b" " * 2**20 + b"{}" + b" " * 2**24, "larger"),
        ("5000 digits", TEXT.replace("300", "3" * 5000).encode(), "JSON"),
        ("duplicate", b'{"vocab_size": 9, ' + TEXT[1:].encode(), "duplicate vocab_size"),
    )],
    *[(f"config: no {key}", config(key), f"config.json {key} missing") for key in REQUIRED
      if key != "rope_theta"],
    ("config: no rope_theta", config("rope_theta"), "config.json rope_theta"),
    *[(f"config: {key} {name}", config(**{key: bad}),
       f"config.json {name if bad != bad or bad == INF else key}")
      for key in REQUIRED for name, bad in WRONG.items()],
    *[(f"config: {key} 2.5", config(**{key: 2.5}), f"config.json {key} integer")
      for key in REQUIRED if isinstance(CONFIG[key], int) and key != "rope_theta"],
    *[(f"config: {n} layers", config(num_hidden_layers=n), "config.json num_hidden_layers")
      for n in (1, 3, 1000, 10**7)],
    ("config: head sizes", config(num_attention_heads=5), "hidden_size num_attention_heads"),
    ("config: odd head", config(hidden_size=36, num_attention_heads=4), "num_attention_heads even"),
    ("config: groups", config(num_key_value_heads=3), "num_attention_heads num_key_value_heads"),
    ("config: top 6 of 5", config(num_experts_per_tok=6), "num_experts_per_tok num_local_experts"),
    *[(f"config: {key} {bad}", config(**{key: bad}), f"{key}") for key, bad in (
        ("model_type", "llama"), ("model_type", "granitemoehybrid"), ("model_type", None),
        ("model_type", []), ("hidden_act", "bogus"), ("hidden_act", "gelu"), ("hidden_act", [5]),
        ("attention_bias", True), ("attention_bias", 1), ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"type": "linear", "factor": 2}), ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}), ("rope_scaling", "linear"),
        ("rope_parameters", [1]), ("dtype", "int8"), ("dtype", "bogus"), ("dtype", ["float32"]),
        ("eos_token_id", 300), ("eos_token_id", -1), ("eos_token_id", "x"), ("eos_token_id", ["x"]),
        ("eos_token_id", True), ("pad_token_id", 300), ("bos_token_id", "x"), ("head_dim", 16),
        ("tie_word_embeddings", "false"), ("tie_word_embeddings", 1), ("attention_dropout", 2.0),
        ("router_aux_loss_coef", -1), ("initializer_range", None), ("attention_dropout", None),
        ("router_aux_loss_coef", "x"), ("output_router_logits", "yes"),
    )],
    ("config: no model_type", config("model_type"), "config.json model_type granitemoe"),
    ("config: both rope spellings differ", config(
        rope_parameters={"rope_type": "default", "rope_theta": "x"}), "rope_theta"),
    ("config: sizes of which no tensor can be", config(hidden_size=2**31), f"{WEIGHTS} shape"),
    ("config: one huge head", config(hidden_size=2**27, num_attention_heads=1,
                                     num_key_value_heads=1), f"{WEIGHTS} shape"),
    ("config: untied", config(tie_word_embeddings=False), f"1 missing {HEAD}"),
    *[(f"config: {key} {size}", config(**{key: size}), f"{WEIGHTS} shape") for key, size in (
        ("vocab_size", 301), ("hidden_size", 40), ("intermediate_size", 23),
        ("num_key_value_heads", 4), ("num_local_experts", 6), ("num_attention_heads", 8),
        ("vocab_size", 2**24), ("hidden_size", 2**20), ("num_local_experts", 2**16),
        ("hidden_size", 2**27), ("intermediate_size", 2**30),
    )],
]  # fmt: skip
ENDS = [
    *[(f"generation: {name}", put("generation_config.json", raw), f"generation_config.json {words}")
      for name, raw, words in (
        ("not JSON", b"[", "JSON"), ("a list", b"[]", "object"), ("empty", b"", "JSON"),
        *[(f"eos {bad}", json.dumps({"eos_token_id": bad}).encode(), "eos_token_id")
          for bad in ("x", True, [0, "x"], {}, 0.0)],
    )],
    ("generation: a folder", lambda f: (f / "generation_config.json").mkdir(),
     "generation_config.json regular"),
]  # fmt: skip
FILES = [
    *[(f"weights: {name}", put(WEIGHTS, raw), f"{WEIGHTS} {words}") for name, raw, words in (
        ("empty", b"", "cut"), ("7 bytes", b"1234567", "cut"), ("pointer", POINTER, "LFS"),
        ("HTML", b"<!DOCTYPE html><html>not found</html>", "safetensors"),
        ("header length 0", struct.pack("<Q", 0) + b"{}", "JSON"),
        ("header length 2^63", struct.pack("<Q", 2**63) + b"{}", "cut"),
        ("header length 50", struct.pack("<Q", 50) + b"{}", "cut"),
        ("header 11 MB", pack(b"{" + b" " * 11 * 2**20 + b"}", b""), ""),
        ("header not JSON", pack(b"{'a': 1}", b"1234"), "JSON"),
        ("header not UTF-8", pack(b'{"\xff": 1}', b"1234"), "JSON"),
        ("header a list", pack(b"[1]", b"1234"), "object"),
        ("header nested", pack(NESTED, b"1234"), "JSON"),
        ("duplicate name", pack(b'{"a": {}, "a": {}}', b"1234"), "duplicate"),
        ("entry a number", pack(b'{"a": 1}', b"1234"), "entry"),
        ("entry without a shape", pack(b'{"a": {"dtype": "F32"}}', b"1234"), "entry"),
        ("shape a string", pack(b'{"a": {"dtype": "F32", "shape": "12"}}', b"1234"), "entry"),
    )],
    *[(f"weights: cut to {size}", lambda f, n=size: os.truncate(f / WEIGHTS, n), WEIGHTS)
      for size in (9, 1000, 5000, 100_000, 159_000)],
    ("weights: a byte more", put(WEIGHTS, checkpoint()[WEIGHTS] + b"x"), WEIGHTS),
    *[(f"weights: no {name}", tensors(lambda t, n=name: t.pop(n)), f"1 missing {name[:40]}")
      for name in KINDS],
    ("weights: three missing", tensors(lambda t: [t.pop(n) for n in KINDS[:3]]), "3 missing"),
    *[(f"weights: unexpected {kind}", header(lambda h, n=name: h.update({n: {**h[NORM]}})),
       "1 unexpected") for kind, name in BAD_NAMES.items()],
    ("weights: a third layer", header(lambda h: h.update({"model.layers.2.x": {**h[NORM]}})),
     "num_hidden_layers 3"),
    ("weights: 5,000 layers", both(config(num_hidden_layers=5000), put(WEIGHTS, pack(DEEP, b"x"))),
     "config.json num_hidden_layers 1000"),
    ("weights: 100,000 names", put(WEIGHTS, pack(MANY, b"x")), "config.json num_hidden_layers 0"),
    *[(f"weights: {name} {shape}", header(lambda h, n=name, s=shape: h[n].update(shape=s)),
       f"{name} shape") for name, shape in (
        (NORM, []), (NORM, [32, 1]), (NORM, [33]), (EMBED, [32, 300]), (Q, [1024]), (NORM, [32.0]),
        (NORM, [True] * 3), (NORM, ["32"]), (MOE + "input_linear.weight", [5, 32, 48]),
        (NORM, [1] * 10_000), (NORM, [2**62, 0]), (NORM, [2**63, 0]), (NORM, [-32]), (NORM, [None]),
        (NORM, [[32]]), (NORM, [10**30]),
    )],
    *[(f"weights: dtype {dtype}", header(lambda h, d=dtype: h[Q].update(dtype=d)), f"{Q} dtype")
      for dtype in BAD_DTYPES],
    *[(f"weights: offsets {pair}", header(lambda h, p=pair: h[Q].update(data_offsets=p)), WEIGHTS)
      for pair in ([0, 4096], [-1, 4095], [0, 2**60], [4096, 0], [2**64, 2**64 + 4096], [0], "x",
                   None, [0.0, 4096.0], [0, 4095])],
    ("weights: no offsets", header(lambda h: h[Q].pop("data_offsets")), WEIGHTS),
    ("weights: half renamed twice", tensors(lambda t: t.update({
        MOE + "router.weight": t[MOE + "router.layer.weight"].clone()})), "router two names"),
    ("weights: renamed with a hole", both(renamed(LAYER), header(lambda h: h.pop(
        MOE + "router.weight"))), f"1 missing {MOE}router"[:40]),
    ("weights: another tied head", tensors(lambda t: t.update({HEAD: -t[EMBED]})), f"{HEAD} tied"),
    *[(f"weights: saved within {kind}", spelled(lambda n, w=kind: w + n), f"{WEIGHTS} {words}")
      for kind, words in (
        ("_orig_mod.", "'_orig_mod.' model._orig_mod.save_pretrained"),
        ("module.", "'module.' model.module.save_pretrained"),
        ("module._orig_mod.", "'module.' save_pretrained"),
        ("_fsdp_wrapped_module.", "'_fsdp_wrapped_module.' full state"),
        ("_forward_module.module.", "'_forward_module.' save_pretrained"),
        ("base_model.model.", "'base_model.model.' merge_and_unload().save_pretrained"))],
    *[(f"weights: compiled {part}", spelled(lambda n, p=part: re.sub(p, r"\g<0>_orig_mod.", n)),
       f"{WEIGHTS} '_orig_mod.'") for part in (r"layers\.\d\.", r"1\.self_attn\.", "model.")],
    ("weights: with and without model.", tensors(lambda t: t.update({NORM[6:]: t[NORM] + 1})),
     f"{WEIGHTS} {NORM} two names"),
    ("weights: another buffer", tensors(lambda t: t.update({LAYER + "mlp.rotary_emb.inv_freq": t[
        NORM]})), "1 unexpected"),
    ("weights: the head alone, untied", both(config(tie_word_embeddings=False), tensors(
        lambda t: t.update({HEAD: t.pop(EMBED)}))), f"1 missing {EMBED}"),
    ("weights: a tied head of another shape", tensors(lambda t: t.update({HEAD: t[EMBED].T})),
     f"{HEAD} shape"),
]  # fmt: skip
INDEXES = [
    ("index: saved in a wrapper", both(spelled(lambda n: "module." + n), shards(
        lambda i: i["weight_map"].setdefault("module." + HEAD, SHARDS[0]))), "'module.'"),
    ("index: neither of a tied pair", both(tensors(lambda t: t.pop(EMBED)), shards(
        lambda i: i["weight_map"].update({HEAD: SHARDS[0], EMBED: "x.safetensors"}))),
     f"1 missing {EMBED}"),
    ("index: a head that is absent, untied", both(config(tie_word_embeddings=False), shard_of(
        HEAD, SHARDS[0])), f"1 missing {HEAD}"),
    *[(f"index: {name}", both(shards(), put(INDEX, raw)), f"{INDEX} {words}") for name, raw, words
      in (("empty", b"", "JSON"), ("list", b"[]", "object"), ("null", b"null", "object"),
          ("11 MB", b"{" + b" " * 11 * 2**20, "larger"), ("no map", b"{}", "weight_map"),
          ("duplicate", b'{"weight_map": {}, "weight_map": {}}', "duplicate weight_map"))],
    *[(f"index: weight_map {bad!r}", shards(lambda i, b=bad: i.update(weight_map=b)),
       f"{INDEX} weight_map") for bad in ([], {}, None, "x", 5)],
    *[(f"index: shard {bad!r}", shard_of(Q, bad), f"{INDEX} {Q[:30]} plain") for bad in BAD_SHARDS],
    ("index: shard missing", both(shards(), remove(SHARDS[0])), f"{SHARDS[0]} no"),
    *[(f"index: shard is a {kind}", both(shards(), instead(SHARDS[0], make)),
       f"{SHARDS[0]} regular")
      for kind, make in (("folder", Path.mkdir), ("FIFO", fifo), ("device", device))],
    ("index: tensor in the other shard", shards(lambda i: i["weight_map"].update(
        {n: SHARDS[i["weight_map"][n] == SHARDS[0]] for n in (Q,)})), f"{Q} not {SHARDS[0][:10]}"),
    ("index: tensor not named", shards(lambda i: i["weight_map"].pop(Q)), f"1 missing {Q[:40]}"),
    ("index: forty links to one header", both(shards(), forty_links), "headers"),
    ("index: 100,000 names", shards(lambda i: i["weight_map"].update(
        {f"x{n}": SHARDS[0] for n in range(100_000)})), f"{INDEX} not"),
    ("index: 100,000 shards", shards(lambda i: i["weight_map"].update(
        {f"x{n}": f"{n}.safetensors" for n in range(100_000)})), "0.safetensors no"),
]  # fmt: skip


ROWS = FOLDERS + CONFIGS + ENDS + FILES + INDEXES


@pytest.mark.parametrize("name, change, words", ROWS, ids=[row[0] for row in ROWS])
def test_refused(name, change, words, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert_refused(load_model, change, words, folder)


@on_linux
@pytest.mark.parametrize("every", (pytest.param(1, marks=thorough), 40))
def test_refused_by_the_command_without_asserts(every):
    """Rows again under python -O, in one line of at most 200 characters and exit status 1."""
    rows = len((ROWS + TOKENIZERS)[::every])
    assert f"\n{rows} rows, 0 wrong" in script("table", every)


def test_a_long_path_leaves_room_for_what_is_wrong(folder):
    config(hidden_act="relu")(folder)
    folder = folder.rename(folder.parent / ("x" * 200))
    outcome = forked(command("--model", str(folder)))
    assert problem(outcome, 1) == "" and re.search("config.json.*hidden_act.*relu", outcome.err)


@on_posix
@pytest.mark.parametrize("name", ("config.json", WEIGHTS, "tokenizer.json"))
def test_unreadable_file(name, folder, monkeypatch):
    """Root reads everything, so for a moment this is somebody else, who cannot open /tmp/pytest-*:
    hence the path "."."""
    monkeypatch.chdir(folder)
    (folder / name).chmod(0)
    folder.chmod(0o755)
    user = os.geteuid()
    loader = load_tokenizer if name == "tokenizer.json" else load_model
    try:
        os.seteuid(user or 65534)
        with pytest.raises(CheckpointError, match=f"{name}.*permission denied"):
            loader(".")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("loader", (load_model, load_tokenizer))
@pytest.mark.parametrize("path", (
    "", "no-such-folder", "./no/such", "../no-such", "here/no-such", "a/b/c", "/no/such",
    "~/x", "https://example.com/x", "a/b\n", "\x1b[2J", "a\0b", "x" * 5000,
))  # fmt: skip
def test_paths_never_become_hub_ids(loader, path, tmp_path, monkeypatch):
    """A typo must not go to the network, and neither must what only looks like an id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with audited(tmp_path) as harm, pytest.raises(CheckpointError) as caught:
        loader(path)
    assert harm == [] and str(caught.value).isprintable()
    unusual = len(path) > 99 or "\0" in path  # the system's own words
    assert unusual or "no such folder, and not a hub id" in str(caught.value)


@pytest.mark.parametrize("name, words", (
    (WEIGHTS, "is a file; name its folder"), ("x.gguf", "a GGUF file"), ("x.bin", "a pickle"),
))  # fmt: skip
def test_a_path_to_a_file(name, words, folder):
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=words):
        load_model(folder / name)


@on_linux
@pytest.mark.parametrize("name", (WEIGHTS, "config.json"))
def test_what_only_the_kernel_has(name, folder):
    """Its log has no end: reading it would wait for the next line."""
    if not os.access("/proc/kmsg", os.R_OK):
        pytest.skip("only root may read it")
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/kmsg")
    assert forked(command("--model", str(folder), "--raw-ids", "5"), seconds=20).status == 1


def test_written_to_while_its_last_part_is_read(folder, monkeypatch):
    """What was read before the state is looked at again may be old or new."""
    stored = checkpoint_file.check(folder, checkpoint_file.read_config(folder))
    states = iter([stored[NORM].state, (0, 0, 0, 0)])
    monkeypatch.setattr(checkpoint_file, "state_of", lambda file: next(states))
    with pytest.raises(CheckpointError, match=f"{NORM}: changed while loading"):
        checkpoint_file.read_tensor(NORM, stored[NORM])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("bad", (INF - INF, INF, -INF), ids=("NaN", "inf", "-inf"))
@pytest.mark.parametrize("place", (0, -1))
def test_values_that_are_not_finite(kind, bad, place, folder):
    """Guards against plausible text: fused attention turns a query of NaN into zeros, and an expert
    that is not chosen hides what it holds."""
    value(kind, bad, place)(folder)
    with pytest.raises(CheckpointError, match=re.escape(f"{WEIGHTS}': {kind}: has NaN or inf")):
        load_model(folder)


def test_values_that_overflow_in_the_cast(folder):
    value(Q, 1e30, -1)(folder)
    assert load_model(folder).model.layers[1].self_attn.q_proj.weight[-1, -1] == 1e30
    with pytest.raises(CheckpointError, match=re.escape(Q)):
        load_model(folder, dtype="float16")


@pytest.mark.parametrize("options", (
    {"dtype": "int8"}, {"dtype": torch.int8}, {"dtype": 5}, {"attention_backend": "fast"},
    {"experts_backend": "x"}, {"device": "bogus"}, {"device": "cuda:99"},
))  # fmt: skip
def test_options_of_load_model(options, folder):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_model(folder, **options)


# -------------------------------------------------------------------------------- the good folders


def symlinks(folder: Path) -> None:
    """The layout of the hub's cache."""
    blobs = folder.with_name("blobs")
    folder.rename(blobs)
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)


def stored_as(choose: Callable[[str], torch.dtype]) -> Change:
    return tensors(lambda state: state.update({n: t.to(choose(n)) for n, t in state.items()}))


def with_zeros(folder: Path) -> None:
    """Each shard also holds zeros for the tensors of the other, and the index tells which count."""
    shards()(folder)
    states = {shard: load((folder / shard).read_bytes()) for shard in SHARDS}
    for shard, other in zip(SHARDS, SHARDS[::-1], strict=True):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in states[other].items()}
        save_file({**zeros, **states[shard]}, folder / shard)


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16 if "attn" in name else torch.float16


SPACED = json.dumps(unpack(checkpoint()[WEIGHTS])[0], indent=3).encode() + b" " * 80
ACCEPTED = {
    "as it is": lambda folder: None,
    "shards": shards(),
    "index without metadata": shards(lambda i: i.pop("metadata")),
    "index with odd metadata": shards(lambda i: i.update(metadata=5, more=[])),
    "zeros in the other shard": with_zeros,
    "single file and index": both(shards(), put(WEIGHTS, checkpoint()[WEIGHTS]), put(INDEX, b"{")),
    "the other spelling": renamed("model."),
    "both spellings": renamed(LAYER),
    "names in another order": header(lambda h: h.update({n: h.pop(n) for n in sorted(h)[::-1]})),
    "spaces after the header": put(WEIGHTS, pack(SPACED, unpack(checkpoint()[WEIGHTS])[1])),
    "names without model.": spelled(lambda name: name.removeprefix("model.")),
    "buffers": tensors(lambda t: t.update({name + "rotary_emb.inv_freq": torch.ones(4) for name in (
        "model.", "model.layers.0.self_attn.", "model.layers.1.self_attn.")})),
    "the tied head alone": tensors(lambda t: t.update({HEAD: t.pop(EMBED)})),
    "index names an absent head": shards(lambda i: i["weight_map"].setdefault(HEAD, SHARDS[1])),
    "index names an absent head's shard": shards(lambda i: i["weight_map"].setdefault(
        HEAD, "model-00003-of-00003.safetensors")),
    "index names the other of a tied pair": both(
        tensors(lambda t: t.update({HEAD: t.pop(EMBED)})),
        shards(lambda i: i["weight_map"].setdefault(EMBED, SHARDS[0]))),
    "index names absent buffers": shards(lambda i: i["weight_map"].update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]})),
    "stored tied head": tensors(lambda t: t.update({HEAD: t[EMBED].clone()})),
    "bfloat16": stored_as(lambda name: torch.bfloat16),
    "mixed dtypes": stored_as(dtype_of),
    "rope_parameters": config("rope_theta", rope_parameters={
        "rope_type": "default", "rope_theta": 1000.0}),
    "rope_scaling null": config(rope_scaling=None, rope_parameters=None),
    "torch_dtype": config("dtype", torch_dtype="torch.bfloat16"),
    "no dtype": config("dtype"),
    "activation_function": config("hidden_act", activation_function="silu"),
    "head_dim": config(head_dim=8),
    "eos list, pad null": config(eos_token_id=[0, 299], pad_token_id=None, bos_token_id=None),
    "ints for floats": config(embedding_multiplier=12, logits_scaling=3),
    "unknown keys": config(auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True, x=[{}],
                           _attn_implementation_internal="/evil", architectures=None),
    "largest context": config(max_position_embeddings=2**31),
    "no tokenizer": remove("tokenizer.json"),
    "generation_config": put("generation_config.json", b'{"temperature": "x", "top_k": []}'),
    "unread files": both(put("chat_template.jinja", b"{{"),
                         put("tokenizer_config.json", b"["), put("evil.py"),
                         put("pytorch_model.bin", PICKLE)),
    "symlinks": symlinks,
    "an odd name": lambda folder: folder.rename(folder.with_name("-a b\n\udcff")),
    "read-only": lambda folder: folder.chmod(0o555),
}  # fmt: skip


@pytest.fixture(scope="session")
def expected(tmp_path_factory) -> torch.Tensor:
    logits = logits_of(write_files(tmp_path_factory.mktemp("expected"), checkpoint()))
    assert 0.1 < logits.std() < 10
    return logits


@pytest.mark.parametrize("ends, expected", (
    (None, [299, 5]), (7, [7]), ([7, 8], [7, 8]), ([], [299, 5]), (0, [0]),
    ([300, 8], [8]), (300, []), (-1, []),
))  # fmt: skip
def test_where_a_text_ends(ends, expected, folder):
    """Where generation_config.json says, and where it says nothing where config.json does. An end
    that the model lacks was added later; it can never come."""
    config(eos_token_id=[299, 5])(folder)
    assert load_model(folder).config.eos_token_id == [299, 5]
    put("generation_config.json", json.dumps({"eos_token_id": ends, "top_p": 2}).encode())(folder)
    assert load_model(folder).config.eos_token_id == expected


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, folder, expected):
    """The same logits, bit for bit, however the checkpoint is written."""
    ACCEPTED[name](folder)
    folder = next(path for path in folder.parent.iterdir() if path.name != "blobs")
    assert torch.equal(logits_of(folder), expected)


def test_the_corpus_can_tell(folder, expected):
    """Each block counts in those logits: a changed number of any kind of tensor shows."""
    for kind in KINDS:
        change = tensors(lambda state, kind=kind: state[kind].mul_(1.01))
        change(write_files(folder, checkpoint()))
        assert not torch.equal(logits_of(folder), expected), kind


def test_untied_head_and_stored_dtype(folder):
    state = make_tensors(tie_word_embeddings=False)
    config("dtype", tie_word_embeddings=False)(folder)
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / WEIGHTS)
    model = load_model(folder)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.training is False
    assert torch.equal(model.lm_head.weight.float(), state[HEAD])


# ----------------------------------------------------------- in processes of their own, as a script


def script(job: str, *args: object) -> str:
    """Run one of JOBS in a fresh process of one thread, which may fork."""
    line = [sys.executable, "-O", str(TESTS / "test_checkpoint.py"), job, *map(str, args)]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


MOST = {  # of the work for any refusal; of memory, over what a good folder takes
    "growth": 32 * 2**20, "read": 32 * 2**20, "calls": 4 * 10**6,
}  # fmt: skip


def run_table(every: str = "1") -> int:
    """Rows through the command; prints what did not end as it must, or took too much work."""
    wrong, most, rows = 0, {}, (ROWS + TOKENIZERS)[:: int(every)]
    good = command("--model", str(write_files(Path("good"), checkpoint())), "--max-new-tokens", "1")
    good()  # code that is paged in at a first run is no row's work
    twin = forked(good, count=True)
    for number, (name, change, words) in enumerate(rows):
        change(folder := write_files(Path(f"{number}"), checkpoint()))
        args = ("a b",) if name in (row[0] for row in TOKENIZERS) else ("--raw-ids", "1 2")
        act = command("--model", str(folder), "--max-new-tokens", "1", *args)
        outcome = forked(act, count=True)
        fault = problem(outcome, 1)
        if missing := [word for word in words.split() if word not in outcome.err]:
            fault = fault or f"{missing} not in {outcome.err}"
        work = {what: getattr(outcome, what) for what in MOST}
        work["growth"] -= twin.growth
        if any(work[what] > limit for what, limit in MOST.items()):
            fault = fault or f"took {work}"
        most = {what: max(done, most.get(what, done)) for what, done in work.items()}
        wrong += bool(fault)
        print(f"{name}: {fault}" if fault else ".", end="\n" * bool(fault))
    print(f"\n{len(rows)} rows, {wrong} wrong; the most work of one: {most}; a good folder: {twin}")
    return min(wrong + bool(twin.status), 1)


def run_changes() -> int:
    """Cut or overwrite the file after each tensor that is read: an error, and no signal; unless the
    others had been read ahead, whole."""
    endings: Counter = Counter()
    count = len(make_tensors())
    for done in range(1, count):
        for size in (0, 60_000):
            folder = write_files(Path("changing"), checkpoint())

            def change(so_far: int, of: int, done=done, size=size, folder=folder) -> None:
                if so_far == done:
                    os.truncate(folder / WEIGHTS, size)
                    if size:  # to its old length, with NaN
                        with (folder / WEIGHTS).open("ab") as file:
                            file.write(b"\xff" * 99_208)

            def act(folder=folder, change=change) -> int:
                try:
                    load_model(folder, progress=change)
                except CheckpointError as error:
                    return 1 if WEIGHTS in str(error) else 2
                return 0

            ahead = done >= count - 1 - READERS
            endings[ahead, forked(act).status] += 1
    print(dict(endings))
    return 0 if {*endings} <= {(False, 1), (True, 1), (True, 0)} and endings[False, 1] else 1


def run_memory(folder: str, dtype: str) -> int:
    """How far loading rises over the memory before it, in bytes, and the weights' size."""
    load_model(write_files(Path("small"), checkpoint()))  # code that is paged in does not count
    Path("/proc/self/clear_refs").write_text("5")
    before = rss()
    weights = load_model(folder, dtype=dtype).state_dict().values()
    print(rss("VmHWM") - before, sum(w.nbytes for w in weights), max(w.nbytes for w in weights))
    return 0


JOBS = {"table": run_table, "changes": run_changes, "memory": run_memory}


@on_linux
def test_file_changes_while_loading():
    script("changes")


def test_shard_changes_while_loading(folder):
    """The second shard is another file by the time it is opened."""
    shards()(folder)
    other = {name: torch.ones(3) for name in load((folder / SHARDS[1]).read_bytes())}
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}.*changed while loading"):
        load_model(folder, progress=lambda *_: save_file(other, folder / SHARDS[1]))


def test_file_changes_after_loading(folder):
    """Guards against weights that are the mapped file: they would change, or end the process."""
    model = load_model(folder)
    before = collect(model, [IDS])
    (folder / WEIGHTS).write_bytes(b"\xff" * 159_000)
    assert collect(model, [IDS]) == before
    os.truncate(folder / WEIGHTS, 0)
    assert collect(model, [IDS]) == before


@on_linux
@pytest.mark.parametrize("dtype", representing(("bfloat16", "float32"), "bfloat16"))
def test_memory_while_loading(dtype, large):
    peak, size, largest = map(int, script("memory", large, dtype).split())
    assert size > 165e6 * (1 + (dtype == "float32"))
    assert size / 2 <= peak <= 1.10 * size + largest  # a kernel may page out what is read


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rows") as base:
        os.chdir(base)
        sys.exit(JOBS[sys.argv[1]](*sys.argv[2:]))
