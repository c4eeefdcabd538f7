"""What is asked of the engine, and what has come of it."""

import time
from dataclasses import dataclass, field

MAX_STOPS = 8  # stop tokens of one request, those of the model included
MAX_TOP_K = 1024

# What a request asks of the choice of its tokens: the argmax of the model's own logits; a draw, or a penalty; these
# with top-k or top-p. Each asks for what those before it do.
GREEDY, DRAWN, LIMITED = KINDS = ("greedy", "drawn", "limited")

# What a step's report says of a row, and the reason a request ends with.
RUNNING, STOP, LENGTH, ERROR = range(4)
REASONS = {STOP: "stop", LENGTH: "length", ERROR: "error"}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends.

    Args:
        max_new_tokens: the most tokens that are generated; 0 is allowed and generates none.
        temperature: 0 takes the most probable token, always.
        top_k: draws from so many tokens at most; 0 = all.
        top_p: draws from the most probable tokens that together have this probability. Of a distribution so flat that
            these are more than 1,024, the 1,024 most probable.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred, as in transformers.
        seed: the same request with the same seed draws the same tokens, whatever else runs; None takes a new one.
        stop: tokens that end the request, besides those of the model.
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
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k must be from 0 (all tokens) to {MAX_TOP_K}, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 = none), got {self.repetition_penalty}")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def kind(self) -> str:
        """Of KINDS."""
        if self.temperature == 0:
            return GREEDY if self.repetition_penalty == 1 else DRAWN
        return DRAWN if self.top_k == 0 and self.top_p == 1 else LIMITED


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine.

    Attributes:
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
    prompt: list[int]
    params: SamplingParams
    stops: tuple[int, ...] = ()
    seed: int = 0
    tokenizer: object = field(default=None, repr=False)
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


def end_tokens(model, tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer. Chat models often name the end of a turn only in the tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = (*(ends if isinstance(ends, list) else [ends]), getattr(tokenizer, "eos_token_id", None))
    return tuple(dict.fromkeys(end for end in ends if end is not None))
