"""What a person can mend is told in one line, with exit code 2."""

from contextlib import contextmanager

import click


class UserError(click.ClickException):
    """Something that the person at the keyboard can mend."""

    exit_code = 2


@contextmanager
def mendable(kinds: type[Exception] | tuple[type[Exception], ...] = ValueError, doing: str = ""):
    """Turns exceptions of these kinds into a UserError: one line, exit 2.

    Put it around calls whose exceptions speak about what the user passed, never around a whole command: a bug must not
    look like a typing error.
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{doing}: {one_line(error)}" if doing else one_line(error)) from error


def one_line(error: BaseException, limit: int = 400) -> str:
    """The message of an exception on one line, or the exception's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU torch says it in a RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
