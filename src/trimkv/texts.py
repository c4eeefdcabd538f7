"""Text files in, token windows out.

Comparisons and trainings read the same files in the same way, so a number measured on a file can be repeated. Files
are read record by record and tokenised piece by piece: eight windows of a 50 MB file cost eight windows.
"""

import codecs
import gzip
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
PAIRS = [(q, a) for q in ("question", "problem") for a in ("solution", "answer")]
FIELDS = "text, messages, question + answer or problem + solution"
SEPARATOR = "\n\n"
MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Text:
    """One record of a file: plain text, or the messages of a chat.

    Attributes:
        text: the text; of a question with its answer, both with a blank line between. None for messages.
        messages: ({"role": ..., "content": ...}, ...), or None.
        source: the file's name as given.
        index: the record's line number in a .jsonl file (from 1); 1 for a .txt file, which is one record.
    """

    text: str | None
    messages: tuple[dict, ...] | None
    source: str
    index: int


def read_texts(paths: Iterable[str | Path]) -> Iterator[Text]:
    """The records of .txt and .jsonl files (also .gz), file by file, one at a time.

    A .txt file is one record. A .jsonl line has ``text``, or ``messages``, or ``question`` + ``answer`` (``problem``
    and ``solution`` are accepted in their places). Records without a single word are passed over.

    Raises:
        ValueError: with one line that names the file, and the line in it, and what is wrong there.
    """
    for path in map(Path, paths):
        name = path.name.lower()
        if not name.endswith(SUFFIXES):
            raise ValueError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
        empty = True
        for text in _read_jsonl(path) if name.removesuffix(".gz").endswith(".jsonl") else _read_txt(path):
            empty = False
            yield text
        if empty:
            raise ValueError(f"{path}: the file is empty")


def decode_text(data: bytes, name: str) -> str:
    """The text that bytes in UTF-8 spell, without the byte order mark that some editors put before it.

    Raises:
        ValueError: one line that begins with ``name`` and says what the bytes are instead.
    """
    refuse_other_encodings(data, name)
    if b"\0" in data:
        raise ValueError(f"{name}: binary data, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text (byte {error.start}: {error.reason})") from None


def refuse_other_encodings(head: bytes, name: str) -> None:
    """Refuses text in UTF-16 or UTF-32, which begins with such a mark or has a zero in every second byte.

    Args:
        head: its first bytes; the first line is enough.

    Raises:
        ValueError: one line that begins with ``name``.
    """
    found = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)
    if found is None and any(_looks_like(head[:512], codec) for codec in ("utf-16-le", "utf-16-be")):
        found = "UTF-16"
    if found:
        raise ValueError(f"{name}: {found} text; save it as UTF-8")


def _looks_like(head: bytes, codec: str) -> bool:
    """Whether these bytes are UTF-16 without a mark: mostly Latin letters, each with a zero beside it."""
    high_bytes = head[1::2] if codec == "utf-16-le" else head[::2]
    if len(head) < 4 or high_bytes.count(0) < 0.75 * len(high_bytes):
        return False
    letters = head[: len(head) // 2 * 2].decode(codec, "replace")
    return all(letter.isprintable() or letter.isspace() for letter in letters)


def windows(texts: Iterable[Text], tokenizer, context: int, max_sequences: int | None = None) -> Iterator[list[int]]:
    """Windows of exactly ``context`` tokens from one stream of records, in the order of ``file_windows``."""
    return _take(_documents_in_turns(texts, _Packer(tokenizer, context)), max_sequences)


def file_windows(
    paths: Iterable[str | Path], tokenizer, context: int, max_sequences: int | None = None
) -> Iterator[list[int]]:
    """Windows of exactly ``context`` tokens, spread over the files and over the documents in them.

    A record of at least ``context`` tokens is a document: it is cut into consecutive windows that do not overlap, and
    what is left at its end is dropped. Shorter records are packed one after another, with blank lines between, until a
    window is full; each packed window begins where a record begins. Messages go through the chat template.
    The order is fixed: files take turns, and within a file every document gives its first window before any gives its
    second. Where the tokenizer marks the beginning of a text, every window starts with that mark.

    Args:
        tokenizer: a transformers tokenizer.
        context: tokens per window, at least 2.
        max_sequences: windows at most; None for all (every document is then held in memory).

    Raises:
        ValueError: as ``read_texts``; or messages that the model's chat template does not take.
    """
    packer = _Packer(tokenizer, context)
    files = deque(_documents_in_turns(read_texts([path]), packer) for path in paths)
    return _take(_in_turns(files), max_sequences)


def _read_txt(path: Path) -> Iterator[Text]:
    text = "".join(line for _, line in _lines(path))
    if text.strip():
        yield Text(text, None, str(path), 1)


def _read_jsonl(path: Path) -> Iterator[Text]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        except RecursionError:
            raise ValueError(f"{where}: not valid JSON (nested too deeply)") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object with {FIELDS}")
        text, messages = record_content(record, where)
        if messages or text.strip():
            yield Text(text, messages, str(path), number)


def record_content(record: dict, where: str) -> tuple[str | None, tuple[dict, ...] | None]:
    if "text" in record:
        return _string(record["text"], f"{where}: field text"), None
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError(f"{where}: field messages must be a list of objects with role and content")
        for message in messages:
            for key in ("role", "content"):
                _string(message.get(key), f"{where}: {key} of a message")
        return None, tuple(messages)
    for pair in PAIRS:
        if all(key in record for key in pair):
            parts = (record[key] for key in pair)
            # Answers to sums are sometimes bare numbers.
            parts = [str(part) if type(part) in (int, float) else part for part in parts]
            both = zip(parts, pair, strict=True)
            return SEPARATOR.join(_string(part, f"{where}: field {key}") for part, key in both), None
    raise ValueError(f"{where}: no known fields; expected {FIELDS}")


def _string(value, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer can read
        raise ValueError(f"{what} is not valid Unicode") from None
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a wrong byte is reported with its line."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            refuse_other_encodings(file.peek(512), str(path))
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise ValueError(f"{path}, line {number}: binary data, not text")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


class _Packer:
    """Knows the tokenizer and the window's length, and holds the short records that wait for a window to fill."""

    def __init__(self, tokenizer, context: int):
        if context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {context}")
        self.tokenizer = tokenizer
        first = tokenizer("a").input_ids[:1]
        self.start = first if first == [tokenizer.bos_token_id] else []
        self.length = context - len(self.start)
        self.separator = self._encode(SEPARATOR)
        self.waiting: list[int] = []

    def blocks(self, text: Text) -> Iterator[list[int]]:
        """Blocks of ``length`` tokens, the last one shorter; tokenised piece by piece, without a first mark."""
        held, first = [], True
        for piece in cut_text(self._render(text), max(4096, 4 * self.length)):
            ids = self._encode(piece)
            if first and self.start and ids[:1] == self.start:  # a template that writes the mark itself
                ids = ids[1:]
            first = False
            held += ids
            while len(held) >= self.length:
                yield held[: self.length]
                held = held[self.length :]
        if held:
            yield held

    def pack(self, block: list[int], separated: bool) -> list[int]:
        """Adds a short record. Returns a full block, dropping what is too much of this record, or [] for not yet."""
        if self.waiting and separated:
            self.waiting += self.separator
        self.waiting += block
        if len(self.waiting) < self.length:
            return []
        full, self.waiting = self.waiting[: self.length], []
        return full

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _render(self, text: Text) -> str:
        if text.messages is None:
            return text.text
        where = f"{text.source}, line {text.index}"
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{where}: messages need a model that has a chat template")
        try:
            return self.tokenizer.apply_chat_template(list(text.messages), tokenize=False)
        except Exception as error:  # a template refuses what it does not know by raising whatever it likes
            raise ValueError(f"{where}: the chat template refuses it ({' '.join(str(error).split())})") from None


def _documents_in_turns(texts: Iterable[Text], packer: _Packer) -> Iterator[list[int]]:
    """The windows of one stream: the first of each document, then the second of each, and so on."""
    rest = deque()
    for text in texts:
        blocks = packer.blocks(text)
        block = next(blocks, [])
        if len(block) == packer.length:
            rest.append(blocks)
        elif block:
            block = packer.pack(block, separated=text.messages is None)
        if block:
            yield packer.start + block
    for block in _in_turns(rest):
        if len(block) == packer.length:
            yield packer.start + block


def _in_turns(iterators: deque[Iterator]) -> Iterator:
    """One item of each, again and again, until all are exhausted."""
    while iterators:
        iterator = iterators.popleft()
        for item in iterator:
            yield item
            iterators.append(iterator)
            break


def _take(items: Iterator, limit: int | None) -> Iterator:
    """The first items, without asking for one more than needed: the next may cost a whole file."""
    for number, item in enumerate(items, 1):
        yield item
        if number == limit:
            return


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cuts of about ``size`` characters, before white space where there is some, so that no word is cut in two."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = max(text.rfind(space, start + size // 2, end) for space in "\n ")
            end = start + size if end < 0 else end
        yield text[start:end]
        start = end
