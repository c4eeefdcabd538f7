"""Caches whose rows belong to different requests."""

import copy

import torch

from ..budget import Budget
from ..cache.bounded import BoundedCache
from ..cache.policies import POLICIES, Policy, make
from ..cache.static import check_static


def check(model, policy: Policy, budget: Budget, rows: int) -> None:
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
    try:
        check_static(model, policy, budget, rows)
    except ValueError as error:
        raise ValueError(f"{error}; the engine runs on one: use model.generate with trimkv.bounded_cache") from None


def _fixed(policy: Policy) -> bool:
    return not policy.grows and not policy.selects


def first_rows(cache: BoundedCache, rows: int) -> BoundedCache:
    """The first rows of a static cache, sharing memory: what a decode step writes there is in the cache."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        layer.store = copy.copy(layer.store)
        for name, value in vars(layer.store).items():
            if isinstance(value, torch.Tensor):
                setattr(layer.store, name, value[:rows])
            elif name in ("state", "rows"):
                setattr(layer.store, name, {key: t[:rows] for key, t in value.items()})
    if cache.ahead is not None:
        part.ahead = copy.copy(cache.ahead)
        part.ahead.layers = part.layers
        part.ahead.seen, part.ahead.next_slot = cache.ahead.seen[:, :rows], cache.ahead.next_slot[:, :rows]
        for layer in part.layers:
            layer.ahead = part.ahead
    return part


def take_apart(cache: BoundedCache) -> None:
    """Lets go of all tensors of a cache that nobody uses any more. Its layers and what they have in common hold each
    other: Python would free them at some later time."""
    if cache.ahead is not None:
        cache.ahead.layers = []
        cache.ahead = None
    for layer in cache.layers:
        layer.ahead = layer.store = None
        layer.reset()


def count_steps(cache: BoundedCache, part: BoundedCache) -> None:
    """Takes over what the host has counted while ``part``, first rows of this cache, was used for the last time."""
    for layer, used in zip(cache.layers, part.layers, strict=True):
        layer.store.used = used.store.used
        for name, value in vars(used).items():
            if isinstance(value, (int, bool)):
                setattr(layer, name, value)
    take_apart(part)
