"""Capturing a step must not disturb the requests that run meanwhile. A stand-in for CUDA's graphs runs the step."""

import contextlib
import weakref

import pytest
import torch

import interpreter
import tiny
import trimkv
from alone import BUDGET, CHUNK, alone, long, prompt
from held import no_more_than_before
from trimkv import Engine
from trimkv.budget import Budget
from trimkv.cache import fused
from trimkv.cache.policies import make as make_policy
from trimkv.engine import graphs
from trimkv.engine.request import DRAWN, GREEDY, KINDS
from trimkv.engine.runner import Runner
from trimkv.engine.staging import FixedStaging, Staging

slots_triton = pytest.importorskip("trimkv.attention.slots_triton")
keep_triton = pytest.importorskip("trimkv.attention.keep_triton")


class Stream:
    def wait_stream(self, other):
        pass


def host_state(runner) -> list[tuple]:
    """(object, attribute, value) of what the host knows of both caches."""
    found = []
    for cache in (runner.cache, runner.staging.cache):
        for layer in cache.layers:
            for owner in (layer, layer.store, layer.facts):
                numbers = {n: x for n, x in vars(owner).items() if x is None or isinstance(x, (bool, int))}
                found += [(owner, name, value) for name, value in numbers.items()]
    return found


class Graph:
    """Replays what a device would do: the host knows at a replay what it knew at the capture, and learns nothing."""

    def __init__(self, runner):
        self.runner, self.replays = runner, 0

    def __enter__(self):
        self.known = host_state(self.runner)

    def __exit__(self, *error):
        pass

    def replay(self):
        self.replays += 1
        graphs = self.runner.graphs, getattr(self.runner.staging, "graphs", None)
        owner, key = next((g, key) for g in graphs if g for key, graph in g.captured.items() if graph is self)
        before = host_state(self.runner)
        self._set(self.known)
        owner.step(*key)
        self._set(before)

    def _set(self, state):
        for owner, name, value in state:
            setattr(owner, name, value)

    def pool(self):
        return "pool"


def make(monkeypatch, policy="trimkv", budget=BUDGET, chunk=CHUNK, **options):
    monkeypatch.setattr(Runner, "fixed_chunks", True)
    engine = Engine(tiny.gated("qwen3"), policy, budget, rows=5, chunk=chunk, **options)
    runner = engine.runner
    runner.few_sizes, runner.lag = True, 1
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(runner))
    runner._warm_up()
    runner._replay(None)
    return engine


@pytest.fixture
def engine(monkeypatch):
    with make(monkeypatch) as engine:
        yield engine


def test_graphs_are_captured_when_needed_and_used_again(engine):
    requests = ((17, 40, {}), (9, 20, {}), (40, 15, {"temperature": 0.8, "seed": 1}), (5, 20, {}), (3, 12, {}))
    handles = []
    for p, n, options in requests:  # each comes while the others run
        handles.append(engine.add(prompt(p), long(n, **options)))
        for _ in range(6):
            engine.step()
    for handle, (p, n, options) in zip(handles, requests, strict=True):
        if not options:
            assert handle.result().tokens == alone(engine.model, "trimkv", prompt(p), n), p
        assert len(handle.result().tokens) == n
    captured = dict(engine.runner.graphs.captured)
    assert {(1, GREEDY), (2, GREEDY), (4, DRAWN)} <= set(captured)
    again = engine.generate([prompt(17)], long(10), progress=False)[0]
    assert again.tokens == handles[0].tokens[:10]
    assert engine.runner.graphs.captured == captured


LENGTHS = (1, 2, 5, 7, 8, 9, 15, 16, 17, 18, 24, 25, 33, 90)


@pytest.mark.parametrize(
    "chunk, budget, fast_start",
    [(8, 16, True), (8, 16, False), (16, 8, True), (8, 17, False), (8, Budget(12, buffer=5), True), (1, 8, False)],
)
def test_every_chunk_of_a_prompt_is_the_replay_of_a_graph(monkeypatch, chunk, budget, fast_start):
    engine = make(monkeypatch, budget=budget, chunk=chunk)
    runner = engine.runner
    if not fast_start:
        runner._capture()
        everything = set(runner.staging.graphs.captured)
    for length in LENGTHS:
        for graph in runner.staging.graphs.captured.values():
            graph.replays = 0
        found = engine.generate([prompt(length)], long(12), progress=False)[0]
        assert found.tokens == alone(engine.model, "trimkv", prompt(length), 12, budget, chunk), length
        replays = {key: graph.replays for key, graph in runner.staging.graphs.captured.items()}
        assert sum(n for key, n in replays.items() if key[0] == "_forward") == -(-length // chunk), length
        assert (
            replays[("_copy",)]
            == replays[("_forward", *runner.staging._forward_of((length - 1) % chunk + 1, False)[1:])]
            == 1
        )
        assert runner.staging.cache.get_seq_length() == length
        assert runner.cache.get_seq_length() >= length
    if not fast_start:
        assert set(runner.staging.graphs.captured) == everything
    if chunk > 1:
        engine.prefix(prompt(90)[:40])
        again = engine.generate([prompt(90)], long(12), progress=False)[0]
        assert (again.reused_tokens, again.tokens) == (40 // chunk * chunk, found.tokens)


@pytest.mark.parametrize(
    "policy", ["streaming_llm", "streaming_llm_cache", "keydiff", "knorm", "random", "locret", "lagkv", "full"]
)
def test_other_policies_read_by_graphs_too(monkeypatch, policy):
    budget = 128 if policy == "full" else BUDGET
    engine = make(monkeypatch, policy, budget)
    for length in LENGTHS:
        found = engine.generate([prompt(length)], long(12), progress=False)[0]
        assert found.tokens == alone(engine.model, policy, prompt(length), 12, budget), length
    names = {key[0] for key in engine.runner.staging.graphs.captured}
    assert names == {"_forward", "_empty", "_copy"}
    engine.prefix(prompt(90)[:40])
    again = engine.generate([prompt(90)], long(12), progress=False)[0]
    assert (again.reused_tokens, again.tokens) == (40, found.tokens)


@pytest.mark.parametrize("budget", [16, 13, Budget(12, buffer=5), Budget(12, sinks=2, recent=4)])
@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "keydiff"])
def test_padded_chunks_leave_what_chunks_without_padding_leave(policy, budget):
    """The same logits, and in the row that joins the same tokens."""
    model = tiny.gated("qwen3")
    for length in LENGTHS:
        found = []
        for kind in (Staging, FixedStaging):
            target = trimkv.bounded_cache(model, policy, budget, CHUNK, rows=2)
            staging = kind(model, make_policy(policy), Budget.of(budget), CHUNK, target)
            staging.clear()
            with torch.no_grad():
                for start in range(0, length, CHUNK):
                    end = min(start + CHUNK, length)
                    logits = staging.read(torch.tensor(prompt(length)), start, end, more=end < length)
                staging.join(1)
            found.append((logits, [store.position[1].sort(-1).values for store in target.stores], target.seen))
        (expect, kept, seen), (got, mine, mine_seen) = found
        torch.testing.assert_close(got, expect, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(mine, kept, strict=True)), length
        assert torch.equal(mine_seen, seen) and seen.tolist() == [0, length]


def test_a_prefix_may_end_anywhere(monkeypatch):
    """A kept row goes on at any token, though its chunks are then cut otherwise."""
    engine = make(monkeypatch, budget=64)
    runner, ids = engine.runner, prompt(45)
    request = engine._request(ids, long(1))
    for length in (1, 8, 13, 44):
        begun = engine._request(ids[:length], long(1))
        begun.is_prefix = True
        for start in range(runner.begin(begun), length, CHUNK):
            assert runner.read(start, min(start + CHUNK, length), more=True) is None
        runner.keep(begun)
        assert runner.begin(request) == length
        for start in range(length, 45, CHUNK):
            logits = runner.read(start, min(start + CHUNK, 45), more=start + CHUNK < 45)
        expect = engine.model(torch.tensor([ids])).logits[:, -1]  # nothing is evicted
        torch.testing.assert_close(logits, expect, atol=1e-4, rtol=1e-4)
        assert runner.staging.cache.get_seq_length() == runner.staging.cache.seen.item() == 45


def test_a_policy_that_looks_at_queries_reads_without_a_graph(monkeypatch):
    engine = make(monkeypatch, policy="h2o")
    engine.runner._capture()
    assert type(engine.runner.staging) is Staging
    found = engine.generate([prompt(90)], long(12), progress=False)[0]
    assert found.tokens == alone(engine.model, "h2o", prompt(90), 12)


def check_kernels(monkeypatch, policy, lengths, new):
    """Tokens with the kernels, or what stands in for them, against plain torch's."""
    with fused.plain_torch():
        model = tiny.gated("qwen3")
        expect = [alone(model, policy, prompt(length), new) for length in lengths]
    with make(monkeypatch, policy) as engine:
        assert engine.runner.cache.ahead is not None
        kept, keep = [], keep_triton.keep
        monkeypatch.setattr(keep_triton, "keep", lambda *args, **options: kept.append(1) or keep(*args, **options))
        found = engine.generate([prompt(length) for length in lengths], long(new), progress=False)
        assert [one.tokens for one in found] == expect and kept


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm"])
def test_chunks_by_kernels_give_the_same_tokens(monkeypatch, policy):
    monkeypatch.setattr(fused, "kernels", lambda q, k, v: slots_triton)
    check_kernels(monkeypatch, policy, LENGTHS, 12)


def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="runs in a process of its own")
def test_chunks_by_interpreted_kernels_give_the_same_tokens(monkeypatch):
    check_kernels(monkeypatch, "trimkv", (1, 20), 2)


def test_all_graphs_are_captured_at_the_start_unless_told_otherwise(engine):
    engine.runner._capture()
    sizes = [size for size, _ in engine.runner.graphs.captured]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {1, 2, 4, 5}
    assert len(engine.runner.graphs.captured) == 4 * len(KINDS)
    found = engine.generate([prompt(9), prompt(40)], long(12), progress=False)
    assert [request.tokens for request in found] == [alone(engine.model, "trimkv", prompt(p), 12) for p in (9, 40)]


@pytest.mark.parametrize("policy, fused", [("trimkv", False), ("trimkv", True), ("h2o", False)])
def test_nothing_is_left_of_graphs_after_closing(monkeypatch, policy, fused):
    """What they call belongs to the engine, which holds them."""
    engine = make(monkeypatch, policy)
    model = engine.model
    engine.close()
    monkeypatch.setattr(tiny, "gated", lambda name: model)
    with no_more_than_before():
        with make(monkeypatch, policy, fused=fused) as engine:
            engine.runner._capture()
            graph = weakref.ref(next(iter(engine.runner.graphs.captured.values())))
            engine.prefix(prompt(40))
            engine.generate([prompt(9), prompt(40) + prompt(5)], long(6), progress=False)
    assert graph() is None


def test_workspaces_are_taken_back_unless_another_graph_has_their_addresses(monkeypatch):
    """A replay of somebody else's graph would write where other tensors are by then."""

    class SomeGraph:
        pass

    cleared = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SomeGraph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cache"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append("workspaces"), raising=False)
    other = SomeGraph()
    graphs.give_back()
    assert cleared == ["cache"] and other
    del other
    graphs.give_back()
    assert cleared == ["cache", "workspaces", "cache"]


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
