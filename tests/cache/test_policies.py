"""Every policy: what it keeps against loops over its formula, and what all of them owe the user."""

import pytest
import torch

import brute
import tiny
import trimkv
from trimkv.attention import reference
from trimkv.budget import Budget
from trimkv.cache.layers import BoundedLayer
from trimkv.cache.policies import POLICIES, Policy, as_published, make
from trimkv.cache.policies.window import push, window_logits, window_state
from trimkv.cache.rotation import Rotation, rotation_of
from trimkv.cache.slots import LayerFacts, Slots

# name of the formula, policy, its options, what the formula must know besides
FORMULAE = [
    ("knorm", "knorm", {}, {}),
    ("keydiff", "keydiff", {}, {}),
    ("tova", "tova", {}, {}),
    ("h2o", "h2o", {}, {}),
    ("h2o_age", "h2o_normalised", {}, {}),
    ("lagkv", "lagkv", {"sinks": 2, "lag": 3}, {"first": 2}),
    ("lagkv", "lagkv", {}, {"first": 4}),
    ("streaming_llm", "streaming_llm_cache", {"sinks": 2}, {}),
]
# Those with trained heads of their own are tested beside their training.
ALL = [name for name, cls in POLICIES.items() if cls.bounded and not cls.head]
WATCHING = [name for name, cls in POLICIES.items() if cls().observes]


def drive(layer, q, k, v, lengths, pads, softcap=None, s_aux=None):
    """Feeds forwards of ``lengths`` tokens; rows start with padding. Yields (start, end, output, kept positions)."""
    D, start = k.shape[-1], 0
    real = torch.arange(sum(lengths)) >= torch.tensor(pads)[:, None]
    for length in lengths:
        end = start + length
        part = slice(start, end)
        layer.stage_padding(None if bool(real[:, part].all()) else real[:, part])
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        out = layer.attend(None, q[:, :, part], keys, values, D**-0.5, softcap, s_aux)
        kept = [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        yield start, end, out, kept
        start = end


def tensors(B, H, G, T, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, H * G, T, D, generator=g), *(torch.randn(B, H, T, D, generator=g) for _ in range(2))


def check(formula, name, options, extra, budget, chunk, lengths, pads, H, G, D=8, seed=0, softcap=None, sink=False):
    policy = make(name, **options)
    layer = BoundedLayer(policy, budget, chunk, 0, Rotation(0.3 ** torch.arange(D // 2).float()))
    q, k, v = tensors(len(pads), H, G, sum(lengths), D, seed)
    s_aux = torch.randn(H * G, generator=torch.Generator().manual_seed(seed)) if sink else None
    if name == "lagkv":
        extra = {**extra, "lag": min(policy.lag, max(4, (budget.tokens - policy.sinks) // 4))}
    rows = [
        brute.BruteRow(
            brute.FORMULAE[formula],
            q[b, :, pad:].unflatten(0, (H, G)),
            k[b, :, pad:],
            v[b, :, pad:],
            budget.tokens,
            budget.buffer,
            layer.sinks,
            layer.recent,
            softcap,
            None if s_aux is None else s_aux.view(H, G),
            **extra,
        )
        for b, pad in enumerate(pads)
    ]
    for start, end, out, kept in drive(layer, q, k, v, lengths, pads, softcap, s_aux):
        for b, (pad, row) in enumerate(zip(pads, rows, strict=True)):
            at = start
            for size in brute.chunks(end - start, chunk):
                real = max(0, at + size - max(at, pad))
                at += size
                if not real:
                    continue
                attended = row.feed(real, alone=size == 1)
                if policy.moves_keys or size > 1 or start % 16:
                    continue  # outputs: now and then
                for h in range(H):
                    columns = torch.tensor(attended[h]) + pad
                    heads = slice(h * G, (h + 1) * G)
                    expect = reference.slot_attention(
                        q[b : b + 1, heads, at - 1 : at],
                        k[b : b + 1, h : h + 1, columns],
                        v[b : b + 1, h : h + 1, columns],
                        torch.tensor([[row.seen - 1]]),
                        torch.tensor([[attended[h]]]),
                        D**-0.5,
                        softcap,
                        None if s_aux is None else s_aux[heads],
                    )
                    torch.testing.assert_close(out[b, heads, at - 1 - start], expect[0, :, 0], atol=1e-5, rtol=1e-4)
            assert kept[b] == row.held, (b, start, end)


@pytest.mark.parametrize(("formula", "name", "options", "extra"), FORMULAE, ids=lambda x: str(x))
@pytest.mark.parametrize("buffer", [0, 5])
def test_200_steps_keep_what_the_formula_says(formula, name, options, extra, buffer):
    """A batch of three with padding: a chunked prompt, 200 decode steps, a second turn."""
    budget = trimkv.Budget(14, buffer=buffer, sinks=1, recent=3)
    check(formula, name, options, extra, budget, 8, [29] + [1] * 200 + [5, 1, 1], [0, 7, 26], H=2, G=3)


@pytest.mark.parametrize(("formula", "name", "options", "extra"), FORMULAE, ids=lambda x: str(x))
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(formula, name, options, extra, seed):
    H, G = [(1, 1), (2, 3), (3, 1), (1, 4), (2, 2), (1, 3)][seed]
    M, W, chunk, recent = [(7, 0, None, 0), (9, 0, 1, 0), (20, 0, 7, 4), (12, 3, 2, 0), (6, 1, 16, 1), (33, 0, 5, 0)][
        seed
    ]
    lengths = [[40, 1, 1, 1, 9, 1], [1] * 50, [3, 30, 1, 1], [12, 1, 1, 1, 1, 20, 1], [25, 2, 1, 1], [60, 1, 1, 1]][
        seed
    ]
    pads = [[0], [0, 0, 0], [2, 0, 1], [11, 3], [20, 0, 24], [0, 50, 30]][seed]
    budget = trimkv.Budget(M, buffer=W, recent=recent)
    check(
        *(formula, name, options, extra, budget, chunk, lengths, pads, H, G),
        D=[8, 4, 16, 6, 8, 10][seed],
        seed=seed,
        softcap=2.0 if seed in (1, 4) else None,
        sink=seed in (2, 4),
    )


def test_h2o_sums_are_the_column_sums_of_the_whole_matrix():
    """In blocks and chunks, and where the kept tokens are all there are."""
    q, k, v = tensors(2, 2, 2, 300, 8)
    pads = [0, 40]
    masses = []
    for chunk in (None, 70, 1):
        layer = BoundedLayer(make("h2o"), trimkv.Budget(300), chunk, 0)
        list(drive(layer, q, k, v, [300], pads))
        mass = torch.zeros(2, 2, 300)
        held = layer.store.view()
        mass.scatter_add_(2, held.position.long().clamp_min(0), held.state["mass"] * held.valid)
        masses.append(mass)
    for b, pad in enumerate(pads):
        T = 300 - pad
        position = torch.arange(T)[None]
        weights = reference.slot_probabilities(
            q[b : b + 1, :, pad:], k[b : b + 1, :, pad:], position, position[:, None].expand(1, 2, T), 8**-0.5
        )
        expect = weights.sum(2).view(2, 2, T).sum(1)
        for mass in masses:
            torch.testing.assert_close(mass[b, :, :T], expect, atol=1e-4, rtol=1e-4)


def test_lagkv_survives_constant_channels():
    layer = BoundedLayer(make("lagkv", sinks=1), trimkv.Budget(20), 64, 0)
    q, k, v = tensors(1, 2, 1, 90, 8)
    k[..., 3], v[..., :] = 1.5, 0.0
    for _, _, out, kept in drive(layer, q, k, v, [60] + [1] * 30, [0]):
        assert out.isfinite().all()
        assert [len(set(head)) for head in kept[0]] == [20, 20]
    assert layer.policy.score(layer.store.view(), layer.store.seen[:, None, None]).isfinite().all()


def test_second_names_are_the_first_ones_with_an_option():
    """`compare` knows policies by their names alone."""
    h2o, near = make("h2o_normalised"), make("expected_attention_32")
    assert h2o.age_normalised and make("h2o", age_normalised=True).name == h2o.name and make("h2o").name == "h2o"
    assert (near.future, near.sinks, near.covariance) == (32, 4, True)
    assert make("expected_attention").future == 512 and make("expected_attention_32", sinks=0).sinks == 0
    for name, first in (("h2o_normalised", "h2o"), ("expected_attention_32", "expected_attention")):
        cls = POLICIES[name]
        assert cls.deviations != POLICIES[first].deviations and cls.__doc__ != POLICIES[first].__doc__


def test_tova_keeps_one_set_for_all_heads_of_a_layer():
    layer = BoundedLayer(make("tova"), trimkv.Budget(10), 8, 0)
    q, k, v = tensors(2, 4, 2, 80, 8)
    for _, _, _, kept in drive(layer, q, k, v, [30] + [1] * 50, [0, 5]):
        assert all(head == row[0] for row in kept for head in row)


# Cache-relative positions.


def test_cache_relative_keys_are_those_of_re_encoded_positions():
    """Acceptance: whatever was evicted, attention is that of the held tokens numbered 0, 1, 2, ... anew."""
    B, H, G, D, lengths, pads = 3, 2, 2, 8, [21] + [1] * 150 + [9, 1, 1], [0, 4, 18]
    rotation = Rotation(0.5 ** torch.arange(D // 2).float())
    q, k, v = tensors(B, H, G, sum(lengths), D)
    place = (torch.arange(sum(lengths)) - torch.tensor(pads)[:, None])[:, None]  # true positions
    layer = BoundedLayer(make("streaming_llm", sinks=2, positions="cache"), trimkv.Budget(12, sinks=3), 8, 0, rotation)
    turned = rotation.turn(q, place.expand(q.shape[:3])), rotation.turn(k, place.expand(k.shape[:3]))
    for start, end, out, kept in drive(layer, *turned, v, lengths, pads):
        if end - start > 1:
            continue
        for b, pad in enumerate(pads):
            columns = torch.tensor(kept[b][0]) + pad
            n = len(columns)
            anew = torch.arange(n)
            assert kept[b][0][:3] == [0, 1, 2]
            expect = reference.slot_attention(
                rotation.turn(q[b : b + 1, :, start:end], torch.full((1, H * G, 1), n - 1)),
                rotation.turn(k[b : b + 1, :, columns], anew.expand(1, H, n)),
                v[b : b + 1, :, columns],
                torch.tensor([[n - 1]]),
                anew.expand(1, H, n),
                D**-0.5,
            )
            torch.testing.assert_close(out[b], expect[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "glm4", "stablelm", "granite"])
def test_a_layer_cannot_tell_a_long_text_from_its_kept_tokens(name):
    """With one layer, the cache-relative form after any text gives the stock logits of sinks + window alone."""
    model = tiny.build(name, num_hidden_layers=1)
    ids = tiny.tokens(1, 60)
    short = torch.cat([ids[:, :4], ids[:, -8:]], 1)
    with torch.no_grad():
        expect = model(short).logits[:, -1]
        cache = trimkv.bounded_cache(model, "streaming_llm_cache", 12)
        for token in ids.split(1, 1):
            logits = model(token, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, expect, atol=2e-3, rtol=1e-3)
        other = trimkv.bounded_cache(model, "streaming_llm", 12)
        for token in ids.split(1, 1):
            absolute = model(token, past_key_values=other).logits[:, -1]
    assert (absolute - expect).abs().max() > 10 * (logits - expect).abs().max()


def test_rotations_that_change_with_the_length_are_refused():
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = {**factors, "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    model = tiny.build("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    with pytest.raises(ValueError, match="another policy"):
        trimkv.bounded_cache(model, "streaming_llm_cache", 12)


@pytest.mark.parametrize(
    "name, interleaved", [("llama", False), ("gpt_oss", False), ("gemma3_text", False), ("glm4", True)]
)
def test_the_rotation_is_the_models_own(name, interleaved):
    model = tiny.build(name)
    rotation = rotation_of(model, model.model.layers[1].self_attn)
    assert rotation.interleaved is interleaved
    x = torch.randn(2, 3, 16)
    there = rotation.turn(x, torch.tensor([[5, 0, 9]] * 2))
    torch.testing.assert_close(rotation.turn(there, -torch.tensor([[5, 0, 9]] * 2)), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(there[:, 1], x[:, 1])


# What every policy owes.


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3", num_hidden_layers=2)


def run(model, policy, ids, mask=None, budget=12, chunk=8, cache=None, prompt=24):
    """A prompt and then token by token. Returns logits of the decoded part, and kept positions [layer][row][head]."""
    cache = cache or trimkv.bounded_cache(model, policy, budget, chunk)
    mask = torch.ones_like(ids) if mask is None else mask
    logits = [trimkv.prefill(model, cache, ids[:, :prompt], mask[:, :prompt], chunk=prompt)]
    for t in range(prompt, ids.shape[1]):
        position = mask[:, : t + 1].sum(-1, keepdim=True) - 1
        logits.append(
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=position, past_key_values=cache)
            .logits[:, -1]
            .detach()
        )
    kept = [
        [[sorted(p for p in h if p >= 0) for h in row] for row in x.store.position.tolist()] for x in cache.slot_layers
    ]
    return torch.stack(logits, 1), kept


@pytest.mark.parametrize("policy", ALL)
def test_a_batch_is_its_rows_in_any_order(model, policy):
    ids, pads = tiny.tokens(3, 50), [0, 9, 17]
    mask = (torch.arange(50) >= torch.tensor(pads)[:, None]).long()
    logits, kept = run(model, policy, ids, mask)
    for b in range(3):
        # with the batch's padding, so that the borders of chunks are the same
        alone, own = run(model, policy, ids[b : b + 1], mask[b : b + 1])
        assert [layer[b] for layer in kept] == [layer[0] for layer in own]
        torch.testing.assert_close(logits[b], alone[0], atol=1e-4, rtol=1e-4)
    again, other = run(model, policy, ids.flip(0), mask.flip(0))
    assert [layer[::-1] for layer in other] == kept
    torch.testing.assert_close(again.flip(0), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ALL)
def test_a_padded_row_is_its_unpadded_run(model, policy):
    """A prompt in one chunk, so that padding cannot move the chunks' borders."""
    ids, pads = tiny.tokens(3, 45), [0, 5, 13]
    mask = (torch.arange(45) >= torch.tensor(pads)[:, None]).long()
    logits, kept = run(model, policy, ids, mask, chunk=None)
    for b, pad in enumerate(pads):
        alone, own = run(model, policy, ids[b : b + 1, pad:], chunk=None, prompt=24 - pad)
        assert [layer[b] for layer in kept] == [layer[0] for layer in own]
        torch.testing.assert_close(logits[b], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", [*ALL, "full"])
@pytest.mark.parametrize("chunk", [7, None])
def test_a_budget_that_holds_everything_gives_the_stock_tokens(model, policy, chunk):
    ids, mask = tiny.left_padded([0, 6], 25)
    stock, stock_logits = tiny.generate(model, ids, None, new=12, mask=mask)
    ours, logits = tiny.generate(model, ids, trimkv.bounded_cache(model, policy, 40, chunk), new=12, mask=mask)
    assert torch.equal(ours, stock)
    torch.testing.assert_close(logits, stock_logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ALL)
def test_a_used_cache_starts_clean_and_a_restored_row_goes_on(model, policy):
    ids = tiny.tokens(2, 40)
    cache = trimkv.bounded_cache(model, policy, 12, chunk=8)
    first, kept = run(model, policy, ids, cache=cache)
    snapshot, more = cache.snapshot(1), tiny.tokens(2, 9, seed=3)
    expect = torch.cat([model(t, past_key_values=cache).logits for t in more.split(1, 1)], 1)
    elsewhere = trimkv.bounded_cache(model, policy, 12, chunk=8)
    elsewhere.restore(snapshot)
    got = torch.cat([model(t, past_key_values=elsewhere).logits for t in more[1:].split(1, 1)], 1)
    torch.testing.assert_close(got[0], expect[1], atol=1e-5, rtol=1e-4)
    for used in (cache, elsewhere):
        used.reset()
        again, kept_again = run(model, policy, ids if used is cache else ids[1:], cache=used)
        assert torch.equal(again[-1], first[-1]) or torch.allclose(again[-1], first[-1], atol=1e-5)
        assert [layer[-1] for layer in kept_again] == [layer[-1] for layer in kept]


@pytest.mark.parametrize("policy", ALL)
def test_sinks_and_the_newest_survive_and_memory_is_what_was_stated(model, policy):
    cache = trimkv.bounded_cache(model, policy, trimkv.Budget(12, sinks=5, recent=3), chunk=8)
    _, kept = run(model, policy, tiny.tokens(2, 60), cache=cache)
    for row in (row for layer in kept for row in layer):
        assert all(head[:5] == [0, 1, 2, 3, 4] and head[-3:] == [57, 58, 59] and len(head) == 12 for head in row)
    Q, H, D = 4, 2, 16
    stated = 2 * (2 * (12 * H * (2 * D * 4 + 4) + make(policy).extra_bytes(12, Q, H, D) + 4))
    assert cache.nbytes == stated
    assert (cache.peak_decode_tokens, cache.peak_prefill_tokens) == (12, 20)


@pytest.mark.parametrize("policy", ALL)
def test_every_policy_says_what_it_does(policy):
    cls = POLICIES[policy]
    assert cls.__doc__ and cls.source and cls.formula and cls.evicts and cls.peak_decode and cls.peak_prefill
    assert cls.needs <= {"log_beta", "keys", "values", "rotation", "queries", "attention"}


# What a sequence carries.


class Windowed(Policy):
    """Keeps what the last three queries like best."""

    name, needs = "windowed", frozenset({"queries"})

    def row_state(self, Q, H, D):
        return window_state(3, Q, D)

    def observe(self, slots, seen):
        push(slots, seen)

    def score(self, slots, now_B11):
        return window_logits(slots)[0].amax((2, 3))


class Grows(Windowed):
    """Cuts prompts, keeps every decoded token."""

    name, grows = "grows", True


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_the_window_holds_the_last_real_queries(chunk):
    layer = BoundedLayer(Windowed(), trimkv.Budget(6), chunk, 0)
    q, k, v = tensors(3, 2, 2, 20, 4)
    pads = [0, 7, 18]
    for _, end, _, _ in drive(layer, q, k, v, [9, 4, 1, 5, 1], pads):
        rows = layer.store.rows
        for b, pad in enumerate(pads):
            n = min(3, max(0, end - pad))
            assert rows["order"][b].tolist() == [0] * (3 - n) + list(range(max(0, end - pad) - n + 1, end - pad + 1))
            assert torch.equal(rows["queries"][b, :, 3 - n :], q[b, :, end - n : end])


def test_window_logits_see_what_the_queries_saw():
    facts = LayerFacts(scaling=0.5)
    position = torch.tensor([[[4, -1, 1, 3]]])
    rows = {"queries": torch.ones(1, 2, 2, 3), "order": torch.tensor([[0, 4]], dtype=torch.int32)}
    x, filled = window_logits(Slots(torch.ones(1, 1, 4, 3), None, position, {}, facts, rows))
    assert filled.tolist() == [[False, True]]
    inf = float("inf")
    assert x[0, 0, 1].tolist() == [[-inf] * 4, [-inf, -inf, 1.5, 1.5]]


def test_what_a_sequence_carries_follows_its_row(model):
    policy = Windowed()
    ids = tiny.tokens(3, 40)
    logits, kept = run(model, policy, ids)
    cache = trimkv.bounded_cache(model, policy, 12, chunk=8)
    run(model, policy, ids[:, :30], cache=cache)
    before = cache.nbytes
    assert before - 2 * 3 * (12 * 2 * (2 * 16 * 4 + 4) + 4) == 2 * 3 * policy.extra_bytes(12, 4, 2, 16) > 0
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    fresh = trimkv.bounded_cache(model, policy, 12, chunk=8)
    for row in range(3):
        fresh.restore(cache.snapshot(row), row, rows=3)
    for t in range(30, 40):
        out = [model(ids[[2, 0, 1], t : t + 1], past_key_values=c).logits[:, 0] for c in (cache, fresh)]
        for x in out:
            torch.testing.assert_close(x, logits[[2, 0, 1], t - 23], atol=1e-4, rtol=1e-4)
    cache.reset()
    assert all(not t.any() for layer in cache.slot_layers for t in layer.store.rows.values())


def test_a_policy_that_cuts_prompts_only(model):
    """As SnapKV and LocRet were published: the prompt is cut to the budget, what is decoded stays."""
    ids, mask = tiny.left_padded([0, 9], 60)
    cache = trimkv.bounded_cache(model, Grows(), 12, chunk=None)
    logits, kept = run(model, None, ids, mask, cache=cache, prompt=40)
    for row, last in ((0, 60), (1, 51)):
        for layer in kept:
            assert all(len(head) == 32 and head[-20:] == list(range(last - 20, last)) for head in layer[row])
    alone = trimkv.bounded_cache(model, Grows(), 12, chunk=None)
    own, kept_own = run(model, None, ids[1:, 9:], cache=alone, prompt=31)
    assert [layer[0] for layer in kept_own] == [layer[1] for layer in kept]
    torch.testing.assert_close(own[0], logits[1], atol=1e-4, rtol=1e-4)
    model(tiny.tokens(2, 8), past_key_values=cache)
    assert cache.held_tokens == 12


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3_text"])
@pytest.mark.parametrize("policy", WATCHING)
def test_capped_logits_and_learned_sinks(name, policy):
    model = tiny.build(name)
    ids = tiny.tokens(2, 30)
    stock, logits = tiny.generate(model, ids, None, new=8)
    ours, own = tiny.generate(model, ids, trimkv.bounded_cache(model, policy, 40, chunk=9), new=8)
    assert torch.equal(ours, stock)
    torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_the_published_form_runs(name):
    """And where there is none, it is the form that everything else uses."""
    model = tiny.gated("qwen3", num_hidden_layers=2)
    policy, budget, chunk = as_published(name, 12, 8)
    form = POLICIES[name].published
    assert (chunk is None) == (form is not None and form.whole_prompt)
    split = "even" if name == "trimkv" else "trained"
    assert budget == Budget(12, buffer=form.buffer if form else 0, split=split)
    cache = trimkv.bounded_cache(model, policy, budget, chunk=chunk)
    with torch.no_grad():
        for part in tiny.tokens(2, 40).split([30] + [1] * 10, 1):
            assert model(part, past_key_values=cache).logits.isfinite().all()
    if form and form.whole_prompt and policy.bounded:
        assert cache.peak_prefill_tokens == 30


def test_a_buffer_that_was_asked_for_stays():
    assert as_published("h2o", Budget(12, buffer=5), 8)[1] == Budget(12, buffer=5)
    assert as_published("trimkv", 12, 8)[0].offset == 1
