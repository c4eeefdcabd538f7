"""A conversation over one bounded cache: only what is new is ever fed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.request import end_tokens
from .answer import Answer, Sampling, answer, read
from .turns import encode, first_turn, next_turn


@dataclass(frozen=True)
class _Mark:
    """A conversation as it was at some moment. The cache's part has a fixed size, however long the conversation was,
    unless its policy keeps every token."""

    cache: Any  # what cache.snapshot() gave; None where nothing was seen
    history: tuple[int, ...]
    messages: tuple[dict, ...]


@dataclass
class Conversation:
    """Everything that was said, and the cache that has read it.

    Attributes:
        history: all tokens, the newest of which the cache may not have seen yet (an answer's last token never is).
        messages: ``{"role": "user" or "assistant", "content": text}``, in pairs.
    """

    model: object
    tokenizer: object
    cache: object
    sampling: Sampling
    chunk: int | None
    system: str | None = None
    history: list[int] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)
    _before: _Mark | None = None  # before the last message

    def say(
        self,
        message: str,
        write: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        reading: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """The model's answer to a message.

        Stopped before the first token of the answer, or failed, the conversation is as it was before the message, for
        the cache, too: it has read a part of it, and is put back. Stopped later, what was written is the answer.

        Raises:
            ValueError: the model's chat template refuses the message.
        """
        turn = encode(self.tokenizer, self._turn(message))
        mark = self._mark()
        self._drop_unfed_end()
        self.history += turn
        try:
            out = answer(
                self.model, self.tokenizer, self.cache, self.history, self.sampling, self.chunk, write, stopped, reading
            )
        except Exception:
            self._go_back(mark)
            raise
        if not out.token_ids:
            self._go_back(mark)
            return out
        self._before = mark
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": out.text}]
        return out

    def retry(
        self,
        write: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        reading: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """Another answer to the last message, in the place of the one before. Where it is stopped before its first
        token, that one stays.

        Raises:
            ValueError: nothing was said yet.
        """
        if self._before is None:
            raise ValueError("nothing was said yet, so there is nothing to answer again")
        before, now, message = self._before, self._mark(), self.messages[-2]["content"]
        self._go_back(before)
        try:
            out = self.say(message, write, stopped, reading)
        except Exception:
            self._go_back(now)
            raise
        if not out.token_ids:
            self._go_back(now)
        return out

    def take_over(
        self,
        messages: Sequence[dict],
        system: str | None,
        stopped: Callable[[], bool] = lambda: False,
        reading: Callable[[int, int], None] = lambda done, total: None,
    ) -> bool:
        """Replaces the conversation by another, which the cache reads from its beginning.

        Args:
            messages: of users and assistants, in pairs.

        Returns:
            False if it was stopped: the conversation is as it was.

        Raises:
            ValueError: the model's chat template refuses it; the conversation is as it was.
        """
        now, system_now, before_now = self._mark(), self.system, self._before
        try:
            self.reset()
            self.system = system
            whole = self._feed_pairs(messages, stopped, reading)
        except Exception:
            self._go_back(now)
            self.system, self._before = system_now, before_now
            raise
        if not whole:
            self._go_back(now)
            self.system, self._before = system_now, before_now
        return whole

    def reset(self) -> None:
        """Starts anew in the same memory. The system message stays."""
        self.cache.reset()
        self.history.clear()
        self.messages.clear()
        self._before = None

    def _feed_pairs(self, messages: Sequence[dict], stopped, reading) -> bool:
        starts = []  # of each pair, in tokens
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            starts.append(len(self.history))
            self.history += encode(self.tokenizer, self._turn(user["content"]))
            self.history += encode(self.tokenizer, assistant["content"])
            self.messages += [user, assistant]
        for end in (*starts[-1:], len(self.history)):
            if not read(self.model, self.cache, self.history, end, self.chunk, stopped, reading):
                return False
            if end < len(self.history):
                mark = self._mark()
                self._before = _Mark(mark.cache, mark.history[:end], mark.messages[:-2])
        return True

    def _turn(self, message: str) -> str:
        if self.history:
            return next_turn(self.tokenizer, message)
        return first_turn(self.tokenizer, message, self.system)

    def _mark(self) -> _Mark:
        held = self.cache.snapshot() if self.cache.get_seq_length() else None
        return _Mark(held, tuple(self.history), tuple(self.messages))

    def _go_back(self, mark: _Mark) -> None:
        if mark.cache is None:
            self.cache.reset()
        else:
            self.cache.restore(mark.cache)
        self.history[:], self.messages[:] = mark.history, mark.messages

    def _drop_unfed_end(self) -> None:
        """The template writes the end of the last answer itself, whether the model came to an end or was cut short."""
        seen = self.cache.get_seq_length()
        if len(self.history) > seen and self.history[-1] in end_tokens(self.model, self.tokenizer):
            self.history.pop()
