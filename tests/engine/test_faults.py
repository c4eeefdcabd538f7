"""What goes wrong for one request stays with it: the others get their tokens, and its row is clean for the next."""

import contextlib
import os
import signal

import pytest
import torch

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from trimkv import Engine, SamplingParams
from trimkv.engine.rows import Rows


@pytest.fixture
def model():
    return tiny.gated("qwen3")


@pytest.fixture(params=[("trimkv", 0), ("trimkv", 1), ("streaming_llm", 0), ("h2o", 1)])
def engine(model, request):
    """Also with results that come a step late, as on a GPU."""
    policy, lag = request.param
    engine = Engine(model, policy, BUDGET, rows=2, chunk=CHUNK)
    engine.policy_name, engine.runner.lag = policy, lag
    with engine:
        yield engine


def expect_clean(engine, model, requests=((40, 12), (5, 30), (61, 20))):
    """Fresh requests in all rows get what they get alone."""
    found = engine.generate([prompt(p) for p, _ in requests], [long(n) for _, n in requests])
    for (p, n), request in zip(requests, found, strict=True):
        assert request.tokens == alone(model, engine.policy_name, prompt(p), n), (p, n)


@contextlib.contextmanager
def poisoned(model, token):
    """Within, a token that is fed makes numbers of its row that are none."""
    weight = model.get_input_embeddings().weight.data
    before = weight[token].clone()
    weight[token] = float("nan")
    try:
        yield
    finally:
        weight[token] = before


def test_cancelled_in_the_queue(engine, model):
    busy = [engine.add(prompt(17), long(20)) for _ in range(2)]
    queued, last = engine.add(prompt(40), long(20)), engine.add(prompt(9), long(5))
    engine.step()
    assert engine.cancel(queued) and not engine.cancel(queued)
    assert (engine.result(queued).finish_reason, engine.result(queued).tokens) == ("cancelled", [])
    for id in busy:
        assert engine.result(id).tokens == alone(model, engine.policy_name, prompt(17), 20)
    assert engine.result(last).tokens == alone(model, engine.policy_name, prompt(9), 5)
    with pytest.raises(ValueError, match="no request 99"):
        engine.cancel(99)


def test_cancelled_while_its_prompt_is_read(engine, model):
    other = engine.add(prompt(17), long(20))
    engine.step(), engine.step(), engine.step()
    read = engine.add(prompt(90), long(20))
    engine.step(), engine.step()
    assert read.status == "prefilling"
    assert engine.cancel(read)
    expect_clean(engine, model)
    assert engine.result(other).tokens == alone(model, engine.policy_name, prompt(17), 20)
    assert engine.result(read).tokens == []


def test_cancelled_while_it_runs(engine, model):
    other, running = engine.add(prompt(17), long(30)), engine.add(prompt(61), long(100))
    stream = engine.stream(running)
    made = [next(stream) for _ in range(4)]
    assert engine.cancel(running)
    assert list(stream) == []
    expect_clean(engine, model)
    assert engine.result(other).tokens == alone(model, engine.policy_name, prompt(17), 30)
    assert made == alone(model, engine.policy_name, prompt(61), 4)


def test_a_prompt_whose_logits_are_not_numbers(engine, model):
    bad = prompt(20)
    bad[3] = 1
    others = [p for p in (17, 9, 30) if 1 not in alone(model, engine.policy_name, prompt(p), 15)]
    assert len(others) > 1
    expected = [alone(model, engine.policy_name, prompt(p), 15) for p in others]
    with poisoned(model, 1):
        failed, *found = engine.generate([bad, *map(prompt, others)], long(15))
        assert [request.tokens for request in found] == expected
    assert (failed.finish_reason, failed.tokens) == ("error", [])
    assert "not numbers" in failed.error
    expect_clean(engine, model)


def test_a_running_row_whose_logits_are_not_numbers(engine, model):
    """It keeps the tokens that it had, and what it left in its slots reaches nobody."""
    texts = {p: alone(model, engine.policy_name, prompt(p), 25) for p in (5, 17, 40, 9, 61)}
    bad, token = next(
        (p, t)
        for p, text in texts.items()
        for t in text[4:20]
        if sum(t in x + prompt(q) for q, x in texts.items()) == 1
    )
    others = [p for p in texts if p != bad]
    with poisoned(model, token):
        requests = [engine.add(prompt(p), long(25)) for p in (bad, *others)]
        failed, *found = [request.result() for request in requests]
        assert [request.tokens for request in found] == [texts[p] for p in others]
    assert failed.finish_reason == "error"
    assert failed.tokens == texts[bad][: texts[bad].index(token) + 1]
    for store in engine.runner.cache.stores:
        assert all(t.isfinite().all() for t in (store.k, store.v, *store.state.values(), *store.rows.values()))
    expect_clean(engine, model)


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "h2o"])
def test_nothing_of_a_failed_row_reaches_the_next_request_in_it(model, policy):
    """Slots that the next one has not filled yet have weight 0, but 0 * NaN is NaN."""
    after = alone(model, policy, prompt(3), 25)
    spoilt, token = next(
        (prompt(p), t)
        for p in range(5, 12)
        for i, t in enumerate(alone(model, policy, prompt(p), 12))
        if i > 2 and t not in prompt(p) + prompt(3) + after
    )
    with Engine(model, policy, BUDGET, rows=2, chunk=CHUNK) as engine:
        for bad in (spoilt, [*prompt(12), token]):
            with poisoned(model, token):
                assert engine.generate([bad], long(25))[0].finish_reason == "error"
            assert engine.generate([prompt(3)], long(25))[0].tokens == after


def test_a_prompt_that_breaks_the_model_fails_alone(engine, model):
    """Out of memory in a prompt's forward, say: the rows that run were not touched."""

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 5:
            raise RuntimeError("no room")

    hook = model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    good, bad = engine.generate([prompt(16), prompt(13)], long(20))
    hook.remove()
    assert good.tokens == alone(model, engine.policy_name, prompt(16), 20)
    assert (bad.finish_reason, bad.error) == ("error", "RuntimeError: no room")
    expect_clean(engine, model)


def test_a_step_that_breaks_fails_what_runs_and_nothing_else(engine, model):
    """It breaks when two layers have the token and the third has its keys but not its attention."""
    layer, calls = engine.runner.cache.layers[2], []
    attend = layer.attend

    def refuse(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("broken")
        return attend(*args)

    a, b, queued = (engine.add(prompt(p), long(20)) for p in (5, 8, 40))
    while b.status != "running":
        engine.step()
    layer.attend = refuse
    with pytest.raises(RuntimeError, match="broken"):
        while engine.step():
            pass
    del layer.attend
    assert a.finish_reason == b.finish_reason == "error" and a.error == "RuntimeError: broken"
    assert a.tokens == alone(model, engine.policy_name, prompt(5), 20)[: len(a.tokens)]
    assert queued.result().tokens == alone(model, engine.policy_name, prompt(40), 20)
    expect_clean(engine, model)


def test_ctrl_c_in_generate_stops_its_requests_and_no_others(engine, model):
    """Also in the middle of a forward, when some layers have a token that others lack."""
    other, calls, held = engine.add(prompt(17), long(40)), [], []
    queue = engine._queue
    engine._queue = lambda requests: held.extend(requests) or queue(requests)

    def press(module, args, kwargs):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    hook = model.model.layers[2].register_forward_pre_hook(press, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt(40), prompt(9), prompt(61)], long(50))
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(calls) < 20
    assert [r.finish_reason for r in (other, *held)] == [None, *["cancelled"] * 3]
    assert engine.result(other).tokens == alone(model, engine.policy_name, prompt(17), 40)
    expect_clean(engine, model)


def test_a_prompt_too_long_is_refused_with_the_limit(model):
    with Engine(model, "streaming_llm", BUDGET, max_prompt_tokens=20) as engine:
        engine.add(prompt(20))
        with pytest.raises(ValueError, match="21 tokens.*limit of this engine is 20"):
            engine.add(prompt(21))
        with pytest.raises(ValueError, match="limit"):
            engine.generate([prompt(5), prompt(21)])
        assert len(engine._waiting) == 1, "a list with a bad prompt must not leave the others running"


def test_bad_requests_are_refused(model):
    with Engine(model, "streaming_llm", BUDGET) as engine:
        for bad, message in (
            ([], "empty"),
            (torch.empty(1, 0, dtype=torch.long), "empty"),
            ([3, 128], "outside of 0..127"),
            ([-1], "vocabulary"),
            ([1.5], "whole numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.add(bad)
        with pytest.raises(ValueError, match="at most 8"):
            engine.add([5], SamplingParams(stop=range(9)))
        for bad in ("one text", [1, 2, 3]):
            with pytest.raises(ValueError, match="one text|one number"):
                engine.generate(bad)
        with pytest.raises(ValueError, match="2 sampling parameters for 1"):
            engine.generate([[5]], [SamplingParams(), SamplingParams()])
        assert not engine.busy
    for options in ({"rows": 0}, {"chunk": 0}, {"prefixes": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            Engine(model, "streaming_llm", BUDGET, **options)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 2000},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
    ],
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_no_new_tokens_is_finished_at_once(model):
    with Engine(model, "streaming_llm", BUDGET, rows=1, chunk=CHUNK) as engine:
        request = engine.add(prompt(5), long(0)).result()
        assert (request.status, request.finish_reason, request.tokens) == ("finished", "length", [])
        assert list(request) == [] and not engine.busy
        none, some = engine.generate([prompt(5), prompt(9)], [long(0), long(3)])
        assert (len(none.tokens), len(some.tokens)) == (0, 3)


def test_closing_ends_everything_and_leaves_the_model_usable(model):
    engine = Engine(model, "streaming_llm", BUDGET, rows=1, chunk=CHUNK)
    engine.start()
    requests = [engine.add(prompt(5), long(100_000)) for _ in range(2)]
    next(iter(requests[0]))
    engine.close()
    engine.close()
    assert [request.result().finish_reason for request in requests] == ["cancelled"] * 2
    assert engine.runner.cache is None and not engine._thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        engine.add([5])
    assert len(alone(model, "streaming_llm", prompt(5), 3)) == 3


def test_a_thread_that_steps_outlives_a_broken_step(model):
    with Engine(model, "streaming_llm", BUDGET, rows=1, chunk=CHUNK) as engine:

        def refuse(module, args, kwargs):
            raise RuntimeError("broken")

        expected = alone(model, "streaming_llm", prompt(9), 3)
        engine.start()
        hook = model.model.register_forward_pre_hook(refuse, with_kwargs=True)
        assert engine.result(engine.add(prompt(5), long(5))).finish_reason == "error"
        hook.remove()
        assert engine.result(engine.add(prompt(9), long(3))).tokens == expected


def test_a_request_that_cannot_take_its_row_fails_alone(engine, model, monkeypatch):
    """Its prompt is read, and what the row is told of it is refused."""
    place = Rows.place

    def refuse(self, row, request, prompt):
        place(self, row, request, prompt)
        if len(request.prompt) == 13:
            raise RuntimeError("no such row")

    monkeypatch.setattr(Rows, "place", refuse)
    first, bad, last = engine.generate([prompt(16), prompt(13), prompt(9)], long(20), progress=False)
    assert (bad.finish_reason, bad.error, bad.tokens) == ("error", "RuntimeError: no such row", [])
    for found, p in ((first, 16), (last, 9)):
        assert found.tokens == alone(model, engine.policy_name, prompt(p), 20)
    monkeypatch.undo()
    expect_clean(engine, model)


def test_a_prefix_that_cannot_be_kept_ends_nothing_else(engine, model, monkeypatch):
    def refuse(request):
        raise RuntimeError("no room")

    running = engine.add(prompt(9), long(20))
    monkeypatch.setattr(engine.runner, "keep", refuse)
    with pytest.raises(RuntimeError, match="the prefix was not kept: RuntimeError: no room"):
        engine.prefix(prompt(40))
    assert running.result().tokens == alone(model, engine.policy_name, prompt(9), 20)
    monkeypatch.undo()
    expect_clean(engine, model)


def test_a_listener_that_fails_is_dropped(engine, model):
    def fail():
        raise KeyError("gone")

    engine._listeners[fail] = None
    expect_clean(engine, model)
    assert fail not in engine._listeners
