"""One answer over a bounded cache: read what the cache has not seen, then write token by token."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ..cache.prefill import prefill
from ..engine.request import end_tokens
from ..hf.calls import with_cache


@dataclass
class Answer:
    """What came out.

    Attributes:
        text: without special tokens.
        token_ids: as drawn, the end token included.
        finish_reason: "stop" (end token), "length" or "interrupted".
        prefill_seconds: until the first token was there.
        decode_tokens_per_second: of the tokens after the first; None if there is no second one.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        penalty_window: the repetition penalty looks back no further than so many tokens before the answer: in a
            conversation without end every word has been said. None: to the beginning, as in transformers.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    penalty_window: int | None = None


def answer(
    model,
    tokenizer,
    cache,
    history: list[int],
    sampling: Sampling,
    chunk: int | None,
    write: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    reading: Callable[[int, int], None] = lambda done, total: None,
) -> Answer:
    """Continues ``history``, of which the cache has seen the first ``cache.get_seq_length()`` tokens.

    Only the rest is fed, all but its last token in chunks: the past is never read twice. Generated tokens are appended
    to ``history``; the last of them is not in the cache yet, and the next call feeds it. The call may be stopped
    between any two forward passes, and ``history`` and cache still belong together.

    Args:
        history: every token of the text so far, changed in place.
        chunk: tokens of a forward; None feeds all of them in one.
        write: gets text as soon as it is certain.
        stopped: asked before every forward pass.
        reading: called as ``reading(done, total)`` while the prompt is fed.
    """
    start = time.perf_counter()
    prompt_tokens = len(history) - cache.get_seq_length()
    stream = _Stream(tokenizer, write or (lambda text: None))
    if chunk:
        read(model, cache, history, len(history) - 1, chunk, stopped, reading)
    reading(prompt_tokens, prompt_tokens)
    ends = end_tokens(model, tokenizer)
    if not stopped():
        ids = torch.tensor([history], device=model.device)
        # The whole history goes in, so that the repetition penalty means what it means in transformers; generate
        # feeds only what the cache has not seen.
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **with_cache(model, cache),
            generation_config=_config(sampling, ends, tokenizer),
            logits_processor=_penalty(sampling, len(history)),
            stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
            streamer=stream,
        )
    new = stream.tokens
    history += new
    reason = "stop" if new and new[-1] in ends else "interrupted" if stopped() else "length"
    first = stream.times[0] if stream.times else time.perf_counter()
    seconds = stream.times[-1] - first if len(new) > 1 else 0.0
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True),
        token_ids=new,
        prompt_tokens=prompt_tokens,
        finish_reason=reason,
        prefill_seconds=first - start,
        decode_tokens_per_second=(len(new) - 1) / seconds if seconds else None,
    )


def read(
    model,
    cache,
    history: list[int],
    end: int,
    chunk: int | None,
    stopped: Callable[[], bool] = lambda: False,
    reading: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Feeds the tokens of ``history`` before ``end`` that the cache has not seen, in chunks.

    Returns:
        False if ``stopped`` said so between two chunks: the rest was not fed.
    """
    fed = cache.get_seq_length()
    for begin in range(fed, end, chunk or max(end, 1)):
        reading(begin - fed, len(history) - fed)
        if stopped():
            return False
        part = torch.tensor([history[begin : min(begin + (chunk or end), end)]], device=model.device)
        prefill(model, cache, part, chunk=part.shape[1])
    return True


def _config(sampling: Sampling, ends: tuple[int, ...], tokenizer) -> GenerationConfig:
    drawn = sampling.temperature > 0
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=drawn,
        repetition_penalty=1.0,  # not the model's own: see _penalty
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
        # top_k=0: only what was asked for; transformers would cut at 50
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if drawn else {}),
    )


def _penalty(sampling: Sampling, history: int) -> LogitsProcessorList:
    if sampling.repetition_penalty == 1:
        return LogitsProcessorList()
    unseen = 0 if sampling.penalty_window is None else max(history - sampling.penalty_window, 0)
    penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty), prompt_ignore_length=unseen)
    return LogitsProcessorList([penalty])


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], self.stopped(), dtype=torch.bool, device=input_ids.device)


class _Stream(BaseStreamer):
    """Collects tokens with their times, and passes their text on.

    A token's text depends on its neighbours (spaces, characters of several bytes), so text is decoded together with
    the tokens of the previous piece, and held back while it ends within a character.
    """

    def __init__(self, tokenizer, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.prompt_passed = False
        self.context, self.written = 0, 0  # token indices: where decoding starts, up to where text was passed on

    def put(self, value):
        if not self.prompt_passed:  # generate hands over the prompt first
            self.prompt_passed = True
            return
        self.tokens += value.flatten().tolist()
        self.times.append(time.perf_counter())
        self._pass_on()

    def end(self):
        self._pass_on(last=True)

    def _pass_on(self, last: bool = False) -> None:
        before = self._decode(self.tokens[self.context : self.written])
        text = self._decode(self.tokens[self.context :])
        if len(text) > len(before) and (last or not text.endswith("\ufffd")):
            self.write(text[len(before) :])
            self.context, self.written = self.written, len(self.tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
