"""What is known of stock models: quantised projections, wrappers, windows that can't be reached, true reasons."""

import pytest
import torch
from torch import nn

import tiny
import trimkv
from tiny import generate
from trimkv.gates.attach import new_gates
from trimkv.hf.calls import cache_argument, cache_in, with_cache
from trimkv.hf.model import attention_modules, compute_device, compute_dtype, decoder_of, key_heads, numbers, value_dim

pytestmark = pytest.mark.smoke


class Packed(nn.Module):
    """A projection that keeps its weight in a buffer of whole numbers, as GPTQ and AWQ do."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.half())

    def forward(self, x):
        return x @ (self.qweight * self.scales.to(x.dtype)).to(x.dtype).T


def packed(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    return model


def eight_bit(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def float8(model):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, fp8.FP8Linear(old.in_features, old.out_features, block_size=(32, 32)))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("quantise", [packed, eight_bit, float8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_and_slots_compute_in_the_dtype_of_the_model(quantise, dtype):
    if quantise is eight_bit and dtype != torch.float32:
        pytest.skip("dynamic int8 is for fp32")
    gates = new_gates(tiny.build("llama"), intermediate_size=16)
    model = quantise(tiny.build("llama").to(dtype))
    trimkv.attach(model, gates)
    gate = model.model.layers[0].self_attn.retention_gate
    assert gate.bias.dtype == gate.linear1.weight.dtype == dtype
    assert gate(torch.randn(1, 3, 64, dtype=dtype)).shape == (1, 2, 3)
    cache = trimkv.bounded_cache(model, "trimkv", 12, rows=2)
    assert {layer.store.k.dtype for layer in cache.slot_layers} == {dtype}
    assert key_heads(model, model.model.layers[0].self_attn) == (2, 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("quantise", [packed, eight_bit])
def test_models_without_parameters_in_their_projections_run(quantise):
    """Also where a module has neither parameters nor buffers; text is that of the stock cache."""
    gates = new_gates(tiny.build("llama"), intermediate_size=16)
    model, ids = quantise(tiny.build("llama")), tiny.tokens(1, 20)
    stock = generate(model, ids)[0]
    trimkv.attach(model, gates)
    for policy in ("streaming_llm", "trimkv"):
        assert torch.equal(generate(model, ids, trimkv.bounded_cache(model, policy, 64))[0], stock)
    with trimkv.Engine(model, "trimkv", 64, rows=2) as engine:
        found = engine.generate([ids[0].tolist()], trimkv.SamplingParams(20, ignore_eos=True))[0]
    assert found.tokens == stock[0, 20:].tolist()


def test_device_and_dtype_come_from_where_the_module_computes():
    model = tiny.build("llama")
    module = model.model.layers[0].self_attn
    assert compute_device(model, module) == torch.device("cpu") and compute_dtype(model) == torch.float32
    module._hf_hook = type("Hook", (), {"execution_device": "meta"})()  # as accelerate's
    assert compute_device(model, module) == torch.device("cpu")
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.to(torch.float8_e4m3fn)
    model.config.dtype = torch.bfloat16
    assert compute_dtype(model) == torch.bfloat16


# Wrappers.


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model is its attribute ``module``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def hooks(model) -> int:
    return len(decoder_of(model)._forward_pre_hooks)


def padded():
    (ids, mask), options = tiny.left_padded([9, 0], 30), {"max_new_tokens": 10, "do_sample": False}
    return {"input_ids": ids, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0, **options}


def test_a_cache_on_an_adapter_then_on_what_is_left_of_it():
    model = adapted(tiny.build("llama"))
    inputs = padded()
    for one in (model, model.base_model, model.base_model.model):
        stock = model.generate(**inputs)
        cache = trimkv.bounded_cache(one, "streaming_llm", 64)
        assert hooks(model) == 1 and torch.equal(model.generate(**inputs, **with_cache(model, cache)), stock)
    merged = model.merge_and_unload()
    stock = merged.generate(**inputs)
    assert torch.equal(
        merged.generate(**inputs, **with_cache(merged, trimkv.bounded_cache(merged, "streaming_llm", 64))), stock
    )
    assert hooks(merged) == 1
    trimkv.detach(merged)
    assert hooks(merged) == 0 and merged.config._attn_implementation == "eager"


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (1, 1)])
def test_detach_from_any_wrapper_leaves_nothing(first, second):
    base = tiny.build("llama")
    names = base, adapted(base)
    gates = new_gates(base, intermediate_size=8)
    trimkv.attach(names[first], gates)
    trimkv.bounded_cache(names[second], "trimkv", 12)
    trimkv.attach(names[second], gates)
    assert hooks(base) == 1
    attention = attention_modules(base)[0]
    assert len(attention._forward_pre_hooks) == 1, "one gate, one hook"
    trimkv.detach(names[first])
    assert hooks(base) == 0 and not attention._forward_pre_hooks and not hasattr(attention, "retention_gate")


def test_a_wrapper_that_only_has_a_module():
    model, ids = tiny.build("llama"), tiny.tokens(1, 20)
    wrapped = Wrapper(model)
    cache = trimkv.bounded_cache(wrapped, "streaming_llm", 12)
    assert torch.equal(wrapped(ids, **with_cache(wrapped, cache)).logits, model(ids).logits)
    assert hooks(model) == 1


# Windows, names, reasons.


@pytest.mark.parametrize("name", ["phi3", "mistral", "starcoder2"])
def test_a_window_that_positions_cannot_reach_is_full_attention(name):
    ids = tiny.tokens(1, 40)
    plain = generate(*(tiny.build(name), ids))
    model = tiny.build(name, sliding_window=2048)  # of a context of 512
    trimkv.attach(model, new_gates(model, intermediate_size=8))
    assert len(trimkv.bounded_cache(model, "trimkv", 16).slot_layers) == 4
    assert torch.equal(generate(model, ids, trimkv.bounded_cache(model, "trimkv", 64))[0], plain[0])
    with trimkv.Engine(model, "streaming_llm", 16, rows=1) as engine:
        assert engine.generate([[3, 4, 5]], trimkv.SamplingParams(2))
    with pytest.raises(ValueError, match="no full-attention layer .sliding window.: nothing to bound"):
        trimkv.bounded_cache(tiny.build(name, sliding_window=8), "streaming_llm", 16)


@pytest.mark.parametrize(
    "name, sizes, reason",
    [
        ("diffllama", {}, "calls attention twice"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "computes its attention in its own code"),
        ("deepseek_v3", {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8}, "multi-head latent attention"),
        ("mamba", {}, "no full-attention layer .linear attention.: nothing to bound"),
        ("gemma3n_text", {"num_kv_shared_layers": 2}, "shares keys and values between layers|KV"),
    ],
)
def test_refusals_give_the_true_reason_when_the_cache_is_made(name, sizes, reason):
    from transformers import AutoConfig, AutoModelForCausalLM

    base = {key: value for key, value in tiny.BASE.items() if not (name == "bloom" and "num_" in key)}
    config = AutoConfig.for_model(name, **{**base, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"can't serve {type(model).__name__}: it .*({reason})") as error:
        trimkv.bounded_cache(model, "streaming_llm", 16)
    assert "\n" not in str(error.value)


def test_the_cache_is_found_whatever_its_name():
    model = tiny.build("llama")
    cache = trimkv.bounded_cache(model, "streaming_llm", 16)
    assert cache_argument(model) in ("cache", "past_key_values")
    for args, kwargs in (
        ((), {"cache": cache}),
        ((), {"past_key_values": cache}),
        ((1, cache), {}),
        ((), {"x": cache}),
    ):
        assert cache_in(args, kwargs) is cache
    assert cache_in((1,), {"cache": None, "use_cache": True}) is None


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_shape_of_attention_is_known_beforehand(name):
    """Heads and dims as told by modules and configuration are those of the keys that arrive."""
    model, shapes = tiny.build(name), {}
    cache = trimkv.bounded_cache(model, "full", 64)
    model(tiny.tokens(1, 5), **with_cache(model, cache))
    modules = attention_modules(model)
    for layer in cache.slot_layers:
        shapes[layer.layer_idx] = layer.store.k.shape[1], layer.store.k.shape[3], layer.store.v.shape[3]
    assert shapes == {i: (*key_heads(model, modules[i]), value_dim(model, modules[i])) for i in shapes}


def test_numbers_are_short():
    assert (numbers([0, 1, 2, 3]), numbers([7, 3]), numbers([1, 2, 5])) == ("0..3", "3, 7", "1, 2, 5")
