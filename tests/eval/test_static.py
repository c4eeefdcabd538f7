"""Policies that are fed token by token, with the step as it is recorded on a GPU."""

import pytest
import torch

import tiny
from trimkv.budget import Budget
from trimkv.cache.policies import POLICIES
from trimkv.eval import compare as module
from trimkv.eval.compare import compare_stepwise

NAMES = ["trimkv", *(name for name, cls in POLICIES.items() if cls.bounded and cls.observes)]


def numbers(device, policies, budgets=None):
    model = tiny.gated("qwen3", num_hidden_layers=2).to(device)
    # No token twice: equal keys would leave the choice to the last bit.
    ids = torch.stack([torch.randperm(125, generator=torch.Generator().manual_seed(b))[:60] + 3 for b in range(3)])
    return compare_stepwise(model, ids, policies, budgets or [6, Budget(9, buffer=3, sinks=1)]).rows


def check(rows, expected, tolerance):
    assert len(rows) == len(expected)
    for a, b in zip(rows, expected, strict=True):
        assert (a.policy, a.budget, a.tokens, a.peak_tokens_per_head) == (
            b.policy,
            b.budget,
            b.tokens,
            b.peak_tokens_per_head,
        )
        assert a.kl == pytest.approx(b.kl, rel=tolerance), a.policy
        assert a.perplexity == pytest.approx(b.perplexity, rel=tolerance), a.policy


def test_a_static_cache_gives_the_same_numbers(monkeypatch):
    expected = numbers("cpu", NAMES)
    made = []
    static = module._static_cache
    monkeypatch.setattr(module, "_records", lambda device: True)
    monkeypatch.setattr(module, "_static_cache", lambda *args: made.append(static(*args)) or made[-1])
    rows = numbers("cpu", NAMES)
    assert all(cache is not None and cache.static for cache in made) and len(made) == 2 * len(NAMES)
    check(rows, expected, 1e-4)


def test_policies_without_a_fixed_number_of_slots_are_measured_too(monkeypatch):
    expected = numbers("cpu", ["full", "seer_attention_r"], [8])
    monkeypatch.setattr(module, "_records", lambda device: True)
    check(numbers("cpu", ["full", "seer_attention_r"], [8]), expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_gives_the_numbers_of_the_cpu(name):
    check(numbers("cuda", [name]), numbers("cpu", [name]), 2e-3)


@pytest.mark.gpu
def test_steps_side_by_side_give_what_they_give_alone():
    """One stream and one workspace each: nothing of one cell may reach another."""
    alone = [row for name in NAMES for row in numbers("cuda", [name])]
    for _ in range(3):
        check(numbers("cuda", NAMES), alone, 1e-6)
