"""Budgets that heads share: against Python loops over the rule, against scope "head", and their memory."""

import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import trimkv
from tiny import gated, generate
from tiny_text import chat_model, save_model
from trimkv.attention import reference
from trimkv.budget import Budget, bytes_per_sequence
from trimkv.cache.build import shared_layers
from trimkv.cache.policies import POLICIES, make
from trimkv.cache.pool import Pool
from trimkv.cache.replay import replayable
from trimkv.cli.app import run
from trimkv.gates.attach import new_gates

SCOPES = ("layer", "global")


class BruteShare:
    """One row of the heads that share a budget, by the rule: head -> position -> log_beta.

    ``worst`` is the head and position worth least of those that may go: of equal scores the older token, of one
    position the head with the lower number.
    """

    def __init__(self, heads, budget):
        self.kept = [{} for _ in range(heads)]
        self.total, self.floor, self.ceiling = heads * budget.tokens, budget.least, budget.most(heads)
        self.sinks, self.recent, self.seen = budget.sinks, budget.recent, 0
        self.threshold = np.log(budget.threshold, dtype=np.float32) if budget.threshold else -np.inf

    def score(self, h, p, recent):
        safe = p < self.sinks or p >= self.seen - recent
        return np.inf if safe else np.float32(self.kept[h][p]) * np.float32(self.seen - p)

    def worst(self, h, recent):
        p = min(self.kept[h], key=lambda p: (self.score(h, p, recent), p))
        return self.score(h, p, recent), p, h

    def expire(self, recent):
        for h, head in enumerate(self.kept):
            for p in [p for p in head if self.score(h, p, recent) < self.threshold]:
                del head[p]

    def cut(self, total, floor, recent):
        while sum(map(len, self.kept)) > total:
            _, p, h = min(self.worst(h, recent) for h, head in enumerate(self.kept) if len(head) > floor)
            del self.kept[h][p]

    def drop_over(self, ceiling, recent):
        for h, head in enumerate(self.kept):
            while len(head) > ceiling:
                del head[self.worst(h, recent)[1]]

    def feed(self, tokens, alone):
        """Tokens as lists of log_beta by head; returns what each head's last query attends to."""
        if not tokens:
            return None
        if alone:
            self.expire(self.recent - 1)
        if alone and sum(map(len, self.kept)) + len(self.kept) > self.total:
            self.drop_over(self.ceiling - 1, self.recent - 1)
            self.cut(self.total - len(self.kept), max(self.floor - 1, 0), self.recent - 1)
        for token in tokens:
            for head, log_beta in zip(self.kept, token, strict=True):
                head[self.seen] = log_beta
            self.seen += 1
        attended = [sorted(head) for head in self.kept]
        if not alone and sum(map(len, self.kept)) > self.total:
            self.drop_over(self.ceiling, self.recent)
            self.cut(self.total, self.floor, self.recent)
        if not alone:
            self.expire(self.recent)
        return attended


def kept_positions(layers):
    """Positions by layer, row and head, as the pools' lists name them."""
    found = []
    for layer in layers:
        pool = layer.store
        lists = pool.lists[:, layer.place * pool.H : (layer.place + 1) * pool.H].long()
        position = pool.position.gather(1, lists.flatten(1)).view(lists.shape).tolist()
        found.append([[sorted(p for p in head if p >= 0) for head in row] for row in position])
    return found


def consistent(pool):
    """Every token is in one list, and knows its place there."""
    B, P = len(pool.seen), pool.P
    assert (pool.position[:, P] == -1).all() and (pool.table[:, -1] == P).all()
    for b in range(B):
        listed = pool.table[b][pool.table[b] < P].tolist()
        held = pool.position[b].ge(0).nonzero().flatten().tolist()
        assert sorted(listed) == held and len(set(listed)) == len(listed)
        assert (pool.table[b, pool.place[b, held].long()] == torch.tensor(held)).all()
    assert pool.held.sum(-1).max() <= P and pool.held.max() <= pool.ceiling


def run_layers(scope, budget, forwards, pads, group, L=2, H=3, D=4, seed=0, chunk=8, check_every=7):
    g = torch.Generator().manual_seed(seed)
    B, total = len(pads), sum(forwards)
    layers = list(shared_layers(make("trimkv"), dict.fromkeys(range(L), budget), chunk).values())
    k, v = (torch.randn(L, B, H, total, D, generator=g) for _ in range(2))
    q = torch.randn(L, B, H * group, total, D, generator=g)
    # Heads of unlike retention, and ties within heads and between them.
    slope = torch.rand(L, 1, H, 1, generator=g) * 2
    log_beta = -torch.rand(L, B, H, total, generator=g).pow(3) * slope
    log_beta[..., ::5] = -0.25
    real = torch.arange(total)[None] >= torch.tensor(pads)[:, None]
    names = (
        [[(j, h) for j in range(L) for h in range(H)]]
        if scope == "global"
        else [[(j, h) for h in range(H)] for j in range(L)]
    )
    brutes = [[BruteShare(len(heads), budget) for heads in names] for _ in pads]
    start = 0
    for number, length in enumerate(forwards):
        part = slice(start, start + length)
        outs = []
        for j, layer in enumerate(layers):
            layer.stage_log_beta(log_beta[j, :, :, part])
            layer.stage_padding(None if bool(real[:, part].all()) else real[:, part])
            keys, values = layer.update(k[j, :, :, part], v[j, :, :, part])
            outs.append(layer.attend(None, q[j, :, :, part], keys, values, D**-0.5))
        kept = kept_positions(layers)
        for b, pad in enumerate(pads):
            columns = [c for c in range(part.start, part.stop) if c >= pad]
            for heads, brute in zip(names, brutes[b], strict=True):
                fed = [[log_beta[j, b, h, c].item() for j, h in heads] for c in columns]
                attended = brute.feed(fed, alone=length == 1)
                if attended is None:
                    continue
                for (j, h), mine in zip(heads, brute.kept, strict=True):
                    assert kept[j][b][h] == sorted(mine), (number, b, j, h)
                if number % check_every:
                    continue
                for (j, h), seen in zip(heads, attended, strict=True):
                    expect = reference.slot_attention(
                        q[j, b : b + 1, h * group : (h + 1) * group, part.stop - 1 : part.stop],
                        k[j, b : b + 1, h : h + 1][:, :, [p + pad for p in seen]],
                        v[j, b : b + 1, h : h + 1][:, :, [p + pad for p in seen]],
                        torch.tensor([[brute.seen - 1]]),
                        torch.tensor([[seen]]),
                        D**-0.5,
                    )
                    got = outs[j][b, h * group : (h + 1) * group, -1]
                    torch.testing.assert_close(got, expect[0, :, 0], atol=1e-5, rtol=1e-4)
        if number % check_every == 0:
            for pool in {id(layer.store): layer.store for layer in layers}.values():
                consistent(pool)
        start += length
    return layers


FORWARDS = [8, 8, 5] + [1] * 150 + [5, 1, 1, 8, 1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("floor", [0, 0.25, 1])
def test_150_steps_keep_what_the_rule_says(scope, group, floor):
    budget = Budget(8, scope=scope, floor=floor)
    layers = run_layers(scope, budget, FORWARDS, [0, 7, 19], group, seed=group)
    counts = torch.cat([layer.store.held for layer in layers], 1)
    assert (counts == 8).all() if floor == 1 else counts.max() > 10
    assert counts.min() >= max(1, int(8 * floor))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "options",
    [
        {"sinks": 2, "recent": 3},
        {"ceiling": 1.5},
        {"ceiling": 1},
        {"ceiling": 1.25, "floor": 0.75, "sinks": 1},
        {"ceiling": 100, "recent": 1},
        {"threshold": 0.5, "sinks": 1},
        {"threshold": 0.999, "recent": 2},
    ],
    ids=str,
)
def test_limits_and_protection_hold_per_head(scope, options):
    budget = Budget(8, scope=scope, **options)
    layers = run_layers(scope, budget, FORWARDS[:100] + FORWARDS[-4:], [3, 0, 20], 2, seed=5)
    if budget.threshold > 0.9:
        assert all((layer.store.held.sum(-1) < layer.store.P).all() for layer in layers)
    for row in sum(kept_positions(layers), []):
        for head in row:
            assert head[: budget.sinks] == list(range(budget.sinks))
            if budget.recent:
                assert head[-budget.recent :] == list(range(head[-1] - budget.recent + 1, head[-1] + 1))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", range(8))
def test_any_chunks_and_padding(scope, seed):
    g = np.random.default_rng(seed)
    chunk = int(g.integers(1, 9))
    forwards = [int(n) for n in g.integers(1, chunk + 1, 25)]
    pads = [int(n) for n in g.integers(0, sum(forwards[:4]), 3)]
    budget = Budget(int(g.integers(1, 9)), scope=scope, floor=float(g.choice([0, 0.3, 1])), ceiling=2)
    run_layers(scope, budget, forwards, pads, 1, L=3, H=int(g.integers(1, 4)), seed=seed, chunk=chunk, check_every=3)


def test_the_layer_scope_works_long_forwards_off_in_chunks():
    """As scope "head" does: plain generate feeds a prompt in one forward."""
    found = []
    for forwards in ([29, 1, 1], [8, 8, 8, 5, 1, 1]):
        g = torch.Generator().manual_seed(1)
        (layer,) = shared_layers(make("trimkv"), {0: Budget(6, scope="layer")}, 8).values()
        x, log_beta, start = torch.randn(2, 2, 31, 4, generator=g), -torch.rand(2, 2, 31, generator=g), 0
        for n in forwards:
            part = slice(start, start + n)
            layer.stage_log_beta(log_beta[:, :, part])
            layer.attend(None, x[:, :, part], *layer.update(x[:, :, part], x[:, :, part]), 1.0)
            start += n
        found.append(kept_positions([layer]))
    assert found[0] == found[1]


def positions(cache):
    if isinstance(cache.stores[0], Pool):
        return kept_positions(cache.slot_layers)
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        for layer in cache.slot_layers
    ]


@pytest.fixture(scope="module")
def model():
    return gated("llama")


@torch.no_grad()
def feed(model, cache, ids, mask=None, steps=60, chunk=8, first=0):
    """A prompt in chunks, of which the first may be shorter, then tokens one by one; returns the steps' logits."""
    n = ids.shape[1] - steps
    mask = torch.ones_like(ids) if mask is None else mask
    if first:
        trimkv.prefill(model, cache, ids[:, :first], mask[:, :first], chunk=chunk)
    logits = [trimkv.prefill(model, cache, ids[:, first:n], mask[:, first:n], chunk=chunk)]
    position = mask.cumsum(-1) - 1
    for t in range(n, ids.shape[1]):
        out = model(
            ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=position[:, t : t + 1],
            past_key_values=cache,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2", "qwen3_next"])
def test_a_budget_as_large_as_the_text_changes_nothing(scope, name):
    model = gated(name)
    ids, mask = tiny.left_padded([0, 0] if name == "qwen3_next" else [0, 9], 20)
    stock, _ = generate(model, ids, mask=mask, new=10)
    text, _ = generate(model, ids, trimkv.bounded_cache(model, "trimkv", Budget(40, scope=scope)), mask=mask, new=10)
    assert torch.equal(text, stock)


@pytest.mark.parametrize("scope", SCOPES)
def test_chunks_of_a_prompt_change_nothing_while_all_fits(model, scope):
    ids, mask = tiny.left_padded([0, 11], 40)
    whole, parts = (
        feed(model, trimkv.bounded_cache(model, "trimkv", Budget(40, scope=scope)), ids, mask, steps=10, chunk=chunk)
        for chunk in (30, 7)
    )
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_whole_floor_is_scope_head(model, scope):
    """The floor gives every head its M: text and victims are those of scope head."""
    ids = tiny.tokens(2, 70)
    shared = trimkv.bounded_cache(model, "trimkv", Budget(12, scope=scope, floor=1, sinks=1), chunk=8)
    own = trimkv.bounded_cache(model, "trimkv", Budget(12, sinks=1), chunk=8)
    a, b = (feed(model, cache, ids, steps=40) for cache in (shared, own))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert positions(shared) == positions(own)
    assert (shared.peak_prefill_tokens, shared.peak_decode_tokens) == (20, 12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("floor", [0, 0.25])
def test_a_padded_row_is_its_single_run(model, scope, floor):
    ids, mask = tiny.left_padded([0, 9, 17], 70)
    budget = Budget(10, scope=scope, floor=floor)
    cache = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
    together = feed(model, cache, ids, mask, steps=40)
    for b, pad in enumerate([0, 9, 17]):
        single = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
        # Chunks begin where those of the padded row do: an eviction after another chunk is another eviction.
        alone = feed(model, single, ids[b : b + 1, pad:], steps=40, first=8 - pad % 8)
        torch.testing.assert_close(together[b], alone[0], atol=1e-4, rtol=1e-4)
        assert [row[b] for row in positions(cache)] == [row[0] for row in positions(single)]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_total_never_exceeds_the_budget_and_memory_is_the_pool(model, scope, monkeypatch):
    ids = tiny.tokens(3, 90)
    M, L, H, D = 10, 4, 2, 16
    budget = Budget(M, scope=scope)
    cache = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
    attended = {}
    from trimkv.cache.shared import SharedLayer

    original = SharedLayer._attend

    def spy(self, slots, new, real, mask):
        seen = slots.valid if mask is None else slots.valid & mask.expand(3, H, -1, -1)[:, :, -1]
        attended[self.layer_idx] = seen.sum((1, 2))
        return original(self, slots, new, real, mask)

    monkeypatch.setattr(SharedLayer, "_attend", spy)
    feed(model, cache, ids[:, :50], steps=1)
    size, places = cache.nbytes, [store.k.data_ptr() for store in cache.stores]
    with torch.no_grad():
        for t in range(50, 90):
            model(ids[:, t : t + 1], past_key_values=cache)
            sums = torch.stack([attended[j] for j in range(L)])
            if scope == "layer":
                assert (sums == M * H).all()
            else:
                assert (sums.sum(0) == M * L * H).all()
            for store in cache.stores:
                assert int((store.position >= 0).sum(-1).max()) == store.P
    assert cache.nbytes == size and [store.k.data_ptr() for store in cache.stores] == places
    assert len(cache.stores) == (1 if scope == "global" else L)
    slots = (1 if scope == "global" else L) + M * L * H  # one more in each pool takes what goes nowhere
    assert sum(store.k.numel() + store.v.numel() for store in cache.stores) == 3 * slots * 2 * D
    assert size == 3 * (bytes_per_sequence(model.config, budget, dtype_bytes=4) + 4 * len(cache.stores))
    copies, waiting, choice = (
        2 * (4 * M + 8) * H * (2 * D + 3) * 4,
        8 * L * H * (2 * D + 3) * 4,
        64 * L * H * (4 * M + 8),
    )
    assert size < cache.peak_bytes < size + 3 * (waiting + max(copies, choice))
    assert cache.peak_mean_tokens == M < cache.peak_decode_tokens <= 4 * M
    assert cache.held_tokens <= 4 * M and cache.full_cache_bytes(90) == 3 * 90 * L * H * 2 * D * 4


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value, or a size that depends on one, comes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not {"_local_scalar_dense", "nonzero", "masked_select"} & {func.__name__.split(".")[0]}, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{}, {"floor": 0.5}, {"ceiling": 1.5, "sinks": 1, "threshold": 0.3}], ids=str)
def test_a_decode_step_reads_nothing_back(scope, options):
    layers = list(shared_layers(make("trimkv"), dict.fromkeys((0, 1), Budget(6, scope=scope, **options)), 8).values())
    x = torch.randn(2, 2, 40, 4)
    for start, stop in [(0, 8), (8, 16), *((t, t + 1) for t in range(16, 40))]:
        for layer in layers:
            layer.stage_log_beta(-torch.rand(2, 2, stop - start))
            layer.stage_padding(torch.ones(2, stop - start, dtype=torch.bool))
            part = x[:, :, start:stop]
            if start < 30:
                layer.attend(None, part, *layer.update(part, part), 1.0)
            else:
                with NoReading():
                    layer.attend(None, part, *layer.update(part, part), 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{}, {"floor": 0.5, "sinks": 1, "recent": 2, "ceiling": 2}], ids=str)
def test_a_decode_step_never_waits_for_a_gpu_and_evicts_what_the_cpu_does(scope, options):
    kept = []
    ids = torch.stack([torch.randperm(125, generator=torch.Generator().manual_seed(b))[:100] + 3 for b in range(3)])
    for device in ("cpu", "cuda"):
        model = gated("llama").to(device)
        cache = trimkv.bounded_cache(model, "trimkv", Budget(12, scope=scope, **options), chunk=8)
        feed(model, cache, ids[:, :41].to(device), steps=1)
        tokens = [token.contiguous() for token in ids[:, 41:].to(device).split(1, 1)]
        with torch.no_grad():
            for step, token in enumerate(tokens):
                if device == "cuda" and step:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    model(token, past_key_values=cache)
                finally:
                    if device == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
        kept.append(positions(cache))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("prompt", [5, 40])
def test_a_row_put_back_goes_on_as_it_would_have(model, scope, prompt):
    """Also into a new cache, into another row of a batch, and before and after the pool is full."""
    ids = tiny.tokens(2, prompt + 30)
    budget = Budget(9, scope=scope)
    cache = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
    feed(model, cache, ids[:, : prompt + 1], steps=1)
    saved = cache.snapshot(1)

    def go_on(cache, rows):
        return torch.stack([model(rows[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(29)], 1)

    with torch.no_grad():
        expect = go_on(cache, ids[:, prompt + 1 :])
        fresh = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
        fresh.restore(saved)
        torch.testing.assert_close(go_on(fresh, ids[1:, prompt + 1 :])[0], expect[1], atol=1e-4, rtol=1e-4)
        assert fresh.get_seq_length() == ids.shape[1]
        batch = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
        for row in (0, 1, 2):
            batch.restore(saved, row, rows=3)
        found = go_on(batch, ids[1:, prompt + 1 :].expand(3, -1))
    torch.testing.assert_close(found, expect[1:].expand(3, -1, -1), atol=1e-4, rtol=1e-4)
    other = trimkv.bounded_cache(model, "trimkv", Budget(10, scope=scope))
    with pytest.raises(ValueError, match="snapshot"):
        other.restore(saved)


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_can_be_reordered_and_a_second_text_starts_clean(model, scope):
    ids = tiny.tokens(2, 60)
    budget = Budget(9, scope=scope)
    cache = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
    first = feed(model, cache, ids, steps=20)
    cache.reset()
    assert cache.held_tokens == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(feed(model, cache, ids, steps=20), first)
    before = positions(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert positions(cache) == [[rows[1], rows[0]] for rows in before]
    cache.batch_repeat_interleave(2)
    assert positions(cache) == [[rows[1], rows[1], rows[0], rows[0]] for rows in before]
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert positions(cache) == [[rows[1], rows[0]] for rows in before]
    for pool in cache.stores:
        consistent(pool)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    beams, _ = generate(model, ids[:1, :8], trimkv.bounded_cache(model, "trimkv", Budget(60, scope=scope)), num_beams=3)
    stock, _ = generate(model, ids[:1, :8], num_beams=3)
    assert torch.equal(beams, stock)


def test_long_rope_turns_the_keys_of_a_pool_once():
    from trimkv.cache.rope import rotate

    layers = run_layers("global", Budget(8, scope="global"), [8, 8, 1], [0], 1)
    pool = layers[0].store
    before, frequency = pool.k.clone(), torch.tensor([0.5, 0.1])
    rotate(pool.k, pool.position, frequency)
    rotate(pool.k, pool.position, -frequency)
    torch.testing.assert_close(pool.k, before)
    cache = trimkv.cache.bounded.BoundedCache(layers)
    assert cache.stores == [pool]


@pytest.mark.parametrize("name", [name for name, cls in POLICIES.items() if cls.bounded and name != "trimkv"])
def test_scores_that_say_nothing_across_heads_are_refused(model, name):
    with pytest.raises(ValueError, match=r"across heads.*scope head.*\(trimkv\)"):
        trimkv.bounded_cache(model, name, Budget(16, scope="layer"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer", "buffer": 2}, "buffer"),
        ({"scope": "global", "floor": 1.5}, "floor"),
        ({"scope": "global", "floor": float("nan")}, "floor"),
        ({"scope": "layer", "ceiling": 0.5}, "ceiling"),
        ({"floor": 0.5}, "scope layer or global"),
        ({"threshold": 0.5}, "scope layer or global"),
        ({"threshold": 0.5, "floor": 0.5, "scope": "layer"}, "one of them"),
        ({"threshold": 1.0, "scope": "layer"}, "threshold"),
        ({"scope": "layers"}, "scope"),
    ],
)
def test_impossible_budgets_say_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(8, **options)


def test_what_cannot_be_done_says_so(model):
    cache = trimkv.bounded_cache(model, "trimkv", Budget(8, scope="global"), chunk=8)
    with pytest.raises(ValueError, match=r"trimkv\.prefill"):
        model(tiny.tokens(1, 9), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert generate(model, tiny.tokens(1, 8), cache, new=3)[0].shape == (1, 11)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(2)
    full = trimkv.bounded_cache(model, "full", Budget(8, scope="global"))
    assert torch.equal(generate(model, tiny.tokens(1, 8), full)[0], generate(model, tiny.tokens(1, 8))[0])
    assert not replayable(make("trimkv"), Budget(8, scope="layer")) and replayable(make("trimkv"), Budget(8))


def test_layers_of_unlike_heads_cannot_share():
    for heads, dim in ((3, 4), (2, 8)):
        first, second = shared_layers(make("trimkv"), dict.fromkeys((0, 1), Budget(8, scope="global")), 8).values()
        x = torch.zeros(1, 2, 1, 4)
        first.update(x, x)
        with pytest.raises(ValueError, match="same heads in all layers; use scope layer"):
            second.update(*(torch.zeros(1, heads, 1, dim),) * 2)


@pytest.mark.parametrize("scope", SCOPES)
def test_compare_measures_shared_budgets(model, scope):
    from trimkv.eval.compare import compare

    found = compare(model, tiny.tokens(2, 40), ["full", "trimkv"], [Budget(8, scope=scope), Budget(64, scope=scope)])
    full, _, small, large = found.rows
    assert abs(full.kl) < 1e-6 and abs(large.kl) < 1e-5 and small.kl > 1e-3
    assert small.mean_tokens_per_head == 8 < small.peak_tokens_per_head <= 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and gates for it, on disk."""
    path = tmp_path_factory.mktemp("shared")
    gates = new_gates(chat_model(), intermediate_size=8, training_length=16)
    for parameters in gates.layers.values():
        parameters["linear2.weight"].mul_(200)
    trimkv.save_gates(gates, path / "gates")
    return str(save_model(path / "model")), str(path / "gates")


@pytest.fixture
def trim(capsys, folders):
    def call(command, *arguments):
        code = run([command, "--model", folders[0], "--gates", folders[1], *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("scope", SCOPES)
def test_generate_from_the_command_line(trim, scope):
    arguments = ("--prompt", "Once upon a time there was a fox. " * 3, "--max-new-tokens", 9, "--prefill-chunk", 16)
    code, out, err = trim("generate", *arguments, "--budget", 20, "--scope", scope, "--floor", 0.25, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["scope"] == scope and found["mean_tokens_per_head_decode"] == 20
    assert 20 <= found["peak_tokens_per_head_decode"] <= 80
    code, out, err = trim("generate", *arguments, "--scope", scope, "--policy", "streaming_llm")
    assert code == 2 and "across heads" in err and not out
    code, out, err = trim("generate", *arguments, "--scope", scope, "--buffer", 4)
    assert code == 2 and "buffer" in err


def test_compare_from_the_command_line(trim, tmp_path):
    (tmp_path / "a.txt").write_text("A small word in a long text. " * 20)
    arguments = ("--text", tmp_path / "a.txt", "--context", 40, "--budgets", 8, "--max-sequences", 2)
    code, out, err = trim("compare", *arguments, "--scope", "global", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    (row,) = found["rows"]
    assert found["scope"] == "global" and row["policy"] == "trimkv" and row["mean_tokens_per_head"] == 8
