"""Datasets of the Hugging Face hub, streamed. Needs the ``train`` extra."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..extras import install_extra
from ..texts import SUFFIXES, Text, record_content

Convert = Callable[[dict], dict | None]
PATTERN = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[^:]+))?(:(?P<split>[^:]+))?(:(?P<field>[^:]+))?"
)


def is_hub(path: str) -> bool:
    """Whether this names a hub dataset: it says so, or looks like org/name and no such file exists."""
    if path.startswith("hub:"):
        return True
    a_file = path.startswith((".", "~")) or path.lower().endswith(SUFFIXES) or Path(path).exists()
    return bool(PATTERN.fullmatch(path)) and not a_file


def hub_texts(path: str, convert: Convert | None = None, folder: str | Path | None = None) -> Iterator[Text]:
    """The records of "hub:org/name@revision:split:field", streamed in their order.

    Without a revision today's newest one is looked up and pinned, so that a stream that breaks off and is taken up
    again stays the same. The split is "train" unless named. A field holds text or messages; without one, records are
    understood as those of .jsonl files are.

    Args:
        convert: makes of a record one that has text or messages; None leaves it out.
        folder: a local copy of the dataset, read in its place.
    """
    match, datasets = _parse(path), _package(path)
    name, split, field = match["name"], match["split"] or "train", match["field"]
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder (for a local copy of {name})")
    try:
        if folder is not None:
            place, revision = str(folder), None
        else:
            place, revision = name, match["revision"] or _newest(name)
        records = datasets.load_dataset(place, match["config"], revision=revision, split=split, streaming=True)
    except Exception as error:  # of the hub, of the network, of the dataset's own files
        raise ValueError(f"{path}: cannot be loaded ({_line(error)})") from None
    source = f"{name}@{revision}:{split}" if folder is None else f"{folder}:{split}"
    return _texts(records, source, field, convert)


def pin(path: str) -> str:
    """The path with a revision: its own, or today's newest."""
    match = _parse(path)
    if match["revision"]:
        return path
    try:
        revision = _newest(match["name"])
    except Exception as error:
        raise ValueError(f"{path}: {_no_file(path)}cannot be looked up on the hub ({_line(error)})") from None
    end = match.end("config") if match["config"] else match.end("name")
    return f"hub:{match.string[:end]}@{revision}{match.string[end:]}"


def check(path: str) -> None:
    """Whether a hub dataset could be read as far as is known without asking the hub.

    Raises:
        ValueError: a name that is none, or the package datasets is missing.
    """
    _parse(path)
    _package(path)


def _package(path: str):
    try:
        import datasets
    except ImportError:
        mend = f"hub datasets need the package datasets: {install_extra('train')}"
        raise ValueError(f"{path}: {_no_file(path)}{mend}") from None
    return datasets


def _no_file(path: str) -> str:
    """For a name that may have been meant as a file's."""
    return "" if path.startswith("hub:") else "no such file; "


def _parse(path: str) -> re.Match:
    match = PATTERN.fullmatch(path.removeprefix("hub:"))
    if not match:
        raise ValueError(f"{path}: expected hub:org/name@revision:split:field (all but org/name optional)")
    return match


def _newest(name: str) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, timeout=20).sha


def _texts(records, source: str, field: str | None, convert: Convert | None) -> Iterator[Text]:
    for number, record in enumerate(_unbroken(records, source), 1):
        where = f"{source}, record {number}"
        if field is not None:
            if field not in record:
                raise ValueError(f"{where}: no field {field}; there are {', '.join(record)}")
            record = {"text" if isinstance(record[field], str) else "messages": record[field]}
        if convert is not None:
            try:
                record = convert(record)
            except KeyError as error:
                raise ValueError(f"{where}: no field {error}; there are {', '.join(record)}") from None
            if record is None:
                continue
        text, messages = record_content(record, where)
        if messages or text.strip():
            yield Text(text, messages, source, number)


def _unbroken(records, source: str) -> Iterator[dict]:
    """A stream opens its files as it goes: what is wrong with one of them, or with the network, shows late."""
    iterator, number = iter(records), 0
    while True:
        try:
            record = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{source}: cannot be read after record {number} ({_line(error)})") from None
        number += 1
        yield record


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
