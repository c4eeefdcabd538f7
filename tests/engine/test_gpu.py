"""The same promises on a GPU, from graphs, and no waiting for a decode step."""

import pytest
import torch

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from trimkv import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = ((5, 30), (40, 12), (17, 25), (90, 8), (3, 40), (61, 20), (8, 1), (16, 33))  # prompt, output


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3").cuda()


@pytest.mark.parametrize("fast_start", [True, False])
@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "h2o"])
def test_a_request_gets_what_it_gets_alone(model, policy, fast_start):
    with Engine(model, policy, BUDGET, rows=5, chunk=CHUNK, fast_start=fast_start) as engine:
        found = engine.generate([prompt(p) for p, _ in LENGTHS], [long(n) for _, n in LENGTHS], progress=False)
    assert [request.tokens for request in found] == [alone(model, policy, prompt(p), n) for p, n in LENGTHS]


def test_drawn_tokens_are_those_of_the_cpu(model):
    params, tokens = [long(20, temperature=0.9, top_p=0.9, seed=n) for n in range(4)], []
    for device in ("cuda", "cpu"):
        with Engine(tiny.gated("qwen3").to(device), "trimkv", BUDGET, rows=4, chunk=CHUNK) as engine:
            found = engine.generate([prompt(9)] * 4, params, progress=False)
            tokens.append([request.tokens for request in found])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}])
def test_a_hundred_steps_wait_for_nothing(model, options):
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK) as engine:
        ids = [engine.add(prompt(p), long(200, seed=p, **options)) for p in (5, 17, 40, 9)]
        while any(engine._find(id).status != "running" for id in ids):
            engine.step()
        engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(len(engine._find(id).tokens) > 100 for id in ids)


def test_memory_does_not_grow_after_the_start(model):
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK, prefixes=2) as engine:
        for number in range(3):
            engine.prefix(prompt(20, seed=number))
            found = engine.generate([prompt(p, number) for p, _ in LENGTHS], [long(n) for _, n in LENGTHS], False)
            assert all(request.finish_reason == "length" for request in found)
            if number == 0:
                torch.cuda.synchronize()
                reserved = torch.cuda.memory_reserved()
        assert torch.cuda.memory_reserved() == reserved


def test_rows_that_run_are_not_touched_by_a_late_capture(model):
    """With a fast start, a graph is captured while requests run."""
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK, fast_start=True) as engine:
        first = engine.add(prompt(17), long(40))
        for _ in range(12):
            engine.step()
        later = [engine.add(prompt(p), long(20)) for p in (9, 40, 5)]
        assert engine.result(first).tokens == alone(model, "trimkv", prompt(17), 40)
        for id, p in zip(later, (9, 40, 5), strict=True):
            assert engine.result(id).tokens == alone(model, "trimkv", prompt(p), 20)
        assert len(engine.runner.graphs.captured) >= 3


def test_compiled_parts_say_the_same():
    model = tiny.gated("qwen3").cuda()
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK, compile=True) as engine:
        found = engine.generate([prompt(p) for p, _ in LENGTHS], [long(n) for _, n in LENGTHS], progress=False)
    assert [request.tokens for request in found] == [alone(model, "trimkv", prompt(p), n) for p, n in LENGTHS]
