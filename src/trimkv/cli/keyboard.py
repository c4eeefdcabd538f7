"""What is typed into a terminal, through prompt_toolkit: lines that can be edited, and a history of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from . import loading
from .messages import is_open_block
from .user_text import repaired

HINT = "(Ctrl-C once more, or Ctrl-D, leaves)"


class Keyboard:
    """Asks for messages.

    Enter sends, Alt-Enter begins a new line; what is pasted is one message however many lines it has. Ctrl-C clears
    what was typed; on an empty line it leaves if it is pressed twice in a row.

    Args:
        history: a file for what was typed, kept between starts; None keeps nothing.
        completions: word -> what may follow a command; names of files where that is None.
    """

    def __init__(self, history: Path | None, completions: dict[str, list[str] | None], input=None, output=None):
        # Asking a terminal where its cursor is leaves the reply on the screen when nobody waits for it any more.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self.warned = False  # the last thing that happened was Ctrl-C on an empty line
        self.session = PromptSession(
            multiline=True,
            prompt_continuation="  ",
            history=_history(history),
            completer=_Completer(completions),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=self._bindings(),
            enable_suspend=True,
            input=input,
            output=output or create_output(always_prefer_tty=True),
        )
        self.session.default_buffer.on_text_changed += self._typed

    def messages(self) -> Iterator[str]:
        """What is entered, until Ctrl-D.

        Raises:
            KeyboardInterrupt: Ctrl-C twice in a row on an empty line.
        """
        while True:
            try:
                text = self.session.prompt("\n> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if self.warned:
                    raise
                self.warned = True
                click.echo(HINT, err=True)
                continue
            self.warned = False
            text = repaired(text)
            if text is None:
                loading.note("what was typed is not UTF-8 text, and was not sent")
            else:
                yield text

    def _typed(self, buffer) -> None:
        if buffer.text:
            self.warned = False

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def enter(event):
            buffer = event.current_buffer
            # Where a terminal does not mark what is pasted, its lines arrive in one piece. Commands that were typed
            # ahead do, too, and are sent one by one.
            more_is_there = bool(event.key_processor.input_queue) and not buffer.text.startswith("/")
            if more_is_there or is_open_block(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def new_line(event):
            event.current_buffer.newline(copy_margin=False)

        @keys.add("c-c")
        @keys.add("<sigint>")
        def clear_or_leave(event):
            if event.current_buffer.text:
                event.current_buffer.reset()
                self.warned = False
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys


class _Completer(Completer):
    def __init__(self, completions: dict[str, list[str] | None]):
        self.completions, self.paths = completions, PathCompleter(expanduser=True)

    def get_completions(self, document, complete_event) -> Iterator[Completion]:
        text = document.text_before_cursor
        word, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            yield from (Completion(name, -len(word)) for name in self.completions if name.startswith(word))
        elif word in self.completions and self.completions[word] is None:
            yield from self.paths.get_completions(Document(rest), complete_event)
        else:
            choices = self.completions.get(word, [])
            yield from (Completion(choice, -len(rest)) for choice in choices if choice.startswith(rest))


def _history(path: Path | None) -> History:
    """The history in a file that only its owner may read."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        loading.note(f"{path}: cannot be written ({error.strerror}), so what you type is not remembered")
        return InMemoryHistory()
    return _FileHistory(str(path))


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        if repaired(string) != string:
            return  # bytes that no file in UTF-8 can hold
        try:
            super().store_string(string)
        except OSError as error:
            loading.note(f"{self.filename}: cannot be written ({error.strerror})")
