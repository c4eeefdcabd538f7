"""Ctrl-C during an answer stops the answer, not the program."""

import contextlib
import signal
import threading


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self):
        self.pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def _press(self, *signal_and_frame) -> None:
        if self.pressed:  # the second one means it
            raise KeyboardInterrupt
        self.pressed = True


@contextlib.contextmanager
def interruptible():
    """Yields a function that says whether Ctrl-C was pressed since. The program goes on until it asks: a forward pass
    that is cut in two would leave some layers of a cache with a token that others lack."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, interrupt._press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
