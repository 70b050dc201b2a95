"""What a tokenizer.json may ask for. It is a program: its parts rewrite a text one after the other.

Forty parts that each double it would take all memory, which no exception tells of. So what the file
lets a text grow to is bounded before anything is built from it. Released tokenizers stay far below.
"""

import base64
import re
from collections.abc import Iterator

from files.checkpoint import require

MAX_FILE = 64 * 2**20  # bytes
MAX_PARTS = 16  # in each of a tokenizer's four sections
MAX_GROWTH = 256  # how many times as long a section may make a text
MAX_PIECES = 64  # that are put around a text
LISTS = {  # sections, and what a list of parts is called there
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}
GROWTH = {  # the most that one character can become
    "NFD": 4, "NFC": 4, "NFKD": 18, "NFKC": 18, "BertNormalizer": 4, "ByteLevel": 4,
}  # fmt: skip


def check_sections(data: dict) -> None:
    """Raises ValueError for a tokenizer.json that could make far more of a text than it is."""
    rewriting = 1  # what the model gets has gone through both of the first two
    for section, inner in LISTS.items():
        growth = 1
        for part in parts(section, data.get(section), inner):
            growth *= check_part(section, part)
            require(growth <= MAX_GROWTH, f"{section}: makes texts over {MAX_GROWTH} times as long")
        if section in ("normalizer", "pre_tokenizer"):
            rewriting *= growth
    good = rewriting <= MAX_GROWTH
    require(good, f"normalizer, pre_tokenizer: make texts over {MAX_GROWTH} times as long")


def parts(section: str, node: object, inner: str) -> Iterator[dict]:
    """The parts of a section, however they are nested."""
    waiting, seen = [node], 0
    while waiting:
        part = waiting.pop()
        seen += 1
        require(seen <= MAX_PARTS, f"{section}: has over {MAX_PARTS} parts")
        if isinstance(part, dict):
            yield part
            below = part.get(inner)
            waiting += below[: MAX_PARTS + 1] if isinstance(below, list) else []


def check_part(section: str, part: dict) -> int:
    """How many times as long it can make a text. Other faults are the library's to find."""
    kind = part.get("type")
    pattern, content = pattern_of(part), text_of(part, "content")
    require(pattern != "", f"{section}: {kind!a:.20}: an empty pattern")
    for name in ("suffix", "word_delimiter_token"):  # of BPEDecoder and CTC, which replace it
        require(part.get(name) != "", f"{section}: {kind!a:.20}: {name}: must not be empty")
    for name in ("prepend", "prefix", "pad_token"):
        require(len(text_of(part, name)) <= MAX_PIECES, f"{section}: {name}: is too long")
    for name in ("single", "pair"):
        check_pieces(f"{section}: {name}", part.get(name))
    special = part.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        few = not isinstance(ids, list) or len(ids) <= MAX_PIECES
        require(few, f"{section}: special_tokens: over {MAX_PIECES} ids in one")
    if kind == "Replace":
        empty = f"{section}: {kind!a:.20}: an empty match of {pattern!a:.40}"
        require(not matches_nothing(part["pattern"]), empty)
        if "String" in part["pattern"]:
            return max(1, -(-len(content) // len(pattern)))
        return 1 + len(content)  # it may match at every place, and between any two
    if kind == "Precompiled":
        return longest_replacement(text_of(part, "precompiled_charsmap"))
    return GROWTH.get(kind, 1) if isinstance(kind, str) else 1


def text_of(part: dict, name: str) -> str:
    value = part.get(name)
    return value if isinstance(value, str) else ""


def pattern_of(part: dict) -> str | None:
    """Of Replace and Split: a text that is looked for, or a regular expression."""
    pattern = part.get("pattern")
    if part.get("type") not in ("Replace", "Split"):
        return None
    good = isinstance(pattern, dict) and len(pattern) == 1 and {*pattern} <= {"String", "Regex"}
    value = [*pattern.values()][0] if good else None
    require(isinstance(value, str), "pattern: must be one String or Regex")
    return value


def matches_nothing(pattern: dict[str, str]) -> bool:
    """Whether a regular expression finds the empty text, and so would insert something everywhere.
    As far as Python's syntax is the library's: others fail in use, in one line."""
    try:
        spelled = re.sub(r"\\[pP]\{\^?\w+\}", r"\\w", pattern.get("Regex", "x"))
        return re.compile(spelled).match("") is not None
    except (re.error, RecursionError, OverflowError):
        return False


def check_pieces(name: str, pieces: object) -> None:
    """What is put around a text, of which each text may be a part once."""
    if not isinstance(pieces, list):
        return
    require(len(pieces) <= MAX_PIECES, f"{name}: over {MAX_PIECES} pieces")
    texts = [
        piece["Sequence"] for piece in pieces if isinstance(piece, dict) and "Sequence" in piece
    ]
    ids = [str(text.get("id")) for text in texts if isinstance(text, dict)]
    require(len(ids) == len({*ids}), f"{name}: a text comes twice")


def longest_replacement(charsmap: str) -> int:
    """Of SentencePiece's table: the size of a trie, the trie, and texts that a zero byte ends."""
    try:
        raw = base64.b64decode(charsmap)
    except ValueError:
        return 1  # the library refuses it
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))
