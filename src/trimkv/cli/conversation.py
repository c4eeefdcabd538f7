"""A conversation over one bounded cache: only what is new is ever fed."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..engine.request import end_tokens
from .answer import Answer, Sampling, answer
from .turns import encode, first_turn, next_turn


@dataclass
class Conversation:
    """Everything that was said, and the cache that has read it.

    Attributes:
        history: all tokens, the newest of which the cache may not have seen yet (an answer's last token never is).
    """

    model: object
    tokenizer: object
    cache: object
    sampling: Sampling
    chunk: int | None
    system: str | None = None
    history: list[int] = field(default_factory=list)

    def say(
        self,
        message: str,
        write: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        reading: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """The model's answer to a message. ValueError if the model's chat template refuses the message."""
        if self.history:
            new = encode(self.tokenizer, next_turn(self.tokenizer, message))
            self._drop_unfed_end()
        else:
            new = encode(self.tokenizer, first_turn(self.tokenizer, message, self.system))
        self.history += new
        return answer(
            self.model, self.tokenizer, self.cache, self.history, self.sampling, self.chunk, write, stopped, reading
        )

    def reset(self) -> None:
        """Starts anew in the same memory."""
        self.cache.reset()
        self.history.clear()

    def _drop_unfed_end(self) -> None:
        """The template writes the end of the last answer itself, whether the model came to an end or was cut short."""
        seen = self.cache.get_seq_length()
        if len(self.history) > seen and self.history[-1] in end_tokens(self.model, self.tokenizer):
            self.history.pop()
