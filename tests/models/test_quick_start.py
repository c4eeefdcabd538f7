"""The published Quick Start, word for word, on tiny models and without a network."""

import json
import logging
import os
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import tiny
from trimkv.cache_utils import TrimKVCache
from trimkv.gates.files import load_gates
from trimkv.models.llama import TrimKVLlamaForCausalLM
from trimkv.models.phi3 import TrimKVPhi3ForCausalLM
from trimkv.models.qwen3 import TrimKVQwen3ForCausalLM

pytestmark = pytest.mark.smoke

CLASSES = {"qwen3": TrimKVQwen3ForCausalLM, "llama": TrimKVLlamaForCausalLM, "phi3": TrimKVPhi3ForCausalLM}
IDS = tiny.tokens(1, 40)


def generate(model, cache=None, new=30, **options):
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, **options}
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, **options)


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)


def edit(folder, **settings):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_word_for_word(publish, name):
    model_path = publish(name)
    write_tokenizer(model_path.parent / "base")
    download_from = "huggingface"

    model = CLASSES[name].from_pretrained(
        model_path,
        torch_dtype=torch.bfloat16,
        load_trimkv_weights=True,
        download_from=download_from,
        use_cache=True,
        device_map="cpu",
    )
    model.config._attn_implementation = "flash_attention_2"
    model.config.compress_memory = True
    model.config.memory_size = 12
    model.config.buffer_size = 6
    tokenizer = AutoTokenizer.from_pretrained(model.config.base_model, use_fast=True, padding_side="left")
    inputs = tokenizer(["w5 w6 w7 " * 10, "w9 w8"], return_tensors="pt", padding=True, return_token_type_ids=False)
    cache = TrimKVCache()
    with_cache = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    without = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)

    assert torch.equal(with_cache, without)
    assert cache.get_seq_length() == 49 and cache.peak_decode_tokens == 18
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len([n for n, _ in model.named_parameters() if ".self_attn.retention_gate." in n]) == 16


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "float16"])
def test_both_names_of_dtype_are_honoured(publish, name, argument, dtype):
    model = CLASSES[name].from_pretrained(publish(name), download_from="local", **{argument: dtype})
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {expected} and model.dtype == expected
    assert model.model.layers[0].self_attn.retention_gate.bias.dtype == expected


def test_defaults_where_the_config_says_nothing(publish, name):
    left_out = ("memory_size", "buffer_size", "compress_memory", "compress_strategy", "retention_gate")
    folder = publish(name, **dict.fromkeys(left_out, ...))
    config = CLASSES[name].from_pretrained(folder, download_from="local").config
    memory, buffer, compress = {"qwen3": (1024, 128, True), "llama": (2048, 1, True), "phi3": (1024, 1, False)}[name]
    assert (config.memory_size, config.buffer_size, config.compress_memory) == (memory, buffer, compress)
    assert (config.compress_strategy, config.retention_gate) == ("alpha", "rg")
    assert config.trainable_params == "self_attn.retention_gate"


def test_settings_among_the_arguments_go_into_the_config(publish):
    model = TrimKVLlamaForCausalLM.from_pretrained(
        publish("llama"), download_from="local", memory_size=9, compress_strategy="knorm_alpha", use_cache=False
    )
    assert (model.config.memory_size, model.config.compress_strategy, model.config.use_cache) == (
        9,
        "knorm_alpha",
        False,
    )
    cache = TrimKVCache()
    generate(model, cache)
    assert cache.peak_decode_tokens == 9 + 4 and cache.layers[0].policy.strategy == "knorm_alpha"


def test_a_config_left_over_from_training_still_generates(publish):
    """Published configs say use_cache false, from gradient checkpointing."""
    model = TrimKVQwen3ForCausalLM.from_pretrained(publish("qwen3", use_cache=False), download_from="local")
    cache = TrimKVCache()
    assert torch.equal(generate(model, cache), generate(model))
    assert cache.get_seq_length() == 69 and cache.held_tokens < 20


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_budget_for_everything_equals_the_stock_model(publish, name, attention):
    folder = publish(name, memory_size=100)
    stock = AutoModelForCausalLM.from_pretrained(folder.parent / "base", attn_implementation=attention)
    model = CLASSES[name].from_pretrained(folder, download_from="local", attn_implementation=attention)
    expected = generate(stock)
    assert torch.equal(generate(model, TrimKVCache()), expected)
    assert torch.equal(generate(model), expected)
    model.config.compress_memory = False
    assert torch.equal(generate(model, TrimKVCache()), expected)
    assert torch.equal(generate(model), expected)


def test_flash_attention_is_replaced_and_said_so_once(publish, caplog):
    folder = publish("llama")
    expected = generate(TrimKVLlamaForCausalLM.from_pretrained(folder, download_from="local"))
    with caplog.at_level(logging.WARNING, "trimkv"):
        for _ in range(2):
            model = TrimKVLlamaForCausalLM.from_pretrained(
                folder, download_from="local", attn_implementation="flash_attention_2"
            )
    assert [r.message for r in caplog.records if "flash_attention_2" in r.message] == [
        "attn_implementation='flash_attention_2' is not used: attention over slots takes its place"
    ]
    assert torch.equal(generate(model), expected)


def test_settings_are_read_at_the_first_forward(publish):
    model = TrimKVQwen3ForCausalLM.from_pretrained(publish("qwen3"), download_from="local")
    cache = TrimKVCache()
    assert (cache.get_seq_length(), cache.get_cache_length(), cache.held_tokens) == (0, 0, 0)
    model.config.memory_size, model.config.buffer_size = 10, 2
    generate(model, cache)
    assert cache.peak_decode_tokens == 12
    model.config.memory_size = 20
    cache.reset()
    generate(model, cache)
    assert cache.peak_decode_tokens == 22 and cache.get_seq_length() == 69


def test_settings_of_the_cache_replace_those_of_the_config(publish):
    model = TrimKVPhi3ForCausalLM.from_pretrained(publish("phi3", compress_memory=False), download_from="local")
    cache = TrimKVCache(memory_size=12, buffer_size=3, sliding_window_size=4, strategy="knorm_alpha", device="cuda")
    generate(model, cache)
    layer = cache.layers[0]
    assert cache.peak_decode_tokens == 15 and layer.budget.recent == 4 and layer.policy.strategy == "knorm_alpha"
    cache = TrimKVCache(memory_size=12, strategy="fixed_budget", max_seq_len=4096)
    generate(model, cache)
    assert cache.layers[0].policy.strategy == "alpha"
    cache = TrimKVCache()
    generate(model, cache)
    assert cache.held_tokens == 69, "compress_memory is off: every token stays"


def test_the_cache_that_generate_makes(publish):
    model = TrimKVQwen3ForCausalLM.from_pretrained(publish("qwen3"), download_from="local")
    options = {"return_dict_in_generate": True}
    cache = generate(model, **options).past_key_values
    assert isinstance(cache, TrimKVCache) and cache.peak_decode_tokens == 20
    assert type(generate(model, cache_implementation="dynamic", **options).past_key_values) is DynamicCache
    assert generate(model, use_cache=False, **options).past_key_values is None
    model.config.compress_memory = False
    assert type(generate(model, **options).past_key_values) is DynamicCache


def test_beams_and_several_answers(publish):
    folder = publish("llama", memory_size=100)
    model = TrimKVLlamaForCausalLM.from_pretrained(folder, download_from="local")
    stock = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, TrimKVCache(), **options), generate(stock, **options))
    model.config.memory_size = 10
    assert torch.equal(generate(model, TrimKVCache(), **options), generate(model, **options))


def test_assisted_decoding_is_refused(publish):
    model = TrimKVLlamaForCausalLM.from_pretrained(publish("llama"), download_from="local")
    with pytest.raises(ValueError, match="use plain decoding"):
        generate(model, prompt_lookup_num_tokens=3)


def test_fresh_gates_start_from_the_configured_bias(publish):
    folder = publish("phi3", retention_gate_bias_init=6.5, retention_gate_intermediate_size=20)
    (folder / "trimkv_weights.pth").unlink()
    with pytest.raises(ValueError, match="no gates in .*load_trimkv_weights=False"):
        TrimKVPhi3ForCausalLM.from_pretrained(folder, download_from="local")
    model = TrimKVPhi3ForCausalLM.from_pretrained(folder, load_trimkv_weights=False, download_from="local")
    gate = model.model.layers[0].self_attn.retention_gate
    assert gate.bias.tolist() == [6.5, 6.5] and gate.linear1.weight.shape == (20, 64)
    assert not gate.linear1.bias.any() and 0.015 < gate.linear1.weight.std() < 0.025
    generate(model)


def test_a_plain_checkpoint_needs_no_gates_only_when_told_so(publish):
    base = publish("qwen3").parent / "base"
    with pytest.raises(ValueError, match="no gates in .*load_trimkv_weights=False"):
        TrimKVQwen3ForCausalLM.from_pretrained(base)
    model = TrimKVQwen3ForCausalLM.from_pretrained(base, load_trimkv_weights=False)
    assert model.config.base_model == str(base) and model.config.retention_gate_bias_init == 10
    assert model.model.layers[3].self_attn.retention_gate.bias.tolist() == [10, 10]


# Where things lie.


def test_base_model_may_be_relative_or_left_out(publish, monkeypatch, tmp_path):
    folder = publish("llama", base_model="../base")
    expected = generate(TrimKVLlamaForCausalLM.from_pretrained(folder, download_from="local"))
    monkeypatch.chdir(tmp_path)
    edit(folder, base_model="base")  # as seen from the working directory
    model = TrimKVLlamaForCausalLM.from_pretrained("gates")
    assert torch.equal(generate(model), expected) and model.config.base_model == str(tmp_path / "base")
    edit(folder, base_model=...)
    os.rename(tmp_path / "base" / "model.safetensors", folder / "model.safetensors")
    assert torch.equal(generate(TrimKVLlamaForCausalLM.from_pretrained(folder, download_from="local")), expected)


def test_missing_places_are_named(publish, tmp_path):
    load = TrimKVQwen3ForCausalLM.from_pretrained
    folder = publish("qwen3")
    with pytest.raises(ValueError, match="must be one of huggingface, local, wandb, got 'ftp'"):
        load(folder, download_from="ftp")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere", download_from="local")
    with pytest.raises(ValueError, match="some/repo is no folder here and could not be fetched"):
        load("some/repo", local_files_only=True)
    with pytest.raises(ValueError, match="nowhere: no such folder, and no name"):
        load(tmp_path / "nowhere")
    edit(folder, base_model="./nothing")
    with pytest.raises(ValueError, match=r"base_model ./nothing, named in .*config.json, is no folder"):
        load(folder)
    edit(folder, base_model="some/model")
    with pytest.raises(ValueError, match="base weights some/model of .*download_from='local' uses no network"):
        load(folder, download_from="local")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="gates has no readable config.json"):
        load(folder)


def test_a_repository_on_the_hub(publish, monkeypatch):
    folder, asked = publish("qwen3"), {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = TrimKVQwen3ForCausalLM.from_pretrained("a/gates", download_from="huggingface", revision="main", token="t")
    assert (asked["repo"], asked["revision"], asked["token"]) == ("a/gates", "main", "t")
    assert model.config.base_model == str(folder.parent / "base")


def test_wandb_is_imported_only_when_asked_for(publish, monkeypatch):
    folder = publish("qwen3")
    monkeypatch.setitem(sys.modules, "wandb", None)
    TrimKVQwen3ForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="pip install wandb"):
        TrimKVQwen3ForCausalLM.from_pretrained("team/project/gates:v3", download_from="wandb")
    artifact = types.SimpleNamespace(download=lambda: str(folder))
    api = types.SimpleNamespace(artifact=lambda name, type: artifact)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=lambda: api))
    model = TrimKVQwen3ForCausalLM.from_pretrained("team/project/gates:v3", download_from="wandb")
    assert model.config.base_model == str(folder.parent / "base")


# What does not fit.


def test_a_checkpoint_that_holds_code_is_refused(publish, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = publish("llama")
    torch.save({"model.layers.0.self_attn.retention_gate.bias": Code()}, folder / "trimkv_weights.pth")
    with pytest.raises(ValueError, match="holds code, not only tensors; it was not loaded"):
        TrimKVLlamaForCausalLM.from_pretrained(folder, download_from="local")
    assert not (tmp_path / "executed").exists()


def test_gates_of_another_model_are_refused_and_both_named(publish):
    folder = publish("llama")
    path, load = folder / "trimkv_weights.pth", TrimKVLlamaForCausalLM.from_pretrained
    good = torch.load(path, weights_only=True)
    torch.save({key: tensor for key, tensor in good.items() if ".layers.3." not in key}, path)
    with pytest.raises(ValueError, match=r"gates in .*gates .*layers 0\.\.2 \(3\), .*base has .*0\.\.3 \(4\)"):
        load(folder, download_from="local")
    torch.save({k: torch.zeros(3) if k.endswith("gate.bias") else v for k, v in good.items()}, path)
    with pytest.raises(ValueError, match=r"do not fit .*base: layer 0 bias is \[3\], the model needs \[2\]"):
        load(folder, download_from="local")
    torch.save({k.replace("linear2", "linear3"): v for k, v in good.items()}, path)
    with pytest.raises(ValueError, match="belong to no known gate"):
        load(folder, download_from="local")
    torch.save(good, path)
    with pytest.raises(ValueError, match="is for a llama model, TrimKVQwen3ForCausalLM is for qwen3"):
        TrimKVQwen3ForCausalLM.from_pretrained(folder, download_from="local")


def test_settings_that_mean_nothing_are_refused(publish):
    folder = publish("llama", compress_strategy="layer_wise_alpha")
    load = TrimKVLlamaForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="compress_strategy must be alpha or knorm_alpha, got 'layer_wise_alpha'"):
        load(folder, download_from="local")
    with pytest.raises(ValueError, match="skip_layers=2 is not supported"):
        load(folder, download_from="local", compress_strategy="alpha", skip_layers=2)
    model = load(folder, download_from="local", compress_strategy="alpha")
    for field, value, message in (
        ("compress_strategy", "alpha_threshold", "alpha or knorm_alpha"),
        ("memory_size", 0, "at least 1"),
        ("memory_size", 0.5, "whole number"),
        ("buffer_size", -1, "not be negative"),
    ):
        before = getattr(model.config, field)
        setattr(model.config, field, value)
        for cache in (TrimKVCache(), None):
            with pytest.raises(ValueError, match=message):
                generate(model, cache)
        setattr(model.config, field, before)
    generate(model)


def test_the_cache_says_so_when_a_model_cannot_use_it(publish):
    stock = AutoModelForCausalLM.from_pretrained(publish("qwen3").parent / "base")
    with pytest.raises(ValueError, match="trimkv.bounded_cache"):
        generate(stock, TrimKVCache())


def test_save_and_load_again(publish, name, tmp_path):
    folder = publish(name)
    model = CLASSES[name].from_pretrained(folder, download_from="local", dtype=torch.bfloat16, memory_size=11)
    model.save_pretrained(tmp_path / "saved")
    again = CLASSES[name].from_pretrained(tmp_path / "saved", download_from="local")
    assert again.dtype == torch.bfloat16 and again.config.memory_size == 11
    assert again.config.base_model == str(tmp_path / "saved")
    assert torch.equal(generate(again), generate(model))
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert stock.config.architectures == [type(stock).__name__]
    assert len(load_gates(tmp_path / "saved").layers) == 4
