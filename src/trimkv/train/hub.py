"""Datasets of the Hugging Face hub, streamed. Needs the ``train`` extra."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..texts import SUFFIXES, Text, record_content

PATTERN = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[^:]+))?(:(?P<split>[^:]+))?(:(?P<field>[^:]+))?"
)


def is_hub(path: str) -> bool:
    """Whether this names a hub dataset: it says so, or looks like org/name and no such file exists."""
    if path.startswith("hub:"):
        return True
    return bool(PATTERN.fullmatch(path)) and not path.endswith(SUFFIXES) and not Path(path).exists()


def hub_texts(path: str) -> Iterator[Text]:
    """The records of "hub:org/name@revision:split:field", streamed in their order.

    Without a revision today's newest one is looked up and pinned, so that a stream that breaks off and is taken up
    again stays the same. The split is "train" unless named. A field holds text or messages; without one, records are
    understood as those of .jsonl files are.
    """
    match = PATTERN.fullmatch(path.removeprefix("hub:"))
    if not match:
        raise ValueError(f"{path}: expected hub:org/name@revision:split:field (all but org/name optional)")
    try:
        import datasets
    except ImportError:
        missing = "" if path.startswith("hub:") else "no such file; "
        mend = "hub datasets need the package datasets: pip install 'trimkv[train]'"
        raise ValueError(f"{path}: {missing}{mend}") from None
    name, split, field = match["name"], match["split"] or "train", match["field"]
    try:
        revision = match["revision"] or _newest(name)
        records = datasets.load_dataset(name, match["config"], revision=revision, split=split, streaming=True)
    except Exception as error:  # of the hub, of the network, of the dataset's own files
        raise ValueError(f"{path}: cannot be loaded ({' '.join(str(error).split())})") from None
    return _texts(records, f"{name}@{revision}:{split}", field)


def _newest(name: str) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name).sha


def _texts(records, source: str, field: str | None) -> Iterator[Text]:
    for number, record in enumerate(records, 1):
        where = f"{source}, record {number}"
        if field is not None:
            if field not in record:
                raise ValueError(f"{where}: no field {field}; there are {', '.join(record)}")
            record = {"text" if isinstance(record[field], str) else "messages": record[field]}
        text, messages = record_content(record, where)
        if messages or text.strip():
            yield Text(text, messages, source, number)
