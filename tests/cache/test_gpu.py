"""The same promises on a GPU: equal text, no waiting for the device in a decode step, flat memory."""

import pytest
import torch

import tiny
import trimkv
from tiny import gated, generate
from trimkv.cache.policies import POLICIES

BOUNDED = [name for name, cls in POLICIES.items() if cls.bounded and not cls.head]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_a_budget_as_large_as_the_text_changes_nothing(name):
    model = gated(name).cuda()
    ids = tiny.tokens(2, 30).cuda()
    stock, _ = generate(model, ids)
    for policy, chunk in (("trimkv", 512), ("trimkv", 7), ("streaming_llm", 7), ("h2o", 7), ("full", 1)):
        text, _ = generate(model, ids, trimkv.bounded_cache(model, policy, 50, chunk=chunk))
        assert torch.equal(text, stock), (policy, chunk)


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("buffer", [0, 4])
def test_the_gpu_evicts_what_the_cpu_evicts(policy, buffer):
    kept = []
    for device in ("cpu", "cuda"):
        model = gated("llama").to(device)
        cache = trimkv.bounded_cache(model, policy, trimkv.Budget(12, buffer=buffer), chunk=8)
        # No token recurs: in the first layer, norms of its keys would be equal but for rounding.
        ids = torch.stack([torch.randperm(125, generator=torch.Generator().manual_seed(b))[:90] + 3 for b in range(3)])
        for part in ids.to(device).split([40] + [1] * 50, 1):
            model(part, past_key_values=cache)
        kept.append([layer.store.position.sort(-1).values.cpu() for layer in cache.slot_layers])
    for ours, theirs in zip(*kept, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("buffer", [0, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decode_step_never_waits_for_the_device(policy, buffer, padded):
    model = gated("qwen3").cuda()
    budget = trimkv.Budget(12, buffer=buffer, sinks=1, recent=2)
    cache = trimkv.bounded_cache(model, policy, budget, chunk=8)
    ids, mask = tiny.tokens(2, 40).cuda(), torch.ones(2, 40, dtype=torch.long).cuda()
    if padded:
        mask[0, :9] = 0
    trimkv.prefill(model, cache, ids, mask)
    token = ids[:, :1].contiguous()
    masks = [torch.cat([mask, mask.new_ones(2, t)], 1) for t in range(1, 102)]
    positions = [(m.cumsum(-1)[:, -1:] - 1) for m in masks]
    for step in range(101):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            model(token, attention_mask=masks[step], position_ids=positions[step], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.peak_decode_tokens == 12 + buffer


def test_memory_is_flat_and_a_prompt_costs_one_chunk():
    model = tiny.build("llama", gain=1.0, hidden_size=256, num_attention_heads=8, num_key_value_heads=4).cuda()
    model = model.to(torch.bfloat16)
    cache = trimkv.bounded_cache(model, "streaming_llm", 256, chunk=512)
    with torch.no_grad():
        trimkv.prefill(model, cache, tiny.tokens(1, 4096).cuda())
        token = torch.tensor([[5]]).cuda()
        for _ in range(20):
            model(token, past_key_values=cache)
        held = torch.cuda.memory_allocated()
        for _ in range(300):
            model(token, past_key_values=cache)
        assert torch.cuda.memory_allocated() <= held
    assert cache.nbytes == 4 * (4 * 256 * (2 * 32 * 2 + 4) + 4)
    assert cache.peak_prefill_tokens == 768
