"""Messages to ids in a checkpoint's own chat format, whose template is an untrusted program."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from files import template as program
from files.checkpoint import (
    find_folder,
    is_there,
    naming,
    read_config,
    read_file,
    require,
    shown,
)
from files.template import MAX_TEXT
from files.tokenizer import (
    END,
    ROLE_END,
    START,
    content_of,
    known,
    panics_caught,
    special_names,
    tokenizer_config,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SECONDS, MEMORY = 5, 512 * 2**20  # that rendering may take; templates that people use take 1 ms
STARTING = 30  # seconds that the process may take to start, beside its first rendering
Messages = list[tuple[str, str]]  # (role, content)
Chat = Callable[[Messages], list[int]]


def load_chat_template(path: str | Path, tokenizer: "Tokenizer") -> Chat:
    """A function from (role, content) messages to ids, which end where the assistant speaks.

    The format is the folder's own chat template, rendered as transformers does or, where it has
    none, Granite 3.0's. What a message says is text: a control token that it spells is encoded as
    its characters. Control tokens are the special ones, and those that the template's text has.
    Raises CheckpointError, and so does the function, for a template that is damaged, refuses the
    messages, or takes more than 5 s or 512 MB.
    """
    folder = find_folder(path)
    file, template, names = find_template(folder)
    size = read_config(folder).vocab_size
    added = tokenizer.get_added_tokens_decoder().items()
    control = {i for i, token in added if token.special or token.content in (template or "")}
    if template is None:
        control |= {tokenizer.token_to_id(token) for token in (START, ROLE_END, END)}
        good = None not in control
        require(good, f"--chat: neither a chat template nor {START}, so this is no instruct model")
        render = granite
    else:
        render = Renderer(file, template, names).render
    speller = Speller(tokenizer, control)

    def chat(messages: Messages) -> list[int]:
        require(messages, "messages: must be at least one")
        with panics_caught():
            ids = speller.encode(render, messages, template or "")
        require(ids, f"{shown(file)}: chat template: writes nothing")
        return known(tokenizer, ids, size)

    return chat


def granite(messages: Messages, stand_ins: dict[str, str]) -> str:
    """Granite 3.0's format."""
    turns = [f"{START}{role}{ROLE_END}{content}{END}\n" for role, content in messages]
    return "".join(turns) + f"{START}assistant{ROLE_END}"


def find_template(folder: Path) -> tuple[Path, str | None, dict[str, str]]:
    """The file with the chat template, the template if there is one, special tokens by name."""
    file, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    data = tokenizer_config(folder)
    names = {name: content_of(token) for name, token in special_names(data).items()}
    if is_there(own):
        with naming(own):
            return own, read_file(own, MAX_TEXT).decode(), names
    template = data.get("chat_template")
    with naming(file):
        if isinstance(template, list):  # several, of which each has a name
            good = all(isinstance(each, dict) for each in template)
            template = {each.get("name"): each.get("template") for each in template if good}
        if isinstance(template, dict):
            template = template.get("default", template)
        good = template is None or isinstance(template, str)
        require(good, "chat_template: must be a text, or a list with one that is named default")
    return file, template, names


# ---------------------------------------------------------------------------- what a message spells


class Speller:
    """Encodes rendered messages, in which control tokens are the template's alone."""

    def __init__(self, tokenizer: "Tokenizer", control: set[int]) -> None:
        self.tokenizer, self.control = tokenizer, control
        self.plain: dict[bool, Tokenizer] = {}  # made once: see spelling

    def encode(self, render: Callable, messages: Messages, template: str) -> list[int]:
        """The ids of the rendered messages.

        Where a message spells a control token, private characters stand in for those of the token
        while the template is rendered. The control tokens in the result are the template's. They
        cut it into pieces; a piece with stand-ins gets its characters back, and is encoded with
        control tokens off.
        """
        stand_ins: dict[str, str] = {}  # by the character that each stands for
        used = {c for message in messages for text in message for c in text} | {*template}
        free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
        hidden = [tuple(self.hide(text, stand_ins, free) for text in pair) for pair in messages]
        back = {stand_in: character for character, stand_in in stand_ins.items()}
        text = render(hidden, back)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        if not stand_ins:
            return encoded.ids
        require_whole(text, back)
        ids, piece, begin = [], [], 0
        places = [*zip(encoded.ids, encoded.offsets, strict=True), (-1, (None, None))]
        for i, (start, end) in places:
            if i >= 0 and i not in self.control:
                piece.append(i)
                continue
            spelled = text[begin:start].translate(str.maketrans(back))
            same = spelled == text[begin:start]
            ids += piece if same else self.encode_text(spelled, first=begin == 0)
            ids, piece, begin = ids + [i], [], end
        return ids[:-1]

    def hide(self, text: str, stand_ins: dict[str, str], free: object) -> str:
        """The text with stand-ins for what is read as a control token, until nothing is: what is
        hidden may have parted another."""
        while True:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            pairs = zip(found.ids, found.offsets, strict=True)
            places = [(i, *place) for i, place in pairs if i in self.control]
            if not places:
                return text
            characters = [*text]
            for i, start, end in places:
                at = text.find(token := self.tokenizer.id_to_token(i), start, end)
                if at >= 0:  # some tokens take the white space around them along
                    start, end = at, at + len(token)
                for at in range(start, end):
                    if text[at] not in stand_ins.values():
                        characters[at] = stand_ins.get(text[at]) or next(free)
                        stand_ins[text[at]] = characters[at]
            hidden = "".join(characters)
            require(hidden != text, "--chat: control tokens in the message cannot be kept text")
            text = hidden

    def encode_text(self, text: str, first: bool) -> list[int]:
        if first not in self.plain:
            self.plain[first] = spelling(self.tokenizer, self.control, first)
        ids = self.plain[first].encode(text, add_special_tokens=False).ids
        require(self.control.isdisjoint(ids), "--chat: control tokens in the message")
        return ids


def spelling(tokenizer: "Tokenizer", control: set[int], first: bool) -> "Tokenizer":
    """The same tokenizer, to which control tokens are ordinary text; first: as at the beginning of
    a text, where Metaspace may put a space in front."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["special"] or token["id"] in control
    waiting = [data["pre_tokenizer"] or {}]
    while waiting and not first:
        part = waiting.pop()
        waiting += part.get("pretokenizers", [])
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    plain = type(tokenizer).from_str(json.dumps(data))
    plain.encode_special_tokens = True  # that is: as ordinary text
    return plain


def require_whole(text: str, stand_ins: dict[str, str]) -> None:
    """Raises ValueError where a template's own escapes have hidden what a stand-in stands for."""
    for stand_in, character in stand_ins.items():
        number = ord(stand_in)
        spellings = [json.dumps(stand_in)[1:-1], f"{stand_in!a}"[1:-1], quote(stand_in)]
        spellings += [f"&#{number};", f"&#x{number:x};"]
        for spelled in spellings:
            good = spelled.lower() not in text.lower()
            what = f"{character!a}, which a message has within a control token"
            require(good, f"--chat: the template escapes {what}")


# -------------------------------------------------------------------------- an untrusted program


class Renderer:
    """A chat template, and the process that renders it: started when it is needed, and kept. It
    ends with this object, and where it takes too long; then the next call starts another."""

    def __init__(self, file: Path, template: str, names: dict[str, str]) -> None:
        self.file, self.template, self.names = file, template, names
        self.lock = threading.Lock()  # of one pipe there and one back
        self.process, self.owner = None, 0
        self.ask(None, {})  # its syntax

    def render(self, messages: Messages, stand_ins: dict[str, str]) -> str:
        values = {"messages": [{"role": role, "content": content} for role, content in messages]}
        values |= {"tools": None, "documents": None, "add_generation_prompt": True}
        return self.ask(self.names | values, stand_ins)

    def ask(self, values: dict | None, stand_ins: dict[str, str]) -> str:
        """What the template writes. Raises CheckpointError with the reason."""
        request = {"template": self.template, "values": values, "stand_ins": stand_ins}
        line = json.dumps(request).encode() + b"\n"
        with naming(self.file), self.lock:
            said = self.exchange(line)
            require(said, f"chat template: took more than {SECONDS} s or {MEMORY >> 20} MB")
            reply = json.loads(said)
            require("text" in reply, f"chat template: {reply.get('error')}")
            return reply["text"]

    def exchange(self, line: bytes) -> bytes:
        """One line there, one line back, or nothing of a process that has ended."""
        patience = SECONDS + 1  # its own limit counts in whole seconds
        if self.process is None or self.owner != os.getpid():  # a fork shares its parent's pipes
            self.start()
            patience += STARTING
        process, said = self.process, b""
        deadline = threading.Timer(patience, process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            with suppress(OSError):  # it has gone
                process.stdin.write(line)
                process.stdin.flush()
                said = process.stdout.readline(12 * MAX_TEXT + 100)
        finally:
            deadline.cancel()
            if not said.endswith(b"\n"):  # ended, or interrupted: what comes late is not for others
                self.stop()
                self.process, said = None, b""
        return said

    def start(self) -> None:
        found = [find_spec(name) for name in ("jinja2", "markupsafe")]
        if None in found:
            raise ImportError("No module named 'jinja2'")
        folders = [str(Path(spec.origin).parents[1]) for spec in found]
        line = [sys.executable, "-I", program.__file__, str(SECONDS), str(MEMORY), *folders]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        how = {"stderr": subprocess.DEVNULL, "start_new_session": True}  # Ctrl-C is not for it
        self.process, self.owner = subprocess.Popen(line, **pipes, **how), os.getpid()
        self.stop = weakref.finalize(self, end, self.process, self.owner)
        self.stop.atexit = True


def end(process: subprocess.Popen, owner: int) -> None:
    """End the process and wait for it, if it is ours and not that of whom we were forked from."""
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # with what was not written any more
            pipe.close()
