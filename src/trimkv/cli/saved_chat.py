"""Conversations on disk: one JSON object with the messages and the settings they were made with."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..texts import decode_text, record_content
from .errors import UserError, mendable

FORMAT = "trimkv chat"


@dataclass(frozen=True)
class SavedChat:
    """What a file holds.

    Attributes:
        messages: of users and assistants, in pairs.
        settings: name -> value, as ``/set`` shows them; empty in files that other programs wrote.
    """

    messages: tuple[dict, ...]
    system: str | None
    model: str | None
    settings: dict


def save(file: str, messages: Sequence[dict], system: str | None, model: str, settings: dict, replace: bool) -> Path:
    """Writes a conversation; what was there stays until all is written.

    Raises:
        UserError: the file is there already and ``replace`` is False; or it cannot be written.
    """
    path = Path(file).expanduser()
    first = [{"role": "system", "content": system}] if system else []
    found = {"format": FORMAT, "model": model, "messages": [*first, *messages], "settings": settings}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file that could be replaced")
        if replace:
            _write(path.with_name(f".{path.name}.{os.getpid()}.new"), text).replace(path)
        else:
            _write(path, text)
    except FileExistsError:
        raise UserError(f"{path} is there already: name another file, or replace it with /save! {file}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    return path


def _write(path: Path, text: str) -> Path:
    """A file that was not there before, or none. FileExistsError if it was."""
    with open(path, "x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise
    return path


def load(file: str) -> SavedChat:
    """Reads what ``save`` wrote, or any JSON object with ``messages``.

    Raises:
        UserError: it cannot be read, or holds no conversation; one line that names the file.
    """
    path = Path(file).expanduser()
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with mendable():
        text = decode_text(data, str(path))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a saved conversation (not valid JSON)") from error
    if not isinstance(found, dict) or "messages" not in found:
        raise UserError(f"{path}: not a saved conversation (no messages in it)")
    with mendable():
        _, messages = record_content({"messages": found["messages"]}, str(path))
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    pairs = messages[system is not None :]
    roles = [message["role"] for message in pairs]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{path}: messages must be of user and assistant in turn, after at most one of system")
    plain = tuple({"role": message["role"], "content": message["content"]} for message in pairs)
    settings, model = found.get("settings", {}), found.get("model")
    if not isinstance(settings, dict) or not isinstance(model, str | None):
        raise UserError(f"{path}: not a saved conversation (settings must be an object, model a name)")
    return SavedChat(plain, system, model, settings)
