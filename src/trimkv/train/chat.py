"""Conversations as tokens, with a mark on those that the model itself would have written."""

import os
import re

import numpy as np

THOUGHT_KEYS = ("reasoning_content", "thinking")


def chat_tokens(tokenizer, messages) -> tuple[np.ndarray, np.ndarray]:
    """The conversation's tokens, int32 [T], and which of them are responses, bool [T].

    A response is what follows the generation prompt up to the end-of-turn token, that token included and white space
    after it not. Prompt and response are tokenised apart, as they are when a model answers.

    Thinking text is kept in every turn, also where the template would strip it from the history: a model that thinks
    has it in its cache. ``reasoning_content`` (or ``thinking``) that the template leaves out goes before the answer as
    <think> ... </think>.

    Raises:
        ValueError: if the template refuses the messages or drops a response.
    """
    ids, marks = [], []
    for text, is_response in _parts(tokenizer, [dict(message) for message in messages]):
        piece = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += piece
        marks += [is_response] * len(piece)
    return np.array(ids, np.int32), np.array(marks, bool)


def _parts(tokenizer, messages: list[dict]):
    """(text, is it a response) in order.

    The template is rendered with a stand-in for every response and never sees their text, so whatever it does to an
    answer in the history it cannot do. Rendering the conversation up to a turn, with and without that turn, then shows
    where the response begins and how it ends, in any template.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    stand_ins = {i: f"TRIMKV{i}RESPONSE" for i in turns}
    shown = [{**m, "content": stand_ins.get(i, m["content"])} for i, m in enumerate(messages)]
    whole, done = _render(tokenizer, shown), 0
    for i in turns:
        at = whole.find(stand_ins[i], done)
        upto = _render(tokenizer, shown[: i + 1])
        if at < 0 or stand_ins[i] not in upto:
            raise ValueError("the chat template leaves out a response")
        prompt = _render(tokenizer, shown[:i], add_generation_prompt=True) if i else ""
        begin = min(at, max(done, len(os.path.commonprefix([prompt, whole])) if i else at))
        after = at + len(stand_ins[i])
        ending = os.path.commonprefix([upto.split(stand_ins[i])[1].rstrip(), whole[after:]])
        yield whole[done:begin], False
        yield _response(whole[begin:at], messages[i]) + ending, True
        done = after + len(ending)
    yield whole[done:], False


def _response(head: str, message: dict) -> str:
    """What the template puts before the answer, then the answer, with its thinking once."""
    answer = message["content"].strip()
    thought = next((message[key] for key in THOUGHT_KEYS if message.get(key)), "").strip()
    if thought and thought not in head and thought not in answer:
        answer = f"<think>\n{thought}\n</think>\n\n{answer}"
    if "<think>" in answer:
        head = re.sub(r"<think>\s*</think>\s*", "", head)  # Qwen3 shows an empty thought where it sees none
    return head + answer


def _render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template refuses what it does not know by raising whatever it likes
        raise ValueError(f"the chat template refuses it ({' '.join(str(error).split())})") from None
