"""Taking back, answering again and reading anew: the cache and what was said always belong together."""

import pytest
import torch

import trimkv
from tiny_text import CHATML, byte_tokenizer, chat_model
from trimkv.cache.policies import POLICIES
from trimkv.cli.answer import Sampling
from trimkv.cli.conversation import Conversation
from trimkv.gates.attach import new_gates
from trimkv.gates.head_sets import attach_heads, new_heads

LONG = "a message that is so long that the model reads it in several chunks"


def converse(policy="streaming_llm", budget=24, chunk=16, tokenizer=None, temperature=0.0, architecture="llama"):
    model = chat_model(architecture)
    trimkv.attach(model, new_gates(model, intermediate_size=8))
    attach_heads(model, new_heads(model, "locret", width=16))
    attach_heads(model, new_heads(model, "seer_attention_r", width=8, block_size=4))
    cache = trimkv.bounded_cache(model, policy=policy, budget=budget, chunk=chunk)
    sampling = Sampling(max_new_tokens=8, temperature=temperature, top_p=1, repetition_penalty=1)
    return Conversation(model, tokenizer or byte_tokenizer(), cache, sampling, chunk, system="sys")


def stop_after(asked: int):
    """Ctrl-C, noticed once the program has asked this many times."""
    times = iter(range(1000))
    return lambda: next(times) >= asked


def state(conversation):
    return list(conversation.history), list(conversation.messages), conversation.cache.get_seq_length()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_message_whose_reading_was_stopped_was_never_there(policy):
    """The next answers are those of a conversation without it, to the last token: the cache has forgotten it, too."""
    stopped, never = converse(policy), converse(policy)
    for first in (True, False):
        before = state(stopped)
        out = stopped.say(LONG, stopped=stop_after(2))
        assert (out.token_ids, out.finish_reason) == ([], "interrupted")
        assert state(stopped) == before and (before[2] == 0) == first
        assert stopped.say("and now?").token_ids == never.say("and now?").token_ids
    assert state(stopped) == state(never)


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_next"])
def test_layers_of_other_kinds_go_back_too(architecture):
    stopped, never = converse(architecture=architecture), converse(architecture=architecture)
    for _ in range(2):
        assert not stopped.say(LONG, stopped=stop_after(2)).token_ids
        assert stopped.say("and now?").token_ids == never.say("and now?").token_ids


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shared_budgets_go_back_too(scope):
    budget = trimkv.Budget(24, scope=scope)
    stopped, never = converse("trimkv", budget), converse("trimkv", budget)
    for _ in range(2):
        assert not stopped.say(LONG, stopped=stop_after(2)).token_ids
        assert stopped.say("and now?").token_ids == never.say("and now?").token_ids


def test_a_message_that_fails_was_never_there(monkeypatch):
    conversation, never = converse(), converse()
    conversation.say("one"), never.say("one")
    before = state(conversation)
    monkeypatch.setattr(conversation.model, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversation.say(LONG)
    monkeypatch.undo()
    assert state(conversation) == before
    assert conversation.say("two").token_ids == never.say("two").token_ids


def test_an_answer_that_was_stopped_stays_as_far_as_it_came():
    conversation = converse()
    asked = stop_after(20)
    out = conversation.say("hello", stopped=asked)
    assert out.token_ids and conversation.messages[-1]["content"] == out.text


class TestRetry:
    def test_the_same_question_is_answered_from_the_same_memory(self):
        conversation, once = converse(), converse()
        for other in (conversation, once):
            other.say("one"), other.say(LONG)
        assert conversation.retry().token_ids == once.history[-8:]
        assert state(conversation) == state(once)
        assert conversation.say("three").token_ids == once.say("three").token_ids

    def test_another_answer_takes_the_place_of_the_first(self):
        torch.manual_seed(1)
        conversation = converse(temperature=5.0)
        first = conversation.say("one").text
        again = conversation.retry().text
        assert again != first
        assert [m["content"] for m in conversation.messages] == ["one", again]
        assert conversation.retry().text not in (first, again), "as often as one likes"

    def test_stopped_while_it_reads_the_old_answer_stays(self):
        conversation, never = converse(), converse()
        for other in (conversation, never):
            other.say("one"), other.say(LONG)
        before = state(conversation)
        assert not conversation.retry(stopped=stop_after(2)).token_ids
        assert state(conversation) == before
        assert conversation.say("three").token_ids == never.say("three").token_ids

    def test_after_a_message_that_was_dropped_it_is_the_one_before(self):
        conversation, never = converse(), converse()
        conversation.say("one"), never.say("one")
        conversation.say(LONG, stopped=stop_after(1))
        assert conversation.retry().token_ids == never.history[-8:]

    def test_nothing_to_answer(self):
        conversation = converse()
        for _ in range(2):
            with pytest.raises(ValueError, match="nothing was said yet"):
                conversation.retry()
            conversation.say("one")
            conversation.reset()


class TestTakeOver:
    def test_it_reads_what_was_said_and_goes_on(self):
        """With room for all, the next answer is the one that the first conversation would have had."""
        first, second = converse(budget=4096), converse(budget=4096)
        tokenizer = byte_tokenizer()
        for message in ("one", LONG):
            first.say(message)
            # the model's random bytes are not always text; what is saved is
            answer = tokenizer("fine", add_special_tokens=False).input_ids
            first.take_over([*first.messages[:-1], {"role": "assistant", "content": tokenizer.decode(answer)}], "sys")
        second.say("something else")
        assert second.take_over(first.messages, first.system)
        assert state(second) == state(first)
        text = tokenizer.decode(second.history)
        expected = tokenizer.apply_chat_template(
            [{"role": "system", "content": "sys"}, *first.messages], tokenize=False, add_generation_prompt=False
        )
        assert text == expected.removesuffix("<|im_end|>\n")
        assert second.retry().token_ids == first.retry().token_ids
        assert second.say("three").token_ids == first.say("three").token_ids

    @pytest.mark.parametrize("asked", [0, 1, 3])
    def test_stopped_it_leaves_all_as_it_was(self, asked):
        conversation, never = converse(), converse()
        for other in (conversation, never):
            other.say("one")
        before = state(conversation)
        pairs = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}] * 2
        assert not conversation.take_over(pairs, "other", stopped=stop_after(asked))
        assert state(conversation) == before and conversation.system == "sys"
        assert conversation.retry().token_ids == never.retry().token_ids
        assert conversation.say("two").token_ids == never.say("two").token_ids

    def test_refused_by_the_template_it_leaves_all_as_it_was(self):
        template = "{% if messages[-1]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
        conversation = converse(tokenizer=byte_tokenizer(chat_template=template))
        conversation.say("one")
        before = state(conversation)
        with pytest.raises(ValueError, match="refuses"):
            conversation.take_over([{"role": "user", "content": "bad"}, {"role": "assistant", "content": "x"}], None)
        assert state(conversation) == before and conversation.system == "sys"

    def test_of_nothing_it_is_a_new_beginning(self):
        conversation, new = converse(), converse()
        new.system = "be brief"
        conversation.say("one")
        assert conversation.take_over([], "be brief")
        assert conversation.say("two").token_ids == new.say("two").token_ids
