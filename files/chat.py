"""Messages to ids in a checkpoint's own chat format, whose template is an untrusted program."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from files.checkpoint import (
    find_folder,
    naming,
    open_file,
    read_config,
    read_json,
    require,
    shown,
)
from files.tokenizer import END, ROLE_END, START, known, panics_caught

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SECONDS, MEMORY = 5, 512 * 2**20  # that rendering may take; templates that people use take 1 ms
MAX_TEXT = 2**20  # characters of a template, and of what it writes
Messages = list[tuple[str, str]]  # (role, content)
Chat = Callable[[Messages], list[int]]


def load_chat_template(path: str | Path, tokenizer: "Tokenizer") -> Chat:
    """A function from (role, content) messages to ids, which end where the assistant speaks.

    The format is the folder's own chat template, rendered as transformers does or, where it has
    none, Granite 3.0's. What a message says is text: a special token that it spells is encoded as
    its characters. Raises CheckpointError, and so does the function, for a template that is
    damaged, refuses the messages, or takes more than 5 s or 512 MB.
    """
    folder = find_folder(path)
    file, template, names = find_template(folder)
    size = read_config(folder).vocab_size
    control = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if template is None:
        control |= {tokenizer.token_to_id(token) for token in (START, ROLE_END, END)}
        good = None not in control
        require(good, f"--chat: neither a chat template nor {START}, so this is no instruct model")
    else:
        environment = sandbox()
        with naming(file):
            confined(lambda: str(environment.parse(template)))  # its syntax

    def render(messages: Messages) -> str:
        if template is None:
            turns = [f"{START}{role}{ROLE_END}{content}{END}\n" for role, content in messages]
            return "".join(turns) + f"{START}assistant{ROLE_END}"
        values = {"messages": [{"role": role, "content": content} for role, content in messages]}
        values |= {"tools": None, "documents": None, "add_generation_prompt": True}
        with naming(file):
            return confined(lambda: environment.from_string(template).render(names | values))

    def chat(messages: Messages) -> list[int]:
        require(messages, "messages: must be at least one")
        with panics_caught():
            ids = encode_chat(tokenizer, control, render, messages)
        require(ids, f"{shown(file)}: chat template: writes nothing")
        return known(tokenizer, ids, size)

    return chat


def find_template(folder: Path) -> tuple[Path, str | None, dict[str, str]]:
    """The file with the chat template, the template if there is one, special tokens by name."""
    file, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    data = read_json(file) if file.exists() else {}
    older = folder / "special_tokens_map.json"
    if older.exists() and "added_tokens_decoder" not in data:
        data |= read_json(older)
    tokens = {name: token for name, token in data.items() if name.endswith("_token")}
    more = data.get("extra_special_tokens")
    tokens |= more if isinstance(more, dict) else {}
    tokens = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    names = {name: token for name, token in tokens.items() if isinstance(token, str)}
    if own.exists():
        with naming(own), open_file(own) as raw:
            template = raw.read(MAX_TEXT + 1)
            require(len(template) <= MAX_TEXT, f"larger than {MAX_TEXT} bytes")
            return own, template.decode(), names
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


def encode_chat(
    tokenizer: "Tokenizer", control: set[int], render: Callable[[Messages], str], messages: Messages
) -> list[int]:
    """The ids of the rendered messages, in which control tokens are the template's alone.

    Where a message spells one, private characters stand in for those of the token while the
    template is rendered. The control tokens in the result are the template's. They cut it into
    pieces; a piece with stand-ins gets its characters back, and is encoded with control tokens off.
    """
    used = {c for message in messages for text in message for c in text}
    free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
    stand_ins: dict[str, str] = {}

    def hide(text: str) -> str:
        found, characters = tokenizer.encode(text, add_special_tokens=False), [*text]
        pairs = zip(found.ids, found.offsets, strict=True)
        for i, (start, end) in (pair for pair in pairs if pair[0] in control):
            at = text.find(token := tokenizer.id_to_token(i), start, end)
            if at >= 0:  # some tokens take the white space around them along
                start, end = at, at + len(token)
            for at in range(start, end):
                if text[at] not in stand_ins:
                    stand_ins[text[at]] = next(free)
                characters[at] = stand_ins[text[at]]
        return "".join(characters)

    text = render([(hide(role), hide(content)) for role, content in messages])
    encoded = tokenizer.encode(text, add_special_tokens=False)
    if not stand_ins:
        return encoded.ids
    back = str.maketrans({stand_in: character for character, stand_in in stand_ins.items()})
    ids, piece, begin = [], [], 0
    for i, (start, end) in [*zip(encoded.ids, encoded.offsets, strict=True), (-1, (None, None))]:
        if i >= 0 and i not in control:
            piece.append(i)
            continue
        spelled = text[begin:start].translate(back)
        ids += piece if spelled == text[begin:start] else encode_text(tokenizer, control, spelled)
        ids, piece, begin = ids + [i], [], end
    return ids[:-1]


def encode_text(tokenizer: "Tokenizer", control: set[int], text: str) -> list[int]:
    plain = type(tokenizer).from_str(tokenizer.to_str())
    plain.encode_special_tokens = True  # that is: as ordinary text
    ids = plain.encode(text, add_special_tokens=False).ids
    require(control.isdisjoint(ids), "--chat: control tokens in the message")
    return ids


# -------------------------------------------------------------------------- an untrusted program


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter of this name, without jinja2's escapes for HTML."""
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(x, ensure_ascii=ensure_ascii, **how)


def sandbox():  # noqa: ANN201  (jinja2 is imported where there is a template alone)
    """The environment in which transformers renders chat templates."""
    from jinja2 import ext, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError, TemplateError

    class Generation(ext.Extension):
        """{% generation %} marks what the assistant says; here it is the text within."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(utils.Namespace):
        def __setitem__(self, name: str, value: object) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"{name!a:.30} of a namespace is not to be set")
            super().__setitem__(name, value)

    def namespace(*given: object, **values: object) -> Namespace:
        made = Namespace()
        for name, value in dict(*given, **values).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    how = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, ext.loopcontrols]}
    made = sandbox.ImmutableSandboxedEnvironment(**how)
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "namespace": namespace}
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def confined(act: Callable[[], str]) -> str:
    """What act returns, computed in a forked process of bounded time and memory: the sandbox keeps
    a template from reaching out, but not from asking for 'x' * 10**10.

    Raises ValueError with the reason. Windows cannot fork, there the sandbox must do.
    """
    if not hasattr(os, "fork"):
        answer = attempt(act)
    else:
        ours, its = os.pipe()
        if (process := os.fork()) == 0:
            try:
                set_limits()
                with os.fdopen(its, "wb") as pipe:
                    pipe.write(attempt(act))
            finally:
                os._exit(0)
        os.close(its)
        try:
            with os.fdopen(ours, "rb") as pipe:
                answer = pipe.read()
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    finished = answer.endswith(b".")
    require(finished, f"chat template: took more than {SECONDS} s or {MEMORY >> 20} MB")
    require(answer.startswith(b"="), f"chat template: {answer[1:-1].decode()}")
    return answer[1:-1].decode()


def attempt(act: Callable[[], str]) -> bytes:
    """ "=" and what act returns, or "!" and why it does not; then a full stop."""
    try:
        text = act()
        require(len(text) <= MAX_TEXT, f"writes more than {MAX_TEXT} characters")
        return b"=" + text.encode() + b"."
    except MemoryError:
        return b"!takes too much memory."
    except Exception as error:  # jinja2's, and whatever an operation of the template raises
        kind, reason = type(error).__name__, str(error).strip().split("\n")[0]
        return f"!{kind}: {reason!a:.120}.".encode()


def set_limits() -> None:
    import resource  # which Windows lacks

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(SECONDS)
    with suppress(OSError, ValueError):  # where there is no /proc, or the limit is lower already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
