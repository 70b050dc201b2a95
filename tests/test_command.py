"""The command: what it prints, how it ends, and what cannot break it.

In a process of its own where that is what is tested (flags, locales, signals, pipes, imports), else
in this one, which has PyTorch already. Most cases let a scripted model speak, whose text is known
to the byte: SAID after PROMPT.
"""

import contextlib
import http.server
import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import conftest
import fuzz
import pytest
from conftest import (
    CONFIG,
    HEAD,
    PROMPT,
    ROOT,
    TESTS,
    WEIGHTS,
    checkpoint,
    command,
    forked,
    needs_compiler,
    on_linux,
    on_posix,
    problem,
    representing,
    scripted,
    sparse,
    thorough,
    tokenizer,
    write_files,
)  # fmt: skip
from safetensors.torch import load, save

import generate
from files import terminal
from generate import load_chat_template, load_tokenizer

SAID = "\x1b\x9b\tgrün😀\x07\n\ufffdZ"  # also an id without a token
PLAIN = "\tgrün😀\n\ufffdZ"  # the same without what a terminal might obey
NO_TOKEN = 299


def script_ids() -> list[int]:
    tok = tokenizer()
    before, after = SAID.split("\ufffd")
    return [*tok.encode(PROMPT).ids[-1:], *tok.encode(before).ids, NO_TOKEN, *tok.encode(after).ids]


@pytest.fixture(scope="session")
def speaker(tmp_path_factory) -> Path:
    """A model that says SAID after PROMPT, and then its end."""
    return write_files(tmp_path_factory.mktemp("speaker"), scripted(script_ids()))


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A model that does not stop by itself for a long time."""
    config = {**CONFIG, "max_position_embeddings": 10**6, "eos_token_id": None}
    files = {**checkpoint(), "config.json": json.dumps(config).encode()}
    return write_files(tmp_path_factory.mktemp("talker"), files)


def start(*args, flags=(), **options) -> subprocess.Popen:
    """The command in a process of its own, with pipes where nothing else is said."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    pipes["env"] = {**os.environ, **options.get("env", {})}
    line = [sys.executable, *flags, str(ROOT / "generate.py"), *map(os.fspath, args)]
    return subprocess.Popen(line, **pipes)


def started(*args, given: bytes = b"", **options) -> tuple[int, str, str]:
    """Its status, output and errors, without the lines of statistics."""
    with start(*args, **options) as process:
        out, err = process.communicate(given, timeout=120)
    return process.returncode, (out or b"").decode(), told(err or b"")


def told(err: bytes) -> str:
    lines = err.decode().splitlines(keepends=True)
    return "".join(line for line in lines if line[0] != "[")


def run(*args, given: bytes | None = b"", stdout: io.TextIOBase | None = None):
    """The same of the command in this process; without `given`, standard input is closed."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    kept = os.dup(1)  # after an error nothing more is written there
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        file.write(given or b"")
        file.seek(0)
        patch.setattr(sys, "argv", ["generate.py", *map(os.fspath, args)])
        patch.setattr(sys, "stdin", None if given is None else io.TextIOWrapper(file))
        patch.setattr(sys, "stdout", stdout or out)
        patch.setattr(sys, "stderr", err)
        try:
            status = generate.main()
        except SystemExit as end:
            status = end.code
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        err.flush()
        out.flush()
    return status, out.buffer.getvalue().decode(), told(err.buffer.getvalue())


def assert_error(err: str, *words: str) -> None:
    assert err.startswith("generate.py: error: ") and err.count("\n") == 1 and len(err) <= 201, err
    assert all(word in err for word in words), err


# ----------------------------------------------------------------------------------- what it prints

GOOD = {  # how it is run: Python's flags, environment
    "a pipe": ((), {}),
    "without asserts": (("-O",), {}),
    "warnings are errors": (("-W", "error"), {}),
    "no UTF-8 mode, no home": (("-X", "utf8=0"), {"HOME": "/no/such", "PYTHONHASHSEED": "7"}),
}
GOOD["all of it"] = (("-O", "-W", "error", "-X", "utf8=0"), GOOD["no UTF-8 mode, no home"][1])


@on_posix
@pytest.mark.parametrize("how", representing(GOOD, "all of it"))
def test_text(how, speaker, tmp_path):
    """Bytes as the model means them, and nothing written beside them."""
    flags, env = GOOD[how]
    tmp_path.chmod(0o555)
    args = ("--model", speaker, PROMPT)
    assert started(*args, flags=flags, env=env, cwd=tmp_path) == (0, PROMPT + SAID + "\n", "")
    assert not any(tmp_path.iterdir())


LOCALES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@on_posix
@pytest.mark.parametrize("name", representing(LOCALES, "C"))
def test_locale_that_lacks_characters(name, speaker):
    """Escaped where they cannot be written; nothing is lost after them."""
    env = LOCALES[name]
    status, out, err = started("--model", speaker, "-", given=PROMPT.encode(), env=env)
    assert (status, err) == (0, "") and out.endswith("Z\n")
    assert out == (PROMPT + SAID + "\n").encode("ascii", "backslashreplace").decode()


def test_terminal(speaker):
    """A terminal must not obey a model: its control characters are left out there."""
    pty = pytest.importorskip("pty", reason="needs a terminal of this kind", exc_type=ImportError)
    expected = (PROMPT + PLAIN + "\n").replace("\n", "\r\n").encode()
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as terminal:
        assert run("--model", speaker, PROMPT, stdout=terminal)[0] == 0
        out = b""
        while len(out) < len(expected) and select.select([master], [], [], 10)[0]:
            out += os.read(master, 4096)  # one write may arrive in parts
        assert not select.select([master], [], [], 0.1)[0]  # and nothing after it
    os.close(master)
    assert out == expected


def test_same_seed_same_text(talker):
    args = ("--model", talker, "--temperature", "1.5", "--seed", "5", "--max-new-tokens", "30", "a")
    first = run(*args)
    assert first == run(*args) and first[0] == 0 and len(first[1]) > 20


@pytest.mark.parametrize("prompts", (("5", "64", "8"), ("8", "64", "5"), ("64", "5", "8")))
def test_several_prompts_are_shown_in_their_order(prompts, tmp_path):
    """Whichever ends first: what comes later waits for those before it, and nothing is lost."""
    chain = [5, 9, 64, 7, 40, 8, 31]
    folder = write_files(tmp_path / "model", scripted(chain))
    status, out, err = run("--model", folder, "--raw-ids", *prompts)
    texts = [" ".join(map(str, chain[chain.index(int(prompt)) :])) for prompt in prompts]
    assert (status, out, err) == (0, "\n\n".join(texts) + "\n", "")


def test_each_turn_of_a_conversation_has_its_seed(folder, monkeypatch, capsys):
    """Else each would draw the same numbers; without one they are random."""
    seeds, plain = [], generate.generate
    monkeypatch.setattr(
        generate, "generate", lambda *a, **k: seeds.append(k["seed"]) or plain(*a, **k)
    )
    args = ["--chat", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "1"]
    for seed in ([], ["--seed", "41"], ["--seed", str(2**63 - 1)]):
        monkeypatch.setattr(sys, "argv", ["generate.py", *args, *seed])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
        assert generate.main() == 0
    assert seeds == [None, None, 41, 42, 2**63 - 1, 0]
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "template",
    (
        None,
        b"""{% for m in messages %}{{ m.role + ':' + (
    m.content if loop.last else m.content | upper) + '<|end_of_text|>' }}{% endfor %}>""",
    ),
)
@pytest.mark.parametrize("options", (
    [], ["--system", "be brief"], ["--system", ""], ["--stop", "e"]), ids=str)  # fmt: skip
def test_a_conversation_is_one_long_prompt(template, options, folder, monkeypatch, capsys):
    """At each turn, what is held and what is read are the messages so far, and no token more is
    read than has to be: a template may rewrite what was said, and then that is read again."""
    if template:
        (folder / "chat_template.jinja").write_bytes(template)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 999}))
    chat, turns, plain = load_chat_template(folder, load_tokenizer(folder)), [], generate.generate

    def spy(model, prompts, *args, cache=None, **how):
        turns.append([cache.ids[0, : cache.length].tolist(), prompts[0], []])
        for ids in plain(model, prompts, *args, cache=cache, **how):
            turns[-1][2].extend(ids)
            yield ids

    monkeypatch.setattr(generate, "generate", spy)
    args = ["--chat", "--model", str(folder), "--max-new-tokens", "3", *options]
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    said = ["a b", "the theory", "<|end_of_text|>"]
    given = io.BytesIO(b"\xef\xbb\xbf" + "".join(line + "\r\n" for line in said).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    assert generate.main() == 0 and len(turns) == 3
    replies, whole, before = capsys.readouterr().out.split("\n"), [], 0
    messages = [("system", options[1])] if "--system" in options else []
    for (held, read, made), message, reply in zip(turns, said, replies, strict=False):
        messages.append(("user", message))
        assert held + read == chat(messages) and held == os.path.commonprefix(
            [held + read[:-1], whole]
        )
        assert not whole or (len(held) >= before) == (template is None)
        messages.append(("assistant", reply))
        whole, before = held + read + made[:-1], len(held + read)


def test_pipe(speaker):
    """What is piped in where no prompt is given is the prompt; nothing is none."""
    for given in (PROMPT.encode(), b"\xef\xbb\xbf" + PROMPT.encode()):
        assert run("--model", speaker, given=given) == (0, PROMPT + SAID + "\n", "")
        assert run("--model", speaker, "-", given=given) == (0, PROMPT + SAID + "\n", "")
    for given in (b"", b"\xef\xbb\xbf"):
        status, out, err = run("--model", speaker, "--max-new-tokens", "0", given=given)
        assert (status, out, err) == (0, terminal.PROMPT + "\n", "")
    ids = run("--model", speaker, "--max-new-tokens", "0", "--raw-ids", given=b"5, 6\n7")
    assert ids == (0, "5 6 7\n", "")
    status, out, err = run("--model", speaker, given=b"\xff")
    assert (status, out) == (2, "")
    assert_error(err, "PROMPT", "UTF-8")


def test_pipe_without_arguments():
    status, out, _ = run(given=b"def f(x):")
    assert status == 0 and out == run("def f(x):")[1]


@on_posix
def test_a_real_pipe(speaker):
    assert started("--model", speaker, given=PROMPT.encode())[:2] == (0, PROMPT + SAID + "\n")


@on_posix
def test_pipe_that_waits(speaker):
    """Says so, once nothing has come for a second."""
    with start("--model", speaker) as process:
        assert process.stderr.readline() == b"[waiting for a prompt from standard input]\n"
        out, _ = process.communicate(PROMPT.encode(), timeout=60)
    assert (process.returncode, out.decode()) == (0, PROMPT + SAID + "\n")


FORMS = {
    "auto": ([], "attention: sdpa, experts: loop;"),
    "bfloat16": (["--dtype", "bfloat16"], "cpu, bfloat16, attention: sdpa, experts: loop;"),
    "asked for": (
        ["--attention", "eager", "--experts", "grouped"],
        "attention: eager, experts: grouped;",
    ),
    "batched": (["--experts", "batched"], "experts: batched;"),
    "compiled": (["--compile"], "compiled: C;"),
}
COMPILED = pytest.param("compiled", marks=needs_compiler)


@pytest.mark.parametrize("name", [*[*FORMS][:-1], COMPILED])
def test_the_bracket_line_names_the_forms(name, folder, monkeypatch, capsys):
    options, words = FORMS[name]
    args = ["--model", str(folder), "--max-new-tokens", "1", *options, PROMPT]
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    assert generate.main() == 0
    assert words in capsys.readouterr().err


def test_without_arguments_it_shows_what_it_can_do(monkeypatch, capsys):
    """A sampled text that does not repeat itself; typed as the line in brackets says, the same."""
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    monkeypatch.setattr(sys, "stdin", None)
    assert generate.main() == 0
    out, err = capsys.readouterr()
    typed = re.search(r"^\[python generate.py (.*)\]$", err, re.MULTILINE)[1]
    assert run(*shlex.split(typed)) == (0, out, "")
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert len(out.splitlines()) <= 25 and len(lines) > 6 and len(set(lines)) == len(lines)


# ------------------------------------------------------------------------------- how it is stopped


@on_posix
def test_closed_pipe(talker):
    """As in `python generate.py | head -c 5`: silent."""
    with start("--model", talker, "--max-new-tokens", "100000", PROMPT) as process:
        assert process.stdout.read(5) == PROMPT[:5].encode()
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141 and "error" not in err and "Traceback" not in err


SIGNALS = {
    "SIGINT": (signal.SIGINT, 130, ()),
    "SIGTERM": (signal.SIGTERM, -signal.SIGTERM, ()),
    "SIGINT, compiled": (signal.SIGINT, 130, ("--compile",)),
    "SIGTERM, compiled": (signal.SIGTERM, -signal.SIGTERM, ("--compile",)),
}


@on_posix
@needs_compiler
@pytest.mark.parametrize("name", representing(SIGNALS, "SIGINT", "SIGTERM, compiled"))
def test_signal_while_streaming(name, talker):
    sent, status, how = SIGNALS[name]
    line = ("--model", talker, "--max-new-tokens", "900000", "--raw-ids", "5 6", *how)
    with start(*line) as process:
        text = process.stdout.read(30)
        process.send_signal(sent)
        text += process.stdout.read()
        err = process.stderr.read().decode()
    assert process.returncode == status and "Traceback" not in err and "error" not in err
    assert text.startswith(b"5 6 ") and len(text) >= 30 and bool(how) == ("compiled" in err)


@on_linux
def test_interrupt_while_loading(tmp_path):
    """The weights are a gigabyte of holes, so that loading lasts until the signal arrives."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
    folder = sparse(tmp_path / "huge", **sizes, num_local_experts=16)
    with start("--model", folder, "--raw-ids", "1") as process:
        fds, name = Path(f"/proc/{process.pid}/fd"), WEIGHTS
        while process.poll() is None and not any(name in read_link(fd) for fd in fds.iterdir()):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def read_link(path: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def shim(folder: Path, **modules: str) -> dict[str, str]:
    """An environment in which other modules come before the installed ones."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return {"PYTHONPATH": str(folder)}


@on_posix
def test_interrupt_while_importing(tmp_path):
    env = shim(tmp_path, torch="import os, time; os.write(1, b'here'); time.sleep(60)")
    with start("x", env=env) as process:
        assert process.stdout.read(4) == b"here"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


@pytest.mark.parametrize("missing", ("torch", "safetensors"))
def test_missing_library(missing, speaker, tmp_path):
    """At the start, which is a process's."""
    env = shim(tmp_path, **{missing: f"raise ImportError('no {missing}')"})
    status, out, err = started("--model", speaker, PROMPT, env=env)
    assert (status, out) == (1, "")
    assert_error(err, f"no {missing}", "pip install -r requirements.txt")


@pytest.mark.parametrize("missing, options", (("tokenizers", ()), ("jinja2", ("--chat",))))
def test_missing_library_that_only_some_need(missing, options, folder, monkeypatch):
    """Named where it is needed, and not missed elsewhere."""
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.setitem(sys.modules, missing, None)
    elsewhere = {"tokenizers": ("--raw-ids", "5"), "jinja2": ("hi",)}[missing]
    args = ("--model", folder, "--max-new-tokens", "0")
    assert run(*args, *elsewhere)[::2] == (0, "")
    status, out, err = run(*args, *options, "hi")
    assert (status, out) == (1, "")
    assert_error(err, missing, "pip install -r requirements.txt")


def closing(*fds: int) -> dict:
    return {"preexec_fn": lambda: [os.close(fd) for fd in fds], **{
        ("stdin", "stdout", "stderr")[fd]: None for fd in fds}}  # fmt: skip


@on_posix
def test_closed_output(speaker):
    status, _, err = started("--model", speaker, PROMPT, **closing(1))
    assert status == 1
    assert_error(err, "standard output", "closed")


@on_linux
def test_full_output(speaker):
    with open("/dev/full", "w") as full:
        status, _, err = run("--model", speaker, PROMPT, stdout=full)
        assert status == 1
        assert_error(err, "standard output", "No space left")
        with contextlib.suppress(OSError):  # what it could not write
            full.close()


@on_posix
def test_closed_errors(speaker, tmp_path):
    assert started("--model", speaker, PROMPT, **closing(2))[:2] == (0, PROMPT + SAID + "\n")


def test_errors_without_a_place(tmp_path, monkeypatch):
    """As where they are closed: the exit status alone tells."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(tmp_path), PROMPT])
    monkeypatch.setattr(sys, "stderr", None)
    assert generate.main() == 1


@on_posix
def test_closed_input(speaker):
    status, out, err = started("--model", speaker, "-", **closing(0))
    assert (status, out) == (2, "")
    assert_error(err, "PROMPT", "standard input")


def test_input_that_is_not_there(speaker):
    """As where it is closed."""
    for args in (("-",), ("--chat",)):
        status, out, err = run("--model", speaker, *args, given=None)
        assert (status, out) == (2, "")
        assert_error(err, "PROMPT", "standard input")
    assert run("--model", speaker, "--max-new-tokens", "0", given=None)[0] == 0


@on_linux
def test_full_errors(speaker):
    """What is said there must not cost the text, nor change the exit status."""
    with open("/dev/full", "w") as full:
        assert started("--model", speaker, PROMPT, stderr=full)[:2] == (0, PROMPT + SAID + "\n")


@on_posix
@pytest.mark.parametrize("flag", ("-I", "-P"))
def test_python_that_leaves_out_the_scripts_folder(flag, speaker, tmp_path):
    done = started("--model", speaker, PROMPT, flags=(flag,), cwd=tmp_path)
    assert done == (0, PROMPT + SAID + "\n", "")


@pytest.mark.parametrize("module", ("generate", "score"))
def test_streams_that_are_no_files(module, speaker, tmp_path):
    """As in a notebook: texts, without bytes or a descriptor; Ctrl-C is the notebook's still."""
    (tmp_path / "text").write_text("the theory")
    args = {"generate": ["--max-new-tokens", "2"], "score": [str(tmp_path / "text")]}
    line = [f"{module}.py", "--model", str(speaker), *args.get(module, [])]
    path = ROOT / ("lessons" if module != "generate" else "") / line[0]
    code = f"""
import io, runpy, signal, sys
sys.path.insert(0, {str(path.parent)!r})
sys.argv, real = {line!r}, sys.stdout
sys.stdin, sys.stdout, sys.stderr = io.StringIO("the theory"), io.StringIO(), io.StringIO()
status = 0
try:
    runpy.run_path({str(path)!r}, run_name="__main__")
except SystemExit as end:
    status = end.code
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
real.write(f"{{status or 0}} {{len(sys.stdout.getvalue()) > 5}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0 True", done.stderr


@pytest.mark.parametrize("prompt", (" ", "\n\n", "\t"))
def test_white_space_is_a_prompt(prompt, speaker):
    for given, args in ((b"", (prompt,)), (prompt.encode(), ("-",)), (prompt.encode(), ())):
        done = run("--model", speaker, "--max-new-tokens", "0", *args, given=given)
        assert done == (0, prompt + "\n", "")


def test_only_what_has_no_tokens_is_empty(folder):
    data = json.loads((folder / "tokenizer.json").read_bytes())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    (folder / "tokenizer.json").write_text(json.dumps(data | {"normalizer": strip}))
    for given, args in ((b"", (" ",)), (b" ", ("-",)), (b" ", ())):
        with pytest.MonkeyPatch.context():
            status, out, err = run("--model", folder, *args, given=given)
        assert (status, out) == (2, "")
        assert_error(err, "PROMPT", "empty")


ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"  # a template


def replies(folder: Path, *args: str, given: bytes = b"") -> tuple[str, str]:
    (folder / "chat_template.jinja").write_text(ECHO)
    with start("--model", folder, "--chat", *args) as process:
        out, err = process.communicate(given, timeout=120)
    return out.decode(), err.decode()


@on_posix
def test_a_reply_that_is_cut_says_so(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": None}))
    assert (
        "cut at 3 tokens; for more: --max-new-tokens 6]"
        in replies(folder, "--max-new-tokens", "3", "ab")[1]
    )
    out, err = replies(folder, given=b"ab\n")  # in a conversation, what is left of it
    assert "62 new" in err and "full" in err and "cut at" not in err


@on_posix
def test_the_tokenizers_own_end_ends_a_reply(tmp_path):
    """Which tokenizer_config.json names, and config.json does not."""
    folder = write_files(tmp_path / "m", scripted(script_ids(), eos_token_id=None))
    whole = replies(folder, "--max-new-tokens", "6", PROMPT)[0]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "g"}))
    cut, err = replies(folder, "--max-new-tokens", "6", PROMPT)
    assert whole.startswith(cut.rstrip("\n")) and len(cut) < len(whole) and "cut" not in err


@on_posix
def test_ctrl_c_ends_a_reply_and_not_the_conversation(tmp_path):
    """What was said is kept; at the prompt it ends the command."""
    pty = pytest.importorskip("pty", reason="needs a terminal of this kind", exc_type=ImportError)
    config = {**CONFIG, "max_position_embeddings": 16000, "eos_token_id": None}
    files = {**checkpoint(), "config.json": json.dumps(config).encode()}
    folder = write_files(tmp_path / "m", files)
    (folder / "chat_template.jinja").write_text(ECHO)
    master, slave = pty.openpty()
    with start("--model", folder, "--chat", stdin=slave, stderr=slave) as process:
        os.write(master, b"ab\n")
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        text = b""
        while not text.rstrip().endswith(b">") or text.count(b">") < 2:
            assert select.select([master], [], [], 60)[0]
            text += os.read(master, 4096)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    os.close(master)
    os.close(slave)
    assert process.returncode == 130


def test_a_loop_of_ones_own_prints_whole_characters(speaker, capsys):
    """As the README has it."""
    model, tok = generate.load_model(speaker), load_tokenizer(speaker)
    ids = tok.encode(PROMPT).ids
    text, shown = generate.TextStream(tok.decode, prompt=ids), []
    for (token,) in generate.generate(model, [ids], 20, eos_token_ids=()):
        shown.append(text.push(token))
    assert "😀" in shown and "ü" in shown and "".join(shown).startswith(SAID.split("\ufffd")[0])


# ------------------------------------------------------------------------------------------ faults


def test_bad_folder(tmp_path):
    """The message of the library, its odd name escaped; each kind is in test_checkpoint.py."""
    folder = write_files(tmp_path / "\x1b[2J", {**checkpoint(), "config.json": b"{}"})
    status, out, err = run("--model", folder, PROMPT)
    assert (status, out) == (1, "")
    assert_error(err, "config.json", "model_type", r"\x1b[2J")


def test_tokenizer_that_fails_at_the_prompt(folder):
    """A panic of the library is no Exception; this one shows after a load that went well."""
    data = json.loads((folder / "tokenizer.json").read_bytes())
    regex = {"type": "Replace", "pattern": {"Regex": "(a+)+c"}, "content": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(data | {"normalizer": regex}))
    status, out, err = run("--model", folder, "a" * 100)
    assert (status, out) == (1, "")
    assert_error(err, "tokenizer")


def test_logits_that_are_not_finite(tmp_path):
    """Stops, says at which step, and what was said before stays."""
    files = scripted(ids := [*script_ids()[:1], 40, 41, 42])
    state = load(files[WEIGHTS])
    state[HEAD][7, 2] = 3e38  # after 41, the logit of 7 overflows
    folder = write_files(tmp_path / "model", {**files, WEIGHTS: save(state)})
    status, out, err = run("--model", folder, "--raw-ids", f"5 {ids[0]}")
    assert (status, out.split()) == (1, ["5", *map(str, ids[:3])])
    assert_error(err, "logits", "finite", "step 2")


def test_context_is_full(speaker, monkeypatch, capsys):
    """It stops there and says so; a longer prompt is refused."""
    context = CONFIG["max_position_embeddings"]
    args = ("--model", speaker, "--max-new-tokens", str(10**12), "--raw-ids")
    ids = " ".join(["5"] * (context - 2)) + f" {script_ids()[0]}"
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args), ids])
    assert generate.main() == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == context and f"the context of {context} tokens is full" in err


def test_out_of_memory(talker):
    """Four gigabytes are not enough for the cache of this prompt and answer."""
    config = {"max_position_embeddings": 2**31, "num_hidden_layers": 2}
    edit = json.loads((talker / "config.json").read_text()) | config
    (talker / "config.json").write_text(json.dumps(edit))
    line = ("--model", str(talker), "--raw-ids", "5", "--max-new-tokens", str(2**30))
    ended = forked(command(*line), memory=4 << 30)
    assert problem(ended, 1) == "" and ended.out == "" and "out of memory" in ended.err


@pytest.mark.parametrize("part", ("rss", "bytes_read"))
def test_a_forked_case_ends_whatever_happens(part, monkeypatch):
    """Also in its bookkeeping: else it would go on as a second pytest."""
    monkeypatch.setattr(conftest, part, None)
    ended = forked(lambda: 0)
    assert ended.status == 70 and "TypeError: 'NoneType' object is not callable" in ended.err
    monkeypatch.undo()
    assert forked(lambda: sys.exit("a text"))[:2] == (70, "")
    assert forked(lambda: sys.exit())[:3] == (0, "", "")


# ------------------------------------------------------------------------------------------- usage

MODEL = ["--model", "@"]  # stands for the scripted model
USAGE = {  # what is wrong: the arguments, words of the error
    "unknown flag": (["--bogus"], "--bogus"),
    "no value": (["--seed"], "--seed expected"),
    "temperature -1": (["--temperature", "-1"], "temperature"),
    "temperature nan": (["--temperature", "nan"], "temperature nan"),
    "temperature inf": (["--temperature", "inf"], "temperature inf"),
    "temperature 1e-45": (["--temperature", "1e-45"], "temperature"),
    "temperature abc": (["--temperature", "abc"], "temperature abc"),
    "top_p 0": (["--top-p", "0"], "top_p"),
    "top_p 1.5": (["--top-p", "1.5"], "top_p 1.5"),
    "top_p nan": (["--top-p", "nan"], "top_p"),
    "top_k -1": (["--top-k", "-1"], "top_k"),
    "top_k 1.5": (["--top-k", "1.5"], "--top-k 1.5"),
    "min_p 2": (["--min-p", "2"], "min_p"),
    "penalty 0": (["--repetition-penalty", "0"], "repetition_penalty"),
    "tokens -1": (["--max-new-tokens", "-1"], "max_new_tokens"),
    "tokens 2.5": (["--max-new-tokens", "2.5"], "--max-new-tokens"),
    "seed -1": (["--seed", "-1"], "seed"),
    "seed 2^64": (["--seed", str(2**64)], "seed"),
    "device bogus": (["--device", "bogus"], "device bogus cpu"),
    "device cuda:99": (["--device", "cuda:99"], "device cuda:99"),
    "dtype int8": (["--dtype", "int8"], "--dtype int8"),
    "empty stop": (["--stop", ""], "--stop"),
    "system without chat": (["--system", "x", "y"], "--system --chat"),
    "system not UTF-8": (["--chat", "--system", "a\udcff", "b"], "--system UTF-8"),
    "chat with two": (["--chat", "a", "b"], "--chat"),
    "chat with ids": (["--chat", "--raw-ids", "5"], "--chat --raw-ids"),
    "ids -1": (["--raw-ids", "5 -1"], "--raw-ids"),
    "ids x": (["--raw-ids", "5 x"], "--raw-ids"),
    "ids 10^30": (["--raw-ids", str(10**30)], "--raw-ids"),
    "compile a loop": (["--compile", "--experts", "loop"], "--compile --experts batched"),
    "compile eager": (["--compile", "--attention", "eager"], "--compile --attention auto"),
    "empty prompt": ([""], "PROMPT empty"),
    "no ids": (["--raw-ids", " \n"], "PROMPT empty"),
    "surrogate": (["a\udcff"], "PROMPT UTF-8"),
    "long and odd": (["--bogus\x1b[2J\n" + "x" * 500], "--bogus"),
}
INPUTS = {"empty": (b"", "empty"), "not UTF-8": (b"a\xff", "UTF-8")}


def assert_usage(monkeypatch, capsys, args: list[str], words: str, given: bytes = b"") -> None:
    """Refused with status 2 before the model is looked for: there is none at that path."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", "/no/such", *args])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(SystemExit) as ended:
        generate.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.rstrip("\n").isprintable()
    assert_error(err, *words.split())


@pytest.mark.parametrize("name", USAGE)
def test_usage(name, monkeypatch, capsys):
    assert_usage(monkeypatch, capsys, *USAGE[name])


@pytest.mark.parametrize("name", INPUTS)
def test_bad_standard_input(name, monkeypatch, capsys):
    given, words = INPUTS[name]
    assert_usage(monkeypatch, capsys, ["-"], f"PROMPT {words}", given)


def test_usage_of_a_real_process():
    status, out, err = started("--top-p", "nan", "x", stdin=subprocess.DEVNULL)
    assert (status, out) == (2, "")
    assert_error(err, "top_p", "nan")


# ------------------------------------------------------------------------------------- the hub's id


class Hub(http.server.BaseHTTPRequestHandler):
    """A small part of the hub: one model, whose files include some that nobody should ask for."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(path := self.path.partition("?")[0])
        commit, body, headers = "0" * 40, None, {}
        if path == "/api/models/owner/model/revision/main":
            body = json.dumps({"id": "owner/model", "sha": commit}).encode()
        elif path == f"/api/models/owner/model/tree/{commit}":
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()
            ]
            body = json.dumps(entries).encode()
        elif (name := path.rpartition("/resolve/" + commit + "/")[2]) in self.files:
            body, headers = self.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": commit}
        self.send_response(404 if body is None else 200)
        for key, text in {**headers, "Content-Length": str(len(body or b""))}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        """Silence."""


@on_posix
def test_hub_id(speaker, tmp_path, monkeypatch):
    """Downloaded with the hub's own client, but only what is data; an unknown id is one line."""
    wanted = {path.name: path.read_bytes() for path in speaker.iterdir()}
    wanted |= {"merges.txt": b"", "chat_template.jinja": b"{{ 1 }}"}
    unwanted = dict.fromkeys(("pytorch_model.bin", "code.py", "README.md", "a.pt", "x.h5"), b"x")
    monkeypatch.setattr(Hub, "files", {**wanted, **unwanted})
    monkeypatch.setattr(Hub, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    env |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        status, out, _ = started("--model", "owner/model", PROMPT, env=env, cwd=tmp_path)
        assert (status, out) == (0, PROMPT + SAID + "\n")
        files = [path for path in Hub.asked if not path.startswith("/api/models/owner/model/")]
        assert {*files} == {f"/owner/model/resolve/{'0' * 40}/{name}" for name in wanted}
        status, out, err = started("--model", "owner/other", PROMPT, env=env, cwd=tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert (status, out) == (1, "")
    assert_error(err, "owner/other", "cannot be downloaded", "not found")


REASONS = {  # the hub's status and code, and what the line has to say
    "mistyped": (401, "RepoNotFound", "not found spelled"),
    "gated": (403, "GatedRepo", "gated access"),
    "broken": (500, "", "500"),
    "login": (401, "", "log"),
    "revision": (404, "RevisionNotFound", "no branch 'v9'"),
}


class Refusing(Hub):
    def do_GET(self) -> None:
        name = next(name for name in REASONS if f"/{name}/" in self.path)
        self.send_response(REASONS[name][0])
        for key, text in (("X-Error-Code", REASONS[name][1]), ("Content-Length", "0")):
            self.send_header(key, text)
        self.end_headers()

    do_HEAD = do_GET


@on_posix
def test_why_a_hub_id_cannot_be_had(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    env |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = """
import sys
from generate import CheckpointError, load_model
for name in sys.argv[1:]:
    try:
        load_model(f"owner/{name}")
    except CheckpointError as error:
        print(error)
"""

    def said(*names: str, **more: str) -> list[str]:
        line = [sys.executable, "-c", code, *names]
        how = {"env": {**os.environ, **env, **more}, "cwd": ROOT}
        return subprocess.run(line, capture_output=True, text=True, **how).stdout.splitlines()

    try:
        lines = said(*[n + "@v9" * (n == "revision") for n in REASONS])
    finally:
        server.shutdown()
        server.server_close()
    for line, (*_, words) in zip(lines, REASONS.values(), strict=True):
        assert all(word in line for word in words.split()), line
    assert "cannot be reached" in said("other")[0]
    assert "downloads are off" in said("other", HF_HUB_OFFLINE="1")[0]


# ------------------------------------------------------------------------------------------- fuzz


@on_linux
def test_fuzz_a_little(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(40, 1) == 0
    assert "40 cases of seed 1: 0 wrong" in capsys.readouterr().out


@on_linux
@thorough
def test_fuzz():
    """300 cases of the fuzzer, of which more are run by hand."""
    line = [sys.executable, str(TESTS / "fuzz.py"), "300", "0"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and "300 cases of seed 0: 0 wrong" in ran.stdout, ran.stdout


def test_a_start_imports_no_compiler():
    """PyTorch's own takes a second, and nothing needs it before a step is compiled for CUDA."""
    code = "import sys, generate; print([m for m in sys.modules if m.startswith('torch._dynamo.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
