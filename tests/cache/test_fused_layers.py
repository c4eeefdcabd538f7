"""Decode steps in which whole layers are a few launches: the stock model's logits, the same tokens kept, and a clear
word where a model has another shape. On the CPU the launches are their references; some run in the interpreter."""

import pytest
import torch

import interpreter
import tiny
import trimkv
from trimkv.cache.fused_layers import NotRecognised, recognise
from trimkv.cache.graph import DecodeStep
from trimkv.gates.attach import new_gates

INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_the_kernels_in_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="runs in the main process")
SHAPE = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "head_dim": 16,
}
GEMMA = {"gemma": {"head_dim": 16, "hidden_act": "silu", "hidden_activation": "silu"}}


def build(name, **changes):
    return tiny.gated(name, **{**SHAPE, **changes})


def kept(cache):
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in layer.store.position.tolist()]
        for layer in cache.slot_layers
    ]


def compare(model, policy="trimkv", budget=12, steps=70, device="cpu", limit=1e-3):
    """Fused steps and stock steps over the same tokens: rows are filled, idle now and then, and cleared."""
    caches = [trimkv.bounded_cache(model, policy, budget, chunk=8, rows=3) for _ in range(2)]
    for row, length in ((0, 5), (1, 30)):
        staged = trimkv.bounded_cache(model, policy, budget, chunk=8)
        trimkv.prefill(model, staged, tiny.tokens(1, length, seed=row).to(device), chunk=8)
        for cache in caches:
            cache.copy_row(staged, 0, row)
    run = [DecodeStep(model, caches[0], fused=True), DecodeStep(model, caches[1])]
    text = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[: 3 * steps].view(steps, 3).to(device)
    for t in range(steps):
        active = torch.tensor([t % 3 != 1, t % 7 != 0, True], device=device)
        got, expect = (step(text[t], active)[active].float() for step in run)
        assert got.isfinite().all() and got.shape == expect.shape
        error = ((got - expect).norm() / expect.norm()).item()
        assert error < limit, (t, error)
        if t == steps // 2:
            for cache in caches:
                cache.clear_rows(0)
        assert kept(caches[0]) == kept(caches[1]), t
    assert not any("forward" in module.__dict__ for module in model.modules()), "the model is as it was"


@not_interpreted
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "mistral", "granite"])
def test_fused_steps_are_stock_steps(name):
    compare(build(name))


@not_interpreted
def test_biases_everywhere():
    compare(build("llama", attention_bias=True, mlp_bias=True))


@not_interpreted
def test_an_output_layer_of_its_own():
    compare(build("qwen3", tie_word_embeddings=True))
    compare(build("qwen3", tie_word_embeddings=False))


@not_interpreted
@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "keydiff", "full"])
def test_every_kind_of_policy(policy):
    """Without gates, with a look at attention, with a look at keys."""
    compare(build("qwen3"), policy, 250 if policy == "full" else 12)


@not_interpreted
@pytest.mark.parametrize("kind", ["rg2", "rg3"])
def test_gates_that_read_keys_are_called_by_attention(kind):
    model = build("qwen3")
    gates = new_gates(model, kind, intermediate_size=16, training_length=16)
    for parameters in gates.layers.values():
        for name in parameters:
            if name.endswith("weight"):
                parameters[name].mul_(20)
    compare(trimkv.attach(model, gates))


@not_interpreted
def test_gates_put_on_anew_are_the_ones_that_are_used():
    """The weights are read where they lie; nothing of a former set is kept."""
    model = build("qwen3")
    fused = recognise(model)
    trimkv.attach(model, new_gates(model, intermediate_size=24, training_length=16, seed=5))
    assert fused.layers[0].gate is model.model.layers[0].self_attn.retention_gate


@not_interpreted
def test_bf16_differs_by_rounding():
    compare(build("qwen3", num_hidden_layers=2).to(torch.bfloat16), "streaming_llm", limit=0.1)


@not_interpreted
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phi3", "layer 0 consists of .*resid_attn_dropout"),
        ("olmo2", "layer 0 consists of .*post_feedforward_layernorm"),
        ("olmo", "input norm of layer 0 is a OlmoLayerNorm"),
        ("smollm3", "layer 3 computes something else"),  # no rotation there
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock without gate_proj"),
        ("gpt_oss", "GptOssMLP without"),
        ("gemma2", "layer 0 consists of .*pre_feedforward_layernorm"),
        ("gemma", "no RMSNorm whose weight is a plain factor"),  # of the common shape but for 1 + weight
    ],
)
def test_other_shapes_are_refused_in_words(monkeypatch, name, words):
    monkeypatch.setattr(tiny, "MODELS", {**tiny.MODELS, **GEMMA})
    model = tiny.build(name)
    with pytest.raises(NotRecognised, match=words):
        recognise(model)


@not_interpreted
def test_what_looks_right_and_is_not_is_found():
    """A model may scale, replace or listen where no module's name tells."""
    scaled = tiny.build("granite", residual_multiplier=0.5)
    with pytest.raises(NotRecognised, match="computes something else"):
        recognise(scaled)
    gelu = tiny.build("llama", hidden_act="gelu")
    with pytest.raises(NotRecognised, match="computes something else"):
        recognise(gelu)
    partial = tiny.build("llama")
    partial.model.layers[1].mlp.down_proj = torch.nn.Sequential(partial.model.layers[1].mlp.down_proj)
    with pytest.raises(NotRecognised, match="layer 1 has a LlamaMLP"):
        recognise(partial)
    heard = tiny.build("llama")
    heard.model.layers[2].mlp.register_forward_hook(lambda *args: None)
    with pytest.raises(NotRecognised, match="mlp of layer 2 has a forward hook"):
        recognise(heard)
    halves = tiny.build("llama")
    halves.model.layers[1].to(torch.bfloat16)
    with pytest.raises(NotRecognised, match="several dtypes"):
        recognise(halves)
    with pytest.raises(ValueError, match="policy locret reads projections"):
        model = build("llama")
        DecodeStep(model, trimkv.bounded_cache(model, "locret", 12, rows=1), fused=True)


@not_interpreted
def test_recognising_changes_nothing():
    """Neither attention nor random numbers of the user."""
    model = tiny.build("llama")
    before, state = model.config._attn_implementation, torch.random.get_rng_state()
    recognise(model)
    assert model.config._attn_implementation == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)


@interpreted
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_interpreted_fused_steps_are_stock_steps(name):
    """All launches of a layer as kernels."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    compare(tiny.gated(name, num_hidden_layers=2, **sizes), steps=6, budget=4)
