"""Whether what a caller gives is a whole number, a number, a flag or a list of token ids; if not, one line says so.

What passes is a plain int, float, bool or tuple, whatever numpy or torch it came from.
"""

import numbers
import operator
import reprlib
from collections.abc import Sequence, Set

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value) -> str:
    """A value as an error message shows it: short, on one line."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # numbers of thousands of digits, objects without a working repr
        return f"a {type(value).__name__}"


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of an exception on one line, or the exception's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def whole(name: str, value, least: int | None = None, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``.

    Raises:
        ValueError: it is another number, or none.
    """
    number = _index(value)
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    if most is not None and not (least or 0) <= number <= most:
        raise ValueError(f"{name} must be from {least or 0:,} to {most:,}, got {shown(number)}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least:,}, got {shown(number)}")
    return number


def real(name: str, value) -> float:
    """A real number, infinite ones and NaN among them.

    Raises:
        ValueError: it is none.
    """
    given = value
    try:
        value = value.item() if callable(getattr(value, "item", None)) else value  # a scalar of numpy or torch
        if isinstance(value, numbers.Real) and not _is_flag(value):
            return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    except Exception:  # several numbers, or an object that is none
        pass
    raise ValueError(f"{name} must be a number, got {shown(given)}")


def flag(name: str, value) -> bool:
    """True or False.

    Raises:
        ValueError: it is neither.
    """
    if not _is_flag(value):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def length_of(name: str, values) -> int:
    """The number of entries of a list, tuple, set, range, array or tensor.

    Raises:
        ValueError: it is something else; an iterator is, since it may never end.
    """
    kinds = isinstance(values, (Sequence, Set)) or hasattr(values, "tolist") and hasattr(values, "__len__")
    if not kinds or isinstance(values, (str, bytes, bytearray, memoryview)):
        raise ValueError(f"{name} must be a list of token ids, got {shown(values)}")
    try:
        return len(values)
    except Exception as error:  # a range that is too long, a tensor of no dimensions, a broken class
        raise ValueError(f"{name} must be a list of token ids, got {shown(values)} ({one_line(error)})") from error


def token_ids(name: str, values) -> tuple[int, ...]:
    """Token ids from a list, tuple, set, range, array or tensor of whole numbers, in one row.

    Raises:
        ValueError: it is something else, or something else is in it.
    """
    length_of(name, values)
    try:
        while getattr(values, "ndim", 1) > 1 and len(values) == 1:
            values = values[0]
        values = values.tolist() if hasattr(values, "tolist") else list(values)
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
    ids = [value if type(value) is int else _index(value) for value in values]
    if None in ids:
        wrong = values[ids.index(None)]
        raise ValueError(f"{name} must be whole numbers, token ids, in one list; it has {shown(wrong)} in it")
    return tuple(ids)


def _index(value) -> int | None:
    """The whole number that a value is, or None."""
    try:
        return None if _is_flag(value) else int(operator.index(value))
    except Exception:  # as an object's own __index__ likes
        return None


def _is_flag(value) -> bool:
    """Whether a value is True or False, also one of numpy or torch: they pass for numbers elsewhere."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
