"""What is asked of the engine, and what has come of it."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from dataclasses import dataclass, field

from . import checks

MAX_STOPS = 8  # stop tokens of one request, those of the model included
MAX_TOP_K = 1024
MOST_TOKENS = 2**31 - 1  # devices count them in int32
# Within these, logits stay finite numbers of fp32, and more than none of a distribution is kept.
COLDEST, WARMEST = 1e-10, 1e10
MOST_PENALTY = 1000.0
LEAST_TOP_P = 1e-30

# What a request asks of the choice of its tokens: the argmax of the model's own logits; a draw, or a penalty; these
# with top-k or top-p. Each asks for what those before it do.
GREEDY, DRAWN, LIMITED = KINDS = ("greedy", "drawn", "limited")

# What a step's report says of a row, and the reason a request ends with.
RUNNING, STOP, LENGTH, ERROR = range(4)
REASONS = {STOP: "stop", LENGTH: "length", ERROR: "error"}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends.

    Numbers may be of numpy or torch; they are kept as plain ones.

    Args:
        max_new_tokens: the most tokens that are generated; 0 is allowed and generates none.
        temperature: 0 takes the most probable token, always.
        top_k: draws from so many tokens at most; 0 = all.
        top_p: draws from the most probable tokens that together have this probability. Of a distribution so flat that
            these are more than 1,024, the 1,024 most probable.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred, as in transformers.
        seed: the same request with the same seed draws the same tokens, whatever else runs; None takes a new one.
        stop: ids of tokens that end the request, besides those of the model.
        ignore_eos: whether the model's own end tokens are tokens like others.

    Raises:
        ValueError: with a one-line message that says what to change.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        temperature = checks.real("temperature", self.temperature)
        if temperature and not COLDEST <= temperature <= WARMEST:
            wrong = checks.shown(self.temperature)
            raise ValueError(f"temperature must be 0 (greedy) or from {COLDEST:g} to {WARMEST:g}, got {wrong}")
        top_p = checks.real("top_p", self.top_p)
        if not LEAST_TOP_P <= top_p <= 1:
            wrong = checks.shown(self.top_p)
            raise ValueError(f"top_p must be from {LEAST_TOP_P:g}, above 0, to 1 (all tokens), got {wrong}")
        penalty = checks.real("repetition_penalty", self.repetition_penalty)
        if not 1 / MOST_PENALTY <= penalty <= MOST_PENALTY:
            raise ValueError(
                f"repetition_penalty must be from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g} (1 = none), "
                f"got {checks.shown(self.repetition_penalty)}"
            )
        checked = {
            "max_new_tokens": checks.whole("max_new_tokens", self.max_new_tokens, 0, MOST_TOKENS),
            "temperature": temperature,
            "top_k": checks.whole("top_k (0 = all tokens)", self.top_k, 0, MAX_TOP_K),
            "top_p": top_p,
            "repetition_penalty": penalty,
            "seed": None if self.seed is None else checks.whole("seed", self.seed),
            "stop": _stop_ids(self.stop),
            "ignore_eos": checks.flag("ignore_eos", self.ignore_eos),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """Of KINDS."""
        if self.temperature == 0:
            return GREEDY if self.repetition_penalty == 1 else DRAWN
        return DRAWN if self.top_k == 0 and self.top_p == 1 else LIMITED


def _stop_ids(stop) -> tuple[int, ...]:
    if stop is None:
        return ()
    texts = [stop] if isinstance(stop, (str, bytes)) else stop if isinstance(stop, (list, tuple, Set)) else ()
    for text in texts:
        if isinstance(text, (str, bytes)):
            raise ValueError(
                f"stop takes token ids, and {checks.shown(text)} is text: take the id from "
                "tokenizer.encode(text, add_special_tokens=False), if the text is one token"
            )
    if isinstance(stop, int) or getattr(stop, "ndim", None) == 0:
        raise ValueError(f"stop must be a list of token ids, got one number: write stop=[{checks.shown(stop)}]")
    ids = checks.token_ids("stop", stop)
    for id in ids:
        checks.whole("a token id in stop", id, 0, MOST_TOKENS)
    return ids


def _no_engine() -> None:
    """What a weak reference says whose object is gone."""


@dataclass(eq=False, repr=False)
class Request:
    """One prompt on its way through the engine, and the handle by which its caller has it.

    Wait for it with ``result``, or iterate over it to get its tokens as they come (``for`` and ``async for``). The
    engine lets go of a request that has ended: what came of it is here and nowhere else. A handle does not keep its
    engine in memory.

    Attributes:
        id: its number in the engine.
        prompt: token ids.
        stops: all tokens that end it.
        status: "queued", "prefilling", "running", "finished".
        tokens: what was generated, an end token included.
        finish_reason: "stop", "length", "cancelled" or "error", once it is finished.
        error: what went wrong, with reason "error".
        reused_tokens: tokens of the prompt that a kept prefix spared.
        added, started, finished: seconds of time.perf_counter(): when it came, when its prompt began to be read, when
            it ended.
        times: when each token became known here; the first of them ends the prompt.
        text: of the tokens, without special ones; None without a tokenizer.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stops: tuple[int, ...] = ()
    seed: int = 0
    tokenizer: object = None
    status: str = "queued"
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    reused_tokens: int = 0
    added: float = field(default_factory=time.perf_counter)
    started: float | None = None
    finished: float | None = None
    times: list[float] = field(default_factory=list)
    is_prefix: bool = False  # its prompt is read and kept, and nothing is generated
    engine_ref: Callable[[], object] = _no_engine  # weak

    # What a caller does with it.

    def result(self) -> "Request":
        """Waits until it has finished, and returns it. See ``Engine.result``."""
        return self if self.done else self._engine().result(self)

    def cancel(self) -> bool:
        """Ends it, whatever it is doing. Returns whether it was not over yet; what it has made stays."""
        return not self.done and self._engine().cancel(self)

    def __iter__(self) -> Iterator[int]:
        """Yields its tokens as they come. See ``Engine.stream``."""
        return iter(tuple(self.tokens)) if self.done else self._engine().stream(self)

    def __aiter__(self) -> AsyncIterator[int]:
        """Yields its tokens in an event loop, as they come. See ``Engine.astream``."""
        return _each(self.tokens) if self.done else self._engine().astream(self)

    def _engine(self):
        engine = self.engine_ref()
        if engine is None:
            raise ValueError(f"the engine of request {self.id} is gone: keep it until its requests have finished")
        return engine

    def __repr__(self) -> str:
        status = f"{self.status}, {self.finish_reason}" if self.done else self.status
        error = "" if self.error is None else f", {checks.shown(self.error)}"
        said = f"{len(self.prompt)} prompt tokens, {len(self.tokens)} new"
        return f"<Request {self.id}: {status}{error}; {said}{self._beginning()}>"

    def _beginning(self) -> str:
        """The first characters of its text, if there are any."""
        if self.tokenizer is None or not self.tokens:
            return ""
        try:
            text = self.tokenizer.decode(self.tokens[:24], skip_special_tokens=True)
        except Exception:  # of a tokenizer that does not know a token; a repr has to go on
            return ""
        return f": {text[:37] + '...' if len(text) > 40 else text!r}"

    def __getstate__(self) -> dict:
        """A copy, in another process say, belongs to no engine."""
        return {**vars(self), "engine_ref": _no_engine}

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str | None:
        return self.tokenizer and self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def begin(self) -> None:
        """Notes that its prompt is being read from now on."""
        self.started, self.status = time.perf_counter(), "prefilling"

    def take(self, token: int) -> None:
        """Notes a token that was generated."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())

    def finish(self, reason: str, error: str | None = None) -> None:
        """Ends it, unless it has ended already."""
        if not self.done:
            self.finished, self.error = time.perf_counter(), error
            self.status, self.finish_reason = "finished", reason


async def _each(tokens: list[int]) -> AsyncIterator[int]:
    for token in tuple(tokens):
        yield token


def end_tokens(model, tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer. Chat models often name the end of a turn only in the tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = (*(ends if isinstance(ends, list) else [ends]), getattr(tokenizer, "eos_token_id", None))
    return tuple(dict.fromkeys(end for end in ends if end is not None))
