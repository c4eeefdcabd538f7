"""A request belongs to whoever holds its handle: nothing of it is lost to them, and nothing of it stays elsewhere."""

import asyncio
import contextlib
import gc
import pickle
import threading
import weakref

import pytest

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from tiny_text import byte_tokenizer, chat_model
from trimkv import Engine, SamplingParams


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama", num_hidden_layers=2, hidden_size=32)


@pytest.fixture(params=[0, 1])
def engine(model, request):
    """Also with results that come a step late, as on a GPU."""
    with Engine(model, "streaming_llm", BUDGET, rows=2, chunk=CHUNK) as engine:
        engine.runner.lag = request.param
        yield engine


@contextlib.contextmanager
def without_collector():
    """Within, only what nobody refers to goes away: what waits for Python's collector counts as kept."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run(engine):
    while engine.step():
        pass


def test_no_result_is_lost_however_many_wait(engine):
    requests = [engine.add([3 + i % 100, 4], long(int(i % 500 == 0))) for i in range(6000)]
    assert [request.result().finish_reason for request in reversed(requests)] == ["length"] * 6000
    assert [len(request.tokens) for request in requests[:501]] == [1, *[0] * 499, 1]
    assert engine.result(requests[17].id) is requests[17]


def test_nothing_is_kept_of_a_request_that_is_over_and_that_nobody_holds(engine):
    with without_collector():
        refs = [weakref.ref(engine.add(prompt(5 + i % 20), long(3))) for i in range(30)]
        run(engine)
        refs += [weakref.ref(request) for request in engine.generate([prompt(5)] * 5, long(2), progress=False)]
        run(engine)
        queued = [engine.add(prompt(9), long(50)) for _ in range(4)]
        engine.step(), engine.step(), engine.step()
        refs += [weakref.ref(request) for request in queued]
        for request in queued:
            request.cancel()
        run(engine)
        del queued, request
        assert [ref for ref in refs if ref() is not None] == []
    assert not engine._requests


def test_a_request_runs_to_its_end_though_nobody_holds_it(engine, model):
    ref, made = weakref.ref(engine.add(prompt(9), long(7))), []
    while engine.step():
        if ref() is not None:
            made = list(ref().tokens)
    assert made == alone(model, "streaming_llm", prompt(9), 7)[: len(made)] and len(made) >= 6
    assert ref() is None


def test_an_id_is_good_while_somebody_holds_the_handle(engine):
    request = engine.add(prompt(9), long(3))
    assert engine.result(request.id) is request and list(engine.stream(request.id)) == request.tokens
    assert not engine.cancel(request.id)
    id = request.id
    del request
    run(engine)
    for call in (engine.result, engine.stream, engine.astream, engine.cancel):
        with pytest.raises(ValueError, match=f"no request {id}: never added, or over and nobody holds its handle"):
            call(id)
        for bad in (True, 1.5, None, "1"):
            with pytest.raises(ValueError, match="id must be a whole number"):
                call(bad)


def test_a_handle_of_another_engine_is_refused(engine, model):
    with Engine(model, "streaming_llm", BUDGET, rows=1, chunk=CHUNK) as other:
        request = other.add(prompt(5), long(2))
        with pytest.raises(ValueError, match="belongs to another engine"):
            engine.result(request)
        assert len(request.result().tokens) == 2


def test_a_handle_yields_its_tokens_waits_and_cancels(engine, model):
    expected = alone(model, "streaming_llm", prompt(9), 12)
    request, other = engine.add(prompt(9), long(12)), engine.add(prompt(9), long(500))
    assert [token for token, _ in zip(request, range(4), strict=False)] == expected[:4]
    assert list(request) == list(request) == expected and request.result() is request
    assert other.cancel() and not other.cancel() and other.result().finish_reason == "cancelled"

    async def read(request):
        return [token async for token in request]

    assert asyncio.run(read(request)) == expected
    assert asyncio.run(asyncio.wait_for(read(engine.add(prompt(9), long(12))), 60)) == expected


def test_a_handle_does_not_keep_its_engine(model):
    engine = Engine(model, "streaming_llm", BUDGET, rows=1, chunk=CHUNK)
    done, open_ = engine.add(prompt(5), long(3)).result(), engine.add(prompt(5), long(3))
    with without_collector():
        ref = weakref.ref(engine)
        del engine
        assert ref() is None
    assert done.result() is done and len(list(done)) == 3 and not done.cancel()
    for call in (open_.result, open_.cancel, lambda: list(open_)):
        with pytest.raises(ValueError, match="the engine of request 1 is gone"):
            call()


def test_results_outlive_the_engine_and_can_be_sent_elsewhere(model):
    with Engine(model, "streaming_llm", BUDGET, rows=1, chunk=CHUNK) as engine:
        done, cut = engine.add(prompt(5), long(3)).result(), engine.add(prompt(5), long(3))
    assert (cut.result().finish_reason, done.finish_reason) == ("cancelled", "length")
    copy = pickle.loads(pickle.dumps(done))
    assert (copy.tokens, copy.prompt, copy.result().finish_reason) == (done.tokens, tuple(prompt(5)), "length")


def test_a_request_says_in_one_line_what_it_is():
    with Engine(chat_model(), "streaming_llm", BUDGET, rows=1, tokenizer=byte_tokenizer()) as engine:
        request = engine.add("Once upon a time", long(60))
        assert repr(request) == "<Request 0: queued; 16 prompt tokens, 0 new>"
        request.result()
        said = repr(request)
        assert said.startswith("<Request 0: finished, length; 16 prompt tokens, 60 new: ")
        assert len(said) < 150 and "\n" not in said and repr(request.text[:5])[1:-1] in said


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
]


@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_is_a_prompt(bos):
    """Rendered by the model's template, up to where the answer begins. Templates write special tokens themselves."""
    model, tokenizer = chat_model(), byte_tokenizer(bos=bos)
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with Engine(model, "streaming_llm", BUDGET, rows=2, chunk=CHUNK, tokenizer=tokenizer) as engine:
        found, other = engine.generate([CHAT, "Hi"], long(5), progress=False)
        assert list(found.prompt) == ids
        assert found.tokens == alone(model, "streaming_llm", ids, 5)
        assert len(other.prompt) == 2 + bos
        kept = engine.prefix(CHAT[:1])  # 18 tokens, of which whole chunks are kept
        assert kept == 16
        again = engine.add(tuple(CHAT), long(5)).result()
        assert (again.reused_tokens, again.tokens) == (kept, found.tokens)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([{"role": "user"}], "content is None"),
        ([{"content": "Hi"}], "role is None"),
        ([{"role": "user", "content": 5}], "content is 5"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "content is"),
        ([*CHAT, "Hi"], "'Hi' in it is none"),
        ([*CHAT, None], "None in it is none"),
        ([{"role": "user", "content": "\ud800"}], "tokenizer refuses"),
    ],
)
def test_what_is_no_chat_is_refused(chat, words):
    with Engine(chat_model(), "streaming_llm", BUDGET, tokenizer=byte_tokenizer()) as engine:
        with pytest.raises(ValueError, match=words) as error:
            engine.add(chat)
        assert "\n" not in str(error.value) and not engine.busy


def test_a_chat_needs_a_template_that_takes_it():
    refusing = "{{ raise_exception('roles must\\nalternate') }}"
    for template, words in ((None, "no chat template"), (refusing, "refuses these messages: roles must alternate")):
        with Engine(chat_model(), "streaming_llm", BUDGET, tokenizer=byte_tokenizer(template)) as engine:
            with pytest.raises(ValueError, match=words) as error:
                engine.add(CHAT)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("driven", [True, False])
def test_threads_add_stream_and_cancel_at_once(model, driven):
    """Every answer is the one that its request gets alone, or the beginning of it where it was cancelled."""
    lengths, faults = (3, 9, 17, 30), []
    expected = {p: alone(model, "streaming_llm", prompt(p), 12) for p in lengths}

    def work(seed: int) -> None:
        try:
            for turn in range(6):
                p, params = lengths[(seed + turn) % len(lengths)], long(12)
                request = engine.add(prompt(p), params)
                how = (seed + 2 * turn) % 5
                if how == 0:
                    assert list(request) == expected[p]
                elif how == 1:
                    assert engine.result(request.id).tokens == expected[p]
                elif how == 2:
                    for _ in zip(request, range(3), strict=False):
                        pass
                    request.cancel()
                    assert request.result().tokens == expected[p][: len(request.tokens)]
                elif how == 3:
                    found = engine.generate([prompt(p), prompt(5)], [params, long(1)], progress=False)
                    assert found[0].tokens == expected[p] == request.result().tokens
                else:
                    with pytest.raises(ValueError):
                        engine.add(prompt(p), SamplingParams(stop=["\n"]))
                    engine.cancel(request.id)
                    assert request.finish_reason in ("cancelled", "length")
        except BaseException as error:
            faults.append(error)

    with Engine(model, "streaming_llm", BUDGET, rows=3, chunk=CHUNK) as engine:
        if driven:
            engine.start()
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not faults, faults
        assert not any(thread.is_alive() for thread in threads)
        while engine.busy:
            engine.step()
        assert not engine._requests


def test_closing_while_threads_wait_lets_them_go(model):
    engine = Engine(model, "streaming_llm", BUDGET, rows=2, chunk=CHUNK)
    engine.start()
    requests = [engine.add(prompt(9), long(100_000)) for _ in range(4)]
    threads = [threading.Thread(target=request.result, daemon=True) for request in requests]
    for thread in threads:
        thread.start()
    next(iter(requests[0]))
    engine.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert [request.finish_reason for request in requests] == ["cancelled"] * 4
