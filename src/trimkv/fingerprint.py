"""What a result was made of, in a form that can be stored beside it, compared and said in a line."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

CHUNK = 1 << 20
SHOWN = 3  # differences that a message names
FILE = ("name", "bytes", "sha256", "files", "digest")
DIGITS = 16  # of a SHA-256, enough to tell results apart


def of_file(path: str | Path) -> dict:
    """Name, size in bytes and SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256()
    with open(path, "rb") as file:
        size = 0
        while block := file.read(CHUNK):
            total.update(block)
            size += len(block)
    return {"name": Path(path).name, "bytes": size, "sha256": total.hexdigest()}


def of_folder(path: str | Path) -> dict:
    """Name of a folder, and a digest of the names and sizes of all files in it."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    sizes = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    return {"name": Path(path).name, "files": len(files), "digest": of_json(sizes)}


def of_tensors(tensors: Iterable) -> str:
    """A digest of the bytes of torch tensors, in their order."""
    import torch

    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:DIGITS]


def of_json(value) -> str:
    """A digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def plain(value):
    """The value as it comes back from a JSON file: tuples are lists, paths and other objects are not allowed."""
    return json.loads(json.dumps(value))


def differences(then: dict, now: dict) -> list[str]:
    """What differs, as "NAME is THIS there, THAT here". Only what ``now`` names counts.

    Args:
        then: of the stored result.
        now: of what is asked for. A dict in it is compared by its own names, unless it is of a file or the like, with a
            name of its own.
    """
    found = []
    for name, value in plain(now).items():
        before = then.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and "name" not in value:
            found += [f"{name}.{one}" for one in differences(before, value)]
        elif before != value:
            found.append(f"{name} is {_said(before)} there, {_said(value)} here")
    return found


def line(found: list[str]) -> str:
    """Differences as one line; the first few of many."""
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _said(value) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, dict):
        if "name" in value:
            size = f" of {value['bytes']:,} bytes" if "bytes" in value else ""
            digest = value.get("sha256") or value.get("digest")
            rest = [f" {name} {_said(one)}" for name, one in value.items() if name not in FILE]
            return f"{value['name']}{size}" + (f" [{digest[:8]}]" if digest else "") + "".join(rest)
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    return str(value)
