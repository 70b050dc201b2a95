"""What callers of generate bring: ids, and numbers, which may be Python's, NumPy's or PyTorch's."""

import math
import operator
from dataclasses import fields
from numbers import Integral


def as_integer(value: object) -> object:
    """An int, by operator.index; what is no integer, or a truth value, as it is."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return value


def as_real(value: object) -> object:
    """A float, by float(); texts, truth values and what is no number as they are."""
    if isinstance(value, bool | str | bytes | bytearray) or type(value).__name__ in (
        "bool",
        "bool_",
    ):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def take_numbers(given: object) -> None:
    """Turn the fields of a dataclass into Python's numbers, as far as they are numbers."""
    for field in fields(given):
        convert = as_real if field.type is float else as_integer
        object.__setattr__(given, field.name, convert(getattr(given, field.name)))


def as_ids(name: str, value: object) -> set[int]:
    """One id, several or None (none) as a set. Raises ValueError."""
    if isinstance(as_integer(value), int):
        value = [value]
    try:
        ids = [as_integer(each) for each in (() if value is None else value)]
    except TypeError:
        ids = [value]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int):
            raise ValueError(f"{name}: must be ids or one id, got {each!a:.60}")
    return set(ids)


def is_number(value: object, kind: type, low: float, high: float = math.inf) -> bool:
    """Integral or Real, from low to high; NaN and booleans are not."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def check_prompts(prompts: list, last: int, context: int) -> None:
    """Raises ValueError unless all are lists of ids from 0 to last, no longer than the context."""
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("prompts: must be a list of at least one prompt")
    for row, ids in enumerate(prompts):
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"prompts[{row}]: must be a list of ids, not empty")
        if len(ids) > context:
            raise ValueError(f"prompts[{row}]: has {len(ids)} tokens, room is for {context}")
        for at, i in enumerate(ids):
            if not is_number(as_integer(i), Integral, 0, last):
                raise ValueError(f"prompts[{row}][{at}]: {i!a:.40} must be an id from 0 to {last}")
