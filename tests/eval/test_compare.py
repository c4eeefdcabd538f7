"""The numbers that policies are judged by."""

import math

import pytest
import torch

from tiny import build, tokens
from trimkv.budget import Budget
from trimkv.eval.compare import compare_stepwise


@pytest.fixture(scope="module")
def model():
    return build("llama")


def logits_with_window(model, ids, budget, sinks):
    """The stock model, forbidden to see what StreamingLLM would have evicted."""
    T = ids.shape[1]
    query, key = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (key <= query) & ((key < sinks) | (key > query - (budget - sinks)))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return model(ids, attention_mask=mask.expand(len(ids), 1, T, T)).logits


def brute_force(model, ids, budget, sinks):
    with torch.no_grad():
        full = model(ids).logits[:, :-1].double().log_softmax(-1)
    bounded = logits_with_window(model, ids, budget, sinks)[:, :-1].double().log_softmax(-1)
    nll = -bounded.gather(-1, ids[:, 1:, None]).mean()
    full_nll = -full.gather(-1, ids[:, 1:, None]).mean()
    kl = (full.exp() * (full - bounded)).sum(-1).mean()
    agreement = (full.argmax(-1) == bounded.argmax(-1)).double().mean()
    return float(kl), math.exp(nll), float(agreement), math.exp(full_nll)


def test_the_numbers_are_those_of_a_stock_model_that_may_not_look_at_evicted_tokens():
    """Checks kl, perplexity, agreement, and that a token is evicted at every step and before attention."""
    ids = tokens(3, 40)
    stock = build("llama")
    kl, perplexity, agreement, full_perplexity = brute_force(stock, ids, budget=12, sinks=4)
    found = compare_stepwise(build("llama"), ids, ["streaming_llm"], [12])
    (row,) = found.rows
    assert kl > 0.02 and agreement < 1  # the budget is small enough to hurt
    assert row.kl == pytest.approx(kl, rel=1e-3)
    assert row.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert row.top1_agreement == pytest.approx(agreement, abs=1e-9)
    assert found.full_perplexity == pytest.approx(full_perplexity, rel=1e-4)
    assert row.tokens == 3 * 39
    assert row.peak_tokens_per_head == 12


def test_nothing_is_lost_where_nothing_is_evicted(model):
    """The measurement's own error: what it reports for a cache that keeps everything."""
    found = compare_stepwise(model, tokens(2, 30), ["full", "streaming_llm", "random"], [8, 64])
    for row in found.rows:
        if row.policy == "full" or row.budget == 64:
            assert abs(row.kl) < 1e-6 and row.top1_agreement == 1
            assert row.perplexity == pytest.approx(found.full_perplexity, rel=1e-5)
            assert row.peak_tokens_per_head == 29
        else:
            assert row.kl > 1e-3
            assert row.peak_tokens_per_head == 8


def test_rows_come_policy_by_policy(model):
    found = compare_stepwise(model, tokens(1, 12), ["random", "full"], [5, Budget(7, sinks=1)]).as_dict()
    assert [(row["policy"], row["budget"]) for row in found["rows"]] == [
        ("random", 5),
        ("random", 7),
        ("full", 5),
        ("full", 7),
    ]
    keys = {"policy", "budget", "kl", "perplexity", "top1_agreement", "tokens", "peak_tokens_per_head"}
    assert set(found["rows"][0]) == keys | {"mean_tokens_per_head"}
    assert found["context"] == 12 and found["sequences"] == 1


def test_batches_and_blocks_do_not_change_the_numbers(model):
    """Otherwise results of different machines could not be compared."""
    ids = tokens(5, 33)
    one = compare_stepwise(model, ids, ["streaming_llm", "random"], [9], batch_size=8, block=128)
    other = compare_stepwise(model, ids, ["streaming_llm", "random"], [9], batch_size=2, block=7)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-4) and a.tokens == b.tokens == 5 * 32
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)


def test_progress_arrives_at_its_end(model):
    calls = []
    compare_stepwise(
        model,
        tokens(3, 10),
        ["full", "random"],
        [4, 6],
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == list(range(1, 55))  # 2 batches x 3 caches ("full" once) x 9 steps
    assert {total for _, total in calls} == {54}


def test_sliding_window_models_are_measured_too():
    """Their sliding layers are bounded anyway; only the full-attention layers differ from the teacher."""
    found = compare_stepwise(build("gemma2"), tokens(2, 30), ["full", "streaming_llm"], [10])
    assert abs(found.rows[0].kl) < 1e-5
    assert found.rows[1].kl > 1e-4 and found.rows[1].peak_tokens_per_head == 10


@pytest.mark.parametrize("shape", [(1, 1), (0, 10)])
def test_nothing_to_predict(model, shape):
    with pytest.raises(ValueError, match="nothing to predict"):
        compare_stepwise(model, torch.zeros(shape, dtype=torch.long), ["full"], [4])
