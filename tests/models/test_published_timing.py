"""Which tokens stay, and when: the published formula as Python loops, against what the model really holds."""

import math

import pytest
import torch

import tiny
import trimkv
from trimkv.cache_utils import TrimKVCache
from trimkv.models.llama import TrimKVLlamaForCausalLM
from trimkv.models.phi3 import TrimKVPhi3ForCausalLM
from trimkv.models.qwen3 import TrimKVQwen3ForCausalLM

pytestmark = pytest.mark.smoke

CLASSES = {"qwen3": TrimKVQwen3ForCausalLM, "llama": TrimKVLlamaForCausalLM, "phi3": TrimKVPhi3ForCausalLM}
M, W = 16, 4


class Head:
    """One head's tokens. After a forward: if M + W or more are held, the M of highest score stay."""

    def __init__(self, strategy, recent=0, late=1):
        self.strategy, self.recent, self.late = strategy, recent, late
        self.kept, self.seen = {}, 0

    def forward(self, tokens):
        for token in tokens:
            self.kept[self.seen] = token
            self.seen += 1
        if len(self.kept) >= M + W:
            protected = sorted(self.kept)[len(self.kept) - self.recent :]
            ranked = sorted(self.kept, key=lambda p: (p in protected, self.score(p), p))
            self.kept = {p: self.kept[p] for p in ranked[-M:]}

    def score(self, position):
        log_beta, norm = self.kept[position]
        worth = log_beta * (self.seen + self.late - position)
        if self.strategy == "knorm_alpha":  # a padding token's embedding, and with it its key in layer 0, may be zero
            worth += math.log(norm) if norm else -math.inf
        return worth


class RecordedCache(TrimKVCache):
    """Also notes the keys of the running forward."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.new_keys = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.new_keys[layer_idx] = key_states.clone()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def follow(model, cache, make_head):
    """Lets loops follow the model: after every forward, each head of each layer must hold what its loop holds.

    Returns a list with, per forward, the positions that the loops kept.
    """
    layers, log_beta, log = len(model.model.layers), {}, []
    heads = [[make_head() for _ in range(model.config.num_key_value_heads)] for _ in range(layers)]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.retention_gate.register_forward_hook(
            lambda module, args, output, i=i: log_beta.__setitem__(i, output)
        )

    def compare(*_):
        for i in range(layers):
            for h, head in enumerate(heads[i]):
                head.forward(
                    zip(log_beta[i][0, h].tolist(), cache.new_keys[i][0, h].norm(dim=-1).tolist(), strict=True)
                )
                position = cache.layers[i].store.position[0, h]
                assert sorted(position[position >= 0].tolist()) == sorted(head.kept), f"layer {i}, head {h}"
        log.append([sorted(head.kept) for row in heads for head in row])

    model.model.register_forward_hook(compare)
    return log


def long_rope(equal=False):
    """Changes that give a tiny Phi-3 an original context of 32 tokens and other frequencies beyond it."""
    long = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": long if equal else [1.0] * 8, "long_factor": long}
    return {"original_max_position_embeddings": 32, "rope_parameters": rope}


def run(model, cache, prompt, new):
    ids = tiny.tokens(1, prompt)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
    )


@pytest.mark.parametrize("strategy", ["alpha", "knorm_alpha"])
@pytest.mark.parametrize("prompt", [18, 40])
def test_evicts_what_the_formula_says(publish, name, strategy, prompt):
    model = CLASSES[name].from_pretrained(publish(name, compress_strategy=strategy), download_from="local")
    cache = RecordedCache()
    log = follow(model, cache, lambda: Head(strategy))
    run(model, cache, prompt, 64)
    assert len(log) == 64
    assert len({tuple(kept) for kept in log[-1]}) > 4, "the heads should not all keep the same"


@pytest.mark.parametrize("kind", ["rg2", "rg3"])
def test_gates_that_read_keys_and_values(publish, kind):
    model = TrimKVQwen3ForCausalLM.from_pretrained(publish("qwen3", kind), download_from="local")
    assert model.model.layers[0].self_attn.retention_gate.kind == kind
    cache = RecordedCache()
    log = follow(model, cache, lambda: Head("alpha"))
    run(model, cache, 30, 40)
    assert len(log) == 40


def test_sliding_window_keeps_the_newest(publish):
    model = TrimKVLlamaForCausalLM.from_pretrained(publish("llama"), download_from="local")
    cache = RecordedCache(sliding_window_size=6)
    log = follow(model, cache, lambda: Head("alpha", recent=6))
    run(model, cache, 30, 40)
    assert all(kept[-6:] == list(range(69 - 6, 69)) for kept in log[-1])


def test_ages_are_those_of_the_released_code(publish):
    """With the age of the next query instead, other tokens would stay: the comparison above can tell them apart."""
    model = TrimKVLlamaForCausalLM.from_pretrained(publish("llama"), download_from="local")
    cache = RecordedCache()
    follow(model, cache, lambda: Head("alpha", late=0))
    with pytest.raises(AssertionError, match="layer"):
        run(model, cache, 40, 64)


def feed(model, cache, *lengths):
    """Tokens held per head after each forward."""
    held, ids = [], tiny.tokens(1, sum(lengths))
    for part in ids.split(list(lengths), 1):
        model(part, past_key_values=cache)
        held.append(cache.held_tokens)
    return held


def test_lengths_after_each_forward(publish):
    model = TrimKVQwen3ForCausalLM.from_pretrained(publish("qwen3"), download_from="local")
    cache = TrimKVCache()
    assert feed(model, cache, 18, *[1] * 6) == [18, 19, 16, 17, 18, 19, 16]
    assert (cache.peak_prefill_tokens, cache.peak_decode_tokens) == (18, 20)
    assert cache.get_seq_length() == 24 and cache.get_cache_length() == cache.get_cache_length(3) == 16
    assert feed(model, TrimKVCache(), 20, 1) == [16, 17], "M + W tokens of a prompt are cut at once"
    assert feed(model, TrimKVCache(), 3, 20, 1, 3, 1) == [3, 16, 17, 16, 17], "several tokens in one forward"
    cache = TrimKVCache()
    assert feed(model, cache, 50, 1, 1) == [16, 17, 18]
    assert cache.peak_prefill_tokens == 50, "the prompt attends in full"


@pytest.mark.parametrize("buffer", [0, 1])
def test_smallest_buffers_evict_after_every_token(publish, buffer):
    model = TrimKVLlamaForCausalLM.from_pretrained(publish("llama"), download_from="local", buffer_size=buffer)
    cache = TrimKVCache()
    assert feed(model, cache, 18, 1, 1, 1) == [16, 16, 16, 16]
    assert cache.peak_decode_tokens == 17, "the new token attends before anything is evicted"
    assert feed(model, TrimKVCache(), 15, 1, 1, 1) == [15, 16, 16, 16]


def test_left_padded_rows_equal_their_single_runs(publish, name):
    model = CLASSES[name].from_pretrained(publish(name), download_from="local")
    rows = [tiny.tokens(1, length, seed=length) for length in (37, 18, 5)]
    ids = torch.cat([torch.nn.functional.pad(row, (37 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (37 - row.shape[1], 0)) for row in rows])
    options = {**tiny.GENERATE, "min_new_tokens": 40, "max_new_tokens": 40}
    batch = model.generate(ids, attention_mask=mask, past_key_values=TrimKVCache(), **options)
    for b, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), past_key_values=TrimKVCache(), **options)
        assert torch.equal(batch.sequences[b, 37:], alone.sequences[0, row.shape[1] :])
        for one, other in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(one[b], other[0], atol=1e-4, rtol=0)


def test_own_interface_stays_strict_on_a_model_loaded_so(publish):
    """bounded_cache on such a model is bounded_cache on the stock model with the same gates."""
    from transformers import AutoModelForCausalLM

    folder = publish("qwen3")
    published = TrimKVQwen3ForCausalLM.from_pretrained(folder, download_from="local")
    stock = trimkv.attach(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), gates=folder)
    ids = tiny.tokens(1, 60)
    outputs = []
    for model in (published, stock):
        cache = trimkv.bounded_cache(model, "trimkv", M, chunk=8)
        outputs.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=30)
        )
        assert cache.peak_prefill_tokens <= M + 8 and cache.peak_decode_tokens == M
    assert torch.equal(*outputs)


def test_turns_of_a_conversation_share_one_cache(publish):
    """A second turn finds what the first one left; the loops follow through both."""
    model = TrimKVPhi3ForCausalLM.from_pretrained(publish("phi3"), download_from="local")
    cache = RecordedCache()
    log = follow(model, cache, lambda: Head("alpha"))
    first = run(model, cache, 30, 10)
    ids = torch.cat([first, tiny.tokens(1, 12, seed=3)], 1)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, min_new_tokens=10, max_new_tokens=10
    )
    assert len(log) == 20 and cache.get_seq_length() == 61


@pytest.mark.parametrize("strategy", ["alpha", "knorm_alpha"])
def test_phi3_keeps_its_memory_beyond_the_original_context(publish, strategy):
    """Stock Phi-3 drops its cache there and goes on from one token."""
    folder = publish("phi3", changes=long_rope(), compress_strategy=strategy)
    model = TrimKVPhi3ForCausalLM.from_pretrained(folder, download_from="local")
    cache = RecordedCache()
    log = follow(model, cache, lambda: Head(strategy))
    ids = run(model, cache, 24, 40)
    crossing = 32 - 24 + 1
    assert cache.long_rope and min(len(kept) for step in log for kept in step) == M
    assert any(kept[0] < 24 for kept in log[crossing]), "some of the prompt is still there"
    # one forward after another, without generate's preparation of inputs, gives the same text
    cache = TrimKVCache()
    model.model._forward_hooks.clear()
    parts = [ids[:, :24], *ids[:, 24:-1].split(1, 1)]
    answer = [int(model(part, past_key_values=cache).logits[0, -1].argmax()) for part in parts]
    assert answer == ids[0, 24:].tolist()


def test_phi3_keeps_every_token_beyond_the_original_context_without_compression(publish):
    folder = publish("phi3", changes=long_rope(equal=True), compress_memory=False)
    model = TrimKVPhi3ForCausalLM.from_pretrained(folder, download_from="local")
    ids = run(model, None, 24, 40)
    at_once = model(ids, use_cache=False).logits[0, 23:-1].argmax(-1)
    assert torch.equal(at_once, ids[0, 24:])
    assert torch.equal(run(model, TrimKVCache(), 24, 40), ids)
