"""Multimodal checkpoints: text works as it does without an image; images work where attention is causal."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import tiny
import trimkv
from tiny import BASE, HALF_SLIDING, generate
from trimkv.gates.attach import new_gates
from trimkv.hf.calls import with_cache
from trimkv.hf.model import decoder_of

pytestmark = pytest.mark.smoke

TEXT = {**BASE, "head_dim": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
MARKS = {"image_token_id": 120, "video_token_id": 121}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
LINEAR = {name: size for name, size in tiny.MODELS["qwen3_next"].items() if name.startswith("linear")}
GLM = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
CONFIGS = {
    "gemma3": {
        "text_config": {**TEXT, **HALF_SLIDING},
        "vision_config": {**SIGLIP, "image_size": 28, "patch_size": 14},
        "image_token_index": 120,
        "boi_token_index": 121,
        "eoi_token_index": 122,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {"text_config": {**TEXT, **tiny.MODELS["gemma4_text"]}, "vision_config": None, "audio_config": None},
    "qwen2_5_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {**VISION, "window_size": 16, "fullatt_block_indexes": [0]},
        "vision_start_token_id": 122,
        "vision_end_token_id": 123,
        **MARKS,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "vision_start_token_id": 122,
        "vision_end_token_id": 123,
        **MARKS,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR, **MROPE},
        "vision_config": {**VISION, "num_position_embeddings": 16},
        **MARKS,
    },
    "glm4v": {
        "text_config": {**TEXT, "rope_parameters": GLM},
        "vision_config": {**VISION, "image_size": 16},
        **MARKS,
    },
}
CAUSAL = ("gemma3", "gemma4", "qwen3_5")  # that AutoModelForCausalLM takes


def build(name: str, auto=AutoModelForImageTextToText):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in part:
                parameter.mul_(4.0)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_text_alone_is_what_the_stock_cache_gives(name):
    for auto in [AutoModelForImageTextToText] + [AutoModelForCausalLM] * (name in CAUSAL):
        model = build(name, auto)
        ids, mask = tiny.left_padded([7, 0], 26)
        ids = ids.clamp_max(110)
        stock, logits = generate(model, ids, mask=mask, new=8)
        for policy, chunk in (("streaming_llm", 512), ("streaming_llm", 7), ("expected_attention", 512), ("h2o", 8)):
            cache = trimkv.bounded_cache(model, policy, 64, chunk=chunk)
            text, ours = generate(model, ids, cache, mask=mask, new=8)
            assert torch.equal(text, stock), (policy, chunk)
            torch.testing.assert_close(ours, logits, atol=2e-4, rtol=1e-3)
        small = trimkv.bounded_cache(model, "streaming_llm", 12, chunk=8)
        generate(model, ids, small, mask=mask, new=8)
        assert small.peak_decode_tokens == 12
        trimkv.detach(model)
        assert torch.equal(generate(model, ids, mask=mask, new=8)[0], stock)
        assert not decoder_of(model)._forward_pre_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_gates_serve_the_text_decoder_of_a_multimodal_model(name):
    model = build(name)
    ids = tiny.tokens(1, 20).clamp_max(110)
    stock = generate(model, ids, new=8)[0]
    trimkv.attach(model, new_gates(model, intermediate_size=8))
    assert torch.equal(generate(model, ids, trimkv.bounded_cache(model, "trimkv", 64), new=8)[0], stock)


def with_image(name: str) -> dict:
    """A prompt with an image in it, as keyword arguments."""
    generator = torch.Generator().manual_seed(3)
    before, after = tiny.tokens(1, 5).clamp_max(110), tiny.tokens(1, 6, seed=1).clamp_max(110)
    image = torch.full((1, 4), 120)
    if name == "gemma3":
        ids = torch.cat([before, image, after], 1)
        pixels = {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    else:
        ids = torch.cat([before, torch.tensor([[122]]), image, torch.tensor([[123]]), after], 1)
        grid = torch.tensor([[1, 4, 4]])
        pixels = {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator), "image_grid_thw": grid}
    kinds = (ids == 120).long()
    types = {"token_type_ids": kinds} if name == "gemma3" else {"mm_token_type_ids": kinds}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **types}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_images_work_where_attention_is_causal(name):
    model = build(name)
    inputs = with_image(name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(**inputs, **options)
    for chunk in (512, 6):
        cache = trimkv.bounded_cache(model, "streaming_llm", 64, chunk=chunk)
        assert torch.equal(model.generate(**inputs, **options, **with_cache(model, cache)), stock)
    with pytest.raises(ValueError, match="policy expected_attention turns keys by their number"):
        model.generate(**inputs, **options, **with_cache(model, trimkv.bounded_cache(model, "expected_attention", 64)))


def test_images_that_attend_both_ways_are_refused_in_one_line():
    model = build("gemma3")
    with pytest.raises(ValueError, match="tokens attend to later ones, as within an image.*give it text") as error:
        model(**with_image("gemma3"), **with_cache(model, trimkv.bounded_cache(model, "streaming_llm", 64)))
    assert "\n" not in str(error.value)
