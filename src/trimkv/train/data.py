"""Token streams for training: documents packed to a fixed length, with their borders.

What sample number i holds depends on the seed and on i alone: a training that was killed goes on where it stopped by
asking for the next number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .. import fingerprint
from ..texts import Text, read_texts
from .corpus import Corpus, tokenise
from .hub import Convert, hub_texts, is_hub

IGNORED = -100
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Source:
    """Files of one kind, or one hub dataset.

    Attributes:
        path: a file as ``texts.read_texts`` takes it, several of them, or a hub dataset: "org/name", or
            "hub:org/name@revision:split:field" (also "hub:org/name/config@..."), all but org/name optional.
        weight: share of the samples, in proportion to the other sources'; None (then in all sources) gives each its
            share of the tokens.
        max_tokens: at most so many tokens, spread over the documents of files; the first ones of a hub dataset.
        convert: for a hub dataset: makes of a record one that has text or messages, or None to leave it out.
        folder: for a hub dataset: a local copy of it, read in its place.
        borders: whether records are documents of their own. Without borders they follow each other in one document,
            with blank lines between, as ``compare`` reads them: short records then make a long context.
    """

    path: str | Path | Sequence[str | Path]
    weight: float | None = None
    max_tokens: int | None = None
    borders: bool = True
    convert: Convert | None = None
    folder: str | Path | None = None

    @property
    def name(self) -> str:
        paths = [self.path] if isinstance(self.path, str | Path) else self.path
        return ", ".join(map(str, paths))

    @property
    def from_hub(self) -> bool:
        return isinstance(self.path, str) and is_hub(self.path)

    def fingerprint(self) -> dict:
        """Name, size and SHA-256 of the files, or the name of the hub dataset; and what is taken from it.

        Raises:
            ValueError: a file that cannot be read.
        """
        options = {
            "weight": self.weight,
            "max_tokens": self.max_tokens,
            "borders": None if self.borders else False,
            "convert": self.convert and self.convert.__qualname__,
        }
        options = {name: value for name, value in options.items() if value is not None}
        try:
            if self.from_hub and self.folder is not None:
                return {**fingerprint.of_folder(self.folder), "name": self.path, **options}
            if self.from_hub:
                return {"name": self.path, **options}
            if isinstance(self.path, str | Path):
                return {**fingerprint.of_file(self.path), **options}
            files = [fingerprint.of_file(path) for path in self.path]
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
        return {"name": self.name, "digest": fingerprint.of_json(files), "files": files, **options}

    def texts(self) -> Iterator[Text]:
        if self.from_hub:
            return hub_texts(self.path, self.convert, self.folder)
        return read_texts([self.path] if isinstance(self.path, str | Path) else self.path)


class PackedTexts(Dataset):
    """Samples of exactly ``context`` tokens.

    A document of at least ``context`` tokens is cut into pieces of that length. Shorter ones, and what is left of long
    ones, follow one another until a sample is full; one that the border cuts continues in the next sample. Every piece
    is a document of its own to attention, and where the tokenizer marks the beginning of a text it begins with that
    mark. Documents are shuffled once, samples anew in every epoch.

    A sample is a dict of tensors [T]:
        input_ids: int64, the pad token after the last document.
        labels: int64, the token ids; -100 on padding, on the first token of a document (nothing in it predicts that)
            and, with ``response_only``, on all of a conversation but the assistant's responses.
        start: int64, the index of the first token of the document a token belongs to; its own index on padding.
        mask: bool, False on padding.

    Args:
        sources: files, hub datasets or ``Source``s.
        tokenizer: a transformers tokenizer; with a chat template if there are messages.
        context: T, at least 2.
        seed: order of documents and samples.
        pack: False gives one piece a sample, padded on the right.
        response_only: of conversations learn the responses only; samples with nothing to learn are left out. Texts
            without roles are learnt whole.
        samples: length of the dataset; None for every sample once (with weights: as many as there are).
        progress: called with a source's name and its tokens so far, while it is tokenised at the first use.

    Raises (at the first use):
        ValueError: unreadable files, messages without a chat template, weights for some sources only, nothing to learn,
            or less than ``context`` tokens in a source.
    """

    def __init__(
        self,
        sources: Sequence[str | Path | Source],
        tokenizer,
        context: int,
        *,
        seed: int = 0,
        pack: bool = True,
        response_only: bool = False,
        samples: int | None = None,
        progress: Progress | None = None,
    ):
        self.sources = [source if isinstance(source, Source) else Source(source) for source in sources]
        if not self.sources:
            raise ValueError("no data to train on: name at least one file")
        if context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {context}")
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("give every source a weight, or none")
        if any(given) and not (min(s.weight for s in self.sources) >= 0 < sum(s.weight for s in self.sources)):
            raise ValueError("weights must not be negative, and not all zero")
        self.tokenizer, self.context, self.seed, self.pack = tokenizer, context, seed, pack
        self.response_only, self.samples, self.progress = response_only, samples, progress
        first = tokenizer("a").input_ids[:1]
        self.mark = first if first and first == [tokenizer.bos_token_id] else []
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in pads if token is not None)

    def __len__(self) -> int:
        return sum(len(pieces) for pieces in self._packed) if self.samples is None else self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        source, number = (int(x) for x in self._turns[:, index])
        epoch, place = divmod(number, len(self._packed[source]))
        order = np.random.default_rng([self.seed, source, epoch]).permutation(len(self._packed[source]))
        return self._sample(self._corpora[source], self._packed[source][order[place]])

    @property
    def num_tokens(self) -> list[int]:
        """Tokens in each source, after ``max_tokens``."""
        return [len(corpus.ids) for corpus in self._corpora]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document in any sample: what eviction can be learnt from."""
        lengths = (end - begin for packed in self._packed for pieces in packed for begin, end in pieces)
        return max(lengths) + len(self.mark)

    def fingerprint(self) -> dict:
        """What decides the samples: the data, and a digest of the tokens that the tokenizer made of them."""
        arrays = (array for corpus in self._corpora for array in (corpus.ids, corpus.learn, corpus.borders))
        return {
            "data": [source.fingerprint() for source in self.sources],
            "tokens": fingerprint.of_tensors(map(torch.from_numpy, arrays)),
            "order": self.seed,
            "pack": self.pack,
            "response_only": self.response_only,
        }

    def _sample(self, corpus: Corpus, pieces: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        ids = np.full(self.context, self.pad, np.int64)
        labels, start = np.full(self.context, IGNORED, np.int64), np.arange(self.context)
        used = 0
        for begin, end in pieces:
            first = used + len(self.mark)
            last = first + end - begin
            ids[used:first], ids[first:last] = self.mark, corpus.ids[begin:end]
            labels[first:last] = np.where(corpus.learn[begin:end], corpus.ids[begin:end], IGNORED)
            labels[used], start[used:last] = IGNORED, used
            used = last
        arrays = {"input_ids": ids, "labels": labels, "start": start, "mask": np.arange(self.context) < used}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @cached_property
    def _corpora(self) -> list[Corpus]:
        return [
            tokenise(
                source.texts(),
                self.tokenizer,
                max_tokens=source.max_tokens,
                streamed=source.from_hub,
                borders=source.borders,
                response_only=self.response_only,
                seed=self.seed,
                progress=self.progress and (lambda tokens, name=source.name: self.progress(name, tokens)),
            )
            for source in self.sources
        ]

    @cached_property
    def _packed(self) -> list[list[list[tuple[int, int]]]]:
        """Of each source, the samples: pieces, as (begin, end) in the source's tokens."""
        packed = []
        for number, (source, corpus) in enumerate(zip(self.sources, self._corpora, strict=True)):
            length = self.context - len(self.mark)
            if self.pack and len(corpus.ids) < length:
                raise ValueError(
                    f"{source.name}: {len(corpus.ids)} tokens are too few for one sample of {self.context}; "
                    "take a smaller context or more text"
                )
            order = np.random.default_rng([self.seed, number]).permutation(len(corpus.borders) - 1)
            samples = list(self._pieces(corpus, order, length))
            if self.response_only:
                samples = [pieces for pieces in samples if any(corpus.learn[b + 1 : e].any() for b, e in pieces)]
            if not samples:
                raise ValueError(f"{source.name}: nothing to learn from; its conversations hold no responses")
            packed.append(samples)
        return packed

    def _pieces(self, corpus: Corpus, order: np.ndarray, length: int) -> Iterator[list[tuple[int, int]]]:
        waiting, room = [], self.context
        for document in order:
            begin, end = int(corpus.borders[document]), int(corpus.borders[document + 1])
            while end - begin >= length:
                yield [(begin, begin + length)]
                begin += length
            while begin < end:
                part = min(end - begin, room - len(self.mark))
                if part > 0:
                    waiting.append((begin, begin + part))
                    begin, room = begin + part, room - part - len(self.mark)
                if room <= len(self.mark) or not self.pack:
                    yield waiting
                    waiting, room = [], self.context
        if waiting:
            yield waiting

    @cached_property
    def _turns(self) -> np.ndarray:
        """[2, samples]: which source has a sample's turn, and how many turns it had before.

        The source that is furthest behind its share is next: any stretch of samples holds the mix, and a longer
        dataset begins as a shorter one does.
        """
        sizes = [len(pieces) for pieces in self._packed]
        weights = [size if s.weight is None else s.weight for s, size in zip(self.sources, sizes, strict=True)]
        shares = [weight / sum(weights) for weight in weights]
        taken, turns = [0] * len(shares), np.empty((2, len(self)), np.int64)
        for index in range(len(self)):
            behind = [share * (index + 1) - count for share, count in zip(shares, taken, strict=True)]
            source = behind.index(max(behind))
            turns[:, index] = source, taken[source]
            taken[source] += 1
        return turns


def collate(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: every tensor [B, T]."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
