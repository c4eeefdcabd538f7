"""What random models cannot show, on the default model: equal text, sinks that matter, a bounded long prompt."""

import os
from pathlib import Path

import pytest
import torch

import trimkv
from trimkv import embedded

QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea, and one about the mountains."]


@pytest.fixture(scope="module")
def smollm2():
    if os.environ.get("TRIMKV_TEST_DOWNLOAD") == "0" and not embedded.is_cached():
        pytest.skip("the default model is not in the cache folder and TRIMKV_TEST_DOWNLOAD=0")
    try:
        folder = embedded.resolve(embedded.ALIAS)
    except embedded.FetchError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def chat(tokenizer, questions):
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    tokenizer.padding_side = "left"
    return tokenizer(texts, return_tensors="pt", padding=True)


def test_a_large_budget_gives_the_stock_answer_in_a_padded_batch(smollm2):
    model, tokenizer = smollm2
    inputs = chat(tokenizer, QUESTIONS)
    assert (inputs.attention_mask == 0).any()
    options = {"max_new_tokens": 16, "do_sample": False}
    stock = model.generate(**inputs, **options)
    for policy, chunk in (("streaming_llm", 512), ("random", 16)):
        cache = trimkv.bounded_cache(model, policy, 96, chunk=chunk)
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), stock)
    assert "Paris" in tokenizer.decode(stock[0])


def test_a_prompt_longer_than_the_budget_is_bounded_and_its_end_is_answered(smollm2):
    model, tokenizer = smollm2
    text = "The ferry left the harbour in the rain. " * 120
    inputs = chat(tokenizer, [text + "\nWhat is the capital of France? Answer in one word."])
    cache = trimkv.bounded_cache(model, "streaming_llm", 128, chunk=256)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert inputs.input_ids.shape[1] > 1000
    assert (cache.peak_prefill_tokens, cache.peak_decode_tokens) == (384, 128)
    assert "Paris" in tokenizer.decode(out[0, inputs.input_ids.shape[1] :])


def test_without_sinks_a_trained_model_breaks(smollm2):
    """Attention sinks (arXiv 2309.17453): losing four tokens of 64 multiplies the loss."""
    model, tokenizer = smollm2
    text = "A fisherman mends his nets before dawn, drinks his tea and looks at the sky. " * 20
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :320]
    loss = {}
    for sinks in (4, 0):
        cache = trimkv.bounded_cache(model, trimkv.cache.policies.make("streaming_llm", sinks=sinks), 64, chunk=32)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache).logits
        loss[sinks] = torch.nn.functional.cross_entropy(logits[0, 128:-1], ids[0, 129:]).item()
    assert loss[0] > 3 * loss[4], loss


def test_bundled_gates_beat_a_sliding_window(smollm2):
    """The gates that ship are for this model, small enough, and better than the best policy without training."""
    from trimkv.eval.compare import compare
    from trimkv.gates import bundled

    model, tokenizer = smollm2
    folder = bundled()["smollm2"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    text = (Path(__file__).parent.parent / "examples" / "demo_prompt.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :640]
    assert ids.shape[1] == 640
    trimkv.attach(model, "bundled")
    try:
        rows = compare(model, ids, ["trimkv", "streaming_llm"], [128]).rows
    finally:
        trimkv.detach(model)
    assert rows[0].kl < 0.6 * rows[1].kl, rows
