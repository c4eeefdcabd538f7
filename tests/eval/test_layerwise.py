"""One pass over whole sequences gives what feeding one token at a time gives."""

import pytest
import torch

import trimkv
from tiny import HYBRID, MODELS, build, gated, tokens
from trimkv.budget import Budget
from trimkv.cache.policies import Policy, make
from trimkv.cache.replay import replay_cache, replayable
from trimkv.eval import layerwise
from trimkv.eval.compare import compare, compare_stepwise
from trimkv.gates.attach import new_gates

STRATEGIES = [
    ("trimkv", {}),
    ("trimkv", {"distance": "reference"}),
    ("trimkv", {"strategy": "knorm_alpha"}),
    ("streaming_llm", {}),
    ("knorm", {}),
    ("keydiff", {}),
    ("lagkv", {"sinks": 1}),
    ("random", {}),
    ("full", {}),
]
BUDGETS = [Budget(1), Budget(9), Budget(14, sinks=2, recent=5), Budget(7, recent=1), Budget(200)]


class Reading(Policy):
    """Reads keys and values at every step. Rotated components, not norms: those of a token that recurs would tie."""

    name = "reading"
    needs = frozenset({"keys", "values"})

    def score(self, slots, now_B11):
        return slots.k[..., 0].float() + slots.v[..., 1].float()


class Late(Reading):
    """Selects, and does not say that it can do so for many queries at once."""

    name, bounded, selects = "late", False, True

    def visible(self, slots, new):
        return (slots.position > new.position[:, :1] - 5)[:, :, None]


def distinct(batch, length):
    """Tokens that do not recur: the norms of their keys in the first layer would be equal but for rounding."""
    return torch.stack(
        [torch.randperm(125, generator=torch.Generator().manual_seed(b))[:length] + 3 for b in range(batch)]
    )


def roomy(policy, budgets):
    return [budget for budget in budgets if budget.tokens > policy.sinks + budget.recent]


def assert_same(a, b, tolerance=2e-5):
    assert a.full_perplexity == pytest.approx(b.full_perplexity, rel=tolerance)
    for fast, slow in zip(a.rows, b.rows, strict=True):
        assert fast.kl == pytest.approx(slow.kl, rel=tolerance, abs=tolerance), slow
        assert fast.perplexity == pytest.approx(slow.perplexity, rel=tolerance), slow
        assert fast.top1_agreement == pytest.approx(slow.top1_agreement, abs=1e-9), slow
        assert (fast.policy, fast.budget, fast.tokens) == (slow.policy, slow.budget, slow.tokens)
        assert fast.peak_tokens_per_head == slow.peak_tokens_per_head, slow


def kept_stepwise(model, ids, policy, budget):
    """step -> layer -> bool [B, H, T]: the tokens in the slots of a real bounded cache, fed token by token."""
    cache = trimkv.bounded_cache(model, policy, budget)
    B, T = ids.shape
    steps = []
    for t in range(T):
        with torch.no_grad():
            model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        held = [layer.store.view().position.long() for layer in cache.slot_layers]
        steps.append([torch.zeros(*p.shape[:2], T, dtype=torch.bool).scatter(2, p, True) for p in held])
    return steps


def assert_same_kept(model, ids, policy, budget):
    slow = kept_stepwise(model, ids, policy, budget)
    cache = replay_cache(model, policy, budget)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    T = ids.shape[1]
    assert cache.get_seq_length() == T and cache.held_tokens == 0
    token = torch.arange(T)
    for t in range(T):
        for layer, kept in zip(cache.slot_layers, slow[t], strict=True):
            assert torch.equal((token <= t) & (layer.last >= t), kept), (t, layer.layer_idx)
    assert cache.peak_tokens == max(int(kept.sum(-1).max()) for step in slow for kept in step)


@pytest.mark.parametrize("policy, options", STRATEGIES, ids=str)
def test_the_kept_tokens_of_every_step_are_those_of_a_bounded_cache(policy, options):
    model, policy = gated("qwen3", num_hidden_layers=2), make(policy, **options)
    for budget in roomy(policy, BUDGETS):
        assert_same_kept(model, distinct(2, 40), policy, budget)


def test_a_policy_may_read_keys_and_values():
    assert_same_kept(build("llama", num_hidden_layers=2), tokens(2, 40), Reading(), Budget(9, sinks=1))


@pytest.mark.parametrize("kind", ["rg2", "rg3"])
def test_gates_that_read_keys(kind):
    model = build("qwen3", num_hidden_layers=2)
    gates = new_gates(model, kind=kind, intermediate_size=16, training_length=16)
    last = "down_proj.weight" if kind == "rg3" else "linear2.weight"
    for parameters in gates.layers.values():
        parameters[last].mul_(200)
    trimkv.attach(model, gates)
    assert_same_kept(model, tokens(2, 40), make("trimkv"), Budget(9))
    assert_same(*(run(model, tokens(2, 40), ["trimkv"], [9]) for run in (compare, compare_stepwise)))


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt_oss", "gemma2"])
def test_the_numbers_are_those_of_feeding_token_by_token(name, monkeypatch):
    """Blocks of queries and of logits smaller than the sequences, and batches that do not divide."""
    monkeypatch.setattr("trimkv.cache.replay.QUERIES", 16)
    monkeypatch.setattr(layerwise, "POSITIONS", 50)
    monkeypatch.setattr(layerwise, "TEACHER_BLOCK", 32)
    model = gated(name)
    policies = ["full", "trimkv", make("trimkv", strategy="knorm_alpha", distance="reference"), "streaming_llm"]
    budgets = [Budget(10), Budget(16, sinks=1, recent=6)]
    fast = compare(model, tokens(3, 60), policies, budgets, batch_size=2)
    assert_same(fast, compare_stepwise(model, tokens(3, 60), policies, budgets, batch_size=3))
    assert all(row.kl > 1e-3 and row.peak_tokens_per_head == row.budget for row in fast.rows[2:])
    assert all(abs(row.kl) < 1e-5 and row.peak_tokens_per_head == 59 for row in fast.rows[:2])


@pytest.mark.parametrize(
    "name, changes",
    [
        ("qwen3", {"num_hidden_layers": 2}),
        ("llama", {"num_hidden_layers": 2, "num_key_value_heads": 4}),
        ("glm4", {"num_hidden_layers": 2, "num_key_value_heads": 1}),
        ("gpt_oss", {}),
        ("gemma2", {}),
    ],
    ids=str,
)
def test_the_blocks_that_a_gate_picks_are_replayed(name, changes, monkeypatch):
    """Blocks of 4 in 46 tokens; budgets below a block, of one, of some and for all; forced blocks in them or beside."""
    monkeypatch.setattr("trimkv.cache.replay.QUERIES", 10)
    model, ids, calls = gated(name, **changes), distinct(3, 47), []
    policies = [make("seer_attention_r", forced=forced) for forced in ("within", "beside")]
    budgets = [2, 4, 13, 200]
    fast = compare(model, ids, policies, budgets, batch_size=2, progress=lambda *call: calls.append(call))
    assert_same(fast, compare_stepwise(model, ids, policies, budgets, batch_size=3))
    assert [row.peak_tokens_per_head for row in fast.rows] == [4, 4, 12, 46, 8, 8, 16, 46]
    kl = [row.kl for row in fast.rows]
    assert kl[0] == kl[1] > kl[2] > 1e-3 and kl[4] == kl[5] > kl[6] > 1e-3 and kl[2] != kl[6]
    assert abs(kl[3]) < 1e-5 and abs(kl[7]) < 1e-5
    total = 2 * 8 * 2  # batches x cells x layers with slots
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("length, budget", [(2, 5), (2, 6), (20, 19), (20, 18), (20, 64)])
def test_short_sequences(length, budget):
    model = gated("qwen3", num_hidden_layers=2)
    policies = ["trimkv", "random", "seer_attention_r"]
    both = (run(model, tokens(2, length), policies, [budget]) for run in (compare, compare_stepwise))
    assert_same(*both)


def test_what_cannot_be_replayed_is_fed_token_by_token():
    """One result, in the order asked for, and one bar."""

    class Watching(Reading):
        name = "watching"
        needs = frozenset({"attention"})

    model, ids, calls = build("llama", num_hidden_layers=2), tokens(3, 20), []
    policies, budgets = ["random", Watching(), Late()], [Budget(8), Budget(6, buffer=3)]
    fast = compare(model, ids, policies, budgets, batch_size=2, progress=lambda *call: calls.append(call))
    assert_same(fast, compare_stepwise(model, ids, policies, budgets, batch_size=2))
    total = 2 * (1 * 2 + 5 * 19)  # batches x (one cell x layers, five cells x steps)
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert not replayable(Watching(), Budget(8)) and not replayable(make("random"), Budget(6, buffer=3))
    assert not replayable(Late(), Budget(8)) and replayable(make("seer_attention_r"), Budget(8))
    with pytest.raises(ValueError, match="token by token"):
        replay_cache(model, "random", Budget(6, buffer=3))


def test_policies_that_watch_are_fed_token_by_token_in_batches():
    """Their numbers do not depend on the batch, and stand beside those of one pass in one result."""
    model, ids = build("qwen3", num_hidden_layers=2), distinct(5, 40)
    policies = ["h2o", make("h2o", age_normalised=True), "tova", "streaming_llm_cache", "keydiff", "knorm", "full"]
    assert [replayable(make(policy), Budget(8)) for policy in policies] == [False] * 4 + [True] * 3
    together = compare(model, ids, policies, [9], batch_size=5)
    assert_same(together, compare(model, ids, policies, [9], batch_size=2, stepwise=True, block=16))
    kl = [row.kl for row in together.rows]
    assert len(set(kl)) == 7 and all(x > 1e-3 for x in kl[:-1]) and abs(kl[-1]) < 1e-6
    assert all(row.peak_tokens_per_head == 9 for row in together.rows[:-1])


def test_rotations_that_depend_on_the_length_are_not_replayed():
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = {**factors, "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    assert layerwise.same_rotations(model, 24) and not layerwise.same_rotations(model, 25)
    assert layerwise.same_rotations(build("gemma3_text"), 10_000)
    both = (run(model, tokens(1, 30), ["streaming_llm"], [8]) for run in (compare, compare_stepwise))
    assert_same(*both, tolerance=0)


def test_a_replay_takes_one_pass_without_padding():
    model, ids = build("llama", num_hidden_layers=2), tokens(2, 12)
    cache = replay_cache(model, "random", 6)
    model(input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="one forward pass"):
        model(input_ids=ids, past_key_values=cache)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="without padding"):
        model(input_ids=ids, attention_mask=mask, past_key_values=replay_cache(model, "random", 6))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_head_is_the_models_own(name):
    """Capped, scaled, masked: whatever a model does to its logits."""
    model, ids = build(name, num_hidden_layers=4 if name in HYBRID else 1), tokens(2, 9)
    with torch.no_grad():
        out = model.get_decoder()(input_ids=ids)
        head = layerwise.Head(model, type(out))
        assert torch.equal(head(out.last_hidden_state.flatten(0, 1)), model(ids).logits.flatten(0, 1))
        assert "forward" not in model.get_decoder().__dict__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name, options", STRATEGIES[:-1])
@pytest.mark.parametrize("budget", [Budget(9), Budget(14, sinks=2, recent=5)])
def test_a_captured_replay_keeps_what_a_loop_keeps(name, options, budget, monkeypatch):
    model = gated("qwen3").cuda()
    ids = tokens(3, 120).cuda()
    captures = []
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *a, _graph=torch.cuda.graph, **k: captures.append(1) or _graph(*a, **k)
    )

    def kept():
        cache = replay_cache(model, make(name, **options), budget)
        model(ids, past_key_values=cache)
        return [layer.last for layer in cache.slot_layers]

    captured = kept()
    assert len(captures) == len(captured)
    monkeypatch.setattr("trimkv.cache.replay.FEW", 1000)
    for ours, loop in zip(captured, kept(), strict=True):
        assert torch.equal(ours, loop) and (loop < 119).sum() == 3 * loop.shape[1] * (120 - budget.tokens)
    assert len(captures) == len(captured)
