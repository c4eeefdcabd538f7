"""Capturing a step must not disturb the requests that run meanwhile. A stand-in for CUDA's graphs runs the step."""

import contextlib

import pytest
import torch

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from trimkv import Engine
from trimkv.engine.graphs import Graphs
from trimkv.engine.request import DRAWN, GREEDY, KINDS


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def __init__(self, runner):
        self.runner, self.replays = runner, 0

    def replay(self):
        self.replays += 1
        graphs = self.runner.graphs, self.runner.chunk_graph
        owner, key = next((g, key) for g in graphs if g for key, graph in g.captured.items() if graph is self)
        owner.step(*key)

    def pool(self):
        return "pool"


def make(monkeypatch, policy="trimkv", budget=BUDGET, chunk=CHUNK, **options):
    engine = Engine(tiny.gated("qwen3"), policy, budget, rows=5, chunk=chunk, **options)
    runner = engine.runner
    runner.graphs, runner.few_sizes, runner.lag = Graphs(runner._step, runner._idle), True, 1
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(runner))
    return engine


@pytest.fixture
def engine(monkeypatch):
    with make(monkeypatch) as engine:
        yield engine


def test_graphs_are_captured_when_needed_and_used_again(engine):
    requests = ((17, 40, {}), (9, 20, {}), (40, 15, {"temperature": 0.8, "seed": 1}), (5, 20, {}), (3, 12, {}))
    ids = []
    for p, n, options in requests:  # each comes while the others run
        ids.append(engine.add(prompt(p), long(n, **options)))
        for _ in range(6):
            engine.step()
    for id, (p, n, options) in zip(ids, requests, strict=True):
        if not options:
            assert engine.result(id).tokens == alone(engine.model, "trimkv", prompt(p), n), p
        assert len(engine.result(id).tokens) == n
    captured = dict(engine.runner.graphs.captured)
    assert {(1, GREEDY), (2, GREEDY), (4, DRAWN)} <= set(captured)
    again = engine.generate([prompt(17)], long(10), progress=False)[0]
    assert again.tokens == engine.result(ids[0]).tokens[:10]
    assert engine.runner.graphs.captured == captured


@pytest.mark.parametrize("chunk, budget", [(8, 16), (16, 8), (8, 17)])
def test_whole_chunks_of_long_prompts_are_one_graph(monkeypatch, chunk, budget):
    """From the first one on that finds all slots taken, and not the last one, whose logits are needed."""
    engine = make(monkeypatch, budget=budget, chunk=chunk)
    engine.runner._capture()
    (graph,) = engine.runner.chunk_graph.captured.values()
    for length in (5, 16, 17, 33, 90):
        graph.replays = 0
        found = engine.generate([prompt(length)], long(12), progress=False)[0]
        assert found.tokens == alone(engine.model, "trimkv", prompt(length), 12, budget, chunk), length
        filled = -(-budget // chunk) * chunk
        assert graph.replays == max((length - 1 - filled) // chunk, 0), length
    engine.prefix(prompt(90)[:40])
    again = engine.generate([prompt(90)], long(12), progress=False)[0]
    assert (again.reused_tokens, again.tokens) == (40 // chunk * chunk, found.tokens)


def test_a_policy_that_looks_at_queries_reads_without_a_graph(monkeypatch):
    engine = make(monkeypatch, policy="h2o")
    engine.runner._capture()
    assert engine.runner.chunk_graph is None
    found = engine.generate([prompt(90)], long(12), progress=False)[0]
    assert found.tokens == alone(engine.model, "h2o", prompt(90), 12)


def test_all_graphs_are_captured_at_the_start_unless_told_otherwise(engine):
    engine.runner._capture()
    sizes = [size for size, _ in engine.runner.graphs.captured]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {1, 2, 4, 5}
    assert len(engine.runner.graphs.captured) == 4 * len(KINDS)
    found = engine.generate([prompt(9), prompt(40)], long(12), progress=False)
    assert [request.tokens for request in found] == [alone(engine.model, "trimkv", prompt(p), 12) for p in (9, 40)]


def test_parts_are_compiled_in_graphs_and_nowhere_else(monkeypatch):
    """The model belongs to the user: between captures it is as it was."""
    compiled, steps = [], []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(forward) or forward)
    with make(monkeypatch, compile=True) as engine:
        runner, model = engine.runner, engine.model
        step = runner._step

        def watched(*key):
            steps.append("forward" in model.model.layers[0].mlp.__dict__)
            step(*key)

        runner.graphs.step = watched
        runner._capture()
        assert compiled and all(steps)
        assert not any("forward" in module.__dict__ for module in model.modules())
        found = engine.generate([prompt(40)], long(9), progress=False)[0]
    assert found.tokens == alone(model, "trimkv", prompt(40), 9)


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm"])
def test_fused_layers_give_the_same_tokens(monkeypatch, policy):
    with make(monkeypatch, policy, fused=True) as engine:
        assert engine.runner.fused is not None
        for p, n in ((40, 30), (5, 25), (17, 20)):
            found = engine.generate([prompt(p)] * 3, long(n), progress=False)
            assert [one.tokens for one in found] == [alone(engine.model, policy, prompt(p), n)] * 3
        assert not any("forward" in module.__dict__ for module in engine.model.modules())


def test_a_model_that_is_not_recognised_says_so():
    with pytest.raises(ValueError, match="OlmoForCausalLM: the input norm of layer 0 is a OlmoLayerNorm"):
        Engine(tiny.gated("olmo"), "trimkv", BUDGET, fused=True)
