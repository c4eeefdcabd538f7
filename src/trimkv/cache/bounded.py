"""The cache object that models and generate see."""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from .ahead import Ahead
from .layers import BoundedLayer, places
from .masks import LateCheck


@dataclass(frozen=True)
class RowSnapshot:
    """A copy of one row of a cache: a fixed number of bytes, whatever the number of tokens seen."""

    layers: tuple
    long_rope: bool = False

    @property
    def tokens_seen(self) -> int:
        return next(entry["columns"] for entry in self.layers if "columns" in entry)


class BoundedCache(Cache):
    """A transformers cache whose full-attention layers live in a fixed number of slots.

    Pass it as ``past_key_values`` to ``model.generate`` or ``model(...)``; build it with ``bounded_cache``. Layers of
    other kinds (sliding windows, linear attention) keep the cache layer that transformers gives them.

    Not possible, and refused with a message: cropping, and with it assisted and prompt-lookup decoding, because evicted
    tokens cannot come back.
    """

    def __init__(self, layers: list):
        super().__init__(layers=layers)
        self.ahead: Ahead | None = None  # of a static cache whose steps the kernels do
        if self.static and Ahead.possible(self.slot_layers):
            self.ahead = Ahead(self.slot_layers)
        self.long_rope = False  # whether kept keys carry LongRoPE's long rotations (rope.py)
        self.given_mask: torch.Tensor | None = None  # of the call around the decoder's, where there is one (hooks.py)
        self.late_check = LateCheck()
        self.hooks = None  # on the decoder that this cache is used with

    def bind(self, decoder) -> None:
        """Called by the decoder's hook at the start of each forward; checks that the cache fits the decoder."""
        num_layers = decoder.config.get_text_config(decoder=True).num_hidden_layers
        if len(self.layers) != num_layers:
            raise ValueError(f"this cache has {len(self.layers)} layers, {type(decoder).__name__} has {num_layers}")
        self.hooks = decoder._trimkv_hooks

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Hands new keys and values, [B, H, T, D], to a layer. Called by transformers' attention modules.

        Raises:
            RuntimeError: the model is stock again, and its attention would not see the slots.
        """
        if self.hooks is not None and self.hooks.removed:
            raise RuntimeError("trimkv.detach took slot attention off this model: make a new cache with bounded_cache")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_positions(self, position_ids: torch.Tensor | None) -> None:
        """Refuses positions of several axes that differ (mrope, within an image) where the policy turns keys: it turns
        them by the number of the token.

        Args:
            position_ids: [B, T], or [axes, B, T] of models with mrope.

        Raises:
            ValueError: such positions.
        """
        if position_ids is None or position_ids.ndim != 3:
            return
        policy = next(layer.policy for layer in self.slot_layers)
        if "rotation" in policy.needs and bool((position_ids != position_ids[:1]).any()):
            raise ValueError(
                f"policy {policy.name} turns keys by their number in the text, and tokens of images have positions of "
                "several axes; choose another policy, or give text alone"
            )

    def reset(self) -> None:
        """Forgets every token, keeps the memory."""
        super().reset()
        self.long_rope = False
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers zeroes these and leaves their length
                layer.keys = layer.values = None
                layer.is_initialized = False

    @property
    def slot_layers(self) -> list[BoundedLayer]:
        return [layer for layer in self.layers if isinstance(layer, BoundedLayer)]

    @property
    def stores(self) -> list:
        """Where tokens are kept: a store per layer, or one that several layers share."""
        return list(dict.fromkeys(layer.store for layer in self.slot_layers if layer.store is not None))

    @property
    def all_slots(self) -> bool:
        """Whether no layer needs a mask from transformers."""
        return len(self.slot_layers) == len(self.layers)

    @property
    def static(self) -> bool:
        """Whether all slots were allocated beforehand (``bounded_cache(..., rows=R)``): a decode step is then the same
        launches for ever, and rows may be of any age."""
        return any(layer.static is not None for layer in self.slot_layers)

    @property
    def seen(self) -> torch.Tensor | None:
        """int32 [B], on the device: tokens that each row has seen, and so the position of its next one; None before the
        first forward of a cache that is not static."""
        return next((layer.store.seen for layer in self.slot_layers if layer.store is not None), None)

    @property
    def padded(self) -> bool:
        """Whether padding was ever seen."""
        return any(layer.padded for layer in self.slot_layers)

    def stage_padding(self, real_BT: torch.Tensor | None) -> None:
        """Takes which of the tokens of the coming forward are real."""
        known = None
        if self.static and real_BT is not None and real_BT.shape[1] > 1:
            known = places(self.seen, real_BT.to(self.seen.device))  # rows are of one age in all layers
        for layer in self.slot_layers:
            layer.stage_padding(real_BT, known)

    def stage_more(self, more: bool) -> None:
        """Takes whether the coming forward leaves off before the end of a prompt."""
        for layer in self.slot_layers:
            layer.stage_more(more)

    # Accounting: tokens per KV head and bytes over all layers.

    @property
    def held_tokens(self) -> int:
        """Tokens that a KV head holds now (the largest over rows and heads). Waits for the device."""
        return max((int(store.held.max()) for store in self.stores), default=0)

    @property
    def mean_held_tokens(self) -> float:
        """Tokens that a KV head holds now, on average over rows and heads. Waits for the device."""
        held = [store.held for store in self.stores]
        return sum(float(tokens.sum()) for tokens in held) / max(sum(tokens.numel() for tokens in held), 1)

    @property
    def peak_prefill_tokens(self) -> int:
        """The most tokens per head that a forward of several tokens has attended to: at most M (+ W) + chunk, where
        heads do not share a budget. Waits for the device where they do."""
        return int(max((layer.peak_prefill_tokens for layer in self.slot_layers), default=0))

    @property
    def peak_decode_tokens(self) -> int:
        """The most tokens per head that a single token has attended to: at most M (+ W), where heads do not share a
        budget. Waits for the device where they do."""
        return int(max((layer.peak_decode_tokens for layer in self.slot_layers), default=0))

    @property
    def peak_mean_tokens(self) -> float:
        """As ``peak_decode_tokens``, but the mean over all heads that share a budget, or have shares of one: at most M
        (+ W)."""
        found = [float(layer.peak_mean_tokens) for layer in self.slot_layers]
        if any(layer.budget.scope == "global" for layer in self.slot_layers):  # the last layer speaks for all
            return max(found)
        return sum(found) / len(found) if found else 0.0

    @property
    def peak_tokens(self) -> int:
        return max(self.peak_prefill_tokens, self.peak_decode_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes held between two forwards by all layers."""
        ahead = 0 if self.ahead is None else self.ahead.next_slot.nbytes + self.ahead.counters.nbytes
        return sum(store.nbytes for store in self.stores) + ahead + self._other_bytes

    @property
    def peak_bytes(self) -> int:
        """``nbytes`` and the largest copy that a prefill chunk made (one layer at a time)."""
        return self.nbytes + max((layer.transient_bytes for layer in self.slot_layers), default=0)

    def full_cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values that the stock cache would hold for this many tokens per row."""
        return self._other_bytes + self._rows() * tokens * sum(store.bytes_per_token for store in self.stores)

    @property
    def _other_bytes(self) -> int:
        others = (layer for layer in self.layers if not isinstance(layer, BoundedLayer))
        return sum(t.nbytes for layer in others for t in _tensors(vars(layer)))

    # One context, several questions.

    def snapshot(self, row: int = 0) -> RowSnapshot:
        """Copies one row out of the cache.

        Raises:
            IndexError: the cache has no such row.
        """
        self._check_row(row)
        return RowSnapshot(tuple(_snapshot_layer(layer, row) for layer in self.layers), self.long_rope)

    def restore(self, snapshot: RowSnapshot, row: int = 0, rows: int | None = None) -> None:
        """Puts a copied row into this cache or into a new one built with the same policy and budget.

        Args:
            row: where to put it.
            rows: size of the batch, for a new cache; an existing one keeps its own.

        Raises:
            ValueError: the snapshot does not fit, or the cache holds layers (sliding windows) whose rows must have seen
                equally many tokens.
        """
        if len(snapshot.layers) != len(self.layers):
            raise ValueError(f"a snapshot of {len(snapshot.layers)} layers, a cache of {len(self.layers)}")
        if self.static and rows not in (None, self._rows()):
            raise ValueError(f"this cache is static, for {self._rows()} rows: leave out rows={rows}")
        rows = rows or self._rows() or 1
        if not 0 <= row < rows:
            raise IndexError(f"row {row} of a cache with {rows} rows")
        if rows > 1 and not self.all_slots:
            raise ValueError("restore into a batch works for models whose layers all have full attention")
        if rows > 1 and not self.static and self.get_seq_length() not in (0, snapshot.tokens_seen):
            raise ValueError(
                f"rows of a batch share their sequence length: this cache has seen {self.get_seq_length()} tokens, "
                f"the snapshot {snapshot.tokens_seen}"
            )
        self.long_rope = snapshot.long_rope
        for i, (layer, entry) in enumerate(zip(self.layers, snapshot.layers, strict=True)):
            if isinstance(layer, BoundedLayer):
                layer.restore(row, entry, rows)
            else:
                self.layers[i] = _copy(entry["layer"])

    def copy_row(self, source: "BoundedCache", source_row: int, row: int) -> None:
        """Copies a row of another cache of the same policy and budget into a row of this static one, in place: what
        ``restore(source.snapshot(source_row), row)`` does, without a second copy.

        Raises:
            ValueError: this cache is not static, or the row does not fit.
            IndexError: there is no such row.
        """
        self._check_static("copy_row")
        if len(source.layers) != len(self.layers):
            raise ValueError(f"a cache of {len(source.layers)} layers to copy from, one of {len(self.layers)} to")
        source._check_row(source_row)
        self._check_row(row)
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.copy_row(theirs, source_row, row)

    def open(self) -> None:
        """Brings all slots of a static cache into view: from now on a chunk of so many tokens is the same launches
        whatever the rows hold, and an attention_mask is followed on the device.

        Raises:
            ValueError: this cache is not static.
        """
        self._check_static("open")
        for layer in self.layers:
            layer.open()

    def take_row(self, source: "BoundedCache", row_1: torch.Tensor) -> None:
        """``copy_row`` and ``refresh`` on the device alone, to be captured as a graph. Both caches are static and open.

        Args:
            source: of one row.
            row_1: int64 [1], where to put it.
        """
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.store.put_row(row_1, theirs.store)
        if self.ahead is not None:
            self.ahead.find()

    def took_row(self, source: "BoundedCache") -> None:
        """What the host has to know of ``take_row``."""
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.columns = max(mine.columns, theirs.columns)
        if self.ahead is not None:
            self.ahead.stale = False

    def begin_step(self, real_B1: torch.Tensor | None) -> None:
        """Called by the model's hook before a forward of one token per row."""
        if self.ahead is not None:
            self.ahead.begin(real_B1)

    def refresh(self) -> None:
        """Makes a static cache ready for the replay of a captured decode step. Call it after ``copy_row``, ``restore``,
        ``clear_rows``, ``reset`` or a prompt, in any number; it does nothing where nothing has changed."""
        if self.ahead is not None:
            self.ahead.refresh()

    def clear_rows(self, rows: "int | list[int]") -> None:
        """Forgets the tokens of some rows of a static cache, in place; the others do not notice.

        Raises:
            ValueError: this cache is not static.
            IndexError: there is no such row.
        """
        self._check_static("clear_rows")
        rows = [rows] if isinstance(rows, int) else list(rows)
        for row in rows:
            self._check_row(row)
        for layer in self.layers:
            for row in rows:
                layer.clear_row(row)

    def _check_static(self, call: str) -> None:
        if not self.static:
            raise ValueError(f"{call} is for static caches: make one with bounded_cache(..., rows=R)")

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self._rows():
            raise IndexError(f"row {row} of a cache with {self._rows()} rows")

    def _rows(self) -> int:
        stores = self.stores
        return stores[0].seen.shape[0] if stores else 0

    # Refused.

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("a bounded cache cannot be cropped: evicted tokens are gone; use snapshot() and restore()")

    def activate_past_recording(self) -> None:
        raise ValueError(
            "assisted and prompt-lookup decoding need a cache that can take tokens back; a bounded cache cannot, "
            "use plain decoding"
        )


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _copy(value):
    """A copy of a cache layer that shares no tensor with it, nor a graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    if isinstance(value, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        layer = copy.copy(value)
        vars(layer).update({key: _copy(item) for key, item in vars(value).items()})
        return layer
    return value


def _snapshot_layer(layer, row: int) -> dict:
    if isinstance(layer, BoundedLayer):
        return layer.snapshot(row)
    layer = _copy(layer)
    layer.reorder_cache(torch.tensor([row]))
    return {"layer": layer}
