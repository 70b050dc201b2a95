"""A checkpoint's tokenizer."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from files.checkpoint import find_folder, naming, open_file, read_config, read_json, require

if TYPE_CHECKING:  # imported where text is used, so that ids need no tokenizer
    from tokenizers import Tokenizer

START, ROLE_END, END = "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"


@contextmanager
def panics_caught() -> Iterator[None]:
    """tokenizers raises bare Exceptions, and panics beyond them: to ValueError, in one line.

    A panic prints a page before it can be caught: meanwhile, standard error leads nowhere.
    """
    hide = sys.stderr is not None
    if hide:
        kept, (unread, nowhere) = os.dup(2), os.pipe()
        if hasattr(os, "set_blocking"):  # not in Python 3.11 on Windows; a page fits in a pipe
            os.set_blocking(nowhere, False)
        os.dup2(nowhere, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError, ValueError):
        raise
    except BaseException as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"not a usable tokenizer: {reason!a:.80}") from None
    finally:
        if hide:
            os.dup2(kept, 2)
            for descriptor in (kept, unread, nowhere):
                os.close(descriptor)


def encode(tokenizer: "Tokenizer", text: str, vocab_size: int) -> list[int]:
    """A text's ids; special tokens that are spelled out in it count as such.

    Raises ValueError for a token that the model has no embedding for.
    """
    with panics_caught():
        return known(tokenizer, tokenizer.encode(text).ids, vocab_size)


def known(tokenizer: "Tokenizer", ids: list[int], vocab_size: int) -> list[int]:
    """The ids. Raises ValueError if one is beyond the model: of a token that was added later."""
    for i in ids:
        if i >= vocab_size:
            token = f"the token {tokenizer.id_to_token(i)!a:.60}"
            raise ValueError(f"{token} has id {i}, but the model's vocab_size is {vocab_size}")
    return ids


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The checkpoint's tokenizer: tokenizer.json, or vocab.json, merges.txt and added_tokens.json.

    Truncation and padding are off: tokenizer.json keeps those of its last call in training.
    Raises CheckpointError, also where it has ids that the model of the folder's config.json lacks,
    other than of added tokens, which are refused when they are used.
    """
    from tokenizers import Tokenizer

    folder = find_folder(path)
    whole, size = folder / "tokenizer.json", read_config(folder).vocab_size
    with naming(whole), panics_caught():
        if whole.exists() or not (folder / "vocab.json").exists():
            open_file(whole).close()
            tokenizer = Tokenizer.from_file(str(whole))
        else:
            tokenizer = tokenizer_from_parts(folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a 1")  # some damage shows only in use
        last = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        require(last < size, f"has id {last}, but vocab_size is {size} in config.json")
    return tokenizer


def tokenizer_from_parts(folder: Path) -> "Tokenizer":
    """Granite's byte-level BPE: single digits, then the GPT-2 split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges, added = (folder / n for n in ("vocab.json", "merges.txt", "added_tokens.json"))
    ids = read_json(vocab)
    with naming(merges):
        open_file(merges).close()
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel
    split = [digits, byte_level(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    special = {END: ids[END]} if END in ids else {}
    special |= read_json(added) if added.exists() else {}
    with naming(added):
        for token, token_id in sorted(special.items(), key=lambda item: str(item[1]).zfill(9)):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            got = tokenizer.token_to_id(token)
            require(got == token_id, f"{token!a:.60}: id {token_id!a:.20} should be {got}")
    return tokenizer


def decoder(tokenizer: "Tokenizer | None") -> Callable[[list[int]], str]:
    """Ids to text, or to their numbers without a tokenizer. A padded vocabulary has ids without a
    token, which show as U+FFFD."""

    def decode(ids: list[int]) -> str:
        runs = itertools.groupby(ids, lambda i: tokenizer.id_to_token(i) is not None)
        texts = (
            tokenizer.decode([*run]) if known else "\ufffd" * len([*run]) for known, run in runs
        )
        return "".join(texts)

    return decode if tokenizer else lambda ids: "".join(f" {i}" for i in ids)
