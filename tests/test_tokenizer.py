"""A checkpoint's tokenizer: what is refused, and what it keeps."""

import base64
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from changes import (
    NESTED,
    Change,
    assert_refused,
    both,
    config,
    device,
    edit,
    fifo,
    instead,
    put,
    remove,
)  # fmt: skip
from conftest import END, START, checkpoint, parts, tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from files.tokenizer import decoder, encode
from generate import TextStream, load_tokenizer


def in_tokenizer(change: Callable[[dict], object]) -> Change:
    return edit("tokenizer.json", change)


def from_parts(name: str, raw: bytes) -> Change:
    files = {**parts(tokenizer()), name: raw}
    return both(remove("tokenizer.json"), *(put(name, raw) for name, raw in files.items()))


DOUBLE = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}
LOWER = {"type": "Lowercase"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PIECE, SPECIAL = ({kind: {"id": "A", "type_id": 0}} for kind in ("Sequence", "SpecialToken"))


def chain(name: str, parts: list[dict]) -> dict:
    return {"type": "Sequence", name: parts}


def nested(part: dict, depth: int) -> dict:
    made = part
    for _ in range(depth - 1):
        made = chain("normalizers", [made, part])
    return made if depth < 9 else chain("normalizers", [part] * depth)


def template(*pieces: dict) -> dict:
    return {"type": "TemplateProcessing", "single": [*pieces], "pair": [], "special_tokens": {}}


ROWS = [
    *[(f"tokenizer: {name}", put("tokenizer.json", raw), "tokenizer.json") for name, raw in (
        ("empty", b""), ("object", b"{}"), ("list", b"[]"), ("not UTF-8", b"\xff\xfe"),
        ("cut", checkpoint()["tokenizer.json"][:-100]), ("HTML", b"<html>"), ("nested", NESTED))],
    ("tokenizer: missing", remove("tokenizer.json"), "tokenizer.json no"),
    *[(f"tokenizer: is a {kind}", instead("tokenizer.json", make), "tokenizer.json regular")
      for kind, make in (("folder", Path.mkdir), ("FIFO", fifo), ("device", device))],
    *[(f"tokenizer: {name}", in_tokenizer(change), "tokenizer.json") for name, change in (
        ("model type", lambda t: t["model"].update(type="bogus")),
        ("merges", lambda t: t["model"]["merges"].append(["no", "such"])),
        ("merges a number", lambda t: t["model"].update(merges=5)),
        ("regex", lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("},
                                                    "behavior": "Isolated", "invert": False})),
        ("charsmap", lambda t: t.update(normalizer={"type": "Precompiled",
                                                    "precompiled_charsmap": "AAAA"})),
        ("post-processor", lambda t: t.update(post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
            "pair": [], "special_tokens": {}})),
        ("id 2^32 - 1", lambda t: t["model"]["vocab"].update(xyzzy=2**32 - 1)),
        ("id 300", lambda t: t["model"]["vocab"].update(xyzzy=300)),
    )],
    *[(f"tokenizer: {name}", in_tokenizer(change), f"tokenizer.json {words}")
      for name, change, words in (
        ("doubling normalizers", lambda t: t.update(normalizer=chain("normalizers", [DOUBLE] * 40)),
         "normalizer times"),
        ("many parts", lambda t: t.update(normalizer=chain("normalizers", [LOWER] * 40)),
         "normalizer parts"),
        ("nested ones", lambda t: t.update(normalizer=nested(DOUBLE, 12)), "normalizer times"),
        ("bytes of bytes", lambda t: t.update(pre_tokenizer=chain("pretokenizers", [BYTES] * 9)),
         "pre_tokenizer times"),
        ("both", lambda t: t.update(normalizer=nested(DOUBLE, 6), pre_tokenizer=chain(
            "pretokenizers", [BYTES] * 2)), "normalizer pre_tokenizer times"),
        ("doubling decoders", lambda t: t.update(decoder=chain("decoders", [DOUBLE] * 12)),
         "decoder times"),
        ("a long replacement", lambda t: t.update(normalizer={**DOUBLE, "content": "x" * 300}),
         "normalizer times"),
        ("an empty pattern", lambda t: t.update(normalizer={**DOUBLE, "pattern": {"String": ""}}),
         "normalizer empty"),
        ("an empty regex", lambda t: t.update(normalizer={**DOUBLE, "pattern": {"Regex": ""}}),
         "normalizer empty"),
        ("an empty match", lambda t: t.update(normalizer={**DOUBLE, "pattern": {"Regex": "a*"}}),
         "normalizer empty"),
        ("an empty suffix", lambda t: t.update(decoder={"type": "BPEDecoder", "suffix": ""}),
         "decoder suffix"),
        ("texts of texts", lambda t: t.update(post_processor=template(PIECE, PIECE)),
         "post_processor twice"),
        ("many pieces", lambda t: t.update(post_processor=template(*[SPECIAL] * 99)), "pieces"),
        ("a table", lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap":
            base64.b64encode(bytes(4) + b"x" * 999).decode()}), "normalizer times"),
    )],
    *[(f"tokenizer_config: {name}", put("tokenizer_config.json", json.dumps(raw).encode()),
       f"tokenizer_config.json {words}") for name, raw, words in (
        ("a list", [], "object"), ("ids", {"added_tokens_decoder": []}, ""),
        ("no list", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("no id", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("no token", {"added_tokens_decoder": {"5": {"content": 5}}}, "added_tokens_decoder"),
        ("flags", {"added_tokens_decoder": {"0": {"content": END, "lstrip": "x"}}}, "lstrip"),
        ("another id", {"added_tokens_decoder": {"5": {"content": END}}}, f"{END} 5"),
        ("a hole", {"added_tokens_decoder": {"299": {"content": "<|x|>"}}}, "<|x|> 299"),
    ) if words],
    ("tokenizer: more ids than the model", config(vocab_size=270), "tokenizer.json vocab_size"),
    *[(f"parts: {name}", from_parts(name, raw), words) for name, raw, words in (
        ("vocab.json", b"{}", ""), ("vocab.json", b"[]", "vocab.json object"),
        ("vocab.json", b'{"a": "x"}', ""), ("merges.txt", b"no such\n", ""),
        ("merges.txt", b"\xff\xfe", ""), ("added_tokens.json", b"[]", "added_tokens.json object"),
        ("added_tokens.json", b'{"<|x|>": 5}', "added_tokens.json <|x|>"),
        ("added_tokens.json", b'{"<|x|>": "y"}', "added_tokens.json <|x|>"),
        ("added_tokens.json", b'{"<|x|>": 299}', "added_tokens.json <|x|>"),
    )],
    ("parts: no merges", both(from_parts("vocab.json", b"{}"), remove("merges.txt")), "merges.txt"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, words", ROWS, ids=[row[0] for row in ROWS])
def test_refused(name, change, words, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert_refused(load_tokenizer, change, words, folder)


# ---------------------------------------------------------------------------------- what it keeps

PLAIN = ["", " a  b\n\tc", "the theory of 1234 strings", "é😀\u202e中\0\ufeff\U0010ffff"]


def test_tokenizer_from_parts(folder):
    whole = load_tokenizer(folder)
    both(remove("tokenizer.json"), *(put(*item) for item in parts(whole).items()))(folder)
    other = load_tokenizer(folder)
    for text in (*PLAIN, END, START):
        ids = whole.encode(text).ids
        assert other.encode(text).ids == ids and other.decode(ids) == whole.decode(ids)


def test_tokenizer_keeps_text(folder):
    tok = load_tokenizer(folder)
    assert [tok.decode(tok.encode(text).ids) for text in PLAIN] == PLAIN
    assert tok.encode(END).ids == [0]  # in plain prompts control tokens count, as in transformers


def left_behind(act: Callable[[Tokenizer], object]) -> Change:
    def change(folder: Path) -> None:
        tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
        act(tok)
        tok.save(str(folder / "tokenizer.json"))

    return change


LEFTOVERS = {  # of training, which change no text
    "as it is": left_behind(lambda tok: None),
    "truncation": left_behind(lambda tok: tok.enable_truncation(max_length=1)),
    "truncation on the left": left_behind(
        lambda tok: tok.enable_truncation(max_length=2, stride=1, direction="left")),
    "padding": left_behind(lambda tok: tok.enable_padding(length=40, pad_token="a", pad_id=65)),
    "an unused token": left_behind(lambda tok: tok.add_special_tokens(
        [f"<|x{n}|>" for n in range(300)])),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_training_left_behind(name, folder):
    """tokenizer.json keeps truncation and padding of its last call: the trainer's state."""
    clean = [load_tokenizer(folder).encode(text).ids for text in PLAIN]
    LEFTOVERS[name](folder)
    loaded = load_tokenizer(folder)
    assert [loaded.encode(text).ids for text in PLAIN] == clean
    assert [e.ids for e in loaded.encode_batch(PLAIN)] == clean


def test_an_added_token_that_the_model_lacks(folder):
    """Nobody may ever use it; who does is told its name."""
    LEFTOVERS["an unused token"](folder)
    tok = load_tokenizer(folder)
    assert encode(tok, "a<|x1|>", 300) == [*tok.encode("a").ids, tok.token_to_id("<|x1|>")]
    with pytest.raises(
        ValueError, match=r"'<\|x299\|>' has id \d+, but the model's vocab_size is 300"
    ):
        encode(tok, "a<|x299|>", 300)


def test_threads_leave_standard_error_alone(folder):
    """Nothing that encodes, fails or decodes may switch it, even for a moment."""
    tok, before, seen = load_tokenizer(folder), os.fstat(2), []
    stop = threading.Event()

    def serve() -> None:
        for _ in range(1000):
            encode(tok, "the theory " * 20, 300)
            decoder(tok)([64, 7])
        stop.set()

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not (seen and stop.is_set()):
        seen.append(os.fstat(2))
    for thread in threads:
        thread.join()
    assert {(x.st_dev, x.st_ino) for x in seen} == {(before.st_dev, before.st_ino)}


def test_decoding_is_caught(folder):
    """As encoding is: a pattern that runs away in a decoder is one line."""
    runaway = {"type": "Replace", "pattern": {"Regex": "^(?:a|a)+$"}, "content": "x"}
    in_tokenizer(lambda t: t.update(decoder=chain("decoders", [{"type": "Fuse"}, runaway])))(folder)
    tok = load_tokenizer(folder)
    a, b = tok.token_to_id("a"), tok.token_to_id("b")
    with pytest.raises(ValueError, match="not a usable tokenizer"):
        decoder(tok)([a] * 40 + [b])


PARTS = {  # of released tokenizers
    "Llama": {"normalizer": chain("normalizers", [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]),
        "pre_tokenizer": None, "decoder": chain("decoders", [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}])},
    "Qwen": {"normalizer": {"type": "NFC"}, "pre_tokenizer": chain("pretokenizers", [
        {"type": "Split", "pattern": {"Regex": "\\p{N}| ?\\p{L}+|\\s+"}, "behavior": "Isolated",
         "invert": False}, BYTES])},
    "XLM": {"normalizer": chain("normalizers", [
        {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
                          "split": True}},
    "BERT": {"normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True,
                            "handle_chinese_chars": True, "strip_accents": None},
             "pre_tokenizer": {"type": "BertPreTokenizer"}},
    "a bos token": {"post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, PIECE],
        "pair": [PIECE, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_released_tokenizers(name, folder):
    in_tokenizer(lambda t: t.update(PARTS[name]))(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("The  theory 12").ids == plain.encode("The  theory 12").ids


@pytest.mark.parametrize("whole", (True, False), ids=("tokenizer.json", "parts"))
def test_special_tokens_of_tokenizer_config(whole, folder):
    """Which it alone names: of the vocabulary, and added at its end; as in transformers."""
    if not whole:
        both(remove("tokenizer.json"), *(put(*x) for x in parts(tokenizer()).items()))(folder)
    last = tokenizer().get_vocab_size()
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    listed = {64: ("_", True), last: ("<|new|>", True), last + 1: ("<think>", False)}
    data = {
        "added_tokens_decoder": {
            str(i): {"content": token, "special": special, **flags}
            for i, (token, special) in listed.items()
        },
        "eos_token": END, "pad_token": {"content": "<|pad|>", "__type": "AddedToken", **flags},
        "additional_special_tokens": ["<|more|>"], "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    listed[tokenizer().token_to_id("_")] = listed.pop(64)
    data["added_tokens_decoder"][str(tokenizer().token_to_id("_"))] = data[
        "added_tokens_decoder"].pop("64")  # fmt: skip
    put("tokenizer_config.json", json.dumps(data).encode())(folder)
    ours = load_tokenizer(folder)
    text = "a_b<|new|>c<think>d<|pad|>e<|more|>f"
    shown = ours.decode(ours.encode(text).ids)
    assert shown == "abc<think>def" and len(ours.encode(text).ids) == 11
    if whole:
        theirs = AutoTokenizer.from_pretrained(folder)
        assert ours.encode(text).ids == theirs(text).input_ids
        assert shown == theirs.decode(ours.encode(text).ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------- streaming

WORDS = ["the", "theory", "of", "other", "##s", "##ing", ".", "é", "x"]


def tokenizers_by_decoder() -> dict[str, Tokenizer]:
    """Tokenizers to which a token's text depends on its neighbours, each in another way."""
    vocab = {word: i for i, word in enumerate([*WORDS, "[UNK]"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    pieces = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    ends = {word + "</w>" * (i % 2): i for word, i in vocab.items()}
    suffixed = Tokenizer(models.WordLevel(ends, unk_token="[UNK]</w>"))
    suffixed.decoder = decoders.BPEDecoder()
    spaced = {"<unk>": 0, "\u2581": 1, "\u2581the": 2, "ory": 3, "\u2581\u2581x": 4, ".": 5}
    spaced |= {f"<0x{byte:02X}>": 6 + n for n, byte in enumerate("é😀".encode())}
    metaspace = Tokenizer(models.WordLevel(spaced, unk_token="<unk>"))
    metaspace.decoder = decoders.Metaspace()
    llama = Tokenizer(models.WordLevel(spaced, unk_token="<unk>"))
    llama.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])  # fmt: skip
    ctc = Tokenizer(models.WordLevel({"<pad>": 0, "|": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    ctc.decoder = decoders.CTC()
    special = Tokenizer.from_str(metaspace.to_str())
    special.add_special_tokens(["<s>"])  # which decoding leaves out
    return {"byte level": tokenizer(), "none": words, "WordPiece": pieces, "BPE": suffixed,
            "Metaspace": metaspace, "Llama": llama, "CTC": ctc, "special": special}  # fmt: skip


@pytest.mark.parametrize("name", tokenizers_by_decoder())
def test_streamed_text(name):
    """Of random tokens: what is shown, and what comes at the end, is what all of them decode to."""
    tok, rng, several = tokenizers_by_decoder()[name], Random(7), 0
    decode, ids = decoder(tok), [*tok.get_vocab().values()]
    units = [[i] for i in ids]
    if name == "Llama":  # whose runs of bytes are text as a whole or not at all
        units = [[i] for i in ids if i < 6] + [[6, 7], [8, 9, 10, 11]]
    for _ in range(300):
        prompt, new = (sum(rng.choices(units, k=rng.randint(1, n)), []) for n in (6, 12))
        if tok.decode(prompt).endswith("\ufffd"):
            continue  # typed text ends with a whole character
        row = TextStream(decode, [], [], prompt)
        shown = [row.push(i) for i in new]
        several += sum(map(bool, shown)) > 1
        assert "".join(shown) + row.finish() == tok.decode(prompt + new)[len(tok.decode(prompt)) :]
        assert row.text == tok.decode(prompt + new)[len(tok.decode(prompt)) :]
        assert row.made == len(new)
    assert several > 50
