"""Text that people type, pipe in or name: always UTF-8, whatever the locale says."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..texts import decode_text, refuse_other_encodings
from .errors import UserError, mendable

STDIN = "standard input"


def argument(text: str | None, option: str) -> str | None:
    """The value of an option as text; None stays None.

    Python keeps the bytes of an argument that it could not decode; in a locale without UTF-8 they may still be UTF-8.

    Raises:
        UserError: not UTF-8 text.
    """
    found = None if text is None else repaired(text)
    if text is not None and found is None:
        raise UserError(f"{option}: not UTF-8 text")
    return found


def repaired(text: str) -> str | None:
    """Text with the bytes that Python could not decode (it keeps them as lone surrogates) read as UTF-8; None where
    they are no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return None


def read_file(file: str) -> str:
    """The text of a file, which may be gzipped; - reads standard input to its end.

    Raises:
        UserError: it cannot be read, or is not UTF-8 text.
    """
    if file == "-":
        return read_stdin()
    try:
        data = Path(file).read_bytes()
        if file.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: not a readable gzip file ({error})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with mendable():
        return decode_text(data, file)


def read_stdin() -> str:
    """All of standard input. UserError if it cannot be read, or is not UTF-8 text."""
    try:
        data = _stdin().read()
    except OSError as error:
        raise UserError(f"{STDIN}: cannot be read ({error.strerror or error})") from error
    with mendable():
        return decode_text(data, STDIN)


def stdin_lines() -> Iterator[str]:
    """The lines of standard input as they arrive, each without its end.

    Raises:
        UserError: a line that is not UTF-8 text.
    """
    number = 0
    try:
        for number, line in enumerate(_stdin(), 1):
            if number == 1:
                with mendable():
                    refuse_other_encodings(line, STDIN)
            if b"\0" in line:
                raise UserError(f"{STDIN}: binary data, not text (line {number})")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{STDIN}: not UTF-8 text (line {number}: {error.reason})") from error
    except OSError as error:
        raise UserError(f"{STDIN}: cannot be read ({error.strerror or error})") from error


def _stdin():
    if sys.stdin is None:  # closed by the shell: <&-
        raise UserError(f"{STDIN} is closed")
    return sys.stdin.buffer


def stdin_is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
