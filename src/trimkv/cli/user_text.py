"""Text that people type, pipe in or name: always UTF-8, whatever the locale says."""

import gzip
import io
import os
import select
import sys
import zlib
from collections.abc import Iterable, Iterator
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


class StdinLines:
    """The lines of standard input as they arrive, each without its end.

    What has arrived already is checked at once, so that a file in another encoding is refused before anything is done
    with its first lines.

    Raises:
        UserError: a line that is not UTF-8 text; now, or when it arrives.
    """

    def __init__(self):
        self.stream = _stdin()
        self.ahead, ended = _arrived(self.stream)
        whole = self.ahead if ended else self.ahead[: self.ahead.rfind(b"\n") + 1]
        for _ in _decoded(io.BytesIO(whole)):
            pass

    def __iter__(self) -> Iterator[str]:
        return _decoded(self._lines())

    def _lines(self) -> Iterator[bytes]:
        for line in io.BytesIO(self.ahead):
            yield line if line.endswith(b"\n") else line + self.stream.readline()
        yield from self.stream


def _arrived(stream) -> tuple[bytes, bool]:
    """The bytes that can be read without waiting, up to a megabyte, and whether they are all."""
    found = b""
    try:
        number = stream.fileno()
        while len(found) < 1 << 20 and select.select([number], [], [], 0)[0]:
            block = os.read(number, 1 << 16)
            if not block:
                return found, True
            found += block
    except (OSError, ValueError):  # what has no number; Windows, which asks so of sockets only
        pass
    return found, False


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
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
