"""Capturing a step must not disturb the requests that run meanwhile. A stand-in for CUDA's graphs runs the step."""

import contextlib

import pytest
import torch

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from trimkv import Engine
from trimkv.engine.graphs import Graphs


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def __init__(self, graphs):
        self.graphs = graphs

    def replay(self):
        key = next(key for key, graph in self.graphs.captured.items() if graph is self)
        self.graphs.step(*key)

    def pool(self):
        return "pool"


@pytest.fixture
def engine(monkeypatch):
    engine = Engine(tiny.gated("qwen3"), "trimkv", BUDGET, rows=5, chunk=CHUNK)
    runner = engine.runner
    runner.graphs, runner.few_sizes, runner.lag = Graphs(runner._step, runner._idle), True, 1
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(runner.graphs))
    with engine:
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
    assert {(1, True), (2, True), (4, False)} <= set(captured)
    again = engine.generate([prompt(17)], long(10), progress=False)[0]
    assert again.tokens == engine.result(ids[0]).tokens[:10]
    assert engine.runner.graphs.captured == captured


def test_all_graphs_are_captured_at_the_start_unless_told_otherwise(engine):
    engine.runner._capture()
    sizes = [size for size, _ in engine.runner.graphs.captured]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {1, 2, 4, 5}
    assert len(engine.runner.graphs.captured) == 8
    found = engine.generate([prompt(9), prompt(40)], long(12), progress=False)
    assert [request.tokens for request in found] == [alone(engine.model, "trimkv", prompt(p), 12) for p in (9, 40)]
