"""Ctrl-C within a chat: it stops what runs, and the conversation goes on."""

import contextlib
import os
import signal
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
