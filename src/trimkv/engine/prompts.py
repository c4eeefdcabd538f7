"""From what a caller gives as a prompt (text, token ids or the messages of a chat) to token ids."""

import threading
from collections.abc import Mapping, Sequence, Set

import torch

from . import checks

Message = Mapping[str, object]
Prompt = str | Sequence[int] | torch.Tensor | Sequence[Message]


class Prompts:
    """Reads prompts for one model.

    Args:
        tokenizer: for text and messages; None leaves token ids.
        longest: tokens of a prompt.
        vocabulary: tokens that the model knows.
    """

    def __init__(self, tokenizer, longest: int, vocabulary: int):
        self.tokenizer, self.longest, self.vocabulary = tokenizer, longest, vocabulary
        self.tokenizing = threading.Lock()  # fast tokenizers change settings of their own while they work

    def token_ids(self, prompt: Prompt, is_prefix: bool = False) -> tuple[int, ...]:
        """The prompt's tokens.

        Args:
            prompt: messages are rendered by the tokenizer's chat template, up to where the answer begins.
            is_prefix: the prompt is the beginning of others: of messages only what they say is rendered.

        Raises:
            ValueError: it is no prompt, it is empty or too long, it has tokens that the model does not know, or the
                tokenizer or its chat template refuses it.
        """
        if isinstance(prompt, str):
            ids = checks.token_ids("the prompt's tokens", self._encode(prompt))
        elif _is_chat(prompt):
            ids = checks.token_ids("the prompt's tokens", self._encode_chat(prompt, is_prefix))
        else:
            ids = self._given(prompt)
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        self._check_length(len(ids))
        self.check_known("the prompt", ids)
        return ids

    def check_known(self, name: str, ids: Sequence[int]) -> None:
        """Refuses tokens that the model does not know.

        Raises:
            ValueError: there are some.
        """
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(id for id in ids if not 0 <= id < self.vocabulary)
            raise ValueError(
                f"{name} has tokens outside of 0..{self.vocabulary - 1}, the model's vocabulary: {checks.shown(wrong)}"
            )

    def _check_length(self, tokens: int) -> None:
        if tokens > self.longest:
            raise ValueError(
                f"a prompt of {tokens:,} tokens, and the limit of this engine is {self.longest:,} (max_prompt_tokens)"
            )

    def _given(self, prompt) -> tuple[int, ...]:
        """Of a prompt that is token ids, or should be."""
        kinds = "a prompt is text, a list of token ids, or a list of chat messages"
        if isinstance(prompt, Mapping):
            inside = "its input_ids" if "input_ids" in prompt else "the messages in a list"
            raise ValueError(f"{kinds}, and this is a {type(prompt).__name__}: give {inside}")
        if isinstance(prompt, (bytes, bytearray, memoryview)):
            raise ValueError(f"{kinds}, and this is {type(prompt).__name__}: decode it first")
        if isinstance(prompt, Set):
            raise ValueError(f"{kinds}, and this is a set, which has no order")
        if getattr(prompt, "ndim", None) == 0 or isinstance(prompt, (int, float)):
            raise ValueError(f"{kinds}, and this is one number")
        try:
            length = checks.length_of("the prompt", prompt)
        except ValueError:
            raise ValueError(f"{kinds}, and this is {checks.shown(prompt)}") from None
        if getattr(prompt, "ndim", 1) == 1:
            self._check_length(length)  # before a long range becomes a list
        return checks.token_ids("the prompt", prompt)

    def _encode(self, text: str, **options):
        if self.tokenizer is None:
            raise ValueError("a prompt that is text needs a tokenizer: Engine(..., tokenizer=...), or token ids")
        try:
            with self.tokenizing:
                return self.tokenizer(text, **options)["input_ids"]
        except Exception as error:  # a lone surrogate, say: tokenizers raise whatever they like
            raise ValueError(f"the tokenizer refuses the prompt: {checks.one_line(error)}") from error

    def _encode_chat(self, messages: Sequence[Message], is_prefix: bool):
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"a chat is a list of messages, and {checks.shown(message)} in it is none")
            for name in ("role", "content"):
                if not isinstance(message.get(name), str):
                    raise ValueError(
                        f'a chat message is {{"role": text, "content": text}}, and in one of these '
                        f"{name} is {checks.shown(message.get(name))}"
                    )
        if self.tokenizer is None:
            raise ValueError("chat messages need a tokenizer: Engine(..., tokenizer=...), or token ids")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template for messages: give text, or token ids")
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=not is_prefix, tokenize=False
            )
        except Exception as error:  # a template refuses what it does not know by raising whatever it likes
            raise ValueError(f"the model's chat template refuses these messages: {checks.one_line(error)}") from error
        return self._encode(rendered, add_special_tokens=False)  # templates write their special tokens themselves


def _is_chat(prompt) -> bool:
    return isinstance(prompt, (list, tuple)) and any(isinstance(one, Mapping) for one in prompt[:1])
