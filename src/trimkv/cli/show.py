"""How results look: JSON for programs, short lines and bars for people."""

import json
import sys
from collections.abc import Callable

import click


def emit(result: dict) -> None:
    """One JSON object on one line of stdout."""
    click.echo(json.dumps(result))


def progress():
    """A bar with the time left on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    class Bar(Progress):
        def __enter__(self) -> Callable[[str], Callable[[int, int], None]]:
            super().__enter__()
            return self.begin

        def begin(self, what: str) -> Callable[[int, int], None]:
            for task in self.task_ids:
                self.remove_task(task)
            task = self.add_task(what, total=None)
            return lambda done, total: self.update(task, completed=done, total=total)

    description = TextColumn("{task.description}")
    columns = (description, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("left"))
    console = Console(stderr=True)
    return Bar(*columns, console=console, disable=not console.is_terminal)


def faint(text: str) -> str:
    return click.style(text, dim=True)


def bytes_text(count: int) -> str:
    """5_898_240 -> "5.9 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def saved_line(cache, bounded: bool) -> str:
    """What was seen, what is held, and what that saves:
    ``seen 812 tokens · held 256 slots per head · cache 5.9 MB instead of 37.4 MB (84 % saved)``."""
    seen, held = cache.get_seq_length(), cache.mean_held_tokens
    full = cache.full_cache_bytes(seen)
    line = f"seen {seen:,} tokens · held {held:,.0f} slots per head · cache {bytes_text(cache.nbytes)}"
    if not bounded:
        return f"{line}, growing with every token"
    if cache.nbytes >= full:  # slots are allocated once, so a short text saves nothing
        return f"{line}, and never more (a full cache would be at {bytes_text(full)} by now)"
    return f"{line} instead of {bytes_text(full)} ({100 * (1 - cache.nbytes / full):.0f} % saved)"


class Reading:
    """A bar on a terminal's stderr while a long prompt is read; gone when the answer starts."""

    def __init__(self):
        self.bar = self.task = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop()

    def __call__(self, done: int, total: int) -> None:
        if done >= total:
            self._stop()
        elif self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif done and sys.stderr.isatty():  # more than one chunk
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("reading", total=total, completed=done)
            self.bar.start()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
