"""Keys that are pressed while a chat reads or writes: Ctrl-C stops that, all others wait for the next line."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

WARNING = b"\n(stopping after this step; Ctrl-C once more ends the program, and the conversation is lost)\n"


@contextlib.contextmanager
def stoppable(patient: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed since; a forward pass is never cut in two, as some layers
    of the cache would then have tokens that others lack.

    Args:
        patient: a second Ctrl-C warns, and the third ends the program; else the second one ends it.
    """
    presses = 0

    def press(*signal_and_frame) -> None:
        nonlocal presses
        presses += 1
        if presses == 2 and patient:
            os.write(2, WARNING)  # print would not do: it may be what was interrupted
        elif presses > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def keys_wait() -> Iterator[None]:
    """Keeps what is typed meanwhile off the screen, where it would stand amidst the answer; the next line has it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    now = termios.tcgetattr(terminal)
    now[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSADRAIN, now)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
