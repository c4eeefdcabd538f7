"""Stock models of many architectures over slots: the three equalities that every change must keep."""

import pytest
import torch

import tiny
import trimkv
from tiny import gated, generate
from trimkv.gates.attach import new_gates

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_budget_as_large_as_the_text_changes_nothing(name):
    model = tiny.build(name)
    ids = tiny.tokens(2, 30)
    stock, stock_logits = generate(model, ids)
    trimkv.attach(model, new_gates(model, training_length=32))
    for policy, chunk in (("trimkv", 512), ("trimkv", 7), ("streaming_llm", 7), ("random", 30), ("full", 1)):
        text, logits = generate(model, ids, trimkv.bounded_cache(model, policy, 50, chunk=chunk))
        assert torch.equal(text, stock), (policy, chunk)
        torch.testing.assert_close(logits, stock_logits, atol=2e-5, rtol=1e-4)
    trimkv.detach(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(generate(model, ids)[0], stock)


def teacher_forced(model, ids, mask, continuation, budget, chunk, policy="trimkv"):
    """Logits at the last prompt position and after each forced token: [B, 1 + T, V]."""
    cache = trimkv.bounded_cache(model, policy, budget, chunk=chunk)
    out = [trimkv.prefill(model, cache, ids, mask, chunk=len(ids[0]))]
    for t in range(continuation.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = mask.cumsum(-1)[:, -1:] - 1
        step = model(continuation[:, t : t + 1], attention_mask=mask, position_ids=position, past_key_values=cache)
        out.append(step.logits[:, -1])
    return torch.stack(out, 1)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_padded_row_equals_its_single_run_while_tokens_are_evicted(name):
    model = gated(name)
    pads = [7, 2, 0]
    (ids, mask), continuation = tiny.left_padded(pads, 20), tiny.tokens(3, 24, seed=1)
    # A chunk boundary falls at other tokens of a padded row than of its single run, so prompts are one chunk here.
    for budget in (trimkv.Budget(12), trimkv.Budget(12, buffer=4), trimkv.Budget(12, sinks=2, recent=3)):
        batch = teacher_forced(model, ids, mask, continuation, budget, None)
        kept_all = teacher_forced(model, ids, mask, continuation, trimkv.Budget(64), None)
        assert (batch - kept_all).abs().max() > 1e-2, "eviction must move logits, or this test shows nothing"
        for row, pad in enumerate(pads):
            alone = ids[row : row + 1, pad:]
            single = teacher_forced(model, alone, torch.ones_like(alone), continuation[row : row + 1], budget, None)
            assert (batch[row] - single[0]).abs().max() < 1e-4, (budget, row)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_a_padded_batch_in_chunks(name):
    """Chunks of any size give the logits of single runs; then tokens are evicted."""
    model = gated(name)
    pads = [8, 4, 0]
    (ids, mask), continuation = tiny.left_padded(pads, 20), tiny.tokens(3, 24, seed=1)
    for chunk in (1, 3, 6, 4):
        # 4 divides every pad: there, single runs have the same chunk borders and may evict during the prompt too.
        for budget in (20, 12) if chunk == 4 else (20,):
            batch = teacher_forced(model, ids, mask, continuation, budget, chunk)
            for row, pad in enumerate(pads):
                alone = ids[row : row + 1, pad:]
                single = teacher_forced(
                    model, alone, torch.ones_like(alone), continuation[row : row + 1], budget, chunk
                )
                assert (batch[row] - single[0]).abs().max() < 1e-4, (chunk, budget, row)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt_oss"])
def test_forwards_of_any_length_give_the_same_text(name):
    """One long forward, worked off in chunks inside attention, equals the chunks fed one after another."""
    model = gated(name)
    ids = tiny.tokens(2, 40)
    whole = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    inside = model(ids, past_key_values=whole).logits
    parts = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    outside = torch.cat([model(part, past_key_values=parts).logits for part in ids.split(8, 1)], 1)
    torch.testing.assert_close(inside, outside, atol=2e-5, rtol=1e-4)
    assert whole.peak_prefill_tokens == parts.peak_prefill_tokens == 18


def test_generate_chunks_its_prompt_by_itself():
    model = gated("qwen3")
    ids = tiny.tokens(1, 60)
    own = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    text, _ = generate(model, ids, own)
    theirs = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    same, _ = generate(model, ids, theirs, prefill_chunk_size=8)
    assert torch.equal(text, same)
    assert own.peak_prefill_tokens == 18
    assert own.peak_decode_tokens == 10


def test_a_hybrid_model_keeps_its_own_layers():
    model = tiny.build("gemma3_text")
    cache = trimkv.bounded_cache(model, "streaming_llm", 12)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "BoundedLayer"] * 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"sliding_window": 8}, "no full-attention layer"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "shares keys"),
    ],
)
def test_models_that_slots_cannot_serve_are_refused(name, changes, message):
    model = tiny.build(name, **changes)
    with pytest.raises(ValueError, match=message):
        trimkv.bounded_cache(model, "streaming_llm", 12)
    assert model.config._attn_implementation == "eager"
