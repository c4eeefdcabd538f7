"""What users of the released package 0.1.5 type: it works, or fails in one line that says what to use."""

import importlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
import trimkv
from trimkv import embedded
from trimkv.cache_utils import DynamicBudgetTrimKVCache, PagedTrimKVCache, TrimKVCache
from trimkv.gates.attach import new_gates
from trimkv.models.llama import TrimKVLlamaForCausalLM
from trimkv.models.qwen2 import TrimKVQwen2ForCausalLM
from trimkv.models.qwen3 import TrimKVQwen3ForCausalLM

IDS = tiny.tokens(1, 40)
# What the Quick Start gives PagedTrimKVCache; it says to swap in the other class for TrimKV gates.
QUICK_START = {
    "num_layers": 4,
    "num_heads": 2,
    "max_seq_len": 32768,
    "memory_size": 12,
    "num_blocks_ratio": 1.0,
    "buffer_size": 3,
    "strategy": "fixed_budget",
    "device": "cuda",
}


def generate(model, cache=None, ids=IDS, new=30, **options):
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, **options}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


@pytest.fixture
def model(publish):
    return TrimKVQwen3ForCausalLM.from_pretrained(publish("qwen3"), download_from="local")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# The cache.


def test_positional_arguments_are_those_of_the_released_class(model):
    cache = TrimKVCache(32768, 12, 3, 4, "fixed_budget", 1, "cuda")
    generate(model, cache)
    assert cache.peak_decode_tokens == 15 and cache.layers[0].budget.recent == 4
    cache = TrimKVCache(32768)
    generate(model, cache)
    assert cache.peak_decode_tokens == 20, "the config's 16 and 4"


def test_memory_size_alone_evicts_after_every_token(model):
    """The released buffer is then 1, whatever the config says."""
    cache = TrimKVCache(memory_size=12)
    generate(model, cache)
    assert cache.peak_decode_tokens == 13 and cache.held_tokens == 12


def test_arguments_of_the_quick_start(model):
    cache = TrimKVCache(**QUICK_START)
    generate(model, cache)
    assert cache.peak_decode_tokens == 15
    TrimKVCache(memory_size=12, lookahead_steps=1, min_tokens_per_head=0, alpha_threshold=None, block_size=256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lookahead_steps": 2}, "lookahead_steps must be 1, the next query, got 2"),
        ({"budget": 16}, "has no argument budget; it takes max_seq_len, memory_size, buffer_size"),
        ({"strategy": "threshold"}, "strategy must be alpha or knorm_alpha, got 'threshold'"),
        ({"max_seq_len": "long"}, "max_seq_len must be a number of tokens, got str"),
        ({"memory_size": 0}, "at least 1"),
        ({"memory_size": 8, "sliding_window_size": 8}, "leave no room"),
        ({"memory_size": 8, "buffer_size": -1}, "not be negative"),
    ],
)
def test_arguments_that_this_cache_does_not_have(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        TrimKVCache(**arguments)
    one_line(error)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: PagedTrimKVCache(**QUICK_START),
        lambda: PagedTrimKVCache(4, 2, 32768, 12),
        lambda: DynamicBudgetTrimKVCache(32768, 12),
        lambda: TrimKVCache(memory_size=12, min_tokens_per_head=4),
        lambda: TrimKVCache(memory_size=12, alpha_threshold=0.01),
    ],
)
def test_what_a_refusal_says_to_use_works(model, refused):
    with pytest.raises(ValueError, match="trimkv.bounded_cache") as error:
        refused()
    advice = one_line(error)
    cache = eval(advice[advice.index("trimkv.bounded_cache(") :], {"trimkv": trimkv, "model": model})
    generate(model, cache)
    assert cache.peak_mean_tokens <= 12 and cache.layers[0].budget.tokens == 12


def test_what_a_cache_is_asked_in_published_scripts(model):
    cache = TrimKVCache(memory_size=12, buffer_size=3)
    assert cache.get_total_cached_tokens() == 0 and cache.log() == {}
    generate(model, cache)
    assert cache.get_total_cached_tokens(2) == 4 * 2 * cache.get_cache_length()
    log = cache.log(1)
    assert log["seen_tokens"] == 69 and cache.log().keys() == {0, 1, 2, 3}
    assert log["kv_positions"].shape == (1, 2, cache.get_cache_length(1))
    assert (log["kv_positions"].diff() > 0).all() and 0 <= log["kv_positions"].min() and log["kv_positions"].max() < 69


def test_the_log_of_rows_of_unequal_length(model):
    ids, mask = tiny.left_padded([0, 34], 40)
    cache = TrimKVCache(memory_size=12, buffer_size=3)
    model(ids, attention_mask=mask, past_key_values=cache)
    positions = cache.log(0)["kv_positions"]
    assert positions.shape == (2, 2, 12) and (positions[1, :, :6] == -1).all()
    assert positions[1, :, 6:].tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("name, hint", [("key_cache", "store.k"), ("compress", "by itself"), ("kv_positions", "log()")])
def test_attributes_that_are_elsewhere(name, hint):
    with pytest.raises(AttributeError, match=f"TrimKVCache has no attribute '{name}'; use ") as error:
        getattr(TrimKVCache(), name)
    assert hint in one_line(error)


# Import lines.


def test_imports_of_the_released_package():
    assert trimkv.TrimKVCache is TrimKVCache and trimkv.TrimKVQwen3ForCausalLM is TrimKVQwen3ForCausalLM
    from trimkv.models import TrimKVLlamaForCausalLM as llama
    from trimkv.models import TrimKVPhi3ForCausalLM, TrimKVQwen2ForCausalLM  # noqa: F401

    assert llama is TrimKVLlamaForCausalLM


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "kind, instead", [("Config", "transformers."), ("Model", ".model"), ("PreTrainedModel", "tran")]
)
def test_companions_name_the_stock_class(family, kind, instead):
    with pytest.raises(ImportError, match=f"has no TrimKV{family}{kind}: use .*{instead}") as error:
        exec(f"from trimkv.models.{family.lower()} import TrimKV{family}{kind}")
    one_line(error)


@pytest.mark.parametrize("module", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_vision_models_say_what_to_use(module):
    with pytest.raises(ImportError, match=f"trimkv.models.{module} is not supported: .*trimkv.attach") as error:
        importlib.import_module(f"trimkv.models.{module}")
    one_line(error)


# Loading.


def test_qwen2_and_settings_of_the_released_config(publish):
    folder = publish("qwen2", global_capacity=False, compress_strategy=..., compress_memory=..., buffer_size=...)
    model = TrimKVQwen2ForCausalLM.from_pretrained(folder, download_from="local", tie_retention_gate_layers=False)
    assert model.config.global_capacity is False and model.config.tie_retention_gate_layers is False
    cache = TrimKVCache(memory_size=12, device="cpu")
    generate(model, cache)
    assert cache.held_tokens == 12


def test_gates_of_dbtrimkv_checkpoints_are_named(publish):
    folder = publish("qwen3", retention_gate="rg10")
    with pytest.raises(ValueError, match="gates of kind rg10 are not supported .*known kinds: rg, rg2, rg3") as error:
        TrimKVQwen3ForCausalLM.from_pretrained(folder, download_from="local")
    one_line(error)


def test_training_by_the_forward_pass_is_refused(model):
    with pytest.raises(ValueError, match="trimkv train"):
        model(IDS, labels=IDS, base_logits=torch.zeros(1, 40, 128))


def test_a_model_built_from_a_config_is_the_stock_model():
    stock = tiny.build("qwen3")
    model = TrimKVQwen3ForCausalLM(stock.config).eval()
    model.load_state_dict(stock.state_dict())
    assert torch.equal(generate(model), generate(stock))


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(publish, model, place):
    placed = TrimKVQwen3ForCausalLM.from_pretrained(model.config.base_model + "/../gates", device_map=place)
    assert {p.device.type for p in placed.parameters()} == {"cpu"}
    assert torch.equal(generate(placed, TrimKVCache()), generate(model, TrimKVCache()))


def test_turns_of_padded_rows_equal_their_single_runs(model):
    ids, mask = tiny.left_padded([0, 25], 40)
    more = tiny.tokens(2, 8, seed=5)

    def talk(ids, mask, more):
        cache = TrimKVCache()
        first = generate(model, cache, ids, new=12, attention_mask=mask)
        ids = torch.cat([first, more], 1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        return generate(model, cache, ids, new=12, attention_mask=mask)[:, first.shape[1] - 12 :]

    both = talk(ids, mask, more)
    for row, pads in enumerate((0, 25)):
        alone = talk(ids[row : row + 1, pads:], mask[row : row + 1, pads:], more[row : row + 1])
        assert torch.equal(both[row], alone[0])


# Gates in our layout.


@pytest.fixture
def our_folder(tmp_path):
    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    gates = new_gates(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "rg2", intermediate_size=16)
    return trimkv.save_gates(gates, tmp_path / "gates", trained_budget=32)


def test_gates_in_our_layout_load_under_the_published_names(our_folder):
    model = TrimKVLlamaForCausalLM.from_pretrained(our_folder, download_from="local", memory_size=12, buffer_size=3)
    config = model.config
    assert config.base_model == str(our_folder.parent / "base") and config.retention_gate == "rg2"
    assert config.retention_gate_intermediate_size == 16 and config.compress_strategy == "alpha"
    cache = TrimKVCache()
    text = generate(model, cache)
    assert cache.peak_decode_tokens == 15
    stock = trimkv.attach(AutoModelForCausalLM.from_pretrained(our_folder.parent / "base"), our_folder)
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    model.save_pretrained(our_folder.parent / "saved")
    again = TrimKVLlamaForCausalLM.from_pretrained(our_folder.parent / "saved", download_from="local")
    assert torch.equal(generate(again), text)
    fresh = TrimKVLlamaForCausalLM.from_pretrained(our_folder, load_trimkv_weights=False, retention_gate_bias_init=5.0)
    assert fresh.model.layers[0].self_attn.retention_gate.kind == "rg2"
    assert fresh.model.layers[0].self_attn.retention_gate.bias.tolist() == [5, 5]


def rewrite(folder, **changes):
    path = folder / "gates.json"
    meta = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def test_a_base_model_that_is_missing_or_another_is_named(our_folder):
    load = TrimKVLlamaForCausalLM.from_pretrained
    base = str(our_folder.parent / "base")
    for changes, cls, message in (
        ({"base_model": None}, TrimKVLlamaForCausalLM, r"gates.json names no base_model: add it, or .*trimkv.attach"),
        ({"base_model": "./no"}, TrimKVLlamaForCausalLM, r"base_model ./no, named in .*gates.json, is no folder here"),
        ({"base_model": "some/model"}, TrimKVLlamaForCausalLM, "base model some/model, named in .* could not be read"),
        ({"base_model": base}, TrimKVQwen3ForCausalLM, "is for a llama model, TrimKVQwen3ForCausalLM is for qwen3"),
    ):
        rewrite(our_folder, **changes)
        with pytest.raises(ValueError, match=message) as error:
            cls.from_pretrained(our_folder, download_from="local")
        one_line(error)
    rewrite(our_folder, base_model="../base")
    load(our_folder, download_from="local")


def test_the_default_model_may_be_the_base(our_folder, monkeypatch):
    """`trimkv train` without --model writes gates for it."""
    rewrite(our_folder, base_model="smollm2")
    monkeypatch.setattr(embedded, "is_cached", lambda: False)
    with pytest.raises(ValueError, match="smollm2 is not on this machine yet; leave out download_from='local'"):
        TrimKVLlamaForCausalLM.from_pretrained(our_folder, download_from="local")
    monkeypatch.setattr(embedded, "fetch", lambda: our_folder.parent / "base")
    model = TrimKVLlamaForCausalLM.from_pretrained(our_folder)
    assert model.config.base_model == str(our_folder.parent / "base")

    def fail():
        raise embedded.FetchError("cannot fetch smollm2: check the network")

    monkeypatch.setattr(embedded, "fetch", fail)
    with pytest.raises(ValueError, match="cannot fetch smollm2: check the network"):
        TrimKVLlamaForCausalLM.from_pretrained(our_folder)
