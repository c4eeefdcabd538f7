"""Caches that hold a context without having read it: a step costs the same whatever the tokens are."""

import torch
from transformers import DynamicCache, StaticCache

from ..cache.bounded import BoundedCache


def dynamic(model, rows: int, tokens: int) -> DynamicCache:
    """transformers' growing cache."""
    cache = DynamicCache(config=model.config)
    for i in range(model.config.num_hidden_layers):
        shape = rows, model.config.num_key_value_heads, tokens, _head_dim(model)
        k, v = (torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in range(2))
        cache.update(k, v, i)
        cache.layers[i].keys, cache.layers[i].values = k, v  # not the copies that it made
    return cache


def static(model, rows: int, tokens: int, capacity: int) -> StaticCache:
    """transformers' static cache."""
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    nothing = torch.empty(rows, model.config.num_key_value_heads, 0, _head_dim(model), dtype=model.dtype)
    nothing = nothing.to(model.device)
    for layer in cache.layers:
        layer.lazy_initialization(nothing, nothing)
        layer.keys[:, :, :tokens].normal_()
        layer.values[:, :, :tokens].normal_()
        layer.cumulative_length.fill_(tokens)
    return cache


def bounded(cache: BoundedCache, tokens: int) -> None:
    """A static bounded cache: its slots hold tokens drawn from ``tokens`` seen ones, the newest among them."""
    for layer in cache.slot_layers:
        layer.clear_row(0)  # opens the store and marks the layer as touched
        store = layer.store
        held = min(tokens, store.capacity)
        store.k[:, :, :held].normal_()
        store.v[:, :, :held].normal_()
        place = torch.linspace(0, tokens - 1, held, device=store.k.device, dtype=torch.float64).round().int()
        store.position[:, :, :held] = place
        for t in store.state.values():
            t.uniform_(-0.01, 0.0)
        store.seen.fill_(tokens)


def _head_dim(model) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
