"""The caches of the published Quick Starts: ``from trimkv.cache_utils import TrimKVCache``."""

import torch

from .budget import Budget
from .cache.bounded import BoundedCache
from .cache.build import make_layers
from .cache.policies import Policy, make
from .cache.policies.trimkv import STRATEGIES

# Arguments that the released constructors take and that have no meaning here: slots are neither paged nor preallocated
# by length. A value of None is always accepted.
_NO_MEANING = ("num_layers", "num_heads", "num_blocks_ratio", "block_size")
# Attributes and methods of the released class that are not here -> what to use.
_ELSEWHERE = {
    "key_cache": "cache.layers[i].store.k",
    "value_cache": "cache.layers[i].store.v",
    "kv_positions": "cache.layers[i].store.position, or cache.log()",
    "retention_weights": 'cache.layers[i].store.state["log_beta"]',
    "n_seen_tokens": "cache.get_seq_length()",
    "peak_cached_tokens": "cache.peak_tokens",
    "compress": "nothing: the cache evicts by itself after each forward",
    "compress_layer": "nothing: the cache evicts by itself after each forward",
    "batch_split": "cache.snapshot(row) and restore()",
    "copy_to_device": "cache.snapshot() and restore() on a cache of the model on that device",
}


class TrimKVCache(BoundedCache):
    """A bounded cache that takes its settings from the model it meets, with the published timing.

    A prompt attends in full. After a forward in which a head holds ``memory_size + buffer_size`` tokens or more, its
    best ``memory_size`` stay. Ages are counted as in the released code, one more than the next query's distance.
    Every layer has ``memory_size``, whatever shares of a budget its gates were trained with.
    ``trimkv.bounded_cache`` is the strict form: exact ages, layer shares, and a prompt that is bounded too.

    In fp32, published gates evict exactly what they evict in the authors' code: every generation and every kept set
    that was compared is equal. In bf16 the two round at different places (the gate's last product is fp32 here): of
    the tokens kept, 99.5 % are the same on average and at least 94 % in each of 112 cases, where both read one text.
    ``tests/peers/authors/parity.sh`` measures it.

    The settings are read at the first forward: ``memory_size``, ``buffer_size``, ``compress_strategy`` and
    ``compress_memory`` (False keeps every token) of ``model.config``, where an argument does not replace them.

    Args, in the order of the released package 0.1.5:
        max_seq_len: accepted because published scripts pass it; slots need no longest sequence.
        memory_size: tokens that stay per KV head; turns compression on, whatever the model's config says.
        buffer_size: tokens allowed above memory_size before an eviction; 0 and 1 mean the same. Left out, it is 1
            beside a memory_size, as in the released package, and the config's otherwise.
        sliding_window_size: the newest tokens, never evicted.
        strategy: "alpha" or "knorm_alpha"; "fixed_budget", the released package's word for a cache of this kind, leaves
            the choice to the config.
        lookahead_steps: 1, the next query; no other number is supported.
        device: accepted, and not needed: slots lie where the model's keys are.
        released: num_layers, num_heads, num_blocks_ratio and block_size are accepted and have no meaning here.

    Different on purpose from the released package 0.1.5: without memory_size the config's settings count (there, no
    token is ever evicted); rows of a batch may have left padding at any time, and each evicts as if it were alone;
    beams, several turns and sequences past Phi-3's original context work.

    Raises:
        ValueError: a setting that this cache does not have, or that means nothing; the message says what to use.
    """

    def __init__(
        self,
        max_seq_len: int | None = None,
        memory_size: int | None = None,
        buffer_size: int | None = None,
        sliding_window_size: int = 0,
        strategy: str | None = None,
        lookahead_steps: int = 1,
        device=None,
        **released,
    ):
        if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int | None):
            raise ValueError(f"TrimKVCache: max_seq_len must be a number of tokens, got {type(max_seq_len).__name__}")
        if lookahead_steps != 1:
            raise ValueError(f"TrimKVCache: lookahead_steps must be 1, the next query, got {lookahead_steps!r}")
        for name, value in released.items():
            _check_released(name, value, memory_size)
        super().__init__([])
        self.memory_size, self.buffer_size, self.sliding_window_size = memory_size, buffer_size, sliding_window_size
        self.strategy = None if strategy in (None, "fixed_budget") else check_strategy(strategy, "strategy")
        if memory_size is not None:
            self._settings(None)  # what is wrong with them is said now

    def bind(self, model) -> None:
        """Makes the layers at the first forward, when the model and its final settings are known."""
        if not self.layers:
            self.layers = make_layers(model, *self._settings(model.config), chunk=None)
        super().bind(model)

    def reset(self) -> None:
        """Forgets every token and every setting: the next forward reads the model's config anew."""
        self.layers, self.long_rope = [], False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.layers:
            raise ValueError(
                "TrimKVCache is for models loaded through trimkv.models; for any other model use trimkv.attach and "
                "trimkv.bounded_cache(model, ...)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_cache_length(self, layer_idx: int = 0) -> int:
        """Tokens that a head of a layer holds now (the largest over rows and heads). Waits for the device."""
        store = self.layers[layer_idx].store if self.layers else None
        return 0 if store is None else int(store.valid.sum(-1).max())

    def get_total_cached_tokens(self, num_key_value_heads: int | None = None) -> int:
        """Tokens that all heads of all layers hold together, in the row that holds most. Waits for the device.

        Args:
            num_key_value_heads: accepted because published scripts pass it; the slots know.
        """
        return sum(int(store.valid.flatten(1).sum(-1).max()) for store in self.stores)

    def log(self, layer_idx: int | None = None) -> dict:
        """What is held: ``seen_tokens``, and ``kv_positions``, int64 [B, H, S] on the CPU, ascending, with -1 before
        the first where a row or head holds fewer. Of one layer, or a dict by layer number. Waits for the device."""
        if layer_idx is None:
            return {i: self.log(i) for i, layer in enumerate(self.layers) if layer.store is not None}
        store = self.layers[layer_idx].store
        positions = torch.where(store.valid, store.position, -1).long().sort(-1).values.cpu()
        width = self.get_cache_length(layer_idx)
        return {"seen_tokens": self.get_seq_length(), "kv_positions": positions[..., positions.shape[-1] - width :]}

    def __getattr__(self, name: str):
        hint = f"; use {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def _settings(self, config) -> tuple[Policy, Budget]:
        if self.memory_size is None and not getattr(config, "compress_memory", True):
            return make("full"), Budget(1)
        if self.memory_size is not None:
            memory, buffer = self.memory_size, _first(self.buffer_size, 1)
        else:
            memory = getattr(config, "memory_size", None)
            buffer = _first(self.buffer_size, getattr(config, "buffer_size", None), 1)
        if memory is None:
            raise ValueError("TrimKVCache: pass memory_size= or set model.config.memory_size")
        strategy = self.strategy or check_strategy(_first(getattr(config, "compress_strategy", None), "alpha"))
        # A buffer of 1 is the smallest that lets a step attend before it evicts.
        settled = {"recent": self.sliding_window_size, "split": "even"}
        budget = Budget(memory, buffer=1 if buffer == 0 else buffer, **settled)
        return make("trimkv", strategy=strategy, distance="reference"), budget


class PagedTrimKVCache:
    """The released package's cache for DBTrimKV gates: importable, as its Quick Start imports it, and not to be had.

    Raises:
        ValueError: always, with what to use.
    """

    def __init__(self, *args, memory_size: int | None = None, **kwargs):
        tokens = memory_size if memory_size is not None else args[3] if len(args) > 3 else 256
        raise ValueError(
            f"{type(self).__name__} is not supported: use TrimKVCache(memory_size={tokens}), or, for heads that share "
            f'a budget, trimkv.bounded_cache(model, "trimkv", trimkv.Budget({tokens}, scope="global"), chunk=None)'
        )


class DynamicBudgetTrimKVCache(PagedTrimKVCache):
    """The same, not paged."""

    def __init__(self, max_seq_len=None, memory_size: int | None = None, *args, **kwargs):
        super().__init__(memory_size=memory_size)


def check_strategy(strategy: str, name: str = "compress_strategy") -> str:
    """The strategy itself.

    Raises:
        ValueError: one that this cache does not have; the message lists those it has.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"{name} must be {' or '.join(STRATEGIES)}, got {strategy!r}")
    return strategy


def _check_released(name: str, value, memory_size: int | None) -> None:
    """Refuses an argument that would be followed by the released package and is not here.

    Raises:
        ValueError: with what to use.
    """
    if name in _NO_MEANING or value is None:
        return
    if name in ("alpha_threshold", "min_tokens_per_head"):
        if not value:
            return
        tokens = 256 if memory_size is None else memory_size
        option = f"threshold={value}" if name == "alpha_threshold" else f"floor={value}/{tokens}"
        raise ValueError(
            f"TrimKVCache: {name} is for heads that share a budget: use trimkv.bounded_cache(model, "
            f'"trimkv", trimkv.Budget({tokens}, scope="global", {option}), chunk=None)'
        )
    raise ValueError(
        f"TrimKVCache has no argument {name}; it takes max_seq_len, memory_size, buffer_size, sliding_window_size, "
        "strategy, lookahead_steps and device"
    )


def _first(*values):
    return next((value for value in values if value is not None), None)
