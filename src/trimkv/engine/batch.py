"""A bounded cache whose rows belong to different requests: made, cut, copied and cleaned row by row."""

import copy

import torch

from ..budget import Budget
from ..cache.bounded import BoundedCache
from ..cache.build import bounded_cache
from ..cache.policies import POLICIES, Policy, make
from ..cache.slots import NO_TOKEN

# Whether what a step of such a cache launches depends on no number of the host, so that it may become a CUDA graph.
STATIC = False


def make_batch(model, policy: Policy, budget: Budget, chunk: int, rows: int) -> BoundedCache:
    """A cache of so many rows, all memory allocated."""
    cache = bounded_cache(model, policy, budget, chunk)
    idle_step(model, cache, rows)  # the first tokens allocate the stores
    cache.reset()
    return cache


@torch.no_grad()
def idle_step(model, cache: BoundedCache, rows: int) -> None:
    """A decode step in which no row has a token."""
    nothing = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    model(input_ids=nothing, position_ids=nothing, attention_mask=nothing.bool(), past_key_values=cache, use_cache=True)


def check(model, policy: Policy, budget: Budget) -> None:
    """Refuses what cannot be served row by row in fixed memory.

    Raises:
        ValueError: the message says what to take instead.
    """
    if not _fixed(policy):
        known = ", ".join(sorted(name for name in POLICIES if _fixed(make(name))))
        raise ValueError(
            f"policy {policy.name} does not keep a sequence in a fixed number of slots, so the engine cannot promise "
            f"its memory; choose one of {known}"
        )
    if budget.shared:
        raise ValueError(f"budget: the engine's rows need scope head, got {budget.scope}")
    name = type(model).__name__
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    others = sorted(set(types) - {"full_attention"})
    if others:
        raise ValueError(
            f"{name} has layers ({', '.join(others)}) whose rows must have seen equally many tokens; the engine serves "
            "models that have full attention in all layers; use model.generate with trimkv.bounded_cache"
        )
    rope = getattr(getattr(model.get_decoder(), "rotary_emb", None), "rope_type", "default")
    if rope in ("longrope", "dynamic"):
        raise ValueError(
            f"{name} rotates by frequencies that depend on the longest row ({rope}), so requests would change each "
            "other; use model.generate with trimkv.bounded_cache"
        )


def _fixed(policy: Policy) -> bool:
    return policy.bounded and not policy.grows and not policy.selects


def first_rows(cache: BoundedCache, rows: int) -> BoundedCache:
    """The first rows of a cache, sharing memory: what a step writes there is in the cache."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        layer.store = copy.copy(layer.store)
        for name, value in vars(layer.store).items():
            if isinstance(value, torch.Tensor):
                setattr(layer.store, name, value[:rows])
            elif name in ("state", "rows"):
                setattr(layer.store, name, {key: t[:rows] for key, t in value.items()})
    return part


def follow_mask(cache: BoundedCache) -> None:
    """Makes the coming steps look at the mask on the device, also where the host sees no reason for it."""
    for layer in cache.slot_layers:
        layer.padded = True


def count_steps(cache: BoundedCache, part: BoundedCache) -> None:
    """Takes over what the host has counted while ``part``, first rows of this cache, was used."""
    for layer, used in zip(cache.slot_layers, part.slot_layers, strict=True):
        layer.store.used = used.store.used
        for name, value in vars(used).items():
            if isinstance(value, (int, bool)):
                setattr(layer, name, value)


def copy_row(source: BoundedCache, row: int, target: BoundedCache, place: int) -> None:
    """Copies a row into another cache of the same policy and budget, whatever the lengths of the rows there.

    A layer at a time, so that no second copy of a whole row exists.
    """
    for there, here in zip(target.layers, source.layers, strict=True):
        there.restore(place, here.snapshot(row), there.store.seen.shape[0])


def clear_row(cache: BoundedCache, row: int) -> None:
    """Makes a row as new. Its keys and values too: what is not a number there would spoil a later request, since an
    empty slot's weight is 0 and 0 * NaN is NaN."""
    for store in cache.stores:
        for value in (*vars(store).values(), *store.state.values(), *store.rows.values()):
            if isinstance(value, torch.Tensor):
                value[row].zero_()
        store.position[row].fill_(NO_TOKEN)
