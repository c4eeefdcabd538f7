"""The same promises on a GPU, from graphs, and no waiting for a decode step."""

import gc

import pytest
import torch

import tiny
import trimkv
from alone import BUDGET, CHUNK, alone, long, prompt
from trimkv import Engine
from trimkv.engine.runner import Runner
from trimkv.gates.files import collect

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


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_invariant_engine_gives_the_same_bits_beside_others(fused):
    model = tiny.gated("qwen3").to("cuda", torch.bfloat16)
    prompts, params = [prompt(p) for p, _ in LENGTHS], [long(n, temperature=0.8, seed=3) for _, n in LENGTHS]
    with Engine(model, "trimkv", BUDGET, rows=7, chunk=CHUNK, fused=fused, batch_invariant=True) as engine:
        together = engine.generate(prompts, params, progress=False)
        single = [engine.generate([one], own, progress=False)[0] for one, own in zip(prompts, params, strict=True)]
    assert [request.tokens for request in together] == [request.tokens for request in single]


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "keydiff", "random"])
def test_prompts_read_by_graphs_say_what_prompts_read_without_say(monkeypatch, model, policy):
    """Shorter than a chunk, whole chunks and one token more, fewer and more tokens than slots; a kept prefix, too."""
    lengths, tokens = (1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 64, 65, 90), []
    for fixed in (None, False):
        monkeypatch.setattr(Runner, "fixed_chunks", fixed)
        with Engine(model, policy, BUDGET, rows=4, chunk=CHUNK) as engine:
            assert (getattr(engine.runner.staging, "graphs", None) is not None) == (fixed is None)
            found = engine.generate([prompt(p) for p in lengths], long(12), progress=False)
            engine.prefix(prompt(90)[:43])
            again = engine.generate([prompt(90)] * 2, long(12), progress=False)
            assert [one.reused_tokens for one in again] == [40, 40]
            tokens.append([request.tokens for request in (*found, *again)])
    assert tokens[0] == tokens[1]
    assert tokens[0][-1] == tokens[0][-2] == tokens[0][len(lengths) - 1]


def test_reading_a_prompt_waits_for_nothing(model):
    """Several chunks, the last of them padded, from the start and from a kept prefix, beside a row that runs."""
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK) as engine:
        first = engine.add(prompt(9), long(300))
        engine.prefix(prompt(90)[:40])
        engine.generate([prompt(61), prompt(90)], long(3), progress=False)
        later = [engine.add(prompt(p), long(100)) for p in (61, 90, 17)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            while any(one.status != "running" for one in later):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not first.done
        for one, p in zip(later, (61, 90, 17), strict=True):
            assert one.result().tokens == alone(model, "trimkv", prompt(p), 100), p


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
        requests = [engine.add(prompt(p), long(200, seed=p, **options)) for p in (5, 17, 40, 9)]
        while any(one.status != "running" for one in requests):
            engine.step()
        engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(len(one.tokens) > 100 for one in requests)


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
        assert first.result().tokens == alone(model, "trimkv", prompt(17), 40)
        for one, p in zip(later, (9, 40, 5), strict=True):
            assert one.result().tokens == alone(model, "trimkv", prompt(p), 20)
        assert len(engine.runner.graphs.captured) >= 3


def test_chunks_that_are_captured_late_touch_neither_rows_nor_prompts(model):
    """With a fast start: the first prompt has one token, those that come beside it need other chunks."""
    lengths = (1, 30, 17, 8)
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK, fast_start=True) as engine:
        assert not engine.runner.staging.graphs.captured
        requests = []
        for p in lengths:
            requests.append(engine.add(prompt(p), long(40)))
            for _ in range(7):
                engine.step()
        engine.prefix(prompt(90)[:40])
        for one, p in zip(requests, lengths, strict=True):
            assert one.result().tokens == alone(model, "trimkv", prompt(p), 40), p
        again = engine.generate([prompt(90)], long(20), progress=False)[0]
        assert (again.reused_tokens, again.tokens) == (40, alone(model, "trimkv", prompt(90), 20))
        forwards = {key for key in engine.runner.staging.graphs.captured if key[0] == "_forward"}
        assert forwards == {("_forward", 1, False), ("_forward", CHUNK, True), ("_forward", CHUNK, False)}


def test_layers_of_unlike_sizes():
    """Shares of the budget: graphs, kernels and staging take each layer's slots as they are."""
    model = tiny.gated("qwen3")
    gates = collect(model)
    gates.meta["layer_shares"] = [1.75, 0.25, 1.5, 0.5]
    trimkv.attach(model, gates).cuda()
    with Engine(model, "trimkv", BUDGET, rows=5, chunk=CHUNK) as engine:
        sizes = [layer.store.capacity for layer in engine.runner.cache.slot_layers]
        found = engine.generate([prompt(p) for p, _ in LENGTHS], [long(n) for _, n in LENGTHS], progress=False)
    assert sizes == [28, 4, 24, 8]
    assert [request.tokens for request in found] == [alone(model, "trimkv", prompt(p), n) for p, n in LENGTHS]


def test_compiled_parts_say_the_same():
    model = tiny.gated("qwen3").cuda()
    with Engine(model, "trimkv", BUDGET, rows=4, chunk=CHUNK, compile=True) as engine:
        found = engine.generate([prompt(p) for p, _ in LENGTHS], [long(n) for _, n in LENGTHS], progress=False)
    assert [request.tokens for request in found] == [alone(model, "trimkv", prompt(p), n) for p, n in LENGTHS]


def device_memory(model) -> tuple[int, int]:
    """Bytes (allocated, reserved) by torch, with what a plain forward of the model leaves behind for the next one: the
    workspace that cuBLAS gets on the current stream."""
    with torch.no_grad():
        model(torch.tensor([prompt(64)], device="cuda"), use_cache=False)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def serve(engine, driven: bool) -> None:
    """Many rows and one, drawn tokens, a kept prefix; some requests are cut off by the end."""
    if driven:
        engine.start()
    engine.prefix(prompt(200))
    params = [long(n, temperature=0.8 * (i % 2), top_k=5, seed=i) for i, (_, n) in enumerate(LENGTHS)]
    found = engine.generate([prompt(p) for p, _ in LENGTHS], params, progress=False)
    found.append(engine.add(prompt(200) + prompt(9), long(8)).result())
    assert all(request.finish_reason == "length" for request in found)
    left = [engine.add(prompt(p), long(400)) for p, _ in LENGTHS]
    next(iter(left[0]))


@pytest.mark.parametrize(
    "policy, options",
    [("trimkv", {}), ("trimkv", {"fused": False}), ("h2o", {}), ("streaming_llm", {"fast_start": True})],
)
def test_the_device_has_its_memory_back_after_closing(policy, options):
    """Slots, graphs and their pool, what is staged, workspaces of the streams that were captured: with requests served,
    in the caller's thread and in the engine's, and requests left. A second engine finds what the first one found.

    Libraries' workspaces are warm in all measurements alike: those that are there at the start are dropped, and each
    measurement begins with a plain forward, so that it holds one workspace, of the stream that the caller works on.
    """
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64}
    model = tiny.gated("qwen3", gain=1.0, num_hidden_layers=8, num_attention_heads=8, **sizes)
    model.to("cuda", torch.bfloat16)
    assert sum(p.nbytes for p in model.parameters()) > 40e6
    Engine(model, policy, 64, rows=1, chunk=64, fast_start=True).close()  # hooks, and kernels that are loaded for good
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    seen = {"before": device_memory(model)}
    for driven in (False, True):
        name = "in the engine's thread" if driven else "in the caller's thread"
        with Engine(model, policy, 256, rows=8, chunk=64, prefixes=2, **options) as engine:
            serve(engine, driven)
            seen[f"open, stepped {name}"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        del engine
        seen[f"closed, stepped {name}"] = device_memory(model)
    graphs = sum(issubclass(type(one), torch.cuda.CUDAGraph) for one in gc.get_objects())
    numbers = {when: tuple(f"{size / 1e6:.3f} MB" for size in sizes) for when, sizes in seen.items()}
    story = f"(allocated, reserved): {numbers}; {graphs} graphs are left in this process"
    before, first, first_closed, second, second_closed = seen.values()
    assert first[0] > before[0] + 10e6 and second[0] > before[0] + 10e6, f"the engine took nothing? {story}"
    assert first_closed[0] <= before[0] and first_closed[1] <= before[1] + 2**21, f"not given back {story}"
    assert second_closed[0] <= before[0] and second_closed[1] <= before[1] + 2**21, f"it grows with engines {story}"
