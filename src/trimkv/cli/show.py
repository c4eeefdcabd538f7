"""How results look: JSON for programs, short lines and bars for people."""

import json
import shutil
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


def width() -> int:
    """The columns of text for people: those of the terminal."""
    return max(shutil.get_terminal_size().columns, 20)


def remark(text: str, as_json: bool = False) -> None:
    """Lines about an answer: faint, beside it on a terminal, else on stderr, as a pipe or a file wants the answer."""
    beside = sys.stdout.isatty() and not as_json
    click.echo(faint(_fitted(text, sys.stdout if beside else sys.stderr)), err=not beside)


def refusal(text: str) -> None:
    """What is wrong with something that was entered, where the program goes on."""
    click.echo(_fitted(f"trimkv: {text}", sys.stderr), err=True)


def _fitted(text: str, stream) -> str:
    """Lines that are too long for a terminal, broken between words."""
    if not stream.isatty():
        return text
    return "\n".join(line if len(line) <= width() else click.wrap_text(line, width()) for line in text.split("\n"))


def starting() -> None:
    """The first sign of life on a terminal; the spinner that follows takes its place, once it could be imported."""
    if sys.stderr.isatty():
        print("starting ...", end="\r", file=sys.stderr, flush=True)


def cut_mark(max_new_tokens: int, also: str = "") -> str:
    """Says that an answer is not at its end."""
    return f"[cut at {max_new_tokens:,} tokens: --max-new-tokens{also}]"


def saved_line(cache, bounded: bool) -> str:
    """What was read and written, how much of it is held, and what that saves:
    ``seen 812 tokens · held 256 per head · cache 5.9 MB instead of 37.4 MB (84 % saved)``."""
    seen = cache.get_seq_length()
    full = cache.full_cache_bytes(seen)
    line = f"seen {seen:,} tokens · held {held_text(cache) if bounded else 'all'} · cache {bytes_text(cache.nbytes)}"
    if not bounded:
        return f"{line}, growing with every token"
    if cache.nbytes >= full:  # slots are allocated once, so a short text saves nothing
        return f"{line}, and never more (holding all would take {bytes_text(full)} so far)"
    return f"{line} instead of {bytes_text(full)} ({100 * (1 - cache.nbytes / full):.0f} % saved)"


def held_text(cache) -> str:
    """How many tokens each KV head holds now, and of how many while there is room: ``256 per head``. Where layers have
    shares of the budget, or heads share it, the budget is a mean, and the largest is named beside it:
    ``229 of 256 per head on average (largest layer: 300 of 512)``."""
    limits = [layer.budget.slots for layer in cache.slot_layers]
    mean_limit = round(sum(limits) / len(limits))
    mean, largest = round(cache.mean_held_tokens), cache.held_tokens
    room = mean < mean_limit

    def part(held: int, limit: int) -> str:
        return f"{held:,} of {limit:,}" if room else f"{held:,}"

    text = f"{part(mean, mean_limit)} per head"
    if any(layer.budget.shared for layer in cache.slot_layers):
        return f"{text} on average (most: {largest:,})"
    if len(set(limits)) > 1:
        return f"{text} on average (largest layer: {part(largest, max(limits))})"
    return text


def limit_text(cache) -> str:
    """How many tokens a KV head can hold at most: ``256 tokens per head``."""
    limits = [layer.budget.slots for layer in cache.slot_layers]
    text = f"{round(sum(limits) / len(limits)):,} tokens per head"
    if any(layer.budget.shared for layer in cache.slot_layers):
        return f"{text} on average, shared among heads"
    if len(set(limits)) > 1:
        return f"{text} on average, {min(limits):,} to {max(limits):,} by layer"
    return text


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
