"""Static caches: the same tokens and the same logits as ever, from a step that could be a CUDA graph."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import trimkv
from trimkv.budget import Budget, bytes_per_sequence
from trimkv.cache.graph import DecodeStep
from trimkv.cache.policies import POLICIES

NAMES = [name for name, cls in POLICIES.items() if not cls.selects]
BOUNDED = [name for name in NAMES if POLICIES[name].bounded]
AGES = [5, 40, 14]
STEPS = 110


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3", num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=1024)


def kept(cache, row):
    """Layer -> head -> sorted positions."""
    return [
        [sorted(p for p in head if p >= 0) for head in layer.store.position[row].tolist()]
        for layer in cache.slot_layers
    ]


def everything(cache):
    """Every tensor that a static cache holds, by name."""
    found = {}
    for layer in cache.slot_layers:
        store = layer.store
        tensors = {**store._per_slot(), **store.rows, "seen": store.seen}
        found.update({f"{layer.layer_idx}.{name}": t for name, t in tensors.items()})
    return found


def staged(model, policy, budget, ids, chunk=8):
    """A cache of one row that has read ``ids``."""
    cache = trimkv.bounded_cache(model, policy, budget, chunk=chunk)
    trimkv.prefill(model, cache, ids, chunk=chunk)
    return cache


@torch.no_grad()
def step(model, cache, tokens, active=None):
    mask = None if active is None else active[:, None].long()
    return model(tokens[:, None], attention_mask=mask, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize(
    ("name", "buffer"), [*((name, 0) for name in NAMES), ("trimkv", 4), ("h2o", 4), ("snapkv", 3), ("streaming_llm", 1)]
)
def test_rows_of_any_age_go_on_as_they_would_alone(model, name, buffer):
    """Rows are copied in from prompts of different lengths and idle now and then; long past the budget, every row holds
    the tokens and gives the logits of a cache of its own."""
    tokens = 200 if not POLICIES[name].bounded else 14
    budget = Budget(tokens, buffer=buffer, sinks=1, recent=3)
    # No token twice in a row: equal keys would leave the choice to the last bit, and that differs with the batch.
    texts = [torch.randperm(1000, generator=torch.Generator().manual_seed(row)) for row in range(3)]
    prompts = [text[None, :age] for text, age in zip(texts, AGES, strict=True)]
    alone = [staged(model, name, budget, ids) for ids in prompts]
    together = trimkv.bounded_cache(model, name, budget, chunk=8, rows=3)
    for row, cache in enumerate(alone):
        if row == 1:
            together.restore(cache.snapshot(), row)
        else:
            together.copy_row(cache, 0, row)
    text = torch.stack([text[age : age + STEPS] for text, age in zip(texts, AGES, strict=True)])
    for t in range(STEPS):
        active = torch.tensor([t % 3 != 1, t % 7 != 0, True])
        logits = step(model, together, text[:, t], active if t % 2 or not active.all() else None)
        for row, cache in enumerate(alone):
            if active[row]:
                expect = step(model, cache, text[row : row + 1, t])
                torch.testing.assert_close(logits[row : row + 1], expect, atol=2e-4, rtol=2e-4)
            assert kept(together, row) == kept(cache, 0), (t, row)
    assert [int(n) for n in together.seen] == [cache.get_seq_length() for cache in alone]
    assert together.peak_decode_tokens == budget.slots


def test_a_whole_batch_may_read_its_prompt_in_a_static_cache(model):
    """Without staging: chunks as today, then static steps, then a second turn of other lengths."""
    ids, mask = tiny.left_padded([0, 20, 35], 41)
    more, more_mask = tiny.left_padded([0, 2, 1], 5)
    results = []
    for rows in (None, 3):
        cache = trimkv.bounded_cache(model, "trimkv", 14, chunk=8, rows=rows)
        logits = [trimkv.prefill(model, cache, ids, mask, chunk=8)]
        together = mask
        for t in range(20):
            together = torch.cat([together, torch.ones(3, 1, dtype=torch.long)], 1)
            own = None if rows else together.cumsum(1)[:, -1:] - 1
            with torch.no_grad():
                token = tiny.tokens(3, 1, seed=t)
                logits.append(
                    model(
                        token, attention_mask=together, position_ids=own, past_key_values=cache, use_cache=True
                    ).logits[:, -1]
                )
        both = more_mask if rows else torch.cat([together, more_mask], 1)
        logits.append(trimkv.prefill(model, cache, more, both, chunk=3))
        results.append((torch.stack(logits), [kept(cache, row) for row in range(3)]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-4, rtol=2e-4)
    assert results[0][1] == results[1][1]


class Record(TorchDispatchMode):
    """What a step launches: operators with the shapes of their tensors, and the numbers given to them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def plain(x):
            if isinstance(x, torch.Tensor):
                return tuple(x.shape), x.stride(), x.dtype
            if isinstance(x, (list, tuple)):
                return [plain(item) for item in x]
            return x

        self.calls.append((str(function), plain(args), plain(list((kwargs or {}).items()))))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("buffer", [0, 3])
def test_a_step_is_the_same_launches_whatever_the_rows_hold(model, name, buffer):
    """What a CUDA graph needs: nothing read back, no shape and no number that changes with the age of a row."""
    cache = trimkv.bounded_cache(model, name, Budget(12, buffer=buffer), chunk=8, rows=2)
    seen = []
    for t in range(40):
        if t == 30:
            cache.clear_rows([1])
            step(model, cache, torch.tensor([3, 4]), torch.tensor([True, False]))  # whatever follows such a change
        with Record() as record:
            step(model, cache, torch.tensor([3 + t, 4]), torch.tensor([True, t % 2 == 0]))
        if t:  # the first brings all slots into view
            seen.append(record.calls)
    read_back = [call[0] for call in seen[0] if "_local_scalar" in call[0] or "nonzero" in call[0]]
    assert not read_back
    for t, calls in enumerate(seen):
        assert calls == seen[0], (t, [pair for pair in zip(calls, seen[0], strict=False) if pair[0] != pair[1]][:1])


@pytest.mark.parametrize("name", BOUNDED)
def test_an_inactive_row_stays_bit_for_bit(model, name):
    cache = trimkv.bounded_cache(model, name, 12, chunk=8, rows=2)
    for row, length in enumerate((30, 6)):
        cache.copy_row(staged(model, name, 12, tiny.tokens(1, length)), 0, row)
    step(model, cache, torch.tensor([5, 6]))
    before = {key: t[1].clone() for key, t in everything(cache).items()}
    for t in range(15):
        step(model, cache, torch.tensor([5 + t, 6 + t]), torch.tensor([True, False]))
    for key, t in everything(cache).items():
        torch.testing.assert_close(t[1], before[key], rtol=0, atol=0, equal_nan=True, msg=key)
    assert int(cache.seen[0]) == 46


@pytest.mark.parametrize("name", ["trimkv", "h2o", "r_kv", "streaming_llm", "full"])
def test_changes_of_rows_leave_every_tensor_where_it_is(model, name):
    """A captured graph reads and writes these addresses."""
    cache = trimkv.bounded_cache(model, name, 40, chunk=8, rows=3)
    before = {key: (t.data_ptr(), t.shape) for key, t in everything(cache).items()}
    source = staged(model, name, 40, tiny.tokens(1, 30))
    cache.copy_row(source, 0, 1)
    step(model, cache, torch.tensor([3, 4, 5]))
    saved = cache.snapshot(1)
    cache.restore(saved, 2)
    cache.clear_rows([0, 2])
    cache.clear_rows(1)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    cache.reset()
    step(model, cache, torch.tensor([3, 4, 5]))
    assert {key: (t.data_ptr(), t.shape) for key, t in everything(cache).items()} == before


def test_a_cleared_row_is_as_new_even_after_nan(model):
    """A request that broke must not break the next one in its row."""
    cache = trimkv.bounded_cache(model, "h2o", 12, chunk=8, rows=2)
    for t in range(20):
        step(model, cache, torch.tensor([7 + t, 9]))
    for layer in cache.slot_layers:
        layer.store.k[1] = layer.store.v[1] = float("nan")
    cache.clear_rows(1)
    alone = trimkv.bounded_cache(model, "h2o", 12, chunk=8)
    for t in range(20):
        logits = step(model, cache, torch.tensor([7, 30 + t]))
        torch.testing.assert_close(logits[1:], step(model, alone, torch.tensor([30 + t])), atol=2e-4, rtol=2e-4)
    for layer in cache.slot_layers:
        layer.store.v[1] = float("nan")
    cache.copy_row(staged(model, "h2o", 12, tiny.tokens(1, 4)), 0, 1)
    assert step(model, cache, torch.tensor([7, 8])).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_before_and_are_all_there(name, dtype):
    """``bytes_per_sequence`` is what a server divides its memory by."""
    model = tiny.gated("llama", num_hidden_layers=2).to(dtype)
    budget, rows = Budget(24, buffer=4), 5
    cache = trimkv.bounded_cache(model, name, budget, rows=rows)
    per_token = sum(t.itemsize for t in cache.slot_layers[0].policy.state.values())
    slots = sum(t.nbytes for layer in cache.slot_layers for t in layer.store._per_slot().values())
    assert slots == rows * bytes_per_sequence(model.config, budget, dtype.itemsize, per_token)
    before = cache.nbytes
    policy = cache.slot_layers[0].policy
    extra = policy.extra_bytes(0, 4, 2, 16) + 4  # of the policy per row and layer, and how many tokens it has seen
    assert before == slots + rows * 2 * extra
    for _ in range(40):
        step(model, cache, torch.randint(3, 100, (rows,)))
    assert cache.nbytes == before


def test_a_decode_step_object_is_a_plain_step(model):
    """The same loop runs with a graph on a GPU and without one here."""
    caches = [trimkv.bounded_cache(model, "trimkv", 12, chunk=8, rows=2) for _ in range(2)]
    run = DecodeStep(model, caches[0])
    for t in range(30):
        token, active = torch.tensor([5 + t, 9]), torch.tensor([True, t % 3 == 0])
        got = run(token, None if t % 2 else active)
        expect = step(model, caches[1], token, None if t % 2 else active)
        torch.testing.assert_close(got, expect)
        if t == 20:
            for cache in caches:
                cache.clear_rows(0)
    assert [kept(caches[0], row) for row in (0, 1)] == [kept(caches[1], row) for row in (0, 1)]
    with pytest.raises(ValueError, match="static"):
        DecodeStep(model, trimkv.bounded_cache(model, "trimkv", 12))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_parts_change_the_speed_only(model):
    compiled, plain = (trimkv.bounded_cache(model, "trimkv", 12, rows=2) for _ in range(2))
    steps = DecodeStep(model, compiled, compile=True), DecodeStep(model, plain)
    before = [type(module.forward) for module in model.modules()]
    for t in range(14):
        got, expect = (one(torch.tensor([5 + t, 9])) for one in steps)
        torch.testing.assert_close(got, expect, atol=2e-4, rtol=2e-4)
    assert [type(module.forward) for module in model.modules()] == before, "the model is as it was"


def test_what_cannot_be_static_is_refused(model):
    cache = trimkv.bounded_cache(model, "trimkv", 12, rows=2)
    for call, words in (
        (lambda: trimkv.bounded_cache(model, "seer_attention_r", 64, rows=2), "keeps every decoded token"),
        (lambda: trimkv.bounded_cache(model, "trimkv", Budget(12, scope="layer"), rows=2), "scope head"),
        (lambda: trimkv.bounded_cache(model, "trimkv", 12, rows=0), "at least 1"),
        (lambda: trimkv.bounded_cache(tiny.build("gemma2"), "streaming_llm", 12, rows=2), "sliding window"),
        (lambda: step(model, cache, torch.tensor([3, 4, 5])), "for 2 rows, and got 3"),
        (lambda: cache.batch_repeat_interleave(2), "cannot be repeated"),
        (lambda: cache.restore(staged(model, "trimkv", 12, tiny.tokens(1, 5)).snapshot(), 0, rows=3), "for 2 rows"),
        (lambda: cache.copy_row(staged(model, "trimkv", 20, tiny.tokens(1, 30)), 0, 0), "does not fit"),
        (lambda: trimkv.bounded_cache(model, "trimkv", 12).clear_rows(0), "static"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for row in (2, -1):
        with pytest.raises(IndexError):
            cache.clear_rows(row)
    half = tiny.gated("llama", num_hidden_layers=2)
    cache = trimkv.bounded_cache(half, "trimkv", 12, rows=1)
    half.to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        step(half, cache, torch.tensor([3]))
