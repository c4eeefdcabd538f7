"""What is evicted: every policy against Python loops over its formula, on random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brute
import tiny
import trimkv
from trimkv.attention import reference
from trimkv.cache.layers import BoundedLayer
from trimkv.cache.policies import make


class Module:
    """Stands in for an attention module: a cache layer asks it for a gate only."""


def drive(layer, heads, lengths, pads, group, dim, seed):
    """Feeds forwards of ``lengths`` tokens to a layer; rows start with ``pads`` padding tokens.

    Returns kept positions and outputs after each forward, with the log_beta and keys that were fed.
    """
    g = torch.Generator().manual_seed(seed)
    B, total = len(pads), sum(lengths)
    k, v = (torch.randn(B, heads, total, dim, generator=g) for _ in range(2))
    q = torch.randn(B, heads * group, total, dim, generator=g)
    log_beta = -torch.rand(B, heads, total, generator=g).pow(3)
    log_beta[:, :, ::5] = -0.25  # ties
    real = torch.arange(total)[None] >= torch.tensor(pads)[:, None]
    start, steps = 0, []
    for length in lengths:
        part = slice(start, start + length)
        layer.stage_log_beta(log_beta[:, :, part])
        layer.stage_padding(None if bool(real[:, part].all()) else real[:, part])
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        out = layer.attend(Module(), q[:, :, part], keys, values, dim**-0.5)
        kept = [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        steps.append((part, out, kept))
        start += length
    return steps, q, k, v, log_beta


def check(policy, budget, chunk, lengths, pads, heads=2, group=2, dim=8, seed=0, **options):
    name = options.pop("name", policy)
    layer = BoundedLayer(make(policy, **options), budget, chunk, 0)
    steps, q, k, v, log_beta = drive(layer, heads, lengths, pads, group, dim, seed)
    distance = 1 if options.get("distance") == "reference" else 0
    log_norm = k.norm(dim=-1).log()
    for b, pad in enumerate(pads):
        for h in range(heads):
            head = brute.BruteHead(
                name, budget.tokens, budget.buffer, max(budget.sinks, layer.sinks), budget.recent, distance
            )
            for part, out, kept in steps:
                start = part.start
                for size in brute.chunks(part.stop - part.start, chunk):
                    columns = [c for c in range(start, start + size) if c >= pad]
                    # A padding token among others changes nothing; a forward of padding alone changes nothing either.
                    fed = [(log_beta[b, h, c].item(), log_norm[b, h, c].item()) for c in columns]
                    start += size
                    if not fed:
                        continue
                    attended = feed(head, fed, size)
                    expect = reference.slot_attention(
                        q[b : b + 1, h * group : (h + 1) * group, start - 1 : start],
                        k[b : b + 1, h : h + 1][:, :, [p + pad for p in attended]],
                        v[b : b + 1, h : h + 1][:, :, [p + pad for p in attended]],
                        torch.tensor([[head.seen - 1]]),
                        torch.tensor([[attended]]),
                        dim**-0.5,
                    )
                    got = out[b, h * group : (h + 1) * group, start - 1 - part.start]
                    torch.testing.assert_close(got, expect[0, :, 0], atol=1e-5, rtol=1e-4)
                assert kept[b][h] == sorted(head.kept), (b, h, part)


def feed(head, fed, size):
    """A chunk of several columns of which one is real is still a chunk: it evicts after attention."""
    if size > 1 and len(fed) == 1:
        head.kept[head.seen] = fed[0]
        head.seen += 1
        attended = sorted(head.kept)
        if len(head.kept) > max(head.M + head.W - 1, head.M):
            head.cut(head.M, head.seen - head.recent)
        return attended
    return head.feed(fed)


POLICIES = [
    ("trimkv", {}),
    ("trimkv", {"distance": "reference"}),
    ("trimkv", {"strategy": "knorm_alpha", "name": "knorm_alpha"}),
    ("streaming_llm", {"sinks": 2}),
]


@pytest.mark.parametrize(("policy", "options"), POLICIES)
@pytest.mark.parametrize("buffer", [0, 1, 4])
def test_200_steps_keep_what_the_formula_says(policy, options, buffer):
    budget = trimkv.Budget(12, buffer=buffer, sinks=2, recent=3)
    check(policy, budget, 8, [29] + [1] * 200 + [5, 1, 1], [0, 7, 26], **options)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_budget_chunk_length_and_padding(data):
    policy, options = data.draw(st.sampled_from(POLICIES))
    sinks = data.draw(st.integers(0, 3))
    recent = data.draw(st.integers(0, 3))
    least = max(sinks, options.get("sinks", 0)) + recent + 1
    tokens = data.draw(st.integers(least, 20))
    buffer = data.draw(st.integers(0, 6))
    chunk = data.draw(st.sampled_from([None, 1, 2, 3, 7, 16]))
    lengths = data.draw(st.lists(st.integers(1, 18), min_size=1, max_size=8))
    pads = data.draw(st.lists(st.integers(0, lengths[0] - 1), min_size=1, max_size=3))
    heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 4)]))
    budget = trimkv.Budget(tokens, buffer=buffer, sinks=sinks, recent=recent)
    check(policy, budget, chunk, lengths, pads, heads, group, seed=data.draw(st.integers(0, 999)), **options)


def test_sinks_survive_10_000_evictions():
    layer = BoundedLayer(make("random"), trimkv.Budget(8, sinks=3, recent=2), 16, 0)
    x = torch.zeros(1, 1, 1, 4)
    for _ in range(10_000 + 8):
        k, v = layer.update(x, x)
        layer.attend(Module(), x, k, v, 1.0)
    held = sorted(layer.store.position[0, 0].tolist())
    assert held[:3] == [0, 1, 2]
    assert held[-2:] == [10_006, 10_007]
    assert layer.store.nbytes == 8 * (4 * 4 * 2 + 4) + 4


def test_random_gives_every_held_token_the_same_chance():
    layer = BoundedLayer(make("random", seed=3), trimkv.Budget(10), None, 0)
    k, v = layer.update(*(torch.zeros(1, 2000, 200, 1),) * 2)
    layer.attend(Module(), torch.zeros(1, 2000, 200, 1), k, v, 1.0)
    counts = torch.bincount(layer.store.position.flatten().long(), minlength=200)
    assert counts.sum() == 20_000
    # 2,000 heads, 10 of 200 tokens each: 100 +- 9.7 per token
    assert 55 < counts.min() and counts.max() < 150


def test_the_published_off_by_one_changes_a_ranking():
    """Ages 2 and 1 of beta .9 and .81: equal at the exact distance (the newer stays), apart at the reference's."""
    for distance, survivor in (("exact", 1), ("reference", 0)):
        layer = BoundedLayer(make("trimkv", distance=distance), trimkv.Budget(1), None, 0)
        layer.stage_log_beta(torch.tensor([[[0.9, 0.81]]]).log())
        x = torch.zeros(1, 1, 2, 4)
        layer.attend(Module(), x, *layer.update(x, x), 1.0)
        log_09, log_081 = torch.tensor([0.9, 0.81]).log().tolist()
        offset = distance == "reference"
        expect = int((log_081 * (1 + offset), 1) > (log_09 * (2 + offset), 0))
        assert layer.store.position[0, 0].tolist() == [expect]
        if distance == "reference":
            assert expect == survivor


def test_memory_does_not_grow_and_slots_stay_where_they_are():
    model = tiny.build("llama")
    cache = trimkv.bounded_cache(model, "streaming_llm", 16, chunk=8)
    ids = tiny.tokens(2, 40)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    places = [layer.store.k.data_ptr() for layer in cache.slot_layers]
    size = cache.nbytes
    more = tiny.tokens(2, 1)
    for _ in range(50):
        model(more, past_key_values=cache)
    assert [layer.store.k.data_ptr() for layer in cache.slot_layers] == places
    assert cache.nbytes == size
    assert (cache.peak_prefill_tokens, cache.peak_decode_tokens, cache.held_tokens) == (24, 16, 16)
    assert cache.get_seq_length() == 94
