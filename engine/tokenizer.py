"""A checkpoint's tokenizer, and Granite's chat format."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint import find_folder, naming, open_file, read_config, read_json, require

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


def encode(tokenizer: "Tokenizer", text: str) -> list[int]:
    """A text's ids; special tokens that are spelled out in it count as such."""
    with panics_caught():
        return tokenizer.encode(text).ids


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The checkpoint's tokenizer: tokenizer.json, or vocab.json, merges.txt and added_tokens.json.

    Raises CheckpointError, also where it has ids that the model of the folder's config.json lacks.
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
        tokenizer.encode("a 1")  # some damage shows only in use
        last = max(tokenizer.get_vocab().values(), default=0)
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


def chat_ids(tokenizer: "Tokenizer", messages: list[tuple[str, str]]) -> list[int]:
    """Granite's chat format for (role, content) messages, ending where the assistant speaks.

    Contents are text: a control token that somebody types is encoded as its characters.
    """
    start, role_end, end = (tokenizer.token_to_id(name) for name in (START, ROLE_END, END))
    known = None not in (start, role_end, end)
    require(known, f"--chat: the tokenizer has no {START}, so this is no instruct model")

    def plain(text: str) -> list[int]:
        tokenizer.encode_special_tokens = True  # that is: as ordinary text
        try:
            with panics_caught():
                ids = tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            tokenizer.encode_special_tokens = False
        require(not {start, role_end, end} & {*ids}, "--chat: control tokens in the message")
        return ids

    ids = []
    for role, content in messages:
        ids += [start, *plain(role), role_end, *plain(content), end, *plain("\n")]
    return [*ids, start, *plain("assistant"), role_end]


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
