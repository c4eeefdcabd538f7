"""A comparison on disk while it runs: what was measured is kept, and the same command goes on after a kill."""

import json
from pathlib import Path

from .. import fingerprint
from . import loading
from .errors import UserError
from .outputs import write


class Partial:
    """The measured cells of a comparison: in OUTPUT.part until all are there, then in OUTPUT, which is always whole.

    Args:
        output: the file of the whole result; None keeps nothing on disk.
        made_of: all that changes the numbers. Cells of another comparison are never mixed in.
        overwrite: begin anew whatever OUTPUT.part holds.

    Raises:
        UserError: OUTPUT.part is of another comparison, or damaged.
    """

    def __init__(self, output: str | None, made_of: dict, overwrite: bool = False):
        self.output = Path(output) if output else None
        self.made_of, self.found, self.seconds = fingerprint.plain(made_of), {}, 0.0
        if self.output and not overwrite and self.path.exists():
            self._take_over()

    @property
    def path(self) -> Path:
        return part_of(self.output)

    @property
    def rows(self) -> dict[tuple[str, int], dict]:
        """The rows that are there, by policy and budget."""
        return {(row["policy"], row["budget"]): row for row in self.found.get("rows", ())}

    def add(self, measured: dict, seconds: float) -> None:
        """Takes what ``eval.compare`` said of some cells."""
        self.seconds += seconds
        self.found = {**measured, **self.found, "rows": [*self.found.get("rows", ()), *measured["rows"]]}
        if self.output:
            write(self.path, {"made_of": self.made_of, "seconds": self.seconds, "found": self.found})

    def finish(self, result: dict) -> None:
        """Puts the whole result in its place."""
        if self.output:
            write(self.output, result)
            self.path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        held = unfinished(self.output, self.made_of)
        self.found, self.seconds = held["found"], held["seconds"]
        loading.note(f"going on from {self.path}, where {len(self.rows)} cells are measured")


def unfinished(output: str | Path, made_of: dict) -> dict | None:
    """What OUTPUT.part holds; None where there is none.

    Args:
        made_of: all that changes the numbers, or the part that is known so far.

    Raises:
        UserError: it is of another comparison, or damaged.
    """
    path = part_of(output)
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        differ = fingerprint.differences(held["made_of"], made_of)
        {row["policy"]: row["budget"] for row in held["found"].get("rows", ())}, float(held["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no unfinished comparison: delete it ({type(error).__name__})") from error
    if differ:
        raise UserError(
            f"{path} holds another comparison, unfinished: {fingerprint.line(differ)}. Finish it with the options it "
            "had, name another --output, or --overwrite to begin anew"
        )
    return held


def part_of(output: str | Path) -> Path:
    """Where a result is while it grows."""
    return Path(output).with_name(f"{Path(output).name}.part")
