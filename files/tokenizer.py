"""A checkpoint's tokenizer."""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from files import bounds
from files.checkpoint import (
    find_folder,
    is_there,
    naming,
    parse_json,
    read_config,
    read_file,
    read_json,
    require,
)

if TYPE_CHECKING:  # imported where text is used, so that ids need no tokenizer
    from tokenizers import AddedToken, Tokenizer

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
START, ROLE_END, END = "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"


@contextmanager
def panics_caught() -> Iterator[None]:
    """tokenizers raises bare Exceptions, and panics beyond them: to ValueError, in one line.

    The page that a panic prints is left to its process's owner: see terminal.quietly.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError, ValueError, ImportError):
        raise
    except BaseException as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"not a usable tokenizer: {reason!a:.80}") from None


def encode(
    tokenizer: "Tokenizer", text: str, vocab_size: int, *, add_special_tokens: bool = True
) -> list[int]:
    """A text's ids; special tokens that are spelled out in it count as such.

    add_special_tokens: also those that the tokenizer puts around every text, a bos token say.
    Raises ValueError for a token that the model has no embedding for.
    """
    with panics_caught():
        found = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return known(tokenizer, found.ids, vocab_size)


def known(tokenizer: "Tokenizer", ids: list[int], vocab_size: int) -> list[int]:
    """The ids. Raises ValueError if one is beyond the model: of a token that was added later."""
    for i in ids:
        if i >= vocab_size:
            token = f"the token {tokenizer.id_to_token(i)!a:.60}"
            raise ValueError(f"{token} has id {i}, but the model's vocab_size is {vocab_size}")
    return ids


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The checkpoint's tokenizer: tokenizer.json, or vocab.json, merges.txt and added_tokens.json;
    and what tokenizer_config.json alone says of its special tokens.

    Truncation and padding are off: tokenizer.json keeps those of its last call in training.
    Raises CheckpointError, also where it has ids that the model of the folder's config.json lacks,
    other than of added tokens, which are refused when they are used.
    """
    from tokenizers import Tokenizer

    folder = find_folder(path)
    whole, size = folder / "tokenizer.json", read_config(folder).vocab_size
    with naming(whole), panics_caught():
        if is_there(whole) or not is_there(folder / "vocab.json"):
            raw = read_file(whole, bounds.MAX_FILE)
            bounds.check_sections(parse_json(raw, bounds.MAX_FILE))
            tokenizer = Tokenizer.from_buffer(raw)
        else:
            tokenizer = tokenizer_from_parts(folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        last = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        require(last < size, f"has id {last}, but vocab_size is {size} in config.json")
        add_special_tokens(folder, tokenizer)
        tokenizer.decode(tokenizer.encode("a 1").ids)  # some damage shows only in use
    return tokenizer


def tokenizer_from_parts(folder: Path) -> "Tokenizer":
    """Granite's byte-level BPE: single digits, then the GPT-2 split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges, added = (folder / n for n in ("vocab.json", "merges.txt", "added_tokens.json"))
    ids = read_json(vocab)
    with naming(merges), panics_caught():
        lines = read_file(merges, bounds.MAX_FILE).decode().splitlines()
        pairs = [tuple(x.split(" ")) for x in lines if x and not x.startswith("#version")]
        require(all(len(pair) == 2 for pair in pairs), "must have two tokens a line")
        tokenizer = Tokenizer(models.BPE(ids, pairs))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel
    split = [digits, byte_level(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    special = {END: ids[END]} if END in ids else {}
    special |= read_json(added) if is_there(added) else {}
    with naming(added):
        for token, token_id in sorted(special.items(), key=lambda item: str(item[1]).zfill(9)):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            got = tokenizer.token_to_id(token)
            require(got == token_id, f"{token!a:.60}: id {token_id!a:.20} should be {got}")
    return tokenizer


# ---------------------------------------------------------------------- tokenizer_config.json


def tokenizer_config(folder: Path) -> dict:
    """tokenizer_config.json, and special_tokens_map.json where that is as old as it."""
    file, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    data = read_json(file) if is_there(file) else {}
    if is_there(older) and "added_tokens_decoder" not in data:
        data |= read_json(older)
    return data


def special_names(data: dict) -> dict[str, object]:
    """Special tokens by their names, as texts or as objects."""
    names = {name: token for name, token in data.items() if name.endswith("_token")}
    more = data.get("extra_special_tokens")
    names |= more if isinstance(more, dict) else {}
    return {name: token for name, token in names.items() if content_of(token)}


def content_of(token: object) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def chat_ends(path: str | Path, tokenizer: "Tokenizer") -> set[int]:
    """The id of the tokenizer's own end token, which ends a reply too, or nothing."""
    end = special_names(tokenizer_config(find_folder(path))).get("eos_token")
    return {tokenizer.token_to_id(content_of(end))} - {None}


def add_special_tokens(folder: Path, tokenizer: "Tokenizer") -> None:
    """What tokenizer_config.json lists and the tokenizer lacks, in transformers' order. Raises
    CheckpointError where both know a token and give it another id."""
    data = tokenizer_config(folder)
    listed = data.get("added_tokens_decoder") or {}
    more = data.get("extra_special_tokens")
    more = [*NAMED, *(more if isinstance(more, dict) else ())]
    names = {name: token for name, token in special_names(data).items() if name in more}
    lists = [data.get("additional_special_tokens"), data.get("extra_special_tokens")]
    more = [token for each in lists if isinstance(each, list) for token in each]
    with naming(folder / "tokenizer_config.json"), panics_caught():
        require(isinstance(listed, dict), "added_tokens_decoder: must be an object")
        good = all(re.fullmatch("[0-9]{1,9}", i) and content_of(listed[i]) for i in listed)
        require(good, "added_tokens_decoder: must have a token for each id")
        named = {content_of(token) for token in names.values()}
        for i in sorted(listed, key=int):
            token = as_added_token(listed[i], special=content_of(listed[i]) in named)
            tokenizer.add_tokens([token])
            got = tokenizer.token_to_id(token.content)
            require(got == int(i), f"{token.content!a:.60}: id {i} is {got} in the tokenizer")
        for token in [*names.values(), *more]:
            if content_of(token):
                tokenizer.add_special_tokens([as_added_token(token, special=True)])


def as_added_token(token: object, special: bool) -> "AddedToken":
    """From a text, or an object of its content and flags."""
    from tokenizers import AddedToken

    given = token if isinstance(token, dict) else {}
    flags = {flag: given[flag] for flag in FLAGS if flag in given}
    good = all(type(value) is bool for value in flags.values())
    require(good, f"{content_of(token)!a:.60}: {', '.join(FLAGS)} must be true or false")
    special = special or flags.pop("special", False)
    return AddedToken(content_of(token), **{**flags, "special": special})


def decoder(tokenizer: "Tokenizer | None") -> Callable[[list[int]], str]:
    """Ids to text, or to their numbers without a tokenizer. A padded vocabulary has ids without a
    token, which show as U+FFFD."""

    def decode(ids: list[int]) -> str:
        runs = itertools.groupby(ids, lambda i: tokenizer.id_to_token(i) is not None)
        with panics_caught():
            return "".join(
                tokenizer.decode([*run]) if known else "\ufffd" * len([*run]) for known, run in runs
            )

    return decode if tokenizer else lambda ids: "".join(f" {i}" for i in ids)
