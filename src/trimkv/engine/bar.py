"""A bar on a terminal's stderr while a list of prompts is worked off."""

import sys

from .request import Request


class Bar:
    """Counts finished requests, and says how fast tokens come. Nothing is drawn elsewhere than on a terminal."""

    def __init__(self, requests: list[Request], wanted: bool):
        self.left, self.total, self.made = list(requests), len(requests), 0
        self.bar = None
        if wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self.bar = Progress(*columns, TextColumn("{task.fields[tokens]} tokens"), console=Console(stderr=True))
            self.task = self.bar.add_task("requests", total=self.total, tokens=0)

    def update(self) -> bool:
        """Looks at the requests again. Returns whether all have finished."""
        self.made += sum(len(request.tokens) for request in self.left if request.done)
        self.left = [request for request in self.left if not request.done]
        if self.bar is not None:
            tokens = self.made + sum(len(request.tokens) for request in self.left)
            self.bar.update(self.task, completed=self.total - len(self.left), tokens=tokens)
        return not self.left

    def __enter__(self) -> "Bar":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.stop()
