"""What a command writes: whether it can be written, and whether it may take the place of what is there."""

import importlib.util
import json
import os
from pathlib import Path

from .. import fingerprint
from ..extras import install_extra
from .errors import UserError, mendable

FIGURES = (".png", ".svg", ".pdf")
MARK = "trimkv result"  # in a figure's metadata, with a digest of what the drawn result was made of
REPLACE = "Name another one, or --overwrite to replace it"


def check_file(option: str, path: str | None) -> None:
    """Refuses a file that cannot be written, before anything slow starts."""
    if path is None:
        return
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{option} {path}: a folder, but a file is to be written")
    if not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written there")


def check_folder(folder: Path) -> None:
    """Refuses an --output folder for gates that cannot be one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: a file, but gates need a folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output {folder}: cannot be written there")


def finished(option: str, path: str | Path | None, made_of: dict, overwrite: bool) -> dict | None:
    """The result that a file holds already, if it was made of the same; None where there is something to do.

    Args:
        made_of: all of what the result is made of, or the part that is known so far.

    Raises:
        UserError: the file holds something else, and nobody said that it may be replaced.
    """
    if path is None or overwrite or not Path(path).exists():
        return None
    result = read(path)
    if result is None:
        raise UserError(f"{option} {path} exists and does not say what it was made of. {REPLACE}")
    differ = fingerprint.differences(result["made_of"], made_of)
    if differ:
        raise UserError(f"{option} {path} holds another result: {fingerprint.line(differ)}. {REPLACE}")
    return result


def read(path: str | Path) -> dict | None:
    """A JSON file that says what it was made of; None for any other file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        return result if isinstance(result["made_of"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, result: dict) -> None:
    """Writes JSON; what was there stays until all is written."""
    half = path.with_name(path.name + ".new")
    with mendable(OSError, doing=f"--output {path}"):
        try:
            half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)


def check_figure(figure: str | None, overwrite: bool) -> None:
    """Refuses a figure that could not be drawn, or that would take the place of another file."""
    if figure is None:
        return
    if Path(figure).suffix.lower() not in FIGURES:
        raise UserError(f"--figure {figure}: expected a name that ends in {', '.join(FIGURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--figure needs matplotlib: {install_extra('viz')}")
    check_file("--figure", figure)
    if not overwrite and Path(figure).exists() and MARK.encode() not in Path(figure).read_bytes():
        raise UserError(f"--figure {figure} exists and is no figure of trimkv. {REPLACE}")


def check_drawn(figure: str | None, result: dict, overwrite: bool) -> None:
    """Refuses to draw over the figure of another result. Drawing the same one again changes nothing."""
    if figure is None or overwrite or not Path(figure).exists():
        return
    if mark(result).encode() not in Path(figure).read_bytes():
        raise UserError(f"--figure {figure} shows another result. {REPLACE}")


def mark(result: dict) -> str:
    """What a figure of this result has in its metadata."""
    return f"{MARK} {fingerprint.of_json(result.get('made_of') or result.get('rows'))}"
