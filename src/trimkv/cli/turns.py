"""The text of a conversation's turns, as the model's own chat template writes them."""

# Stands for an answer that the cache already holds; no user types this.
ANSWERED = "(((the-answer-so-far)))"


def first_turn(tokenizer, user: str, system: str | None = None) -> str:
    """The text from the very beginning up to where the first answer starts. ValueError if the template refuses."""
    system_part = [{"role": "system", "content": system}] if system else []
    return _render(tokenizer, [*system_part, {"role": "user", "content": user}])


def next_turn(tokenizer, user: str) -> str:
    """The text between the end of an answer and the start of the next one.

    A conversation is rendered in which some answer was given, and what follows that answer is taken: its end mark, the
    user's new message, and the opening of the next answer. The past itself is neither rendered nor fed again.

    Raises:
        ValueError: the template refuses, or leaves past answers out.
    """
    messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWERED}]
    rendered = _render(tokenizer, [*messages, {"role": "user", "content": user}])
    _, found, rest = rendered.partition(ANSWERED)
    if not found:
        raise ValueError("this model's chat template leaves past answers out, so a conversation cannot be continued")
    return rest


def encode(tokenizer, text: str) -> list[int]:
    """Tokens of rendered text: templates write their special tokens themselves."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _render(tokenizer, messages: list[dict]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template refuses what it does not know by raising whatever it likes
        raise ValueError(f"the model's chat template refuses this: {' '.join(str(error).split())}") from error
