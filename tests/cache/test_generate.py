"""What generate and users do with a cache: batches, beams, turns, snapshots, and what is refused."""

import pytest
import torch

import tiny
import trimkv
from tiny import gated, generate
from trimkv.cache.layers import BoundedLayer

pytestmark = pytest.mark.smoke

MODELS = ("qwen3", "gemma3_text")


def tensors(cache):
    """Every tensor of every layer, for comparison."""
    return [
        t
        for layer in cache.slot_layers
        for t in (layer.store.k, layer.store.v, layer.store.position, layer.store.seen, *layer.store.state.values())
    ]


@pytest.mark.parametrize("name", MODELS)
def test_row_operations_move_every_tensor(name):
    model = gated(name)
    ids = tiny.tokens(3, 30)
    cache = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    model(ids, past_key_values=cache)
    before = [t.clone() for t in tensors(cache)]
    assert len(before) == 5 * len(cache.slot_layers)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for old, new in zip(before, tensors(cache), strict=True):
        assert torch.equal(new, old[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    for old, new in zip(before, tensors(cache), strict=True):
        assert torch.equal(new, old[[2, 0]])
    # and the rows go on as if they had always been there
    more = tiny.tokens(2, 6, seed=2)
    alone = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    model(ids[[2, 0]], past_key_values=alone)
    torch.testing.assert_close(
        model(more, past_key_values=cache).logits, model(more, past_key_values=alone).logits, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_beam_search_equals_stock_when_everything_fits_and_runs_when_not(name):
    model = gated(name)
    ids = tiny.tokens(2, 20)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": False, "output_logits": False}
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for chunk in (512, 6):
        cache = trimkv.bounded_cache(model, "trimkv", 40, chunk=chunk)
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        assert torch.equal(ours, stock)
    cache = trimkv.bounded_cache(model, "trimkv", 8, chunk=6)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    assert cache.peak_decode_tokens == 8


def test_beams_follow_their_own_history_under_eviction():
    """The best beam's score equals the score of the same text run alone through the same budget."""
    model = gated("qwen3")
    ids = tiny.tokens(1, 20)
    cache = trimkv.bounded_cache(model, "trimkv", 8, chunk=None)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        num_beams=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=10,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    alone = trimkv.bounded_cache(model, "trimkv", 8, chunk=None)
    logits, total = model(ids, past_key_values=alone).logits[:, -1], 0.0
    for token in out.sequences[0, 20:]:
        total += logits.log_softmax(-1)[0, token].item()
        logits = model(token.view(1, 1), past_key_values=alone).logits[:, -1]
    assert total == pytest.approx(out.sequences_scores[0].item(), abs=1e-4)


def test_num_return_sequences_samples_differ_and_share_the_prompt():
    model = gated("llama")
    ids = tiny.tokens(1, 30)
    cache = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    text, _ = generate(model, ids, cache, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert text.shape == (3, 50)
    assert len({tuple(row) for row in text.tolist()}) == 3
    assert torch.equal(text[:, :30], ids.expand(3, 30))
    for row in range(3):  # each row's memory is that of its own text
        alone = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
        model(ids, past_key_values=alone)
        for token in text[row, 30:-1]:
            model(token.view(1, 1), past_key_values=alone)
        for ours, theirs in zip(cache.slot_layers, alone.slot_layers, strict=True):
            assert torch.equal(ours.store.position[row].sort(-1).values, theirs.store.position[0].sort(-1).values)


@pytest.mark.parametrize("name", [*MODELS, "qwen3_next", "gpt_oss"])
def test_several_turns_on_one_cache(name):
    model = gated(name)
    cache = trimkv.bounded_cache(model, "trimkv", 64, chunk=8)
    text, _ = generate(model, tiny.tokens(1, 30), cache, new=10)
    turn = torch.cat([text, tiny.tokens(1, 12, seed=3)], 1)
    ours, logits = generate(model, turn, cache, new=8)
    stock, stock_logits = generate(model, turn, None, new=8)
    assert torch.equal(ours, stock)
    torch.testing.assert_close(logits, stock_logits, atol=2e-5, rtol=1e-4)


def test_a_padded_turn_in_the_middle_of_a_batch():
    """Rows whose second turn differs in length: padding between valid tokens neither is kept nor costs a kept token."""
    model = gated("qwen3")
    first, second = tiny.tokens(2, 14), tiny.tokens(2, 6, seed=4)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 14:18] = 0
    for budget in (10, 40):
        batch = trimkv.bounded_cache(model, "trimkv", budget, chunk=None)
        model(first, past_key_values=batch)
        for t in range(6):  # token by token: a padding token must not overwrite a slot
            seen = mask[:, : 15 + t]
            position = seen.cumsum(-1)[:, -1:] - 1
            out = model(
                second[:, t : t + 1], attention_mask=seen, position_ids=position.clamp_min(0), past_key_values=batch
            )
        alone = trimkv.bounded_cache(model, "trimkv", budget, chunk=None)
        model(first[:1], past_key_values=alone)
        for t in (4, 5):
            single = model(second[:1, t : t + 1], past_key_values=alone)
        assert (out.logits[0, -1] - single.logits[0, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [*MODELS, "qwen3_next"])
@pytest.mark.parametrize("buffer", [0, 4])
def test_snapshot_and_restore(name, buffer):
    """One context, two questions: each is answered as if it were the only one."""
    model = gated(name)
    budget = trimkv.Budget(10, buffer=buffer)
    context, questions = tiny.tokens(1, 40), (tiny.tokens(1, 5, seed=5), tiny.tokens(1, 9, seed=6))
    cache = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
    model(context, past_key_values=cache)
    kept = cache.snapshot()
    assert kept.tokens_seen == 40

    def answer(cache, question):
        return torch.cat([model(token, past_key_values=cache).logits for token in question.split(1, 1)], 1)

    expect = []
    for question in questions:
        own = trimkv.bounded_cache(model, "trimkv", budget, chunk=8)
        model(context, past_key_values=own)
        expect.append(answer(own, question))
    for target in (cache, trimkv.bounded_cache(model, "trimkv", budget, chunk=8)):
        for question, logits in zip(questions, expect, strict=True):
            target.restore(kept)
            assert target.get_seq_length() == 40
            torch.testing.assert_close(answer(target, question), logits, atol=1e-5, rtol=1e-4)


def test_restore_into_a_batch():
    model = gated("llama")
    rows = []
    for seed in (0, 1):
        cache = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
        model(tiny.tokens(1, 30, seed=seed), past_key_values=cache)
        rows.append((cache.snapshot(), model(torch.tensor([[5]]), past_key_values=cache).logits))
    batch = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    batch.restore(rows[0][0], row=0, rows=2)
    batch.restore(rows[1][0], row=1)
    logits = model(torch.tensor([[5], [5]]), past_key_values=batch).logits
    torch.testing.assert_close(logits, torch.cat([r[1] for r in rows]), atol=1e-5, rtol=1e-4)
    with pytest.raises(IndexError, match="row 2"):
        batch.restore(rows[0][0], row=2)
    short = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    model(tiny.tokens(1, 12), past_key_values=short)
    with pytest.raises(ValueError, match="sequence length"):
        batch.restore(short.snapshot(), row=1)
    smaller = trimkv.bounded_cache(model, "trimkv", 5, chunk=8)
    with pytest.raises(ValueError, match="does not fit"):
        smaller.restore(rows[0][0])


def test_reset_starts_clean_and_keeps_the_memory():
    model = gated("gemma2")
    ids = tiny.tokens(2, 30)
    cache = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    first, _ = generate(model, ids, cache)
    place = cache.slot_layers[0].store.k.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.held_tokens == 0
    second, _ = generate(model, ids, cache)
    assert torch.equal(first, second)
    assert cache.slot_layers[0].store.k.data_ptr() == place
    cache.reset()
    other, _ = generate(model, ids[:1], cache)  # another batch size after a reset
    assert torch.equal(other, first[:1])


def test_offloaded_slots_come_back():
    model = gated("qwen3")
    cache = trimkv.bounded_cache(model, "trimkv", 10, chunk=8)
    cache.offloading, cache.only_non_sliding = False, True
    model(tiny.tokens(1, 20), past_key_values=cache)
    layer = cache.slot_layers[0]
    before = [t.clone() for t in tensors(cache)]
    layer.offload()
    layer.prefetch()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache), strict=True))


def test_assisted_decoding_and_cropping_are_refused_with_a_reason():
    model = gated("qwen3")
    ids = tiny.tokens(1, 20)
    cache = trimkv.bounded_cache(model, "trimkv", 10)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="take tokens back"):
        generate(model, ids, cache, prompt_lookup_num_tokens=3, output_logits=False)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_misuse_is_answered_in_one_line():
    model = gated("qwen3")
    other = tiny.build("qwen3", num_hidden_layers=2)
    ids = tiny.tokens(1, 20)
    with pytest.raises(ValueError, match="known policies: .*random, .*streaming_llm, .*trimkv"):
        trimkv.bounded_cache(model, "lru", 8)
    with pytest.raises(ValueError, match="needs retention gates"):
        trimkv.bounded_cache(other, "trimkv", 8)
    with pytest.raises(ValueError, match="no room beside the 4 sinks"):
        trimkv.bounded_cache(model, "streaming_llm", 4)
    with pytest.raises(ValueError, match="chunk"):
        trimkv.bounded_cache(model, "trimkv", 8, chunk=0)
    with pytest.raises(ValueError, match="layers"):
        cache = trimkv.bounded_cache(model, "trimkv", 8)
        trimkv.bounded_cache(other, "streaming_llm", 8)
        other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="2D attention_mask"):
        model(ids, attention_mask=torch.zeros(1, 1, 20, 20), past_key_values=trimkv.bounded_cache(model, "trimkv", 8))
    cache = trimkv.bounded_cache(model, "trimkv", 8)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 rows and got 2"):
        model(tiny.tokens(2, 3), past_key_values=cache)
    trimkv.detach(model)
    with pytest.raises(ValueError, match="needs retention gates"):
        trimkv.bounded_cache(model, "trimkv", 8)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tokens": 0}, "at least 1"),
        ({"tokens": 4.0}, "whole number"),
        ({"tokens": 4, "sinks": 2, "recent": 2}, "more than 4"),
        ({"tokens": 4, "buffer": -1}, "negative"),
        ({"tokens": 4, "scope": "row"}, "scope"),
    ],
)
def test_impossible_budgets(budget, message):
    with pytest.raises(ValueError, match=message):
        trimkv.Budget(**budget)


def test_bytes_are_known_before_anything_is_allocated():
    from trimkv.budget import bytes_per_sequence

    for name in ("qwen3", "gemma3_text"):
        model = gated(name)
        cache = trimkv.bounded_cache(model, "trimkv", trimkv.Budget(10, buffer=3), chunk=8)
        model(tiny.tokens(2, 20), past_key_values=cache)
        stored = sum(layer.store.nbytes - layer.store.seen.nbytes for layer in cache.slot_layers)
        assert stored == 2 * bytes_per_sequence(model.config, trimkv.Budget(10, buffer=3), dtype_bytes=4)


def test_an_exception_in_a_forward_leaves_the_model_usable():
    model = gated("qwen3")
    ids = tiny.tokens(1, 20)
    expect, _ = generate(model, ids, trimkv.bounded_cache(model, "trimkv", 8))

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, trimkv.bounded_cache(model, "trimkv", 8))
    handle.remove()
    again, _ = generate(model, ids, trimkv.bounded_cache(model, "trimkv", 8))
    assert torch.equal(again, expect)
    stock = tiny.build("qwen3")
    assert torch.equal(generate(model, ids)[0], generate(stock, ids)[0])


def test_decode_steps_wait_for_nothing():
    """The per-layer part of a decode step reads no tensor on the host (as a GPU would have to wait for)."""
    model = gated("qwen3")
    cache = trimkv.bounded_cache(model, "trimkv", trimkv.Budget(8, sinks=1, recent=2), chunk=8)
    model(tiny.tokens(2, 20), past_key_values=cache)
    watched = {"item": 0}
    original = torch.Tensor.__bool__

    def count(self):
        watched["item"] += 1
        return original(self)

    torch.Tensor.__bool__ = count
    try:
        model(tiny.tokens(2, 1), past_key_values=cache)
    finally:
        torch.Tensor.__bool__ = original
    assert watched["item"] == 0
    assert isinstance(cache.layers[0], BoundedLayer)
