"""Training gates on tiny models: what is learnt, what stays frozen, and that a killed run goes on as if it were not."""

import json

import pytest
import torch

import tiny
import trimkv
from trimkv.attention import reference
from trimkv.gates.attach import new_gates
from trimkv.train.config import GateConfig
from trimkv.train.student import Student
from trimkv.train.trainer import train

pytestmark = pytest.mark.smoke

CONTEXT = 24


class Samples(torch.utils.data.Dataset):
    """Random tokens, packed: some samples hold two documents, some end in padding."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = tiny.tokens(1, CONTEXT, seed=index)[0]
        start, labels, mask = torch.zeros(CONTEXT, dtype=torch.long), ids.clone(), torch.ones(CONTEXT, dtype=torch.bool)
        if index % 2:
            start[15:] = 15
            labels[15] = -100
        if index % 3 == 0:
            start[20:] = torch.arange(20, CONTEXT)
            labels[20:], mask[20:] = -100, False
        return {"input_ids": ids, "labels": labels, "start": start, "mask": mask}


def settings(**changes):
    base = {"budget": 4, "context": CONTEXT, "steps": 6, "batch_size": 2, "intermediate_size": 8, "warmup_steps": 1}
    return GateConfig(**{**base, "budgets": (3, 12), **changes})


def batch(*indices):
    from trimkv.train.data import collate

    return collate([Samples()[i] for i in indices])


def student(name="llama", **changes):
    model = tiny.build(name)
    gates = new_gates(model, changes.pop("kind", "rg"), 8, CONTEXT)
    config = settings(**changes)
    return Student(trimkv.attach(model, gates), config)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gemma2", "gpt_oss"])
def test_the_teacher_is_the_stock_model(name):
    stock = tiny.build(name)
    ours = student(name)
    ours.train()
    ids = tiny.tokens(2, CONTEXT)
    ours.teaching = True
    with torch.no_grad():
        hidden = ours.model.get_decoder()(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(ours.project(hidden), stock(ids).logits, atol=2e-5, rtol=1e-4)


def test_documents_of_a_sample_do_not_know_each_other():
    """The loss of packed documents is the loss of the documents alone."""
    ours = student()
    packed = batch(1)
    parts = [{name: t[:, part] for name, t in packed.items()} for part in (slice(0, 15), slice(15, CONTEXT))]
    parts[1]["start"] = parts[1]["start"] - 15
    both = ours(**packed)
    first, second = (ours(**part) for part in parts)
    predicted = 14, 8  # labels count but the first of each document
    expect = (first["kl"] * predicted[0] + second["kl"] * predicted[1]) / sum(predicted)
    torch.testing.assert_close(both["kl"], expect, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rg", "rg2", "rg3"])
@pytest.mark.parametrize("stage", ["decay", "eviction"])
def test_only_gates_learn_and_all_of_them(kind, stage):
    ours = student(kind=kind, stage=stage)
    ours.train()
    ours.begin_step(0)
    ours(**batch(0, 1))["loss"].backward()
    for name, parameter in ours.model.named_parameters():
        learns = ".retention_gate." in name
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == learns, name


def test_what_is_recomputed_is_not_kept():
    """Otherwise the backward pass holds the gates' activations of all layers, and long contexts do not fit."""
    ours = student(checkpointing=True)
    ours.train()
    ours.begin_step(0)
    loss, before = ours(**batch(0, 1))["loss"], dict(ours.log_beta)
    recomputed = []
    gate = ours.modules_with_gates[0].retention_gate
    gate.register_forward_hook(lambda *_: recomputed.append(1))
    loss.backward()
    assert recomputed, "nothing was recomputed"
    assert len(before) == len(ours.modules_with_gates)
    assert all(ours.log_beta[i] is log_beta for i, log_beta in before.items())


def test_checkpointing_changes_no_gradient():
    gradients = []
    for training in (True, False):  # transformers checkpoints in training mode only
        ours = student()
        ours.train(training)
        ours(**batch(0, 1))["loss"].backward()
        gradients.append([p.grad for p in ours.gate_parameters()[0]])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_the_capacity_loss_is_that_of_the_formula():
    ours = student(budget=3)
    inputs = batch(2)
    got = ours(**inputs)["capacity"]
    layers = []
    for i in sorted(ours.log_beta):
        S = reference.retention_sum(ours.log_beta[i], inputs["start"])
        layers.append(((S - 3).relu() / torch.arange(1, CONTEXT + 1)).mean())
    torch.testing.assert_close(got, torch.stack(layers).mean().detach(), atol=1e-6, rtol=1e-4)


def test_soft_eviction_becomes_hard_eviction_as_the_temperature_falls():
    from trimkv.attention.soft_eviction import soft_eviction_attention

    B, H, G, T, D, M = 2, 2, 3, 20, 8, 6
    q, k, v = torch.randn(B, H * G, T, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    log_beta = -torch.rand(B, H, T)
    out = soft_eviction_attention(q, k, v, log_beta, 0.3, torch.full((B,), float(M)), 1e-4)
    age = torch.arange(T)[:, None] - torch.arange(T)
    score = (log_beta[:, :, None] * age).masked_fill(age < 0, -torch.inf)
    best = score >= score.sort(-1, descending=True).values[..., M - 1 : M]
    mask = (best | (torch.arange(T) < M)[:, None]) & (age >= 0)
    logits = (q.view(B, H, G, T, D) @ k[:, :, None].transpose(3, 4) * 0.3).masked_fill(~mask[:, :, None], -torch.inf)
    expect = (logits.softmax(-1) @ v[:, :, None]).view(B, H * G, T, D)
    torch.testing.assert_close(out, expect, atol=1e-3, rtol=1e-3)


def test_soft_eviction_cares_for_the_order_only():
    """Multiplying all log beta of a head by a factor changes neither output nor, summed over tokens, is it learnt."""
    from trimkv.attention.soft_eviction import soft_eviction_attention

    q, k, v = torch.randn(1, 2, 16, 8), torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8)
    z = torch.randn(1, 1, 16, requires_grad=True)
    log_beta = -torch.exp(z)
    budget = torch.tensor([5.0])
    out = soft_eviction_attention(q, k, v, log_beta, 0.3, budget, 0.3)
    scaled = soft_eviction_attention(q, k, v, log_beta * 7, 0.3, budget, 0.3)
    torch.testing.assert_close(out, scaled, atol=2e-3, rtol=1e-2)
    (out * torch.randn_like(out)).sum().backward()
    assert z.grad.abs().max() > 1e-2
    assert z.grad.sum().abs() < 1e-3 * z.grad.abs().sum() + 1e-4


def test_layers_are_trained_with_their_shares_of_the_budget(monkeypatch, tmp_path):
    from trimkv.train import student as room

    model, seen = tiny.build("llama"), []
    gates = new_gates(model, "rg", 8, CONTEXT)
    gates.meta["layer_shares"] = [2.0, 0.5, 0.5, 1.0]

    def attention(q, k, v, log_beta, scaling, budget_B, *rest):
        seen.append(budget_B.tolist())
        return real(q, k, v, log_beta, scaling, budget_B, *rest)

    real = room.soft_eviction_attention
    monkeypatch.setattr(room, "soft_eviction_attention", attention)
    train(model, Samples(), settings(stage="eviction", steps=1, checkpointing=False), tmp_path, gates)
    drawn = torch.tensor(seen[3])
    assert len(seen) == 4 and (3 <= drawn).all() and (drawn <= 12).all()
    for share, budget in zip((2.0, 0.5, 0.5, 1.0), seen, strict=True):
        torch.testing.assert_close(torch.tensor(budget), drawn * share)
    assert json.loads((tmp_path / "gates.json").read_text())["layer_shares"] == [2.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("stage", ["decay", "eviction"])
def test_training_lowers_the_loss_and_writes_a_gate_set(stage, tmp_path):
    model = tiny.build("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = train(model, Samples(), settings(stage=stage, steps=30), tmp_path, meta={"data": "random tokens"})
    first = sum(entry["loss"] for entry in result["history"][:5])
    assert sum(entry["loss"] for entry in result["history"][-5:]) < first
    assert result["steps"] == 30 and result["tokens"] == 30 * 2 * CONTEXT
    meta = json.loads((tmp_path / "gates.json").read_text())
    assert meta["steps"] == 30 and meta["trained_budget"] == 4 and meta["data"] == "random tokens"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    assert model.config._attn_implementation == "eager" and not model.is_gradient_checkpointing
    cache = trimkv.bounded_cache(model, "trimkv", 8)
    trained = model(tiny.tokens(1, 40), past_key_values=cache).logits
    other = trimkv.attach(tiny.build("llama"), tmp_path)
    cache = trimkv.bounded_cache(other, "trimkv", 8)
    torch.testing.assert_close(other(tiny.tokens(1, 40), past_key_values=cache).logits, trained)
    assert cache.held_tokens == 8


@pytest.mark.parametrize("stage", ["decay", "eviction"])
def test_a_killed_run_resumes_to_the_same_losses(stage, tmp_path):
    config = settings(stage=stage, steps=8, save_steps=4, accumulation=2)
    whole = train(tiny.build("llama"), Samples(), config, tmp_path / "whole")

    class Kill(Exception):
        pass

    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise Kill

    with pytest.raises(Kill):
        train(tiny.build("llama"), Samples(), config, tmp_path / "killed", callbacks=[Killer()])
    resumed = train(tiny.build("llama"), Samples(), config, tmp_path / "killed", resume=True)
    assert [entry["step"] for entry in resumed["history"]] == [5, 6, 7, 8]
    for ours, theirs in zip(resumed["history"], whole["history"][4:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    held = {path.name for path in (tmp_path / "whole" / "checkpoint-8").iterdir()}
    assert "gates.safetensors" in held and "model.safetensors" not in held


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        train(tiny.build("llama"), Samples(), settings(), tmp_path, resume=True)
