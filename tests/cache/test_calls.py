"""A cache belongs to the call that it is given to: threads, nested calls, several caches, wrappers, modes of torch."""

import copy
import io
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache

import tiny
import trimkv
from tiny import generate
from trimkv.hf.calls import with_cache
from trimkv.hf.model import decoder_of

pytestmark = pytest.mark.smoke

POLICIES = [
    "streaming_llm",
    "trimkv",
    "h2o",
    "tova",
    "snapkv",
    "locret",
    "seer_attention_r",
    "random",
    "keydiff",
    "full",
]


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3", num_hidden_layers=2)


def run(model, i: int, new: int = 8):
    """Call number i: a policy and a prompt of its own, every eleventh one without a cache of ours."""
    ids = tiny.tokens(1, 20 + i % 7, seed=i)
    policy = (POLICIES + [None])[i % 11]
    cache = None if policy is None else trimkv.bounded_cache(model, policy, 20, chunk=8)
    return generate(model, ids, cache, new=new)[0]


def test_threads_get_what_single_runs_get(model):
    """16 threads, ten policies and plain generates, 200 calls on one model."""
    alone = [run(model, i) for i in range(44)]
    wrong, todo = [], list(range(200))

    def work():
        while True:
            try:
                i = todo.pop()
            except IndexError:
                return
            try:
                if not torch.equal(run(model, i % 44), alone[i % 44]):
                    wrong.append(i)
            except Exception as error:
                wrong.append(f"{i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("fused", [False, True])
def test_generate_beside_a_running_engine(fused):
    """Another thread's plain and bounded calls don't notice the engine, nor the engine them, fused layers or not."""
    model = tiny.build("llama")
    ids = [tiny.tokens(1, 16, seed=i) for i in range(4)]
    plain = [generate(model, one)[0] for one in ids]
    bounded = [generate(model, one, trimkv.bounded_cache(model, "streaming_llm", 12))[0] for one in ids]
    prompts = [one[0].tolist() for one in ids]
    params = trimkv.SamplingParams(30, ignore_eos=True)

    def engine():
        return trimkv.Engine(model, "streaming_llm", 12, rows=2, chunk=8, fused=fused)

    with engine() as alone:
        expected = [request.tokens for request in alone.generate(prompts, params)]
    with engine() as running:
        running.start()
        requests = [running.add(prompt, params) for prompt in prompts * 3]
        for _ in range(2):
            for one, stock, kept in zip(ids, plain, bounded, strict=True):
                assert torch.equal(generate(model, one)[0], stock)
                assert torch.equal(generate(model, one, trimkv.bounded_cache(model, "streaming_llm", 12))[0], kept)
        assert [running.result(request).tokens for request in requests] == expected * 3


def test_caches_take_turns_on_one_model(model):
    """Two conversations, token by token in turns, and a plain call between: each continues its own."""
    ids = tiny.tokens(2, 40)
    expected = []
    for row in range(2):
        cache = trimkv.bounded_cache(model, "trimkv", 12)
        steps = [model(ids[row : row + 1, t : t + 1], **with_cache(model, cache)).logits for t in range(40)]
        expected.append(torch.cat(steps, 1))
    caches, steps = [trimkv.bounded_cache(model, "trimkv", 12) for _ in range(2)], [[], []]
    plain = model(ids).logits
    for t in range(40):
        for row in range(2):
            steps[row].append(model(ids[row : row + 1, t : t + 1], **with_cache(model, caches[row])).logits)
        if t % 13 == 0:
            assert torch.equal(model(ids).logits, plain)
    for row in range(2):
        assert torch.equal(torch.cat(steps[row], 1), expected[row])


def test_a_call_inside_a_call():
    """A hook that asks the same model something else, with a cache of its own and without, leaves both as they are."""
    model, ids = tiny.gated("llama"), tiny.tokens(1, 30)
    expected = generate(model, ids, trimkv.bounded_cache(model, "trimkv", 12, chunk=8))
    inner, depth = generate(model, ids[:, :9], trimkv.bounded_cache(model, "h2o", 8)), []
    plain = generate(model, ids[:, :9])

    def ask(module, args, output):
        if not depth:
            depth.append(1)
            assert torch.equal(generate(model, ids[:, :9], trimkv.bounded_cache(model, "h2o", 8))[0], inner[0])
            assert torch.equal(generate(model, ids[:, :9])[0], plain[0])
            depth.pop()

    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(ask)
    try:
        found = generate(model, ids, trimkv.bounded_cache(model, "trimkv", 12, chunk=8), new=3)
    finally:
        handle.remove()
    assert torch.equal(found[1], expected[1][:, :3])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_that_was_filled_in_inference_mode_serves_outside_of_it(model, policy):
    ids = tiny.tokens(1, 60)

    def filled():
        cache = trimkv.bounded_cache(model, policy, 24, chunk=8)
        trimkv.prefill(model, cache, ids[:, :56], chunk=8)
        return cache

    expected = generate(model, ids, filled())[0]
    with torch.inference_mode():
        cache = filled()
        snapshot = cache.snapshot()
    assert torch.equal(generate(model, ids, cache)[0], expected)
    cache.reset()
    cache.restore(snapshot)
    assert torch.equal(generate(model, ids, cache)[0], expected)
    cache.batch_repeat_interleave(2)
    with torch.inference_mode():
        cache.batch_select_indices(torch.tensor([1]))
    assert generate(model, torch.cat([expected, expected[:, -1:]], 1), cache, new=2)[0].shape[1] > expected.shape[1]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shared_budgets_in_and_out_of_inference_mode(model, scope):
    ids = tiny.tokens(1, 40)
    budget = trimkv.Budget(12, scope=scope)
    expected = generate(model, ids, trimkv.bounded_cache(model, "trimkv", budget, chunk=512))[0]
    cache = trimkv.bounded_cache(model, "trimkv", budget, chunk=512)
    with torch.inference_mode():
        model(ids[:, :39], **with_cache(model, cache))
    found = generate(model, ids, cache)[0]
    assert found.shape == expected.shape


def test_static_caches_and_engines_made_in_inference_mode(model):
    with torch.inference_mode():
        cache = trimkv.bounded_cache(model, "trimkv", 12, rows=2)
        engine = trimkv.Engine(model, "trimkv", 12, rows=2, chunk=8)
    ids = tiny.tokens(2, 5)
    with torch.no_grad():
        for t in range(5):
            model(ids[:, t : t + 1], attention_mask=torch.ones(2, 1), **with_cache(model, cache))
    cache.clear_rows(0)
    assert cache.seen.tolist() == [0, 5]
    with engine:
        prompt, params = ids[0].tolist(), trimkv.SamplingParams(4, ignore_eos=True)
        outside = engine.generate([prompt], params)[0].tokens
        with torch.inference_mode():
            assert engine.generate([prompt], params)[0].tokens == outside


def test_gates_attached_in_inference_mode_can_be_trained():
    model = tiny.build("llama")
    with torch.inference_mode():
        trimkv.attach(model, trimkv.gates.attach.new_gates(model, intermediate_size=8))
    gate = model.model.layers[0].self_attn.retention_gate.requires_grad_(True)
    gate(torch.randn(1, 3, 64)).sum().backward()
    assert gate.linear1.weight.grad is not None


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_of_a_first_forward_are_those_of_the_stock_cache(name):
    model = tiny.build(name)
    ids, mask = tiny.tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 6] = -100  # predicted by padding
    found = []
    for cache in (DynamicCache(config=model.config), trimkv.bounded_cache(model, "streaming_llm", 64)):
        model.zero_grad(set_to_none=True)
        out = model(ids, attention_mask=mask, labels=labels, **with_cache(model, cache))
        out.loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-3)


def test_gradients_through_slots_are_refused_when_somebody_asks_for_them():
    model, ids = tiny.build("llama"), tiny.tokens(1, 30)
    cache = trimkv.bounded_cache(model, "streaming_llm", 12, chunk=16)
    loss = model(ids, labels=ids, **with_cache(model, cache)).loss  # two chunks: the second attends to slots
    assert loss.isfinite()
    with pytest.raises(RuntimeError, match="no gradients beyond its first chunk.*no_grad"):
        loss.backward()
    later = model(ids[:, :2], labels=ids[:, :2], **with_cache(model, cache)).loss
    with pytest.raises(RuntimeError, match="no gradients"):
        later.backward()


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_model_that_has_had_a_cache_can_be_pickled_and_copied(name):
    model = tiny.gated(name)
    ids = tiny.tokens(1, 30)
    expected = generate(model, ids, trimkv.bounded_cache(model, "trimkv", 12))[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for policy in ("trimkv", "locret"):
            theirs = generate(other, ids, trimkv.bounded_cache(other, policy, 12))[0]
            assert torch.equal(theirs, generate(model, ids, trimkv.bounded_cache(model, policy, 12))[0])
        assert len(decoder_of(other)._forward_pre_hooks) == 1
        trimkv.detach(other)
        assert not decoder_of(other)._forward_pre_hooks
    assert torch.equal(generate(model, ids, trimkv.bounded_cache(model, "trimkv", 12))[0], expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_mask_over_tokens_in_the_cache_is_followed_or_refused(name):
    model, ids = tiny.build(name), tiny.tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    cache = trimkv.bounded_cache(model, "streaming_llm", 64)
    trimkv.prefill(model, cache, ids[:, :30] * mask[:, :30], mask[:, :30])
    after = cache.snapshot(0) if cache.all_slots else None

    def go_on(mask):
        position = (mask.cumsum(-1) - 1)[:, 30:].clamp_min(0)
        return model(ids[:, 30:], attention_mask=mask, position_ids=position, **with_cache(model, cache))

    left_out, filled = mask.clone(), torch.ones_like(mask)
    left_out[0, 5:15] = 0
    for wrong, words in (
        (left_out, "leaves out"),
        (filled, "padding"),
        (mask[:, 3:], "37 columns"),
        (mask[:, :39], "39"),
    ):
        with pytest.raises(ValueError, match=words):
            go_on(wrong)
    assert cache.get_seq_length() == 30, "a refused forward leaves the cache as it was"
    if after is not None:
        assert torch.equal(cache.snapshot(0).layers[0]["store"]["slots"]["k"], after.layers[0]["store"]["slots"]["k"])
    stock = DynamicCache(config=model.config)
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    model(
        ids[:, :30] * mask[:, :30],
        attention_mask=mask[:, :30],
        position_ids=position[:, :30],
        **with_cache(model, stock),
    )
    expected = model(ids[:, 30:], attention_mask=mask, position_ids=position[:, 30:], **with_cache(model, stock)).logits
    torch.testing.assert_close(go_on(mask).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_mask_of_the_new_tokens_alone_is_taken():
    model, ids = tiny.build("llama"), tiny.tokens(1, 30)
    cache = trimkv.bounded_cache(model, "streaming_llm", 64)
    model(ids[:, :20], **with_cache(model, cache))
    found = model(ids[:, 20:], attention_mask=torch.ones(1, 10), **with_cache(model, cache)).logits
    torch.testing.assert_close(found, model(ids).logits[:, 20:], atol=2e-5, rtol=1e-4)


def test_a_cache_after_detach_is_refused():
    model, ids = tiny.build("llama"), tiny.tokens(1, 10)
    cache = trimkv.bounded_cache(model, "streaming_llm", 64)
    model(ids, **with_cache(model, cache))
    trimkv.detach(model)
    with pytest.raises(RuntimeError, match="trimkv.detach took slot attention off"):
        model(ids, **with_cache(model, cache))
    trimkv.bounded_cache(model, "streaming_llm", 64)  # puts the hooks on again
    assert torch.equal(model(ids, **with_cache(model, cache)).logits[:, -1].isfinite(), torch.ones(1, 128).bool())


def test_a_second_attention_over_one_update_is_refused():
    model, ids = tiny.build("llama"), tiny.tokens(1, 10)
    cache = trimkv.bounded_cache(model, "streaming_llm", 64)
    keys = torch.randn(1, 2, 10, 16)
    keys, values = cache.update(keys, keys, 0)
    attend = trimkv.attention.register.trimkv_attention
    module = model.model.layers[0].self_attn
    attend(module, torch.randn(1, 4, 10, 16), keys, values, None)
    with pytest.raises(ValueError, match="LlamaAttention attends more than once"):
        attend(module, torch.randn(1, 4, 10, 16), keys, values, None)
    assert generate(model, ids)[0].shape == (1, 30), "plain calls go on"
