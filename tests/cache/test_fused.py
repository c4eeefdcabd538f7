"""The cache on the fused kernels keeps what the cache in plain torch keeps, at every step.

Here the kernels' plain reference stands in for them, so that the wiring is tested everywhere; the interpreted tests run
the kernels themselves in Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interpreter
import tiny
import trimkv
from trimkv.budget import Budget
from trimkv.cache import fused
from trimkv.cache.layers import BoundedLayer
from trimkv.cache.policies import POLICIES, make
from trimkv.cache.policies.trimkv import TrimKV

slots_triton = pytest.importorskip("trimkv.attention.slots_triton")

interpreted = pytest.mark.skipif(not interpreter.INTERPRETED, reason="runs in a process of its own")
not_interpreted = pytest.mark.skipif(interpreter.INTERPRETED, reason="runs in the main process")
STATIC = ["trimkv", "streaming_llm"]
DYNAMIC = ["trimkv", "streaming_llm", "full", "h2o", "h2o_normalised", "tova", "keydiff", "r_kv", "snapkv", "random"]


def plain(q, k, v):
    return None


def forced(q, k, v):
    return slots_triton


def run(layer, given, lengths, pads, how, reset_at=None):
    """Forwards of ``lengths`` tokens through one layer: (outputs of real tokens, kept positions) of each."""
    q, k, v, log_beta = given
    start, results = 0, []
    real = torch.arange(sum(lengths)) >= torch.tensor(pads)[:, None]
    # Rows also pause in the middle of decoding.
    real[0, sum(lengths) - 9 :: 3] = False
    for n, length in enumerate(lengths):
        if n == reset_at:
            layer.restore(len(pads) - 1, layer.snapshot(len(pads) - 1), len(pads))
        part = slice(start, start + length)
        start += length
        layer.stage_padding(None if bool(real[:, part].all()) else real[:, part])
        layer.stage_log_beta(log_beta[:, :, part])
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        out = layer.attend(None, q[:, :, part], keys, values, *how)
        out = out * real[:, None, part, None]
        kept = [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        results.append((out, kept))
    return results


def check_layer(monkeypatch, kernels, policy, budget, G, lengths, pads, softcap=None, sink=False, H=2, D=8):
    g = torch.Generator().manual_seed(G)
    T = sum(lengths)
    q = torch.randn(len(pads), H * G, T, D, generator=g)
    k, v = (torch.randn(len(pads), H, T, D, generator=g) for _ in range(2))
    given = q, k, v, -torch.rand(len(pads), H, T, generator=g) * 0.1
    how = D**-0.5, softcap, torch.randn(H * G, generator=g) if sink else None
    results, calls = [], []
    decode, attend_chunk = slots_triton.decode, slots_triton.attend_chunk
    monkeypatch.setattr(slots_triton, "decode", lambda *a, **o: calls.append(o) or decode(*a, **o))
    monkeypatch.setattr(slots_triton, "attend_chunk", lambda *a, **o: calls.append(o) or attend_chunk(*a, **o))
    for choose in (plain, kernels):
        monkeypatch.setattr(fused, "kernels", choose)
        layer = BoundedLayer(policy, budget, 8, 0)
        results.append(run(layer, given, lengths, pads, how, reset_at=len(lengths) - 5))
        assert bool(calls) == (choose is not plain)
    monkeypatch.undo()
    for t, (expect, got) in enumerate(zip(*results, strict=True)):
        assert got[1] == expect[1], f"forward {t} keeps other tokens"
        torch.testing.assert_close(
            got[0], expect[0], atol=2e-5, rtol=1e-4, msg=lambda text, t=t: f"forward {t}: {text}"
        )
    return calls


@not_interpreted
@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("G", [1, 3, 4])
@pytest.mark.parametrize("buffer", [0, 3])
def test_a_layer_keeps_and_gives_the_same(monkeypatch, name, G, buffer):
    """Padded rows, sinks and recent tokens, a restore and a second turn in between, softcap and learned sinks."""
    budget = Budget(12, buffer=buffer, sinks=2, recent=4)
    lengths = [5] + [1] * 40 + [9] + [1] * 40
    calls = check_layer(monkeypatch, forced, make(name), budget, G, lengths, [0, 3, 0], softcap=3.0, sink=G > 1)
    chunks = sum("score" not in call for call in calls)
    calls = [call for call in calls if "score" in call]
    assert chunks == (2 if POLICIES[name].needs <= {"log_beta"} else 0)
    searched = sum(call["score"] != "none" for call in calls)
    assert searched == 0 if buffer or not POLICIES[name].search or name == "full" else searched > 60
    check_layer(monkeypatch, forced, make(name), budget, G, [20] + [1] * 30, [0])


@not_interpreted
def test_the_released_distance_is_followed(monkeypatch):
    check_layer(monkeypatch, forced, TrimKV(distance="reference"), Budget(12), 2, [5] + [1] * 80, [0, 2])


@not_interpreted
def test_what_the_kernel_cannot_score_is_scored_in_torch(monkeypatch):
    calls = check_layer(monkeypatch, forced, TrimKV(strategy="knorm_alpha"), Budget(12), 2, [5] + [1] * 40, [0, 2])
    assert {call.get("score") for call in calls} == {"none"}
    monkeypatch.setattr(fused, "kernels", forced)
    model = tiny.gated("llama", num_hidden_layers=2)
    assert trimkv.bounded_cache(model, TrimKV(strategy="knorm_alpha"), 12, rows=2).ahead is None
    assert trimkv.bounded_cache(model, "trimkv", Budget(12, buffer=2), rows=2).ahead is None
    assert trimkv.bounded_cache(model, "h2o", 12, rows=2).ahead is None
    cache = trimkv.bounded_cache(model, "trimkv", 12, rows=2)
    assert cache.ahead is not None
    stored = sum(store.nbytes for store in cache.stores)
    counters = 2 * 2 * 4
    assert cache.nbytes == stored + 2 * 2 * 2 * 4 + counters, "where the next token goes, per layer, row and head"


def kept(cache):
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        for layer in cache.slot_layers
    ]


def serve(model, name, budget, steps, replayed=False):
    """What a server does: rows come, pause and go while the others decode. Logits of active rows and kept positions."""
    cache = trimkv.bounded_cache(model, name, budget, chunk=8, rows=3)
    text = torch.randperm(900, generator=torch.Generator().manual_seed(1))[: 3 * steps].view(steps, 3) + 5
    results = []
    for t in range(steps):
        if t in (3, 30, 50):
            staging = trimkv.bounded_cache(model, name, budget, chunk=8)
            trimkv.prefill(model, staging, tiny.tokens(1, [4, 33, 14][t % 3], seed=t), chunk=8)
            cache.copy_row(staging, 0, t % 3)
        if t == 20:
            saved = cache.snapshot(1)
            cache.clear_rows([0])
        if t == 42:
            cache.restore(saved, 2)
        if t == 60:
            ids, mask = tiny.left_padded([0, 11, 5], 11)
            trimkv.prefill(model, cache, ids, mask, chunk=5)
        active = torch.tensor([t % 5 != 2, True, t % 4 != 1])
        everyone = bool(active.all())
        with torch.no_grad():
            mask = None if everyone else active[:, None].long()
            logits = model(text[t][:, None], attention_mask=mask, past_key_values=cache).logits[:, -1]
        results.append((logits * active[:, None], kept(cache)))
    return cache, results


@pytest.fixture(scope="module")
def models():
    return {
        G: tiny.gated("qwen3", num_hidden_layers=2, num_attention_heads=2 * G, num_key_value_heads=2, vocab_size=1024)
        for G in (1, 3, 4)
    }


@not_interpreted
@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("G", [1, 3, 4])
def test_a_static_cache_keeps_and_gives_the_same(monkeypatch, models, name, G):
    budget = Budget(12, sinks=1, recent=3)
    expect, truth = serve(models[G], name, budget, 90)
    monkeypatch.setattr(fused, "kernels", forced)
    cache, got = serve(models[G], name, budget, 90)
    assert expect.ahead is None and cache.ahead is not None
    for t, (a, b) in enumerate(zip(got, truth, strict=True)):
        assert a[1] == b[1], f"step {t} keeps other tokens"
        torch.testing.assert_close(a[0], b[0], atol=2e-4, rtol=2e-4, msg=lambda text, t=t: f"step {t}: {text}")
    assert torch.equal(cache.seen, expect.seen) and cache.peak_decode_tokens == 12


@not_interpreted
def test_a_replayed_step_needs_nothing_from_the_host(monkeypatch, models):
    """A graph has only the step in it. Between steps nothing may be found anew, and whatever changes rows must be seen
    by ``refresh``, not by the step."""
    monkeypatch.setattr(fused, "kernels", forced)
    cache = trimkv.bounded_cache(models[3], "trimkv", 12, chunk=8, rows=2)
    token = torch.tensor([[5], [6]])
    found = []
    find = BoundedLayer.find_slot
    monkeypatch.setattr(BoundedLayer, "find_slot", lambda self: found.append(self.which) or find(self))
    next_slot, seen = cache.ahead.next_slot.data_ptr(), cache.seen.data_ptr()
    with torch.no_grad():
        for _ in range(3):
            models[3](token, past_key_values=cache)
        assert found == [0, 1]  # once, before the first step
        source = trimkv.bounded_cache(models[3], "trimkv", 12, chunk=8)
        trimkv.prefill(models[3], source, tiny.tokens(1, 30), chunk=8)
        for change in (
            lambda: cache.copy_row(source, 0, 0),
            lambda: cache.restore(source.snapshot(), 1),
            lambda: cache.clear_rows(1),
            lambda: trimkv.prefill(models[3], cache, tiny.tokens(2, 9), chunk=9),  # the cache's last chunk is one token
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            cache.reset,
        ):
            change()
            found.clear()
            cache.refresh()
            assert found == [0, 1]
            models[3](token, past_key_values=cache)
            assert found == [0, 1]
            # What the step found is what plain torch finds.
            for layer, slot in zip(cache.slot_layers, cache.ahead.next_slot, strict=True):
                assert torch.equal(find(layer)[..., 0].int(), slot)
    assert (cache.ahead.next_slot.data_ptr(), cache.seen.data_ptr()) == (next_slot, seen)


@not_interpreted
def test_plain_torch_can_be_asked_for(monkeypatch):
    """What a measurement of the kernels compares them with must not be themselves."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.ones(1, 1, 1, 16)
    assert fused.kernels(x, x, x) is slots_triton
    with fused.plain_torch():
        assert fused.kernels(x, x, x) is None
    assert fused.kernels(x, x, x) is slots_triton


@not_interpreted
def test_the_cache_works_without_triton():
    """On a Mac, and in torch's builds without it."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tiny, trimkv\n"
        "from trimkv.cache import fused\n"
        "model = tiny.gated('llama', num_hidden_layers=2)\n"
        "cache = trimkv.bounded_cache(model, 'trimkv', 8, rows=1)\n"
        "with torch.no_grad():\n"
        "    for t in range(12): model(torch.tensor([[5 + t]]), past_key_values=cache)\n"
        "class OnAGpu(torch.Tensor): is_cuda = True\n"
        "print(cache.held_tokens, fused.kernels(torch.ones(1).as_subclass(OnAGpu), None, None))"
    )
    path = os.pathsep.join(str(Path(file).parents[1]) for file in (tiny.__file__, trimkv.__file__))
    path = os.pathsep.join([path, str(Path(tiny.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["8", "None"], done.stderr


def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)


@interpreted
@pytest.mark.parametrize(("name", "G"), [("trimkv", 3), ("streaming_llm", 1), ("h2o", 4), ("tova", 3)])
def test_interpreted_kernels_in_a_layer(monkeypatch, name, G):
    budget = Budget(12, sinks=2, recent=4)
    lengths = [9] + [1] * 62
    check_layer(monkeypatch, fused.kernels, make(name), budget, G, lengths, [0, 3], softcap=3.0, sink=G > 1, D=16)


@interpreted
def test_interpreted_kernels_in_a_static_cache(monkeypatch, models):
    name, budget = "trimkv", Budget(12, sinks=1, recent=3)
    cache, got = serve(models[3], name, budget, 64)
    assert cache.ahead is not None
    monkeypatch.setattr(fused, "kernels", plain)
    _, truth = serve(models[3], name, budget, 64)
    for t, (a, b) in enumerate(zip(got, truth, strict=True)):
        assert a[1] == b[1], f"step {t} keeps other tokens"
        torch.testing.assert_close(a[0], b[0], atol=2e-4, rtol=2e-4)
