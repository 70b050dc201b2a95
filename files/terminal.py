"""generate.py as a process: a quiet start, prompts in, text out, one line of error, exit statuses.

Imports the standard library alone, so that it is there before torch.
"""

import argparse
import codecs
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from granitemoe import GraniteMoeForCausalLM

INSTALL = "run: pip install -r requirements.txt"
TINY = Path(__file__).resolve().parents[1] / "tiny"
MAX_NEW_TOKENS = 128
PROMPT = "class Stack:"  # without a prompt; without any argument, DEMO
DEMO = f'"{PROMPT}" --temperature 0.8 --top-p 0.9 --seed 40 --max-new-tokens 92 --dtype float32'


@contextmanager
def starting(name: str) -> Iterator[None]:
    """For the imports of a module of that __name__. Where it is the command, a missing library ends
    in one line and, in a process of its own (a notebook is none), Ctrl-C ends quietly in the second
    that importing torch takes."""
    if name == "__main__" and any(Path(arg).name == "generate.py" for arg in sys.orig_argv):
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    except ImportError as error:
        if name != "__main__":
            raise
        sys.exit(f"generate.py: error: {error}; {INSTALL}")


def descriptor(stream: object) -> int | None:
    """The number of a standard stream's file. A notebook's stream, or StringIO, has none."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def is_terminal(stream: object) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # closed, or not made to be asked
        return False


def note(text: str, end: str = "\n") -> None:
    """To standard error, where there is one: a full one must not cost the text."""
    if sys.stderr is None:
        return
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = None  # or Python would try once more as it ends, and change the exit status


def quietly(act: Callable, *given: object) -> object:
    """act(*given), without the page that tokenizers prints before its error can be caught.

    That takes switching the process's standard error, which no library call may do: other threads
    use it. The command has no other thread that writes."""
    if descriptor(sys.stderr) != 2:
        return act(*given)
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        return act(*given)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def progress() -> Callable[[int, int], None]:
    """For load_model: tells a terminal how many tensors are read, once that takes over a second."""
    began = time.perf_counter()

    def tell(done: int, of: int) -> None:
        if is_terminal(sys.stderr) and time.perf_counter() - began > 1:
            note(f"\rloading: {done} of {of} tensors", "\n" if done == of else "")

    return tell


def write(text: str) -> None:
    """To standard output at once; a terminal gets no control characters that a model made up."""
    if sys.stdout is None:
        raise ValueError("standard output: is closed")
    if is_terminal(sys.stdout):
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    encoding = getattr(sys.stdout, "encoding", None)
    if encoding:  # what it lacks is escaped
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"standard output: {error.strerror}") from None


def decode_prompt(raw: bytes) -> str:
    """Raises ValueError if it is empty or not UTF-8. A byte order mark in front is no text. White
    space is one, if the tokenizer has tokens for it: see refuse_empty."""
    try:
        prompt = raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        raise ValueError("PROMPT: is not valid UTF-8") from None
    if not prompt:
        raise ValueError("PROMPT: is empty")
    return prompt


def read_prompts(prompts: list[str], piped: bool) -> list[str]:
    """Prompts as typed, or standard input for -; without any, what is piped in, if it is wanted."""
    if sys.stdin is None and ("-" in prompts or not (prompts or piped)):
        raise ValueError("PROMPT: standard input is closed")
    texts = [
        decode_prompt(p.encode(errors="surrogateescape") if p != "-" else read_input())
        for p in prompts
    ]
    if texts or not piped or sys.stdin is None or is_terminal(sys.stdin):
        return texts
    raw = b""
    with suppress(OSError, ValueError, TypeError):  # Windows cannot ask a pipe
        if not select.select([sys.stdin], [], [], 1)[0]:
            note("[waiting for a prompt from standard input]")
    with suppress(OSError):  # what cannot be read, a folder say, is no prompt
        raw = read_input()
    return [decode_prompt(raw)] if raw.removeprefix(codecs.BOM_UTF8) else []


def read_input(line: bool = False) -> bytes:
    """Standard input, or its next line. A notebook's is a stream of text without bytes below it."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    raw = stream.readline() if line else stream.read()
    return raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass")


def read_line() -> bytes:
    """The next line of standard input, asked for where somebody types it; empty at its end."""
    if is_terminal(sys.stdin):
        note("> ", "")
    return read_input(line=True)


def typed_messages() -> Iterator[str]:
    """Yields each line of standard input that is valid text; of any other, says what is wrong."""
    while line := read_line():
        try:
            text = decode_prompt(line.rstrip(b"\r\n"))
        except ValueError as error:
            note(f"[{error}]")
        else:
            yield text


def is_utf8(text: str) -> bool:
    """Not where an argument had other bytes: Python keeps those as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def parse_ids(prompt: str) -> list[int]:
    words = prompt.replace(",", " ").split()
    if not words:
        raise ValueError("PROMPT: is empty")
    if not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
        raise ValueError("--raw-ids: PROMPT must be integers from 0")
    return [int(word) for word in words]


def refuse_empty(prompts: list[list[int]]) -> None:
    """A prompt of no tokens is bad usage, which only the tokenizer can tell."""
    if not all(prompts):
        Parser().error("PROMPT: is empty")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error, and not the whole usage."""
        plain = message.encode("unicode_escape").decode()  # it may echo what was typed
        note(f"generate.py: error: {plain:.160} (see --help)")
        sys.exit(2)


def parse_args(
    given: list[str], complete: Callable[[argparse.Namespace], None], *tables: Iterable[str]
) -> argparse.Namespace:
    """The command's arguments, all of them checked; prompts are read, and `ids` are those of
    --raw-ids. complete: checks what others know; tables: the names that some options take.
    `messages` begin a chat; `ends` are for end tokens that the tokenizer knows of."""
    parser = Parser(description="Continue text with a GraniteMoe model.")
    add_options(parser, *tables)
    args = parser.parse_args(given)
    if args.max_new_tokens is None:
        args.max_new_tokens = 10**9 if args.chat and not args.prompts else MAX_NEW_TOKENS
    try:
        complete(args)
        check_options(args)
        args.prompts = read_prompts(args.prompts, piped=not args.chat)
        if args.raw_ids:
            args.ids = [parse_ids(prompt) for prompt in args.prompts or ["0"]]
    except ValueError as error:
        parser.error(str(error))
    if not args.prompts and not given:
        note(f"[python generate.py {DEMO}]")
        return parse_args(shlex.split(DEMO), complete, *tables)
    args.ends, args.messages = set(), []
    if args.system is not None:
        args.messages.append(("system", args.system))
    return args


def add_options(parser: Parser, dtypes: Iterable, attention: Iterable, experts: Iterable) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="texts to continue, as one batch; - is stdin")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    how_many = f"how many at the most (default: {MAX_NEW_TOKENS}; in a conversation, what is left)"
    add("--max-new-tokens", type=int, metavar="N", help=how_many)
    greedy = "0 (default): the likeliest; else sampled"
    add("--temperature", type=float, default=0.0, metavar="T", help=greedy)
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest; 0 keeps all")
    mass = "keep the likeliest that hold P of it"
    add("--top-p", type=float, default=1.0, metavar="P", help=mass)
    least = "drop what is below P times the likeliest"
    add("--min-p", type=float, default=0.0, metavar="P", help=least)
    less = "over 1: repeat less"
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help=less)
    add("--seed", type=int, metavar="S", help="the same seed, the same samples")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--chat", action="store_true", help="the model's chat format; no PROMPT: a conversation")
    add("--system", metavar="TEXT", help="the system message of --chat")
    add("--raw-ids", action="store_true", help="prompts and output are token ids")
    add("--device", default="auto", help="auto (default), cpu, mps, cuda or cuda:N")
    add("--dtype", choices=dtypes, help="default: the checkpoint's")
    forms = "same numbers, other speed and memory (default: auto)"
    add("--attention", choices=("auto", *attention), default="auto", help=forms)
    add("--experts", choices=("auto", "batched", *experts), default="auto", help=forms)
    add("--compile", action="store_true", help="the same model once more for speed (see fast/)")


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if args.system is not None and not args.chat:
        raise ValueError("--system: needs --chat")
    if args.system is not None and not is_utf8(args.system):
        raise ValueError("--system: is not UTF-8")
    if args.chat and (args.raw_ids or len(args.prompts) > 1):
        raise ValueError("--chat: takes one PROMPT or none, and no --raw-ids")
    if "" in args.stop or (args.stop and args.raw_ids):
        raise ValueError("--stop: must be a text that is not empty, and not with --raw-ids")
    if args.compile and args.attention != "auto":
        raise ValueError("--compile: needs --attention auto")
    if args.compile and args.experts not in ("auto", "batched"):
        raise ValueError("--compile: needs --experts auto or batched")


def introduce(
    model: "GraniteMoeForCausalLM", loaded: float, compiled: str | bool, pays: bool
) -> None:
    """What was loaded, in how many seconds, and what runs. compiled: the form of --compile, if it
    is asked for; pays: whether it would be faster."""
    total, active = model.num_parameters() / 1e6, model.num_parameters(active=True) / 1e6
    weight, config = model.model.norm.weight, model.config
    where = f"{weight.device}, {str(weight.dtype).removeprefix('torch.')}"
    size = f"{total:.1f} M parameters, {active:.1f} M active"
    runs = f"attention: {config.attention_backend}, experts: {config.experts_backend}"
    if compiled:
        runs = f"compiled: {compiled}"
    elif pays:
        runs += "; --compile decodes 3 x as fast"  # bench/RESULTS.md
    note(f"[{size}; {where}, {runs}; loaded in {loaded:.2f} s]")


def report(
    model: "GraniteMoeForCausalLM",
    prompts: list,
    rows: list,
    times: list[float],
    args: argparse.Namespace,
) -> None:
    """Speeds on standard error, and whether a reply was cut; rows have `made` new ids; times:
    before the prefill, then after each step."""
    read, new, steps = sum(map(len, prompts)), sum(row.made for row in rows), len(times) - 2
    if steps >= 0:
        first = times[1] - times[0]
        text = f"first token {first:.3f} s; prompt {read} tokens, {read / first:.0f} tokens/s"
        if steps > 0:
            seconds = (times[-1] - times[1]) / steps
            active = model.num_parameters(active=True) * model.model.norm.weight.element_size()
            text += f"; {new} new, {(new - len(prompts)) / steps / seconds:.1f} tokens/s, "
            text += f"weights at {active / seconds / 1e9:.2f} GB/s a row"
        note(f"[{text}]")
    context = model.config.max_position_embeddings
    if any(len(ids) + row.made >= context for ids, row in zip(prompts, rows, strict=True)):
        note(f"[the context of {context} tokens is full]")
    elif args.chat and not rows[0].ended and rows[0].made < args.max_new_tokens:
        note("[the reply is cut: the conversation is full]")
    elif args.chat and not rows[0].ended:
        limit = args.max_new_tokens
        note(f"[the reply is cut at {limit} tokens; for more: --max-new-tokens {2 * limit}]")


def out_of_memory(error: Exception) -> bool:
    """In the words of PyTorch's allocators and of drivers; an illegal memory access is no such."""
    words = "out of memory|allocate memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def run(command: Callable[[], None]) -> int:
    """Run the command; returns its exit status, after at most one line of error."""
    before = None
    if threading.current_thread() is threading.main_thread():  # no other may set it
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
    status, message = 0, ""
    try:
        command()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except ImportError as error:  # of what only some commands need
        status, message = 1, f"{error}; {INSTALL}"
    except (ValueError, OSError) as error:
        status, message = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        status, message = 1, "out of memory: try a shorter or smaller batch, or another --dtype"
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    if status and descriptor(sys.stdout) == 1:  # or the exit would write the rest once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if status and status != 141:  # then nobody reads on
        note(f"generate.py: error: {' '.join(message.split())}"[:200] if message else "")
    return status
