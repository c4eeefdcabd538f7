"""A dozen of the sweep's architectures (tests/architectures.py has them all) beside those of tiny.py."""

import pytest

import architectures

pytestmark = pytest.mark.smoke

WORKS = ["gpt2", "gpt_neox", "opt", "biogpt", "gpt_bigcode", "nemotron_h", "bamba", "jamba", "bart", "roberta", "olmoe"]
WORKS += ["apertus", "llama4_text", "qwen3_5_text"]


@pytest.mark.parametrize("model_type", WORKS)
def test_text_and_logits_are_those_of_the_stock_cache(model_type):
    verdict = architectures.check(model_type)
    assert verdict.kind == "works", verdict


@pytest.mark.parametrize("model_type", ["jetmoe", "diffllama", "falcon", "mpt", "xglm", "trocr", "deepseek_v3"])
def test_what_cannot_be_served_is_refused_when_the_cache_is_made(model_type):
    verdict = architectures.check(model_type)
    assert verdict.kind == "refused" and verdict.reason, verdict


def test_the_sweep_would_notice_a_difference(monkeypatch):
    """A cache that forgets: the check is no check if it passes."""
    real = architectures.trimkv.bounded_cache
    monkeypatch.setattr(
        architectures.trimkv, "bounded_cache", lambda model, policy, budget, **k: real(model, policy, 6, **k)
    )
    assert architectures.check("gpt2").kind == "differs"
