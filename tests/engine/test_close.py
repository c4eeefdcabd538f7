"""After close() nothing of an engine is left in memory, though the model is. tests/engine/test_gpu.py asks the GPU."""

import weakref

import pytest

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from held import no_more_than_before, storages
from tiny_text import byte_tokenizer
from trimkv import Engine
from trimkv.cache import fused
from trimkv.engine.rows import Rows
from trimkv.engine.runner import Runner


@pytest.fixture(scope="module")
def model():
    model = tiny.gated("qwen3")
    alone(model, "trimkv", prompt(9), 2)  # what the first forward makes stays
    return model


def serve(engine):
    """Rows, a queue, a kept prefix, a request that is cut off, drawn tokens."""
    engine.prefix(prompt(40))
    found = engine.generate([prompt(5), prompt(40) + prompt(9), prompt(17)], long(6, temperature=0.5), progress=False)
    assert [len(request.tokens) for request in found] == [6] * 3
    left = [engine.add(prompt(p), long(50)) for p in (9, 30, 5, 3)]
    for _ in range(6):
        engine.step()
    return left


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "h2o"])
def test_nothing_of_an_engine_is_left_after_closing(model, policy, fixed, lag, monkeypatch):
    monkeypatch.setattr(Runner, "fixed_chunks", fixed)
    with no_more_than_before():
        engine = Engine(model, policy, BUDGET, rows=3, chunk=CHUNK, prefixes=2)
        engine.runner.lag, engine.runner.few_sizes = lag, bool(lag)
        left = serve(engine)
        engine.close()
        assert {request.finish_reason for request in left} == {"cancelled"}
    assert engine.runner.cache is None
    assert alone(model, policy, prompt(9), 3), "the model stays usable"


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm"])
def test_nothing_is_left_where_layers_look_ahead_together(model, policy, monkeypatch):
    """What they have in common holds them, and they hold it; each step of a few rows makes another such circle."""
    kernels = pytest.importorskip("trimkv.attention.slots_triton")
    monkeypatch.setattr(fused, "kernels", lambda q, k, v: kernels)
    monkeypatch.setattr(Runner, "fixed_chunks", True)
    with no_more_than_before():
        engine = Engine(model, policy, BUDGET, rows=4, chunk=CHUNK, prefixes=2)
        engine.runner.lag, engine.runner.few_sizes = 1, True
        assert engine.runner.cache.ahead is not None
        serve(engine)
        before = len(storages())
        for _ in range(5):
            engine.step()
        assert len(storages()) <= before
        engine.close()


def test_nothing_is_left_of_a_thread_that_stepped(model):
    with no_more_than_before():
        with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK) as engine:
            engine.start()
            serve(engine)
        assert not engine._thread.is_alive()


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("breaks", [(Rows, "advance"), (Runner, "_step")])
def test_nothing_is_left_of_an_engine_in_which_something_broke(model, monkeypatch, breaks, driven, caplog):
    """A request's last part of reading, or a step; the log keeps the traceback."""

    def refuse(self, *args):
        raise RuntimeError("broken")

    with no_more_than_before():
        with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK) as engine:
            if driven:
                engine.start()
            request = engine.add(prompt(9), long(5))
            with monkeypatch.context() as patch:
                patch.setattr(*breaks, refuse)
                try:
                    engine.result(request)
                except RuntimeError:
                    assert not driven
            assert (request.finish_reason, request.error) == ("error", "RuntimeError: broken")
            assert len(engine.add(prompt(9), long(5)).result().tokens) == 5
        assert ("refuse" in caplog.text) == (driven or breaks[1] == "advance"), "a log without the reason"


@pytest.mark.parametrize("fixed", [False, True])
def test_nothing_is_left_of_a_prompt_that_broke_within_attention(model, fixed, monkeypatch):
    """Between the hook that finds the layer's slots and the attention that takes them."""

    def refuse(module, args):
        raise RuntimeError("broken")

    monkeypatch.setattr(Runner, "fixed_chunks", fixed)
    with no_more_than_before():
        with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK) as engine:
            hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(refuse)
            try:
                request = engine.add(prompt(9), long(5)).result()
            finally:
                hook.remove()
            assert request.error == "RuntimeError: broken"


def test_nothing_is_left_of_an_engine_for_which_there_is_no_room(model, monkeypatch):
    """Whoever catches it may make a smaller one."""

    def refuse(*args):
        raise MemoryError("no room")

    with no_more_than_before():
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "empty", refuse)
            try:
                Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK)
                raise AssertionError("not refused")
            except MemoryError:
                pass
        Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK).close()


def test_an_engine_lets_go_of_the_model_that_it_loaded(model, tmp_path):
    """Of one that is given by name nobody else knows; who wants it takes engine.model before."""
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = Engine(tmp_path, "streaming_llm", BUDGET, rows=2, chunk=CHUNK)
    request, loaded = engine.add(prompt(9), long(3)).result(), weakref.ref(engine.model)
    engine.close()
    assert engine.model is None and loaded() is None
    assert len(request.tokens) == 3 and isinstance(request.text, str)
