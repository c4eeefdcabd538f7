"""A comparison on disk while it runs: what was measured is kept, and the same command goes on after a kill."""

import hashlib
import json
from pathlib import Path

from . import loading
from .errors import UserError, mendable

TRAINED = ("retention_gate", "retaining_head", "attn_gate")  # parts of attention modules that decide what is kept


class Partial:
    """The measured cells of a comparison: in OUTPUT.part until all are there, then in OUTPUT, which is always whole.

    Args:
        output: the file of the whole result; None keeps nothing on disk.
        settings: all that changes the numbers. Cells of other settings are never mixed in.

    Raises:
        UserError: OUTPUT.part is of another comparison, or damaged.
    """

    def __init__(self, output: str | None, settings: dict):
        self.output = Path(output) if output else None
        self.settings, self.found, self.seconds = json.loads(json.dumps(settings)), {}, 0.0
        if self.output and self.path.exists():
            self._take_over()

    @property
    def path(self) -> Path:
        return self.output.with_name(self.output.name + ".part")

    @property
    def rows(self) -> dict[tuple[str, int], dict]:
        """The rows that are there, by policy and budget."""
        return {(row["policy"], row["budget"]): row for row in self.found.get("rows", ())}

    def add(self, measured: dict, seconds: float) -> None:
        """Takes what ``eval.compare`` said of some cells."""
        self.seconds += seconds
        self.found = {**measured, **self.found, "rows": [*self.found.get("rows", ()), *measured["rows"]]}
        if self.output:
            write(self.path, {"settings": self.settings, "seconds": self.seconds, "found": self.found})

    def finish(self, result: dict) -> None:
        """Puts the whole result in its place."""
        if self.output:
            write(self.output, result)
            self.path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            then, self.found, self.seconds = held["settings"], held["found"], held["seconds"]
            rows = len(self.rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no unfinished comparison: delete it ({type(error).__name__})") from error
        other = [name for name in self.settings if self.settings[name] != then.get(name)]
        if other:
            raise UserError(
                f"{self.path} holds an unfinished comparison with other {', '.join(other)}: finish it with the options "
                "it had, delete it, or name another --output"
            )
        loading.note(f"going on from {self.path}, where {rows} cells are measured")


def write(path: Path, result: dict) -> None:
    """Writes JSON; what was there stays until all is written."""
    half = path.with_name(path.name + ".new")
    with mendable(OSError, doing=f"--output {path}"):
        half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        half.replace(path)


def digest(*tensors) -> str:
    """A short name for the contents of tensors."""
    import torch

    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def trained_parts(model) -> dict[str, str]:
    """What is attached to a model: kind of part -> digest of its weights."""
    found = {}
    for part in TRAINED:
        tensors = [p for name, p in model.named_parameters() if f".{part}." in name]
        if tensors:
            found[part] = digest(*tensors)
    return found
