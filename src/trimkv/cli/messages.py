"""What counts as one message of a chat: a line, lines that were pasted together, or a block in triple quotes."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import UserError

QUOTES = '"""'


@dataclass(frozen=True)
class Command:
    """A line that begins with one slash.

    Attributes:
        name: what stands between the slash and the first white space.
        argument: what follows, without white space around it; "" for nothing.
    """

    name: str
    argument: str


def parse(text: str) -> str | Command | None:
    """The message or the command that was entered; None for nothing.

    Two slashes begin a message with one. What stands between triple quotes is always a message, as it is.
    """
    text = text.strip()
    if is_block(text):
        return text[len(QUOTES) : -len(QUOTES)].strip("\r\n") or None
    if text.startswith("//"):
        return text[1:]
    if text.startswith("/"):
        name, argument = re.fullmatch(r"/(\S*)\s*(.*)", text, re.DOTALL).groups()
        return Command(name, argument)
    return text or None


def is_block(text: str) -> bool:
    """Whether this is a whole block."""
    text = text.strip()
    return text.startswith(QUOTES) and text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES)


def is_open_block(text: str) -> bool:
    """Whether a block was begun and not ended, so that further lines belong to it."""
    return text.lstrip().startswith(QUOTES) and not is_block(text)


def join_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Lines one by one, those of a block together.

    Raises:
        UserError: the lines end within a block.
    """
    block: list[str] = []
    for line in lines:
        block.append(line)
        if line.rstrip().endswith(QUOTES) if len(block) > 1 else not is_open_block(line):
            yield "\n".join(block)
            block = []
    if block:
        raise UserError(f"standard input: a message that begins with {QUOTES} must end with {QUOTES}")
