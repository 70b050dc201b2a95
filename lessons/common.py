"""What the lessons share: opening a checkpoint, showing a token, ending with one line of error."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generate import TINY, load_model, load_tokenizer  # noqa: E402
from granitemoe import GraniteMoeForCausalLM  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def open_checkpoint(
    path: str | Path = TINY, dtype: str | None = None
) -> tuple[GraniteMoeForCausalLM, "Tokenizer"]:
    """A checkpoint's model, on the CPU, and its tokenizer. Raises ValueError as load_model does."""
    return load_model(path, dtype=dtype), load_tokenizer(path)


def pieces(tokenizer: "Tokenizer", ids: list[int]) -> list[str]:
    """Each token's text by itself; a character split between tokens shows as U+FFFD in each.

    Control characters, which could steer a terminal, show as U+FFFD too.
    """
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    known = (tokenizer.id_to_token(i) is not None for i in ids)  # a padded vocabulary has gaps
    return [CONTROL.sub("\ufffd", t) if k else "\ufffd" for t, k in zip(texts, known, strict=True)]


def command(main: Callable[[], None]) -> None:
    """Run a lesson's main; what the user can put right ends in one line, not in a traceback."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone, and Python's own flush at exit would complain
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
