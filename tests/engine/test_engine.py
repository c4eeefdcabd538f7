"""A request gets what it would get alone, whatever else runs; and memory is what it was at the start."""

import asyncio
import threading

import pytest

import tiny
import trimkv
from alone import BUDGET, CHUNK, alone, long, prompt
from trimkv import Engine, SamplingParams
from trimkv.cache import fused
from trimkv.cache.policies import POLICIES, make
from trimkv.engine.runner import Runner

pytestmark = pytest.mark.smoke

LENGTHS = ((5, 30), (40, 12), (17, 25), (90, 8), (3, 40), (61, 20), (8, 1), (16, 33))  # prompt, output
FIXED = [name for name, cls in POLICIES.items() if not cls.grows and not cls.selects]
# Their scores of a token that recurs differ by nothing but rounding, and a batch rounds otherwise than a single row.
ROUNDED = {"knorm", "locret"}


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3")


def coarse(name):
    """A policy whose scores have ten binary digits after the point, so that what should be a tie is one."""
    policy = make(name)
    score = policy.score
    policy.score = lambda slots, now: (score(slots, now) * 1024).round() / 1024
    return policy


def run_with_arrivals(engine, requests):
    """Adds one request every third step; returns finished requests in order."""
    found, steps = [], 0
    while len(found) < len(requests) or engine.busy:
        if steps % 3 == 0 and len(found) < len(requests):
            found.append(engine.add(*requests[len(found)]))
        engine.step()
        steps += 1
    return [request.result() for request in found]


@pytest.mark.parametrize("buffer", [0, 4])
@pytest.mark.parametrize("policy", FIXED)
def test_a_request_gets_what_it_gets_alone(model, policy, buffer):
    """Mixed lengths, more requests than rows, arrivals during the run."""
    if policy in ROUNDED:
        policy = coarse(policy)
    budget = trimkv.Budget(128 if policy == "full" else BUDGET, buffer=buffer)
    expected = [alone(model, policy, prompt(p), n, budget) for p, n in LENGTHS]
    assert len({tuple(tokens[:1]) for tokens in expected}) > 2, "a model that always says the same proves nothing"
    with Engine(model, policy, budget, rows=3, chunk=CHUNK) as engine:
        found = run_with_arrivals(engine, [(prompt(p), long(n)) for p, n in LENGTHS])
    assert [request.tokens for request in found] == expected
    assert {request.finish_reason for request in found} == {"length"}


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "h2o"])
def test_results_that_come_a_step_late_and_rows_that_rest_change_nothing(model, policy):
    """As on a GPU, where the host does not wait for a step, and steps come in few sizes."""
    expected = [alone(model, policy, prompt(p), n) for p, n in LENGTHS]
    stops = [(tokens[len(tokens) // 2],) for tokens in expected[:-1]] + [()]
    expected = [
        tokens[: tokens.index(*stop) + 1] if stop else tokens for tokens, stop in zip(expected, stops, strict=True)
    ]
    params = [long(n, stop=stop) for (_, n), stop in zip(LENGTHS, stops, strict=True)]
    with Engine(model, policy, BUDGET, rows=5, chunk=CHUNK) as engine:
        engine.runner.lag, engine.runner.few_sizes = 1, True
        requests = [(prompt(p), param) for (p, _), param in zip(LENGTHS, params, strict=True)]
        found = run_with_arrivals(engine, requests)
        assert [engine.runner._bucket(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5]
    assert [request.tokens for request in found] == expected


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "h2o"])
def test_rows_that_rest_on_the_fused_kernels_change_nothing(model, policy, monkeypatch):
    """Here the kernels' plain reference runs. They look a step ahead: the first rows of a batch share that knowledge
    with the whole."""
    kernels = pytest.importorskip("trimkv.attention.slots_triton")
    monkeypatch.setattr(fused, "kernels", lambda q, k, v: kernels)
    expected = [alone(model, policy, prompt(p), n) for p, n in LENGTHS]
    with Engine(model, policy, BUDGET, rows=5, chunk=CHUNK) as engine:
        assert (engine.runner.cache.ahead is not None) == (policy != "h2o")
        engine.runner.lag, engine.runner.few_sizes = 1, True
        found = run_with_arrivals(engine, [(prompt(p), long(n)) for p, n in LENGTHS])
    assert [request.tokens for request in found] == expected


def test_a_batch_invariant_engine_gives_the_same_bits_beside_others(monkeypatch):
    """In bf16, where a sum in another order would say other things: every step is one of all rows."""
    model = tiny.gated("qwen3").bfloat16()
    sizes, step = [], Runner._step
    monkeypatch.setattr(Runner, "_step", lambda self, size, kind: sizes.append(size) or step(self, size, kind))
    requests = [(prompt(p), long(n, temperature=0.8, seed=3)) for p, n in LENGTHS]
    with Engine(model, "trimkv", BUDGET, rows=5, chunk=CHUNK, batch_invariant=True) as engine:
        together = engine.generate(*zip(*requests, strict=True), progress=False)
        single = [engine.generate([prompt], params, progress=False)[0] for prompt, params in requests]
    assert [request.tokens for request in together] == [request.tokens for request in single]
    assert set(sizes) == {5}


def test_other_policies_than_those_with_fixed_memory_are_refused(model):
    for policy in sorted(set(POLICIES) - set(FIXED)):
        with pytest.raises(ValueError, match="fixed number of slots.*streaming_llm"):
            Engine(model, policy, 16)
    with pytest.raises(ValueError, match="scope head"):
        Engine(model, "trimkv", trimkv.Budget(16, scope="layer"))


def test_a_request_that_the_full_cache_has_no_room_for_is_refused(model):
    with Engine(model, "full", 60, rows=2, chunk=CHUNK) as engine:
        assert engine.generate([prompt(40)], long(20))[0].tokens == alone(model, "full", prompt(40), 20)
        with pytest.raises(ValueError, match="40 of the prompt and max_new_tokens=21 do not fit the budget of 60"):
            engine.add(prompt(40), long(21))


def test_models_that_cannot_be_served_row_by_row_are_refused():
    with pytest.raises(ValueError, match="sliding window.*full attention only.*use model.generate"):
        Engine(tiny.build("gemma2"), "streaming_llm", 16)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    phi = tiny.build("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(ValueError, match="longrope"):
        Engine(phi, "streaming_llm", 16)


def test_a_model_without_gates_gets_them_or_says_what_is_missing():
    model = tiny.build("qwen3")
    with pytest.raises(ValueError, match="no gates are bundled"):
        Engine(model, "trimkv", 16)
    Engine(model, "streaming_llm", 16).close()


def test_memory_is_known_at_the_start_and_never_grows(model):
    with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK, prefixes=2) as engine:
        before = dict(engine.memory)
        stores = engine.runner.cache.stores
        places = [store.k.data_ptr() for store in stores]
        assert before["slots"] == 3 * before["staging"] == sum(store.nbytes for store in stores)
        assert before["prefixes"] == 2 * before["staging"]
        run_with_arrivals(engine, [(prompt(p), long(n)) for p, n in LENGTHS])
        assert engine.runner.memory == before
        assert [store.k.data_ptr() for store in engine.runner.cache.stores] == places
        assert engine.runner.cache.peak_decode_tokens == BUDGET


def test_a_long_prompt_does_not_stop_those_that_run(model):
    """Between two tokens of a running request lies one chunk of another's prompt, not the whole prompt."""
    with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK) as engine:
        first = engine.result(engine.add(prompt(5), long(1)))
        running = engine.add(prompt(5), long(30))
        engine.step()
        engine.add(prompt(90), long(2))
        made = []
        for _ in range(12):
            engine.step()
            made.append(len(running.tokens))
        assert made == list(range(made[0], made[0] + 12))
        assert first.tokens == running.result().tokens[:1]


def test_a_stop_token_ends_a_request_and_is_its_last_token(model):
    text = alone(model, "trimkv", prompt(40), 20)
    stop = next(token for token in text[3:] if text.index(token) >= 3)
    with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK) as engine:
        found, other = engine.generate([prompt(40), prompt(17)], [long(20, stop=(stop,)), long(20)])
    assert (found.finish_reason, found.tokens) == ("stop", text[: text.index(stop) + 1])
    assert (other.finish_reason, len(other.tokens)) == ("length", 20)


def test_the_models_own_end_token_ends_a_request_unless_told_otherwise(model):
    text = alone(model, "trimkv", prompt(40), 20)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [text[4]]
    try:
        with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK) as engine:
            ends, goes_on = engine.generate([prompt(40)] * 2, [SamplingParams(20), long(20)])
    finally:
        model.generation_config.eos_token_id = before
    assert ends.tokens == text[: text.index(text[4]) + 1] and ends.finish_reason == "stop"
    assert goes_on.tokens == text


def test_a_prompt_goes_on_from_the_longest_kept_prefix(model):
    """Its beginning is not read again, and its tokens are those that it would have got."""
    text, read = prompt(60), []
    with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK, prefixes=2) as engine:
        hook = model.model.register_forward_pre_hook(
            lambda m, a, k: read.append(k["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            assert engine.prefix(text[:20]) == 16  # whole chunks
            assert engine.prefix(text[:43]) == 40
            assert sum(read) == 40
            found, other, same = engine.generate([text, prompt(17), text[:16]], long(15))
        finally:
            hook.remove()
        assert (found.reused_tokens, other.reused_tokens, same.reused_tokens) == (40, 0, 0)
        assert found.tokens == alone(model, "trimkv", text, 15)
        assert other.tokens == alone(model, "trimkv", prompt(17), 15)
        engine.prefix(prompt(9))  # the one of 16 tokens goes: it is the longest unused
        assert sorted(map(len, engine.runner.kept)) == [8, 40]
        with pytest.raises(ValueError, match="shorter than a chunk"):
            engine.prefix(prompt(7))
    with Engine(model, "trimkv", BUDGET, prefixes=0) as engine, pytest.raises(ValueError, match="prefixes=1"):
        engine.prefix(text)


def test_drawn_tokens_depend_on_the_request_alone(model):
    """Not on its row, on the others or on when it came."""
    params = [long(12, temperature=0.8, top_p=0.9, seed=7), long(20, temperature=1.5, top_k=5, seed=8), long(9)]
    params.append(long(15, repetition_penalty=1.7))
    prompts = [prompt(5), prompt(40), prompt(17), prompt(9)]
    single = []
    for one, param in zip(prompts, params, strict=True):
        with Engine(model, "trimkv", BUDGET, rows=1, chunk=CHUNK) as engine:
            single.append(engine.generate([one], param)[0].tokens)
    with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK) as engine:
        together = [r.tokens for r in engine.generate(prompts, params)]
        backwards = [r.tokens for r in engine.generate(prompts[::-1], params[::-1])]
    assert together == single == backwards[::-1]
    assert single[2] == alone(model, "trimkv", prompts[2], 9)
    assert single[3] != alone(model, "trimkv", prompts[3], 15)


def test_streams_yield_tokens_while_others_run(model):
    with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK) as engine:
        a, b = engine.add(prompt(40), long(12)), engine.add(prompt(17), long(25))
        stream = engine.stream(b)
        assert next(stream) == alone(model, "trimkv", prompt(17), 1)[0]
        assert len(b.tokens) < 25
        assert list(engine.stream(a)) == alone(model, "trimkv", prompt(40), 12)
        assert len(list(stream)) == 24


def test_an_event_loop_reads_many_streams(model):
    async def read(engine, p, n):
        return [token async for token in engine.astream(engine.add(prompt(p), long(n)))]

    async def read_all(engine):
        return await asyncio.gather(*(read(engine, p, n) for p, n in LENGTHS))

    with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK) as engine:
        found = asyncio.run(asyncio.wait_for(read_all(engine), 60))
        assert not engine._listeners
    assert found == [alone(model, "trimkv", prompt(p), n) for p, n in LENGTHS]


@pytest.mark.parametrize("driven", [True, False])
def test_threads_may_add_and_wait_at_once(model, driven):
    """With a thread that steps, and where those who wait take turns."""
    found = {}

    def ask(p, n):
        found[p] = engine.result(engine.add(prompt(p), long(n))).tokens

    with Engine(model, "trimkv", BUDGET, rows=3, chunk=CHUNK) as engine:
        if driven:
            engine.start()
        threads = [threading.Thread(target=ask, args=pair) for pair in LENGTHS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {p: alone(model, "trimkv", prompt(p), n) for p, n in LENGTHS}


def test_text_goes_in_and_comes_out(model):
    class Letters:
        eos_token_id = None

        def __call__(self, text):
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

    with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK, tokenizer=Letters()) as engine:
        (found,) = engine.generate(["a long story"], long(5))
    assert found.tokens == alone(model, "trimkv", [ord(c) for c in "a long story"], 5)
    assert found.text == "".join(map(chr, found.tokens))
    with Engine(model, "trimkv", BUDGET) as engine, pytest.raises(ValueError, match="tokenizer"):
        engine.add("a long story")


def test_a_bar_counts_what_has_finished(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Engine(model, "trimkv", BUDGET, rows=2, chunk=CHUNK) as engine:
        engine.generate([prompt(5), prompt(9), prompt(17)], long(4))
        shown = capsys.readouterr().err
        assert "3/3" in shown and "12 tokens" in shown
        engine.generate([prompt(5)], long(4), progress=False)
        assert capsys.readouterr().err == ""
