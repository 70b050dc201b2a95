"""What the lessons share. Imported first, it makes granitemoe.py and generate.py importable."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def pieces(tokenizer: "Tokenizer", ids: list[int]) -> list[str]:
    """Each token's text by itself; a character split between tokens shows as U+FFFD in each.

    Control characters, which could steer a terminal, show as U+FFFD too.
    """
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    known = (tokenizer.id_to_token(i) is not None for i in ids)  # a padded vocabulary has gaps
    return [CONTROL.sub("\ufffd", t) if k else "\ufffd" for t, k in zip(texts, known, strict=True)]


@contextmanager
def watch(modules: Iterable[nn.Module]) -> Iterator[list[tuple]]:
    """Within `with`, the list fills with (inputs, output) of each call of one of the modules.

    Forward hooks do it, and go at the end: the model itself knows nothing of its observers.
    """
    calls: list[tuple] = []
    note = lambda _, inputs, output: calls.append((inputs, output))  # noqa: E731
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Within `with`, a function of how many are done, and of how many: it tells a terminal.

    On standard error, on one line that goes at the end. Work of up to a second says nothing,
    and nothing goes to a file or a pipe.
    """
    began, shown = time.monotonic(), ""

    def tell(done: int, of: int) -> None:
        nonlocal shown
        if time.monotonic() - began > 1 and sys.stderr is not None and sys.stderr.isatty():
            shown = f"{what}: {done:,} of {of:,}"
            print(f"\r{shown}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if shown:
            print(f"\r{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def new_figure(file: Path, **options) -> "Figure":
    """An empty picture, to be saved as file. Raises ValueError where matplotlib is missing or does
    not write such files."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib; run: pip install matplotlib") from None
    matplotlib.rcParams["svg.hashsalt"] = "lessons"  # the same picture, the same file
    figure = Figure(layout="constrained", facecolor="white", **options)
    kinds = figure.canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot: must end in one of .{', .'.join(kinds)}, got {file.name!a}")
    return figure


def read_text(file: Path) -> str:
    """A UTF-8 text. Raises ValueError where it is none, and OSError."""
    raw = file.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        byte = f"its byte {error.start} is {raw[error.start]:#04x}"
        raise ValueError(f"{str(file)!r}: must be UTF-8 text, but {byte}") from None


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> None:
        line = CONTROL.sub("\ufffd", message.replace("\n", " "))
        self.exit(2, f"{self.prog}: error: {line}\n")


def refuse(allowed: str, text: str) -> NoReturn:
    """For a type of argparse, which adds the option's name."""
    raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!a:.60}")


def integer(least: int, most: int = 2**31) -> Callable[[str], int]:
    """A type for argparse: an integer from least to most."""

    def read(text: str) -> int:
        with suppress(ValueError):  # also for more digits than Python reads
            if least <= int(text) <= most:
                return int(text)
        refuse(f"an integer from {least} to {most}", text)

    return read


def words(text: str) -> str:
    """A type for argparse: a text that can be encoded, as one typed in UTF-8 can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse("UTF-8 text", text)
    return text


def file_name(text: str) -> Path:
    """A type for argparse: a path. An empty one would be the folder that one is in."""
    if not text:
        refuse("a path", text)
    return Path(text)


def new_file_name(text: str) -> Path:
    """A type for argparse: a file that can be written. Asked before the work, not after it."""
    path = file_name(text)
    if path.is_dir() or not path.parent.is_dir():
        refuse("a file to write, in a folder that is there", text)
    return path


def check_prompt(name: str, ids: list[int], most: int) -> None:
    """Raises ValueError unless there are tokens, and no more than the model's context has."""
    if not 1 <= len(ids) <= most:
        raise ValueError(f"{name}: must have from 1 to {most} tokens, has {len(ids)}")


def command(main: Callable[[], None]) -> None:
    """Run a lesson's main; what the user can put right ends in one line, not in a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream has no such
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone, and Python's own flush at exit would complain
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {reason(error)}")


def reason(error: ValueError | OSError) -> str:
    """In one line. What the system says comes after the file that it is about."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    file = f"{str(error.filename)!r}: " if error.filename is not None else ""
    return file + error.strerror.lower()
