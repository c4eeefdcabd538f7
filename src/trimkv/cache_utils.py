"""The cache of the published Quick Start: ``from trimkv.cache_utils import TrimKVCache``."""

from .budget import Budget
from .cache.bounded import BoundedCache
from .cache.build import make_layers
from .cache.policies import Policy, make
from .cache.policies.trimkv import STRATEGIES


class TrimKVCache(BoundedCache):
    """A bounded cache that takes its settings from the model it meets, with the published timing.

    A prompt attends in full. After a forward in which a head holds ``memory_size + buffer_size`` tokens or more, its
    best ``memory_size`` stay. Ages are counted as in the released code, one more than the next query's distance, so
    that published gates evict what they evict there. ``trimkv.bounded_cache`` is the strict form: exact ages, and a
    prompt that is bounded too.

    The settings are read at the first forward: ``memory_size``, ``buffer_size``, ``compress_strategy`` and
    ``compress_memory`` (False keeps every token) of ``model.config``, where an argument does not replace them.

    Args:
        memory_size: tokens that stay per KV head; turns compression on, whatever the model's config says.
        buffer_size: tokens allowed above memory_size before an eviction; 0 and 1 mean the same.
        sliding_window_size: the newest tokens, never evicted.
        strategy: "alpha" or "knorm_alpha"; "fixed_budget", a later name of this cache's kind, says nothing about them.
        max_seq_len, device: accepted because published scripts pass them; slots need neither.
    """

    def __init__(
        self,
        *,
        memory_size: int | None = None,
        buffer_size: int | None = None,
        sliding_window_size: int = 0,
        strategy: str | None = None,
        max_seq_len: int | None = None,
        device=None,
    ):
        super().__init__([])
        self.memory_size, self.buffer_size, self.sliding_window_size = memory_size, buffer_size, sliding_window_size
        self.strategy = None if strategy == "fixed_budget" else strategy

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

    def _settings(self, config) -> tuple[Policy, Budget]:
        if self.memory_size is None and not getattr(config, "compress_memory", True):
            return make("full"), Budget(1)
        memory = _first(self.memory_size, getattr(config, "memory_size", None))
        if memory is None:
            raise ValueError("TrimKVCache: pass memory_size= or set model.config.memory_size")
        buffer = _first(self.buffer_size, getattr(config, "buffer_size", None), 1)
        strategy = check_strategy(_first(self.strategy, getattr(config, "compress_strategy", None), "alpha"))
        # A buffer of 1 is the smallest that lets a step attend before it evicts.
        settled = {"recent": self.sliding_window_size, "split": "even"}
        budget = Budget(memory, buffer=1 if buffer == 0 else buffer, **settled)
        return make("trimkv", strategy=strategy, distance="reference"), budget


def check_strategy(strategy: str) -> str:
    """The strategy itself.

    Raises:
        ValueError: one that this cache does not have; the message lists those it has.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"compress_strategy must be {' or '.join(STRATEGIES)}, got {strategy!r}")
    return strategy


def _first(*values):
    return next((value for value in values if value is not None), None)
