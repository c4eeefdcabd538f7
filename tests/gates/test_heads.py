"""Heads of trained baselines: their formulae, on any model and off again, on disk."""

import json
import re

import pytest
import torch

import tiny
import trimkv
from trimkv.gates.head_sets import (
    PLACES,
    HeadSet,
    attach_heads,
    bundled_heads,
    detach_heads,
    load_heads,
    new_heads,
    save_heads,
)
from trimkv.gates.heads import BlockGate, RetainingHead

KINDS = list(PLACES)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_a_retaining_head_reads_what_is_projected_before_rotation(name):
    model, ids = tiny.gated(name, num_hidden_layers=1), tiny.tokens(2, 9)
    module, hidden, said = model.model.layers[0].self_attn, [], []
    module.register_forward_pre_hook(lambda m, args, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True)
    take = module.retaining_head.take
    module.retaining_head.take = lambda tokens: said.append(take(tokens)) or said[-1]
    with torch.no_grad():
        model(ids, past_key_values=trimkv.bounded_cache(model, "locret", 4, chunk=5))
        fused = hasattr(module, "qkv_proj")
        parts = [module.qkv_proj] if fused else [module.q_proj, module.k_proj, module.v_proj]
        x = torch.cat([part(hidden[0]) for part in parts], -1)
        head = module.retaining_head
        expect = torch.nn.functional.silu(x @ head.fc1.weight.T) @ head.fc2.weight.T
    assert [s.shape[2] for s in said] == [5, 4]
    torch.testing.assert_close(torch.cat(said, 2), expect.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_a_retaining_head_decides_in_fp32():
    head = RetainingHead(8, 2, 16).to(torch.bfloat16)
    assert head(torch.randn(1, 3, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_block_gate_turns_by_the_distance_alone():
    """Query and block moved together by as many positions: the same logit. And the group's heads are summed."""
    gate = BlockGate(2, 3, 8, width=6, block_size=4)
    q, pooled = torch.randn(1, 6, 1, 8), torch.randn(1, 2, 1, 24)

    def logit(at, begin):
        return gate.logits(gate.query(q, torch.tensor([[at]])), gate.summary(pooled, torch.tensor([[begin]])))

    torch.testing.assert_close(logit(9, 4), logit(109, 104), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logit(9, 4), logit(9, 0), atol=1e-3)
    weight = gate.attngate_linear_q.weight
    summed = torch.stack([sum(q[0, h * 3 + g, 0] @ weight[h, g] for g in range(3)) for h in range(2)])
    summed = summed / (summed.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(gate.query(q, torch.tensor([[0]]))[0, :, 0], summed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_to_disk_and_back(kind, tmp_path):
    model = attach_heads(tiny.build("qwen3"), new_heads(tiny.build("qwen3"), kind, 8, 4, seed=3))
    save_heads(model, tmp_path, kind, torch.float16, steps=7)
    meta = json.loads((tmp_path / "heads.json").read_text())
    assert meta["kind"] == kind and meta["width"] == 8 and meta["steps"] == 7
    heads = load_heads(tmp_path)
    assert next(iter(heads.layers[0].values())).dtype == torch.float16
    other = attach_heads(tiny.build("qwen3"), tmp_path)
    ids, logits = tiny.tokens(1, 30), []
    for one in (model, other):
        attach_heads(one, heads)
        cache = trimkv.bounded_cache(one, kind, 8, chunk=4)
        logits.append([one(ids[:, t : t + 1], past_key_values=cache).logits for t in range(30)])
    assert torch.equal(torch.cat(logits[0]), torch.cat(logits[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_detached_the_model_is_stock_again(kind):
    model = tiny.build("llama")
    names, ids = set(model.state_dict()), tiny.tokens(1, 12)
    stock = model(ids).logits
    attach_heads(model, new_heads(model, kind, 8, 4))
    assert set(model.state_dict()) > names and torch.equal(model(ids).logits, stock)
    trimkv.bounded_cache(model, kind, 8)
    trimkv.detach(model)
    assert set(model.state_dict()) == names and torch.equal(model(ids).logits, stock)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_kinds_stay_beside_each_other():
    model = tiny.gated("llama", num_hidden_layers=1)
    module = model.model.layers[0].self_attn
    detach_heads(model, "locret")
    assert not hasattr(module, "retaining_head") and hasattr(module, "attn_gate") and hasattr(module, "retention_gate")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["olmo", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_any_architecture_takes_heads(kind, name):
    model = tiny.build(name)
    attach_heads(model, new_heads(model, kind, 8, 4))
    cache = trimkv.bounded_cache(model, kind, 8, chunk=8)
    tiny.generate(model, tiny.tokens(2, 20), cache, new=5)
    assert cache.peak_decode_tokens == 8


def test_heads_that_do_not_fit_change_nothing(tmp_path):
    model = tiny.build("llama")
    heads = new_heads(tiny.build("llama", hidden_size=32), "locret", 8)
    with pytest.raises(ValueError, match=r"do not fit .*fc1.weight is \[8, 64\]"):
        attach_heads(model, heads)
    with pytest.raises(ValueError, match=r"layers 0\.\.0"):
        attach_heads(model, HeadSet({0: heads.layers[0]}, heads.meta))
    assert not hasattr(model.model.layers[0].self_attn, "retaining_head")


def test_what_cannot_be_read_is_said(tmp_path):
    model = tiny.build("llama")
    with pytest.raises(ValueError, match="no heads in"):
        load_heads(tmp_path)
    with pytest.raises(ValueError, match="no locret heads are bundled for"):
        attach_heads(model, "locret")
    with pytest.raises(ValueError, match="known kinds: locret, seer_attention_r"):
        new_heads(model, "snapkv")
    save_heads(new_heads(model, "locret", 8), tmp_path)
    meta = json.loads((tmp_path / "heads.json").read_text())
    (tmp_path / "heads.json").write_text(json.dumps({**meta, "kind": "seer_attention_r"}))
    with pytest.raises(ValueError, match="is no parameter of seer_attention_r"):
        load_heads(tmp_path)
    (tmp_path / "heads.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=re.escape("heads.safetensors is damaged")):
        load_heads(tmp_path)


def test_bundled_heads_are_no_bundled_gates():
    from trimkv.gates import bundled

    folders = set(map(str, bundled().values()))
    assert not any(str(folder) in folders for kind in KINDS for folder in bundled_heads(kind).values())


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_the_default_model_ship(kind):
    heads = load_heads(bundled_heads(kind)["smollm2"])
    assert heads.kind == kind and sorted(heads.layers) == list(range(30))
    stages = [*heads.meta.get("earlier_stages", ()), heads.meta]
    assert [stage["tokens"] for stage in stages] == [tokens * 2**14 for tokens in (1700, 700, 500)][: len(stages)]
    assert len(stages) == (1 if kind == "locret" else 3)
