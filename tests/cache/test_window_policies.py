"""SnapKV, R-KV and ExpectedAttention against loops over their published formulae, in float64."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import brute
import trimkv
from trimkv.cache.layers import BoundedLayer
from trimkv.cache.policies import make, r_kv
from trimkv.cache.rotation import Rotation

FORCED = 1e30


# The formulae. A row is a brute.BruteRow; what is scored are its held tokens, before position ``now`` arrives.


def once(formula):
    """All scores of a head at a time: (row, head, now) -> {position: worth}, asked for one by one."""

    def score(row, h, p, now):
        key = h, now, tuple(row.held[h])
        if row.options.setdefault("known", {}).get("key") != key:
            row.options["known"] = {"key": key, "scores": formula(row, h, now)}
        return row.options["known"]["scores"].get(p, FORCED)

    return score


def logit(row, h, g, t, p):
    x = float(row.q[h, g, t] @ row.k[h, p]) * row.k.shape[-1] ** -0.5
    return x if row.softcap is None else row.softcap * math.tanh(x / row.softcap)


def window_and_old(row, h, now):
    first = now - min(row.options["window"], max(1, row.M // 2))
    return range(max(0, first), now), sorted(p for p in row.held[h] if p < first)


def pooled(values, kernel, pooling):
    half, out = kernel // 2, []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        out.append(max(near) if pooling == "max" else sum(near) / kernel)
    return out


@once
def snapkv(row, h, now):
    options = {"kernel": 5, "pooling": "avg", "group": "mean", "denominator": "all", **row.options}
    queries, old = window_and_old(row, h, now)
    heads = []
    for g in range(row.q.shape[1]):
        votes = [0.0] * len(old)
        for t in queries:
            visible = old if options["denominator"] == "old" else [p for p in row.held[h] if p <= t]
            total = sum(math.exp(logit(row, h, g, t, p)) for p in visible)
            if row.s_aux is not None and options["denominator"] == "all":
                total += math.exp(row.s_aux[h, g])
            for i, p in enumerate(old):
                votes[i] += math.exp(logit(row, h, g, t, p)) / total
        heads.append(pooled(votes, options["kernel"], options["pooling"]))
    join = max if options["group"] == "max" else lambda x: sum(x) / len(x)
    return {p: join([head[i] for head in heads]) for i, p in enumerate(old)}


@once
def rkv(row, h, now):
    options = {"kernel": 7, "mix_lambda": 0.1, "threshold": 0.5, **row.options}
    queries, old = window_and_old(row, h, now)
    votes = [0.0] * len(old)
    for t in queries:
        exps = [math.exp(max(logit(row, h, g, t, p) for g in range(row.q.shape[1]))) for p in old]
        for i, e in enumerate(exps):
            votes[i] += e / sum(exps) / len(queries)
    importance = pooled(votes, options["kernel"], "max")
    order = sorted(row.held[h])
    unit = [row.k[h, p] / np.linalg.norm(row.k[h, p]) for p in order]
    columns = [0.0] * len(order)
    for i, mine in enumerate(unit):
        similar = [0.0 if i == j else float(mine @ other) for j, other in enumerate(unit)]
        overlooked = max((j for j, c in enumerate(similar) if c > options["threshold"]), default=0)
        for j, c in enumerate(similar):
            columns[j] += 0.0 if j == overlooked else c / len(order)
    exps = [math.exp(c) for c in columns]
    weight = options["mix_lambda"]
    return {p: weight * importance[i] - (1 - weight) * exps[order.index(p)] / sum(exps) for i, p in enumerate(old)}


def turn_matrix(position, frequency):
    """The D x D rotation of a position: pairs are (i, i + D/2)."""
    n = len(frequency)
    cos, sin = np.diag(np.cos(position * frequency)), np.diag(np.sin(position * frequency))
    R = np.eye(2 * n)
    R[:n, :n], R[:n, n:], R[n:, :n], R[n:, n:] = cos, -sin, sin, cos
    return R


@once
def expected_attention(row, h, now):
    options = {"first": 4, "future": 512, "covariance": True, "value_norm": True, "epsilon": 0.0, **row.options}
    D, f = row.k.shape[-1], options["frequency"]
    candidates = [p for p in row.held[h] if p >= options["first"]]
    probability = dict.fromkeys(candidates, 0.0)
    if "unturned" not in row.options:
        turned_back = np.array([turn_matrix(t, f).T for t in range(row.q.shape[2])])
        row.options["unturned"] = np.einsum("tij,hgtj->hgti", turned_back, row.q)
    R = sum(turn_matrix(now + j, f) for j in range(options["future"])) / options["future"]
    for g in range(row.q.shape[1]):
        q = row.options["unturned"][h, g, options["first"] : now]
        mean = R @ q.mean(0) if len(q) else np.zeros(D)
        cov = R @ np.cov(q.T, bias=True) @ R.T if len(q) else np.zeros((D, D))
        x = {p: mean @ row.k[h, p] / D**0.5 for p in candidates}
        if options["covariance"]:
            x = {p: x[p] + row.k[h, p] @ cov @ row.k[h, p] / D / 2 for p in candidates}
        total = sum(math.exp(v) for v in x.values())
        for p in candidates:
            probability[p] += math.exp(x[p]) / total / row.q.shape[1]
    if not options["value_norm"]:
        return probability
    return {p: (e + options["epsilon"]) * float(np.linalg.norm(row.v[h, p])) for p, e in probability.items()}


FORMULAE = {"snapkv": snapkv, "r_kv": rkv, "expected_attention": expected_attention}
CASES = [
    ("snapkv", {}),
    ("snapkv", {"window": 4, "kernel": 7, "pooling": "max"}),
    ("snapkv", {"window": 3, "kernel": 3, "group": "max"}),
    ("snapkv", {"window": 5, "kernel": 1, "denominator": "old"}),
    ("snapkv", {"window": 2, "pooling": "max", "group": "max", "denominator": "old"}),
    ("r_kv", {}),
    ("r_kv", {"window": 3, "kernel": 3, "mix_lambda": 0.07, "threshold": 0.2}),
    ("r_kv", {"window": 4, "mix_lambda": 1.0}),
    ("expected_attention", {"future": 24}),
    ("expected_attention", {"sinks": 0, "future": 1, "epsilon": 0.05}),
    ("expected_attention", {"sinks": 2, "future": 9, "covariance": False, "value_norm": False}),
]


def tensors(B, H, G, T, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, H * G, T, D, generator=g), *(torch.randn(B, H, T, D, generator=g) for _ in range(2))


def drive(layer, q, k, v, lengths, pads, softcap=None, s_aux=None):
    """Feeds forwards of ``lengths`` tokens; rows start with padding. Yields (start, end, kept positions)."""
    D, start = k.shape[-1], 0
    real = torch.arange(sum(lengths)) >= torch.tensor(pads)[:, None]
    for length in lengths:
        part = slice(start, start + length)
        layer.stage_padding(None if bool(real[:, part].all()) else real[:, part])
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        layer.attend(None, q[:, :, part], keys, values, D**-0.5, softcap, s_aux)
        yield part.start, part.stop, kept(layer)
        start = part.stop


def kept(layer):
    return [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]


def make_layer(name, options, budget, chunk, D):
    return BoundedLayer(make(name, **options), budget, chunk, 0, Rotation(0.3 ** torch.arange(D // 2).float()))


def check(name, options, budget, chunk, lengths, pads, H, G, D=8, seed=0, softcap=None, sink=False):
    layer = make_layer(name, options, budget, chunk, D)
    q, k, v = tensors(len(pads), H, G, sum(lengths), D, seed)
    s_aux = torch.randn(H * G, generator=torch.Generator().manual_seed(seed)) if sink else None
    extra = {key: value for key, value in options.items() if key != "sinks"}
    if name == "expected_attention":
        frequency = 0.3 ** torch.arange(D // 2).float()
        extra |= {"first": layer.policy.sinks, "frequency": frequency.double().numpy()}
    else:
        extra |= {"window": layer.policy.window}
    rows = [
        brute.BruteRow(
            FORMULAE[name],
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
    for start, end, got in drive(layer, q, k, v, lengths, pads, softcap, s_aux):
        for b, (pad, row) in enumerate(zip(pads, rows, strict=True)):
            at = start
            for size in brute.chunks(end - start, chunk):
                real = max(0, at + size - max(at, pad))
                at += size
                if real:
                    row.feed(real, alone=size == 1)
            assert got[b] == row.held, (b, start, end)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("buffer", [0, 5])
def test_200_steps_keep_what_the_formula_says(name, options, buffer):
    """A batch of three with padding: a chunked prompt, 200 decode steps, a second turn."""
    budget = trimkv.Budget(14, buffer=buffer, sinks=1, recent=3 if buffer else 0)
    check(name, options, budget, 8, [29] + [1] * 200 + [5, 1, 1], [0, 7, 26], H=1, G=3, D=4)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(name, options, seed):
    H, G = [(1, 1), (2, 3), (3, 1), (1, 4), (2, 2), (1, 3)][seed]
    M, W, chunk, recent = [(7, 0, None, 0), (9, 0, 1, 0), (20, 0, 7, 4), (12, 3, 2, 0), (6, 1, 16, 1), (33, 0, 5, 0)][
        seed
    ]
    lengths = [[40, 1, 1, 1, 9, 1], [1] * 50, [3, 30, 1, 1], [12, 1, 1, 1, 1, 20, 1], [25, 2, 1, 1], [60, 1, 1, 1]][
        seed
    ]
    pads = [[0], [0, 0, 0], [2, 0, 1], [11, 3], [20, 0, 24], [0, 50, 30]][seed]
    check(
        *(name, options, trimkv.Budget(M, buffer=W, recent=recent), chunk, lengths, pads, H, G),
        D=[8, 4, 16, 6, 8, 10][seed],
        seed=seed,
        softcap=2.0 if seed in (1, 4) and name != "expected_attention" else None,
        sink=seed in (2, 4),
    )


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_batch_is_its_rows_and_a_layer_can_be_used_again(name, options):
    """With a window that is full, shifted row by row, 60 steps: alone, in another order, after reset, restored."""
    lengths, pads, D = [40] + [1] * 60, [0, 9, 17], 8
    q, k, v = tensors(3, 2, 2, sum(lengths), D)
    layer = make_layer(name, options, trimkv.Budget(18), 16, D)
    expect = [held for _, _, held in drive(layer, q, k, v, lengths, pads)]
    for b, pad in enumerate(pads):
        alone = make_layer(name, options, trimkv.Budget(18), 16, D)
        row = slice(b, b + 1)
        assert [held[0] for _, _, held in drive(alone, q[row], k[row], v[row], lengths, [pad])] == [
            e[b] for e in expect
        ]
    layer.reset()
    flipped = [held for _, _, held in drive(layer, q.flip(0), k.flip(0), v.flip(0), lengths, pads[::-1])]
    assert [held[::-1] for held in flipped] == expect

    layer.reset()
    half = 31
    list(drive(layer, q, k, v, lengths[:half], pads))
    elsewhere = make_layer(name, options, trimkv.Budget(18), 16, D)
    elsewhere.restore(0, layer.snapshot(2), rows=1)
    layer.reset()
    start = sum(lengths[:half])
    rest = (x[2:, :, start:] for x in (q, k, v))
    assert [held[0] for _, _, held in drive(elsewhere, *rest, lengths[half:], [0])] == [e[2] for e in expect[half:]]


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_statistics_of_queries_do_not_depend_on_chunks(chunk):
    """Far from zero and far along, where sums of squares would lose their digits."""
    q, k, v = tensors(2, 1, 3, 80, 8)
    q, pads = q + 100, [0, 33]
    layer = make_layer("expected_attention", {"sinks": 3}, trimkv.Budget(10), chunk, 8)
    list(drive(layer, q, k, v, [50, 1, 1, 28], pads))
    rows, frequency = layer.store.rows, layer.facts.rotation.frequency.double().numpy()
    for b, pad in enumerate(pads):
        for g in range(3):
            own = q[b, g, pad:].double().numpy()
            own = np.array([turn_matrix(t, frequency).T @ x for t, x in enumerate(own)])[3:]
            assert rows["count"][b] == len(own)
            np.testing.assert_allclose(rows["mean"][b, g], own.mean(0), rtol=1e-5, atol=1e-3)
            cov = rows["scatter"][b, g] / len(own)
            np.testing.assert_allclose(cov, np.cov(own.T, bias=True), rtol=1e-4, atol=1e-2)


def test_expected_attention_is_the_mean_over_sampled_queries():
    """The closed form against what it stands for: E[exp(s q.k)] over normal queries."""
    D, n = 8, 200_000
    g = torch.Generator().manual_seed(0)
    mean, root = 0.5 * torch.randn(D, generator=g), 0.4 * torch.randn(D, D, generator=g)
    q, k, v = (torch.zeros(1, 1, 12, D) for _ in range(3))
    k[:] = torch.randn(1, 1, 12, D, generator=g)
    layer = make_layer("expected_attention", {"sinks": 0, "future": 1, "value_norm": False}, trimkv.Budget(20), 64, D)
    list(drive(layer, q, k, v, [12], [0]))
    rows = layer.store.rows
    rows["count"].fill_(1), rows["mean"].copy_(mean[None, None]), rows["scatter"].copy_(root @ root.T)
    samples = mean + torch.randn(n, D, generator=g) @ root.T
    turned = layer.facts.rotation.turn(samples, torch.full((n,), 12))
    expect = ((turned @ k[0, 0].T) * D**-0.5).double().exp().mean(0)
    score = layer.policy.score(layer.store.view(), layer.store.seen[:, None, None])[0, 0]
    torch.testing.assert_close(score.exp(), (expect / expect.sum()).float(), rtol=0.02, atol=0)


def test_redundancy_in_blocks_is_redundancy(monkeypatch):
    layer = make_layer("r_kv", {"window": 4}, trimkv.Budget(40), 64, 8)
    list(drive(layer, *tensors(2, 2, 1, 90, 8), [80, 1, 9], [0, 60]))
    view = layer.store.view()
    whole = r_kv.redundancy(view, 0.5)
    monkeypatch.setattr(r_kv, "BLOCK", 700)
    torch.testing.assert_close(r_kv.redundancy(view, 0.5), whole, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close((whole * view.valid).sum(-1), torch.ones(2, 2))


def test_r_kv_gives_up_what_others_say_again():
    """Ten distinct keys among forty copies of one: the distinct ones stay, and of the copies the newest."""
    D, T = 16, 50
    q, k, v = tensors(1, 1, 1, T, D)
    distinct = list(range(0, 40, 4))
    k[:, :, [t for t in range(T) if t not in distinct]] = k[:, :, -1:].clone()
    k[:, :, distinct] = torch.linalg.qr(torch.randn(D, D))[0][:10]
    layer = make_layer("r_kv", {"window": 2, "mix_lambda": 0.0}, trimkv.Budget(14), None, D)
    ((_, _, [[held]]),) = drive(layer, q, k, v, [T], [0])
    assert set(distinct) <= set(held) and {48, 49} <= set(held)


def test_snapkv_as_published_cuts_the_prompt_only():
    layer = make_layer("snapkv", {"window": 4, "decoding": False}, trimkv.Budget(10), None, 8)
    q, k, v = tensors(2, 2, 2, 60, 8)
    first, *_, last = [held for _, _, held in drive(layer, q, k, v, [30] + [1] * 30, [0, 6])]
    same = make_layer("snapkv", {"window": 4}, trimkv.Budget(10), None, 8)
    assert first == next(drive(same, q, k, v, [30], [0, 6]))[2]
    for row, end in ((0, 60), (1, 54)):
        assert last[row] == [head + list(range(end - 30, end)) for head in first[row]]
    assert "decoded" in layer.policy.peak_decode and "prompt" in layer.policy.evicts


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value, or a size that depends on one, comes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not {"_local_scalar_dense", "nonzero", "masked_select"} & {func.__name__.split(".")[0]}, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_decode_step_reads_nothing_back(name, options):
    layer = make_layer(name, options, trimkv.Budget(9, sinks=1), 16, 8)
    q, k, v = tensors(2, 2, 2, 24, 8)
    list(drive(layer, q, k, v, [20, 1], [0, 3]))
    last = slice(21, 22)
    layer.stage_padding(torch.ones(2, 1, dtype=torch.bool))
    with NoReading():
        layer.attend(None, q[:, :, last], *layer.update(k[:, :, last], v[:, :, last]), 8**-0.5)
    with NoReading(), pytest.raises(AssertionError):
        q.sum().item()


@pytest.mark.parametrize("name", FORMULAE)
def test_half_precision_is_scored_in_single(name):
    layer = make_layer(name, {}, trimkv.Budget(12), 16, 8)
    q, k, v = (x.bfloat16() for x in tensors(2, 2, 2, 60, 8))
    *_, (_, _, held) = drive(layer, q, k, v, [40] + [1] * 20, [0, 11])
    score = layer.policy.score(layer.store.view(), layer.store.seen[:, None, None])
    assert score.dtype == torch.float32 and score.isfinite().all()
    assert all(len(set(head)) == 12 for row in held for head in row)
    assert all(t.dtype in (torch.float32, torch.int32) for t in layer.store.rows.values())


def test_expected_attention_survives_extreme_keys():
    """Probabilities that underflow still rank; values of no length and constant queries are no NaN."""
    layer = make_layer("expected_attention", {}, trimkv.Budget(12), 16, 8)
    q, k, v = tensors(1, 2, 2, 60, 8)
    q[:, 1], k[:, 0], v[:, 1, ::3] = 1.0, 60 * k[:, 0], 0.0
    for _, _, _ in drive(layer, q, k, v, [40] + [1] * 20, [0]):
        score = layer.policy.score(layer.store.view(), layer.store.seen[:, None, None])
        assert score.isfinite().all()
    assert score[0, 0].unique().numel() >= 8


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("snapkv", {"window": 0}, "window"),
        ("snapkv", {"kernel": 4}, "odd"),
        ("snapkv", {"pooling": "median"}, "avg, max"),
        ("snapkv", {"group": "none"}, "mean, max"),
        ("snapkv", {"denominator": "new"}, "all, old"),
        ("r_kv", {"mix_lambda": 1.5}, "mix_lambda"),
        ("r_kv", {"kernel": 0}, "odd"),
        ("expected_attention", {"future": 0}, "future"),
        ("expected_attention", {"epsilon": -1.0}, "epsilon"),
        ("expected_attention", {"sinks": -1}, "sinks"),
    ],
)
def test_impossible_options_say_what_to_change(name, options, word):
    with pytest.raises(ValueError, match=word):
        make(name, **options)
