"""Gates on models and on disk."""

import json

import pytest
import torch
import torch.nn.functional as F

import tiny
import trimkv
from trimkv.gates.attach import new_gates
from trimkv.gates.files import META, WEIGHTS, collect
from trimkv.gates.gate import RetentionGate, output_bias

pytestmark = pytest.mark.smoke

PARAMETERS = {
    "rg": ["bias", "linear1.bias", "linear1.weight", "linear2.weight"],
    "rg2": ["bias", "linear1.bias", "linear1.weight", "linear2.weight"],
    "rg3": ["bias", "down_proj.weight", "gate_proj.weight", "up_proj.weight"],
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_log_beta_by_its_formula(kind):
    B, T, E, H, D, width = 2, 5, 12, 3, 4, 7
    gate = RetentionGate(kind, E, H, D, width)
    gate.initialise(100, std=0.5)
    gate.bias.data += torch.tensor([0.0, 1.0, 2.0])
    assert sorted(gate.state_dict()) == PARAMETERS[kind]
    hidden, k, v = torch.randn(B, T, E), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    got = gate(hidden) if kind == "rg" else gate(k, v)
    assert got.shape == (B, H, T) and got.dtype == torch.float32 and (got < 0).all()
    w = gate.state_dict()
    for b in range(B):
        for t in range(T):
            x = hidden[b, t] if kind == "rg" else torch.cat([torch.cat([k[b, h, t], v[b, h, t]]) for h in range(H)])
            if kind == "rg3":
                z = w["down_proj.weight"] @ (F.silu(w["gate_proj.weight"] @ x) * (w["up_proj.weight"] @ x)) + w["bias"]
            else:
                z = w["linear2.weight"] @ F.silu(w["linear1.weight"] @ x + w["linear1.bias"]) + w["bias"]
            torch.testing.assert_close(got[b, :, t], torch.sigmoid(z.double()).log().float(), atol=1e-5, rtol=1e-4)


def test_bf16_gates_still_tell_tokens_apart():
    """Near a bias of 18 the bf16 grid is 0.125 wide: a gate computed in bf16 gives a handful of values."""
    gate = RetentionGate("rg", 64, 1, 16, 32).to(torch.bfloat16)
    gate.initialise(100, std=0.3)
    gate.bias.data.fill_(18)
    values = gate(torch.randn(1, 2000, 64, dtype=torch.bfloat16))
    assert values.dtype == torch.float32
    assert values.unique().numel() > 1000


@pytest.mark.parametrize("length", [24, 1024, 131072])
def test_initial_retention_survives_one_training_sequence(length):
    beta = torch.sigmoid(torch.tensor(output_bias(length), dtype=torch.float64))
    assert beta.pow(length).item() == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_saved_gates_evict_as_before(kind, name, tmp_path):
    model = tiny.build(name)
    gates = new_gates(model, kind, intermediate_size=16, training_length=16)
    for parameters in gates.layers.values():
        parameters["linear2.weight" if kind != "rg3" else "down_proj.weight"].mul_(100 if kind != "rg3" else 10_000)
    trimkv.attach(model, gates)
    ids = tiny.tokens(1, 40)
    cache = trimkv.bounded_cache(model, "trimkv", 8, chunk=4)
    logits = model(ids, past_key_values=cache).logits
    trimkv.save_gates(model, tmp_path, data="none", steps=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [META, WEIGHTS]
    meta = json.loads((tmp_path / META).read_text())
    assert meta["gate"] == kind and meta["intermediate_size"] == 16 and meta["steps"] == 0

    other = trimkv.attach(tiny.build(name), tmp_path)
    again = trimkv.bounded_cache(other, "trimkv", 8, chunk=4)
    torch.testing.assert_close(other(ids, past_key_values=again).logits, logits)
    assert cache.held_tokens == 8
    positions = {tuple(sorted(head)) for head in cache.slot_layers[0].store.position[0].tolist()}
    assert positions != {tuple(range(32, 40))}, "these gates must not be a sliding window"


def test_attaching_again_replaces_and_detaching_restores():
    model = tiny.build("qwen3")
    keys = set(model.state_dict())
    ids = tiny.tokens(1, 12)
    stock = model(ids).logits
    first, second = (new_gates(model, intermediate_size=4, seed=seed) for seed in (0, 1))
    for gates in (first, first, second):
        trimkv.attach(model, gates)
        module = model.model.layers[0].self_attn
        assert len(module._forward_pre_hooks) == 1
        assert torch.equal(module.retention_gate.linear1.weight, gates.layers[0]["linear1.weight"])
    added = set(model.state_dict()) - keys
    assert "model.layers.3.self_attn.retention_gate.linear1.weight" in added
    assert torch.equal(model(ids).logits, stock), "gates alone change nothing"
    cache = trimkv.bounded_cache(model, "trimkv", 8)
    model(ids, past_key_values=cache)
    trimkv.detach(trimkv.detach(model))
    assert set(model.state_dict()) == keys
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "eager"


def test_gates_that_do_not_fit_leave_the_model_as_it_was():
    model, small = tiny.build("qwen3"), tiny.build("llama", hidden_size=32, num_hidden_layers=2)
    gates = new_gates(small)
    gates.meta["base_model"] = "org/small"
    with pytest.raises(ValueError, match=r"org/small.*layers 0\.\.1.*Qwen3ForCausalLM.*layers 0\.\.3"):
        trimkv.attach(model, gates)
    narrow = new_gates(tiny.build("qwen3", hidden_size=32))
    narrow.meta["base_model"] = "org/narrow"
    trimkv.attach(model, good := new_gates(model))
    with pytest.raises(ValueError, match=r"org/narrow.*do not fit Qwen3ForCausalLM"):
        trimkv.attach(model, narrow)
    assert torch.equal(collect(model).layers[0]["linear1.weight"], good.layers[0]["linear1.weight"])


def test_other_base_model_is_said(caplog):
    model = tiny.build("qwen3")
    gates = new_gates(model)
    gates.meta["base_model"] = "org/other"
    trimkv.attach(model, gates)
    assert "org/other" in caplog.text


def test_half_precision_models_get_half_precision_gates_and_fp32_log_beta():
    model = tiny.build("llama").to(torch.bfloat16)
    trimkv.attach(model, new_gates(model))
    assert model.model.layers[0].self_attn.retention_gate.linear1.weight.dtype == torch.bfloat16
    cache = trimkv.bounded_cache(model, "trimkv", 8)
    model(tiny.tokens(1, 20), past_key_values=cache)
    assert cache.slot_layers[0].store.state["log_beta"].dtype == torch.float32
    assert cache.slot_layers[0].store.k.dtype == torch.bfloat16


def published(tmp_path, tensors, **config):
    torch.save(tensors, tmp_path / "trimkv_weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def published_tensors(model, kind="rg", prefix="model."):
    gates = new_gates(model, kind, intermediate_size=8)
    return {
        f"{prefix}layers.{i}.self_attn.retention_gate.{name}": t
        for i, parameters in gates.layers.items()
        for name, t in parameters.items()
    }


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("declared", [True, False])
def test_the_kind_is_inferred_from_the_published_keys(kind, prefix, declared, tmp_path):
    model = tiny.build("qwen3", head_dim=24)  # 2 heads x 2 x 24 = 96 inputs for rg2, 64 for rg
    folder = published(
        tmp_path, published_tensors(model, kind, prefix), **({"retention_gate": kind} if declared else {})
    )
    gates = trimkv.load_gates(folder)
    assert gates.kind(model.config.hidden_size) == kind
    assert gates.intermediate_size == 8
    trimkv.attach(model, folder)


class Payload:
    def __reduce__(self):
        return print, ("this must never run",)


def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, capsys):
    model = tiny.build("qwen3")
    good = published_tensors(model)

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            trimkv.attach(model, tmp_path)
        assert "\n" not in str(error.value)

    refused("no gates in")
    published(tmp_path, {**good, "x": Payload()})
    refused("holds code")
    assert "never run" not in capsys.readouterr().out
    published(tmp_path, {**good, "model.embed_tokens.weight": torch.zeros(1)})
    refused("is not a retention gate's parameter")
    published(tmp_path, [1, 2])
    refused("no dictionary")
    published(tmp_path, {k.replace("linear2", "linear9"): t for k, t in good.items()})
    refused("no known gate")
    (tmp_path / "trimkv_weights.pth").write_bytes(b"PK\x03\x04 cut")
    refused("damaged")
    published(tmp_path, good)
    (tmp_path / "config.json").write_text("{")
    refused("cannot be read")
    (tmp_path / "config.json").unlink()
    refused("missing")
    (tmp_path / WEIGHTS).write_bytes(b"\x00\x01")
    refused("damaged")
    with pytest.raises(ValueError, match="no gates are bundled"):
        trimkv.attach(model, "bundled")
    assert not hasattr(model.model.layers[0].self_attn, "retention_gate")
