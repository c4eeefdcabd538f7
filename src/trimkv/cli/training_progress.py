"""What a training shows while it runs: a live line on a terminal, a line now and then in a file."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SHOWN = ("kl", "capacity", "regression", "smoothness", "distillation")  # losses, on the live line and at the end
EVERY = 10.0  # seconds between two lines in a file


@contextlib.contextmanager
def watching(steps: int, tokens_per_step: int) -> Iterator[list]:
    """Callbacks for the Trainer that report to stderr.

    Args:
        steps: of the whole training.
        tokens_per_step: of all processes together.
    """
    if not sys.stderr.isatty():
        yield [lines(steps, tokens_per_step)]
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield [bar(progress, steps)]


def lines(steps: int, tokens_per_step: int, clock=time.monotonic):
    """Prints a line at the start, about every ten seconds, at each checkpoint and at the end."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        first = begun = last = shown = None
        said = ""

        def on_train_begin(self, args, state, control, **kwargs):
            self.first, self.begun = state.global_step, clock()
            self.last = self.begun
            after = f", going on after step {self.first:,}" if self.first else ""
            self._print(f"training {steps:,} steps of {tokens_per_step:,} tokens{after}")

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not logs or "loss" not in logs:
                return
            self.said = losses(logs)
            if clock() - self.last >= EVERY or state.global_step in (self.first + 1, steps):
                self._step(state.global_step)

        def on_save(self, args, state, control, **kwargs):
            if self.shown != state.global_step:
                self._step(state.global_step)
            self._print(f"checkpoint written: {Path(args.output_dir) / f'checkpoint-{state.global_step}'}")

        def _step(self, step: int) -> None:
            self.last, self.shown = clock(), step
            rate = (step - self.first) / max(self.last - self.begun, 1e-9)
            left = duration((steps - step) / rate) if rate else "?"
            self._print(f"step {step:,}/{steps:,}  {self.said}  {rate:.3g} steps/s  {left} left")

        def _print(self, text: str) -> None:
            print(f"trimkv: {text}", file=sys.stderr, flush=True)

    return Lines()


def bar(progress, steps: int):
    """Moves a bar, with the losses beside it."""
    from transformers import TrainerCallback

    task = progress.add_task("training", total=steps)

    class Bar(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                progress.update(task, completed=state.global_step, description=losses(logs))

        def on_save(self, args, state, control, **kwargs):
            progress.console.print(f"checkpoint written at step {state.global_step:,}", style="dim")

    return Bar()


def losses(logs: dict) -> str:
    """``kl 0.0123  capacity 0.0456  retained 1.17 x budget``"""
    said = [f"{name} {logs[name]:.4f}" for name in SHOWN if name in logs] or [f"loss {logs['loss']:.4f}"]
    said += [f"retained {logs['occupancy']:.2f} x budget"] if "occupancy" in logs else []
    return "  ".join(said)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
