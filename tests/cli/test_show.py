"""The line below an answer: numbers that a reader can put together."""

import pytest

import trimkv
from tiny import tokens
from tiny_text import chat_model
from trimkv.cli import show
from trimkv.gates.attach import new_gates


def cache_after(seen: int, policy="trimkv", budget=16, shares=None):
    model = chat_model()
    gates = new_gates(model, intermediate_size=8)
    if shares:
        gates.meta["layer_shares"] = shares
    trimkv.attach(model, gates)
    cache = trimkv.bounded_cache(model, policy, budget, chunk=8)
    if seen:
        trimkv.prefill(model, cache, tokens(1, seen), chunk=8)
    return cache


SHARES = [0.5, 0.75, 0.75, 2.0]  # 8, 12, 12 and 32 slots, if the mean is 16


@pytest.mark.parametrize(
    "seen, options, held, limit",
    [
        (10, {}, "10 of 16 per head", "16 tokens per head"),
        (40, {}, "16 per head", "16 tokens per head"),
        (0, {}, "0 of 16 per head", "16 tokens per head"),
        (
            20,
            {"shares": SHARES},
            "13 of 16 per head on average (largest layer: 20 of 32)",
            "16 tokens per head on average, 8 to 32 by layer",
        ),
        (
            40,
            {"shares": SHARES},
            "16 per head on average (largest layer: 32)",
            "16 tokens per head on average, 8 to 32 by layer",
        ),
        (40, {"budget": trimkv.Budget(16, split="even"), "shares": SHARES}, "16 per head", "16 tokens per head"),
        (40, {"budget": trimkv.Budget(16, buffer=4)}, "16 of 20 per head", "20 tokens per head"),
    ],
)
def test_a_budget_is_a_mean_where_layers_have_shares(seen, options, held, limit):
    cache = cache_after(seen, **options)
    assert show.held_text(cache) == held
    assert show.limit_text(cache) == limit
    line = show.saved_line(cache, bounded=True)
    assert line.startswith(f"seen {seen} tokens · held {held} · cache ")


def test_heads_that_share():
    cache = cache_after(40, budget=trimkv.Budget(16, scope="layer"))
    most = max(int(store.held.max()) for store in cache.stores)
    assert show.held_text(cache) == f"16 per head on average (most: {most})"
    assert show.limit_text(cache) == "16 tokens per head on average, shared among heads"


def test_a_full_cache_holds_all():
    cache = cache_after(40, policy="full")
    assert show.saved_line(cache, bounded=False).startswith("seen 40 tokens · held all · cache ")


def test_what_is_saved_is_said_once_something_is():
    assert "never more (holding all would take" in show.saved_line(cache_after(10), bounded=True)
    assert show.saved_line(cache_after(64), bounded=True).endswith("% saved)")
