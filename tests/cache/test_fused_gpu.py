"""Static caches and the fused kernels on a GPU: graphs that equal plain steps, and no step that waits."""

import pytest
import torch

import tiny
import trimkv
from trimkv.budget import Budget
from trimkv.cache import fused
from trimkv.cache.graph import DecodeStep
from trimkv.cache.policies import POLICIES

BOUNDED = [name for name, cls in POLICIES.items() if cls.bounded and not cls.head]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("true_fp32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024}
    return tiny.gated("qwen3", num_hidden_layers=2, **sizes).cuda()


def kept(cache):
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        for layer in cache.slot_layers
    ]


def serve(model, name, steps, graph, **how):
    """Rows come, pause and go. Logits of active rows and kept positions of each step."""
    budget = Budget(16, sinks=1, recent=3)
    cache = trimkv.bounded_cache(model, name, budget, chunk=8, rows=3)
    step = DecodeStep(model, cache, **how) if graph else None
    text = torch.randperm(900, generator=torch.Generator().manual_seed(1))[: 3 * steps].view(steps, 3).cuda() + 5
    results = []
    for t in range(steps):
        if t in (3, 30, 50):
            staging = trimkv.bounded_cache(model, name, budget, chunk=8)
            trimkv.prefill(model, staging, tiny.tokens(1, [4, 33, 14][t % 3], seed=t).cuda(), chunk=8)
            cache.copy_row(staging, 0, t % 3)
        if t == 20:
            cache.clear_rows([0])
        active = torch.tensor([t % 5 != 2, True, t % 4 != 1], device="cuda")
        if graph:
            cache.refresh()
            torch.cuda.set_sync_debug_mode("error" if t else "default")
            try:
                logits = step(text[t], active)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            with torch.no_grad():
                logits = model(text[t][:, None], attention_mask=active[:, None], past_key_values=cache).logits[:, -1]
        results.append((logits * active[:, None], kept(cache)))
    return cache, results


@pytest.mark.parametrize("name", BOUNDED)
def test_a_replayed_graph_is_a_plain_step(monkeypatch, model, name):
    """For every policy: graph and kernels against eager plain torch, with rows of all ages."""
    cache, got = serve(model, name, 90, graph=True)
    assert (cache.ahead is not None) == bool(POLICIES[name].search)
    monkeypatch.setattr(fused, "kernels", lambda q, k, v: None)
    _, truth = serve(model, name, 90, graph=False)
    for t, (a, b) in enumerate(zip(got, truth, strict=True)):
        torch.testing.assert_close(a[0], b[0], atol=2e-3, rtol=2e-3, msg=lambda text, t=t: f"step {t}: {text}")
        assert a[1] == b[1], f"step {t} keeps other tokens"


@pytest.mark.parametrize("how", [{"compile": True}, {"overlap": True}, {"compile": True, "overlap": True}], ids=str)
def test_a_faster_graph_is_the_same_step(model, how):
    """Compiled parts and gates beside the projections."""
    _, truth = serve(model, "trimkv", 70, graph=True)
    _, got = serve(model, "trimkv", 70, graph=True, **how)
    for t, (a, b) in enumerate(zip(got, truth, strict=True)):
        torch.testing.assert_close(a[0], b[0], atol=2e-3, rtol=2e-3, msg=lambda text, t=t: f"step {t}: {text}")
        assert a[1] == b[1], f"step {t} keeps other tokens"


def test_changed_rows_are_not_forgotten_in_a_capture(model):
    cache = trimkv.bounded_cache(model, "trimkv", 16, rows=2)
    token = torch.tensor([[5], [6]], device="cuda")
    with torch.no_grad():
        model(token, past_key_values=cache)
    cache.clear_rows(0)
    with pytest.raises(RuntimeError, match="refresh"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cache.begin_step(None)
