"""What a cache holds, measured: by the tensors that are alive, and on a GPU by its allocator. Nothing is added up."""

import gc

import pytest
import torch
from torch._subclasses import FakeTensor

import tiny
import trimkv
from trimkv.budget import Budget, bytes_per_sequence
from trimkv.cache.policies import POLICIES

KEEP_ALL = [name for name, cls in POLICIES.items() if not cls.bounded]
BOUNDED = [name for name, cls in POLICIES.items() if cls.bounded]
B, PROMPT = 3, 40
IDS = tiny.tokens(B, PROMPT + 150)


def stated_bytes(model, cache, budget: Budget) -> int:
    """Keys, values and positions, what the policy says it adds, and per row the 4-byte number of tokens seen."""
    config, layers = model.config, cache.slot_layers
    itemsize = next(model.parameters()).element_size()
    policy = layers[0].policy
    D = config.hidden_size // config.num_attention_heads
    extra = policy.extra_bytes(budget.slots, config.num_attention_heads, config.num_key_value_heads, D)
    return B * (bytes_per_sequence(config, budget, itemsize, 0) + len(layers) * (extra + 4))


def storages() -> dict[int, torch.UntypedStorage]:
    """The memory of every tensor that Python knows, whoever holds it: address -> storage."""
    gc.collect()
    # A compiler's fake tensors, which other tests in this process may have left, hold no memory.
    alive = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and type(one) is not FakeTensor]
    alive = [one.untyped_storage() for one in alive]
    return {storage.data_ptr(): storage for storage in alive}


def new_bytes(before: dict[int, torch.UntypedStorage]) -> int:
    """Bytes of storages that were not there; ``before`` keeps its own alive, so that no address is used twice."""
    return sum(storage.nbytes() for address, storage in storages().items() if address not in before)


@torch.no_grad()
def decode(model, cache, ids) -> None:
    for token in ids.split(1, 1):
        model(token, past_key_values=cache)


@pytest.fixture(scope="module")
def model():
    model = tiny.gated("llama", num_hidden_layers=2)
    trimkv.bounded_cache(model, "streaming_llm", 12)  # puts its hooks on
    return model


@pytest.fixture(scope="module")
def before(model):
    found = storages()
    gc.freeze()  # what is there now needs no second look: a search takes a tenth of the time
    yield found
    gc.unfreeze()


@pytest.mark.parametrize("name, buffer", [*((name, 0) for name in BOUNDED), ("trimkv", 5), ("h2o", 5), ("snapkv", 5)])
def test_a_bounded_policy_holds_what_it_states_and_never_more(model, before, name, buffer):
    budget, ids = Budget(12, buffer=buffer), IDS
    cache = trimkv.bounded_cache(model, name, budget, chunk=8)
    trimkv.prefill(model, cache, ids[:, :PROMPT], chunk=8)
    held = []
    for part in ids[:, PROMPT:].split([20, 130], 1):
        decode(model, cache, part)
        held.append(new_bytes(before))
    assert held == [stated_bytes(model, cache, budget)] * 2
    assert cache.nbytes == held[0]


@pytest.mark.parametrize("name", KEEP_ALL)
def test_what_keeps_everything_is_seen_to_grow(model, before, name):
    """The measurement's own check: it must find what the other test says is not there."""
    ids = IDS[:, : PROMPT + 60]
    cache = trimkv.bounded_cache(model, name, 12, chunk=8)
    trimkv.prefill(model, cache, ids[:, :PROMPT], chunk=8)
    decode(model, cache, ids[:, PROMPT:])
    found = new_bytes(before)
    capacity = cache.slot_layers[0].store.capacity
    assert 100 <= capacity <= 200
    assert found == stated_bytes(model, cache, Budget(capacity)) > 5 * stated_bytes(model, cache, Budget(12))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [*BOUNDED, *KEEP_ALL])
def test_the_gpus_allocator_says_the_same(name):
    """Each allocation is rounded up to 512 bytes; otherwise not a byte above what is stated."""
    model = tiny.gated("llama", num_hidden_layers=2).cuda()
    budget, ids = Budget(64), tiny.tokens(B, PROMPT + 300).cuda()
    warm = trimkv.bounded_cache(model, name, budget, chunk=16)  # workspaces of libraries are allocated once
    trimkv.prefill(model, warm, ids[:, :PROMPT], chunk=16)
    decode(model, warm, ids[:, :80])
    del warm
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = trimkv.bounded_cache(model, name, budget, chunk=16)
    trimkv.prefill(model, cache, ids[:, :PROMPT], chunk=16)
    held = []
    for part in ids[:, PROMPT:].split(150, 1):
        decode(model, cache, part)
        gc.collect()
        held.append(torch.cuda.memory_allocated() - before)
    bounded = POLICIES[name].bounded
    budget = budget if bounded else Budget(cache.slot_layers[0].store.capacity)
    tensors = sum(4 + len(layer.store.state) + len(layer.store.rows) for layer in cache.slot_layers)
    assert held[-1] <= stated_bytes(model, cache, budget) + 512 * tensors
    assert not bounded or held[0] == held[1]
