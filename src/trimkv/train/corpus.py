"""Records tokenised once, into flat arrays: four bytes a token, and one that says whether to learn it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..texts import SEPARATOR, Text, cut_text
from .chat import chat_tokens

PIECE = 16_384  # characters tokenised at a time
REPORT_EVERY = 1 << 18  # tokens between two calls of progress


@dataclass(frozen=True)
class Corpus:
    """Documents one after another.

    Attributes:
        ids: int32 [N].
        learn: bool [N], whether the token counts in the loss.
        borders: int64 [documents + 1], where documents begin, and the end of the last.
    """

    ids: np.ndarray
    learn: np.ndarray
    borders: np.ndarray


def tokenise(
    texts: Iterable[Text],
    tokenizer,
    *,
    max_tokens: int | None = None,
    streamed: bool = False,
    borders: bool = True,
    response_only: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Tokenises records, or as many pieces of them as ``max_tokens`` asks for.

    Texts are cut into pieces of about 16,000 characters. A selection takes them in a random order that depends on the
    seed alone, so it is spread over all documents, and then puts neighbours together again. With ``streamed`` records
    are taken in their order, and not read any further than needed.
    """
    units = ((record, part, piece) for record, text in enumerate(texts) for part, piece in enumerate(_cut(text)))
    if max_tokens is not None and not streamed:
        pieces = list(units)
        units = (pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces)))
    done, total, reported = [], 0, 0
    for record, part, piece in units:
        if max_tokens is not None and total >= max_tokens:
            break
        ids, learn = _encode(tokenizer, piece, response_only)
        left = len(ids) if max_tokens is None else max_tokens - total
        done.append((record, part, ids[:left], learn[:left], isinstance(piece, Text)))
        total += len(done[-1][2])
        if progress and total - reported >= REPORT_EVERY:
            progress(total)
            reported = total
    if progress:
        progress(total)
    return _assemble(sorted(done, key=lambda unit: unit[:2]), tokenizer, borders)


def _cut(text: Text) -> Iterator[str | Text]:
    if text.messages is not None:
        yield text
    else:
        yield from cut_text(text.text, PIECE)


def _encode(tokenizer, piece: str | Text, response_only: bool) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(piece, str):
        ids = np.array(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids, np.int32)
        return ids, np.ones(len(ids), bool)
    where = f"{piece.source}, line {piece.index}"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: messages need a model that has a chat template")
    try:
        ids, learn = chat_tokens(tokenizer, piece.messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(ids) and ids[0] == tokenizer.bos_token_id and tokenizer("a").input_ids[0] == ids[0]:
        ids, learn = ids[1:], learn[1:]  # packing writes the mark, at every piece's beginning
    return ids, learn if response_only else np.ones_like(learn)


def _assemble(units: list, tokenizer, borders: bool) -> Corpus:
    """Neighbouring pieces of a record make one document; without borders everything does."""
    separator, counted = _encode(tokenizer, SEPARATOR, response_only=False)
    ids, learn, starts, total, before = [], [], [], 0, None
    for record, part, unit_ids, unit_learn, is_chat in units:
        follows = before == (record, part - 1)
        before = (record, part)
        if not follows and not borders and ids and not is_chat:
            ids.append(separator)
            learn.append(counted)
            total += len(separator)
        if not follows and (borders or not starts):
            starts.append(total)
        ids.append(unit_ids)
        learn.append(unit_learn)
        total += len(unit_ids)
    join = np.concatenate if ids else lambda _: np.empty(0)
    return Corpus(join(ids).astype(np.int32), join(learn).astype(bool), np.array([*starts, total], np.int64))
