"""The trained baselines: what they keep, or attend to, against loops over their formulae."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import tiny
import trimkv
from trimkv.attention import reference
from trimkv.budget import Budget
from trimkv.cache.layers import BoundedLayer
from trimkv.cache.policies import make
from trimkv.cache.replay import ReplayLayer
from trimkv.cache.rotation import Rotation
from trimkv.eval.compare import compare, compare_stepwise
from trimkv.gates.head_sets import attach_heads, new_heads
from trimkv.gates.heads import BlockGate

D = 8
ROTATION = Rotation(0.3 ** torch.arange(D // 2).float())


def forwards(layer, module, q, k, v, lengths, pads, more=None):
    """Feeds forwards of ``lengths`` tokens; yields (start, end, output)."""
    real, start = torch.arange(sum(lengths)) >= torch.tensor(pads)[:, None], 0
    for i, length in enumerate(lengths):
        part = slice(start, start + length)
        layer.stage_padding(None if bool(real[:, part].all()) else real[:, part])
        layer.stage_more(bool(more and more[i]))
        module.before(part)
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        yield start, start + length, layer.attend(module, q[:, :, part], keys, values, D**-0.5)
        start += length


def tensors(B, H, G, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, H * G, T, D, generator=g), *(torch.randn(B, H, T, D, generator=g) for _ in range(2))


class Scored:
    """Stands in for an attention module whose retaining head said ``scores``."""

    def __init__(self, scores):
        self.scores, self.retaining_head = scores, self

    def before(self, part):
        self.given = self.scores[:, :, part]

    def take(self, tokens):
        part, self.given = self.given[:, :, :tokens], self.given[:, :, tokens:]
        return part


def kept_positions(layer):
    return [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]


def locret_kept(scores, held, seen, arriving, M, local, stabilizers):
    """What one head keeps of ``held`` positions: a decoded token arrives, or (None) a chunk is over."""

    def rank(p):
        forced = p >= seen - max(local, stabilizers)
        return (math.inf if forced else scores[p]), p

    room = M - (arriving is not None)
    return sorted(sorted(held, key=rank, reverse=True)[:room] + ([] if arriving is None else [arriving]))


@pytest.mark.parametrize(("H", "G"), [(3, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize(("chunk", "options"), [(None, {}), (9, {}), (16, {"stabilizers": 5, "local_len": 2})])
def test_locret_keeps_what_the_formula_says(H, G, chunk, options):
    M, pads, lengths = 12, [0, 4, 23], [40, *[1] * 210, 11, 1, 1]
    q, k, v = tensors(3, H, G, sum(lengths))
    scores = torch.randn(3, H, sum(lengths), generator=torch.Generator().manual_seed(1))
    scores[:, :, ::5] = 0.5  # ties
    layer = BoundedLayer(make("locret", **options), Budget(M), chunk, 0)
    local = options.get("local_len", M // 4)
    stabilizers = options.get("stabilizers", M * 2500 // 6000)
    held, seen = [[[] for _ in range(H)] for _ in pads], [0, 0, 0]
    for start, end, out in forwards(layer, Scored(scores), q, k, v, lengths, pads):
        step = chunk or end - start
        for b, pad in enumerate(pads):
            attended = [list(h) for h in held[b]]
            for at in range(start, end, step):
                size = min(step, end - at)
                new = [c - pad for c in range(at, at + size) if c >= pad]
                for h in range(H):
                    mine = scores[b, h, pad:].tolist()
                    if size == 1:
                        full = len(held[b][h]) == M
                        n = local_n = local
                        held[b][h] = (
                            locret_kept(mine, held[b][h], seen[b], new[0], M, n, local_n) if full else held[b][h] + new
                        )
                        attended[h] = held[b][h]
                    else:
                        attended[h] = held[b][h] + new
                        forced = stabilizers if at + size < end else 0
                        now = seen[b] + len(new)
                        held[b][h] = locret_kept(mine, attended[h], now, None, M, local, forced)
                seen[b] += len(new)
            for h in range(H):
                expect = reference.slot_attention(
                    q[b : b + 1, h * G : (h + 1) * G, end - 1 : end],
                    k[b : b + 1, h : h + 1][:, :, [p + pad for p in attended[h]]],
                    v[b : b + 1, h : h + 1][:, :, [p + pad for p in attended[h]]],
                    torch.tensor([[seen[b] - 1]]),
                    torch.tensor([[attended[h]]]),
                    D**-0.5,
                )
                torch.testing.assert_close(out[b, h * G : (h + 1) * G, -1], expect[0, :, 0], atol=1e-5, rtol=1e-4)
        assert kept_positions(layer) == held


@pytest.mark.parametrize("how", ["one forward", "prefill"])
def test_the_last_chunk_has_no_stabilizers(how):
    """All tokens alike but the first six, which are worth most: only force can keep others."""
    scores = torch.zeros(1, 1, 32)
    scores[:, :, 16:22] = 1.0
    q, k, v = tensors(1, 1, 1, 32)
    layer = BoundedLayer(make("locret", stabilizers=5, local_len=2), Budget(8), 16, 0)
    lengths, more = ([32], None) if how == "one forward" else ([16, 16], [True, False])
    seen = []
    for _ in forwards(layer, Scored(scores), q, k, v, lengths, [0], more):
        seen.append(kept_positions(layer)[0][0])
    if how == "prefill":
        assert seen[0] == [8, 9, 10, 11, 12, 13, 14, 15]
    assert seen[-1] == [16, 17, 18, 19, 20, 21, 30, 31]
    assert layer.more is False and layer.facts.more_follows is False


def test_prefill_says_which_chunk_is_the_last(monkeypatch):
    model = tiny.gated("llama", num_hidden_layers=2)
    ids, said = tiny.tokens(1, 30), []
    score = type(make("locret")).score

    def spy(self, slots, now):
        said.append(slots.layer.more_follows)
        return score(self, slots, now)

    monkeypatch.setattr(type(make("locret")), "score", spy)
    trimkv.prefill(model, trimkv.bounded_cache(model, "locret", 8, chunk=10), ids, chunk=10)
    assert said == [True, True, True, True, False, False]


@pytest.mark.parametrize("prompt", [1, 2, 5])
def test_a_prompt_shorter_than_local_len_works(prompt):
    model, ids = tiny.gated("llama"), tiny.tokens(2, prompt)
    stock, _ = tiny.generate(model, ids, None, new=6)
    cache = trimkv.bounded_cache(model, make("locret", local_len=20), 32)
    ours, _ = tiny.generate(model, ids, cache, new=6)
    assert torch.equal(ours, stock)


def gate_module(H, G, size=4, width=6, seed=0):
    gate = BlockGate(H, G, D, width, size)
    gate.initialise(torch.Generator().manual_seed(seed), std=1.0)
    return SimpleNamespace(attn_gate=gate.requires_grad_(False), before=lambda part: None)


def seer_layer(module, M, chunk=None, kind=BoundedLayer, **options):
    policy = make("seer_attention_r", **options).fitted({0: module})
    return kind(policy, Budget(M), chunk, 0, ROTATION)


def seer_blocks(gate, q, k, now, M, forced):
    """The blocks that the query at ``now`` of one row and head attends to. q: [G, D] and k: [S, D], rotated."""

    def turned(x, position, theta=10000.0):
        half = len(x) // 2
        angle = position * torch.tensor([theta ** (-i / half) for i in range(half)])
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def plain(x, position):
        return ROTATION.turn(x, torch.tensor(-position))

    def normal(x):
        return x / (x.pow(2).mean() + 1e-6).sqrt()

    weight_q, weight_k, size = gate
    query = sum(plain(q[g], now) @ weight_q[g] for g in range(len(q)))
    query = turned(normal(query), now)
    own, logits = now // size, {}
    for n in range((now + 1) // size):
        block = torch.stack([plain(k[p], p) for p in range(n * size, (n + 1) * size)])
        pooled = torch.cat([block.max(0).values, block.min(0).values, block.mean(0)])
        logits[n] = float(query @ turned(normal(pooled @ weight_k), n * size)) / len(query) ** 0.5
    if forced == "beside":
        logits.setdefault(own, 0.0)
        room = max(M // size, 1)
    else:
        logits.pop(own, None)
        room = max(M // size, 1) - 1
    best = sorted(logits, key=lambda n: (logits[n], n), reverse=True)[:room]
    return sorted({*best, own})


@pytest.mark.parametrize(
    ("H", "G", "M", "forced"),
    [(2, 1, 12, "within"), (1, 3, 12, "within"), (1, 4, 4, "within"), (1, 3, 9, "beside"), (1, 1, 2, "within")],
)
def test_seer_attends_to_the_blocks_that_the_formula_picks(H, G, M, forced):
    size, pads, lengths = 4, [0, 3, 14], [17, *[1] * 25, 6, *[1] * 40]
    module = gate_module(H, G, size)
    layer = seer_layer(module, M, chunk=7, forced=forced)
    q, k, v = tensors(3, H, G, sum(lengths))
    weights = module.attn_gate.attngate_linear_q.weight, module.attn_gate.attngate_linear_k.weight
    for start, end, out in forwards(layer, module, q, k, v, lengths, pads):
        alone = end - start == 1
        for b, pad in enumerate(pads):
            now = end - 1 - pad
            for h in range(H):
                heads = slice(h * G, (h + 1) * G)
                attended = list(range(now + 1))
                if alone:
                    gate = weights[0][h], weights[1][h], size
                    blocks = seer_blocks(gate, q[b, heads, end - 1], k[b, h, pad:], now, M, forced)
                    attended = [p for p in attended if p // size in blocks]
                    assert len(attended) <= layer.policy.attended(M)
                expect = reference.slot_attention(
                    q[b : b + 1, heads, end - 1 : end],
                    k[b : b + 1, h : h + 1][:, :, [p + pad for p in attended]],
                    v[b : b + 1, h : h + 1][:, :, [p + pad for p in attended]],
                    torch.tensor([[now]]),
                    torch.tensor([[attended]]),
                    D**-0.5,
                )
                torch.testing.assert_close(out[b, heads, -1], expect[0, :, 0], atol=1e-5, rtol=1e-4)
    assert layer.peak_decode_tokens == layer.policy.attended(M) and layer.store.used == sum(lengths)


def replayed_and_fed(module, M, forced, q, k, v):
    """The outputs [B, Q, T, D] of one pass over all tokens, and of feeding them one by one."""
    B, T = q.shape[0], q.shape[2]
    outs, peaks = [], []
    for kind, lengths in ((ReplayLayer, [T]), (BoundedLayer, [1] * T)):
        layer = seer_layer(module, M, kind=kind, forced=forced)
        outs.append(torch.cat([out for *_, out in forwards(layer, module, q, k, v, lengths, [0] * B)], 2))
        peaks.append(layer.peak_decode_tokens)
    assert peaks[0] == peaks[1]
    return outs


def attention_over(mask_BHTT, q, k, v):
    """Stock attention under a mask, [B, Q, T, D]."""
    G = q.shape[1] // k.shape[1]
    k, v, mask = (x.repeat_interleave(G, 1) for x in (k, v, mask_BHTT))
    return (q @ k.transpose(2, 3) * D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("forced", ["within", "beside"])
@pytest.mark.parametrize(("H", "G", "T", "size"), [(2, 1, 31, 4), (1, 3, 31, 4), (2, 2, 32, 4), (1, 2, 17, 1)])
def test_a_replay_of_seer_is_what_the_formula_picks_at_every_step(H, G, T, size, forced, monkeypatch):
    """Blocks of queries that end within a block of keys; budgets below a block, of one, of some, and for all."""
    monkeypatch.setattr("trimkv.cache.replay.QUERIES", 10)
    module = gate_module(H, G, size)
    q, k, v = tensors(2, H, G, T)
    gate = module.attn_gate.attngate_linear_q.weight, module.attn_gate.attngate_linear_k.weight
    sizes = set()
    for M in (2, 4, 9, 12, 64):
        mask = torch.zeros(2, H, T, T, dtype=torch.bool)
        for b, h, t in itertools.product(range(2), range(H), range(T)):
            one = gate[0][h], gate[1][h], size
            blocks = seer_blocks(one, q[b, h * G : (h + 1) * G, t], k[b, h, : t + 1], t, M, forced)
            mask[b, h, t, : t + 1] = torch.tensor([p // size in blocks for p in range(t + 1)])
        expect = attention_over(mask, q, k, v)
        for out in replayed_and_fed(module, M, forced, q, k, v):
            torch.testing.assert_close(out, expect, atol=1e-5, rtol=1e-4)
        sizes.add(int(mask.sum()))
    assert len(sizes) >= 3  # the budgets differ in what they show


@pytest.mark.parametrize("forced", ["within", "beside"])
def test_blocks_worth_the_same_are_picked_newest_first(forced):
    """In a replay as in a step; beside them, an incomplete own block is worth no more than they are."""
    module, size, T = gate_module(2, 2), 4, 31
    module.attn_gate.attngate_linear_k.weight.zero_()
    q, k, v = tensors(2, 2, 2, T)
    block = torch.arange(T) // size
    mask = (block[None] <= block[:, None]) & (block[None] > block[:, None] - 3) & torch.ones(T, T).tril().bool()
    expect = attention_over(mask.expand(2, 2, T, T), q, k, v)
    for out in replayed_and_fed(module, 12, forced, q, k, v):
        torch.testing.assert_close(out, expect, atol=1e-5, rtol=1e-4)


def test_block_summaries_are_the_same_in_prefill_and_decode():
    """Whatever the chunks: also for a block that a chunk leaves half full, and one that decoding completes."""
    T, pads, size = 150, [0, 5], 4
    q, k, v = tensors(2, 2, 2, T)
    seen = []
    for lengths in ([T], [7] * 21 + [3], [1] * T, [33, *[1] * 50, 67]):
        module = gate_module(2, 2, size)
        layer = seer_layer(module, 12)
        for _ in forwards(layer, module, q, k, v, lengths, pads):
            pass
        summary = layer.store.rows["summary"]
        assert summary.shape[1] >= T // size
        seen.append([summary[b, : (T - pad) // size] for b, pad in enumerate(pads)])
    for other in seen[1:]:
        for ours, theirs in zip(other, seen[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_seer_says_that_it_keeps_everything():
    model = tiny.gated("llama", num_hidden_layers=2)
    cache = trimkv.bounded_cache(model, "seer_attention_r", 8, chunk=8)
    tiny.generate(model, tiny.tokens(2, 40), cache, new=90)
    assert cache.held_tokens == 129 and cache.peak_decode_tokens == 8 and cache.peak_prefill_tokens == 40
    assert cache.nbytes > cache.full_cache_bytes(129)
    assert cache.slot_layers[0].store.rows["summary"].shape[1] == 256 // 4 + 1


def test_a_row_of_seers_goes_on_in_another_cache():
    model, ids = tiny.gated("llama", num_hidden_layers=2), tiny.tokens(1, 100)
    cache = trimkv.bounded_cache(model, "seer_attention_r", 8)
    trimkv.prefill(model, cache, ids[:, :70])
    other = trimkv.bounded_cache(model, "seer_attention_r", 8)
    other.restore(cache.snapshot())
    for t in range(70, 100):
        a, b = (model(ids[:, t : t + 1], past_key_values=one).logits for one in (cache, other))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", ["locret", "seer_attention_r"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "glm4", "gpt_oss"])
def test_a_budget_that_holds_everything_gives_the_stock_tokens(policy, name):
    model = tiny.gated(name)
    ids, mask = tiny.left_padded([0, 6], 20)
    stock, _ = tiny.generate(model, ids, None, new=12, mask=mask)
    ours, _ = tiny.generate(model, ids, trimkv.bounded_cache(model, policy, 40, 7), new=12, mask=mask)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("policy", ["locret", "seer_attention_r"])
def test_a_padded_row_is_its_unpadded_run(policy):
    """Of different tokens: in the first layer a token says the same of itself wherever it stands, and rounding would
    decide between two of them."""
    model, pads = tiny.gated("qwen3", num_hidden_layers=2), [0, 5, 13]
    ids = torch.stack([torch.randperm(120)[:45] + 3 for _ in pads])
    mask = (torch.arange(45) >= torch.tensor(pads)[:, None]).long()

    def run(ids, mask, prompt):
        cache = trimkv.bounded_cache(model, policy, 12, None)
        logits = [trimkv.prefill(model, cache, ids[:, :prompt], mask[:, :prompt], chunk=prompt)]
        for t in range(prompt, ids.shape[1]):
            seen = mask[:, : t + 1]
            at = seen.sum(-1, keepdim=True) - 1
            new = model(ids[:, t : t + 1], attention_mask=seen, position_ids=at, past_key_values=cache)
            logits.append(new.logits[:, -1])
        return torch.stack(logits, 1)

    with torch.no_grad():
        together = run(ids, mask, 24)
        for b, pad in enumerate(pads):
            alone = run(ids[b : b + 1, pad:], mask[b : b + 1, pad:], 24 - pad)
            torch.testing.assert_close(together[b], alone[0], atol=1e-4, rtol=1e-4)


def test_compare_measures_both():
    model, ids = tiny.gated("llama", num_hidden_layers=2), tiny.tokens(2, 40, seed=3)
    policies, budgets = ["locret", "seer_attention_r", "full"], [4, 12]
    fast, slow = compare(model, ids, policies, budgets).rows, compare_stepwise(model, ids, policies, budgets).rows
    for a, b in zip(fast, slow, strict=True):
        assert (a.policy, a.budget, a.peak_tokens_per_head) == (b.policy, b.budget, b.peak_tokens_per_head)
        if a.policy != "locret":  # equal tokens are ties in its first layer
            assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-6)
    by = {(row.policy, row.budget): row for row in slow}
    assert by["seer_attention_r", 4].kl > by["seer_attention_r", 12].kl > 1e-3
    assert by["seer_attention_r", 4].peak_tokens_per_head == 4


@pytest.mark.parametrize("policy", ["locret", "seer_attention_r"])
def test_missing_heads_are_said(policy):
    model = tiny.build("llama")
    with pytest.raises(ValueError, match=f"{policy} needs trained heads"):
        trimkv.bounded_cache(model, policy, 8)
    attach_heads(model, new_heads(model, policy, 8))
    assert trimkv.bounded_cache(model, policy, 8)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="stabilizers"):
        make("locret", stabilizers=-1)
    with pytest.raises(ValueError, match="within, beside"):
        make("seer_attention_r", forced="never")


def test_a_full_cache_is_never_trimmed():
    """The store of a policy that keeps everything is full at times; a buffer has nothing to say there."""
    model, ids = tiny.build("llama", num_hidden_layers=1), tiny.tokens(1, 60)
    cache = trimkv.bounded_cache(model, "full", Budget(8, buffer=4))
    tiny.generate(model, ids, cache, new=10)
    assert cache.held_tokens == 69
