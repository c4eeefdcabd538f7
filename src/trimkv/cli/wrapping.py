"""Text on a terminal, wrapped between words while it arrives."""

import sys
from collections.abc import Callable

import click

from . import show

FENCE = "```"  # opens and closes a block of code


class Wrapped:
    """Passes text on with line ends where the terminal's width asks for them.

    A word is held back until it ends, so that it is never cut in two unless it is longer than a line. Lines of code
    between two fences stay as they are, so that they can be copied. Call ``end`` after the last piece.

    Args:
        write: gets text.
        width: the terminal's columns; asked for every word, as windows change their size.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int]):
        from rich.cells import cell_len

        self.write, self.width, self.cells = write, width, cell_len
        self.column = 0  # cells that are taken in this line
        self.spaces = self.word = ""  # held back
        self.begin = ""  # the first letters of this line
        self.code = False

    def __call__(self, text: str) -> None:
        out = "".join(map(self._take, text))
        if out:
            self.write(out)

    def end(self) -> None:
        """Passes on what is held back."""
        held = self._release()
        if held:
            self.write(held)

    def _take(self, letter: str) -> str:
        """What can be written now that this letter is here."""
        if letter == "\n":
            out = self._release() + letter
            self.code ^= self.begin == FENCE
            self.column, self.spaces, self.begin = 0, "", ""
            return out
        if len(self.begin) < len(FENCE) and not letter.isspace():
            self.begin += letter
        if self.code:
            return letter
        if letter.isspace():
            out = self._release()
            self.spaces += letter
            return out
        self.word += letter
        # Scripts without spaces, whose letters take two cells, may break anywhere.
        return self._release() if self.cells(letter) > 1 or self.cells(self.word) >= self.width() else ""

    def _release(self) -> str:
        """The word that is held back, behind its spaces, or on a new line if it does not fit there."""
        if not self.word:
            return ""
        out, word = self.spaces + self.word, self.word
        self.spaces = self.word = ""
        if self.column and self.column + self.cells(out) > self.width():
            self.column = self.cells(word)
            return "\n" + word
        self.column += self.cells(out)
        return out


class Screen:
    """Where an answer goes: wrapped on a terminal, as it is in a pipe or a file."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.write = Wrapped(_echo, show.width) if self.terminal else _echo

    def end(self, mark: str = "") -> None:
        """After the last piece of an answer, with a mark behind it where there is a person to see it."""
        if self.terminal:
            self.write.end()
        click.echo(mark if self.terminal else "")


def _echo(text: str) -> None:
    click.echo(text, nl=False)
