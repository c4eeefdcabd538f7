"""Phi-3 past its original context: keys are rotated by other frequencies from then on, and nothing is forgotten."""

import pytest
import torch
from transformers import DynamicCache

import tiny
import trimkv
from trimkv.cache.rope import rotate

pytestmark = pytest.mark.smoke

ORIGINAL = 32
SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0]


def long_rope(short, long):
    return {
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": ORIGINAL,
        },
    }


def phi3(short=SHORT, long=LONG):
    return tiny.build("phi3", **long_rope(short, long))


def generate(model, cache, prompt=24, new=30, **options):
    ids = tiny.tokens(1, prompt)
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)


def step_by_step(model, cache, ids, prompt=24):
    """Logits of ``model.forward`` on a prompt and then on one given token after another."""
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache).logits[:, -1:] for part in parts], 1)


def keys_by_position(cache, layer=0):
    """Position -> key [D] for each KV head of the first row."""
    store = cache.layers[layer].store
    return [
        {int(p): store.k[0, h, s] for s, p in enumerate(store.position[0, h].tolist()) if p >= 0}
        for h in range(store.k.shape[1])
    ]


def test_with_equal_factors_generate_equals_a_forward_over_the_whole_text():
    """Where the frequencies never change, crossing must change nothing at all."""
    model = phi3(LONG, LONG)
    ids = generate(model, trimkv.bounded_cache(model, "full"))
    assert ids.shape[1] == 54
    cache = trimkv.bounded_cache(model, "full")
    logits = step_by_step(model, cache, ids[:, :-1])
    assert torch.equal(logits[0].argmax(-1), ids[0, 24:])
    assert cache.held_tokens == 53
    at_once = model(ids, use_cache=False).logits[:, 23:-1]
    torch.testing.assert_close(logits, at_once, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy,budget", [("streaming_llm", 20), ("streaming_llm", trimkv.Budget(16, buffer=4))])
def test_generate_crosses_as_step_by_step_does(policy, budget):
    """generate's own preparation of inputs, which drops a stock cache here, makes no difference."""
    model = phi3()
    ids = generate(model, trimkv.bounded_cache(model, policy, budget))
    logits = step_by_step(model, trimkv.bounded_cache(model, policy, budget), ids[:, :-1])
    assert torch.equal(logits[0].argmax(-1), ids[0, 24:])


@pytest.mark.parametrize("budget", [100, 20])
def test_after_crossing_kept_keys_are_those_of_the_long_frequencies(budget):
    model = phi3()
    cache = trimkv.bounded_cache(model, "streaming_llm", budget)
    held = []
    model.model.register_forward_hook(lambda *_: held.append(cache.held_tokens))
    ids = generate(model, cache)
    assert held == sorted(held), "the number of tokens held never drops"
    assert held[-1] == min(budget, 53)

    # a single forward over all tokens is past the original context, so that it rotates by the long frequencies alone;
    # keys of layer 0 depend on nothing but the token and its position
    scratch = DynamicCache(config=model.config)
    trimkv.detach(model)(ids[:, :-1], past_key_values=scratch)
    for h, keys in enumerate(keys_by_position(cache)):
        assert len(keys) == held[-1]
        for position, key in keys.items():
            torch.testing.assert_close(key, scratch.layers[0].keys[0, h, position], atol=1e-5, rtol=0)


def test_before_crossing_keys_are_those_of_the_short_frequencies():
    model = phi3()
    cache = trimkv.bounded_cache(model, "streaming_llm", 100)
    ids = generate(model, cache, prompt=24, new=8)
    assert not cache.long_rope and cache.get_seq_length() == 31
    short = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=short)
    for h, keys in enumerate(keys_by_position(cache)):
        for position, key in keys.items():
            torch.testing.assert_close(key, short.layers[0].keys[0, h, position], atol=1e-5, rtol=0)


def test_a_prompt_beyond_the_original_context_is_fed_in_chunks():
    """The long frequencies come with the first chunk of a long prompt, not in its middle."""
    model = phi3()
    ids = tiny.tokens(1, 60)
    whole = model(ids, past_key_values=trimkv.bounded_cache(model, "full", chunk=None)).logits
    cache = trimkv.bounded_cache(model, "streaming_llm", 100, chunk=7)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, atol=1e-4, rtol=1e-4)


def test_a_padded_row_crosses_as_its_single_run():
    model = phi3()
    rows = [tiny.tokens(1, length, seed=length) for length in (26, 20)]
    ids = torch.cat([torch.nn.functional.pad(row, (26 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (26 - row.shape[1], 0)) for row in rows])
    options = {"do_sample": False, "min_new_tokens": 30, "max_new_tokens": 30}
    cache = trimkv.bounded_cache(model, "streaming_llm", 20)
    both = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    # the stock rotary embedding goes by the longest row; the longest row is therefore the one that equals its own run
    cache = trimkv.bounded_cache(model, "streaming_llm", 20)
    alone = model.generate(rows[0], attention_mask=torch.ones_like(rows[0]), past_key_values=cache, **options)
    assert torch.equal(both[0, 26:], alone[0, 26:])


def test_a_used_cache_starts_short_again_after_reset():
    model = phi3()
    cache = trimkv.bounded_cache(model, "streaming_llm", 20)
    first = generate(model, cache)
    assert cache.long_rope
    cache.reset()
    assert not cache.long_rope
    assert torch.equal(generate(model, cache), first)


def test_a_snapshot_remembers_its_rotation():
    model = phi3()
    cache = trimkv.bounded_cache(model, "streaming_llm", 20)
    for prompt, crossed in ((24, False), (40, True)):
        cache.reset()
        model(tiny.tokens(1, prompt), past_key_values=cache)
        snapshot = cache.snapshot()
        copy = trimkv.bounded_cache(model, "streaming_llm", 20)
        copy.restore(snapshot)
        assert copy.long_rope is crossed
        more = tiny.tokens(1, 20, seed=5)
        expected = model(more, past_key_values=cache).logits
        torch.testing.assert_close(model(more, past_key_values=copy).logits, expected)


def test_rotating_there_and_back_changes_nothing():
    k, position = torch.randn(2, 2, 5, 16), torch.randint(0, 100, (2, 2, 5), dtype=torch.int32)
    turned, frequency = k.clone(), torch.rand(8)
    rotate(turned, position, frequency)
    assert not torch.allclose(turned, k)
    rotate(turned, position, -frequency)
    torch.testing.assert_close(turned, k, atol=1e-5, rtol=1e-5)
