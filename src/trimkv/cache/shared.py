"""The transformers cache layer for heads that share a budget."""

import math
from dataclasses import dataclass, field

import torch

from ..attention import slots as attention
from ..budget import Budget
from . import shares
from .layers import BoundedLayer
from .policies import Policy
from .pool import Pool
from .slots import NewTokens, Slots


@dataclass
class Share:
    """What the layers of one budget have in common: a pool, and the tokens of a chunk that wait for the last layer."""

    layers: int
    pool: Pool | None = None
    waiting: list[Slots] = field(default_factory=list)


class SharedLayer(BoundedLayer):
    """One attention layer whose heads share a budget with each other (scope "layer") or with all layers' ("global").

    The order of time, for both. A decode step: before the first layer that shares attends, as many slots are freed as
    tokens arrive, one per head of each layer; each layer writes its tokens into the slots it was given and attends. So
    the heads of a row never attend to more than their budget. A chunk: each layer's queries attend to its kept tokens
    and the chunk; after the last layer that shares, the best of all tokens are kept. Until then a global scope keeps
    the chunk's tokens of all layers, which ``transient_bytes`` counts.

    Args:
        policy: one that is ``comparable``.
        share: the same object for all layers that share.
        place: the layer's number among them, in the order of the forward pass.
    """

    def __init__(self, policy: Policy, budget: Budget, chunk: int | None, layer_idx: int, share: Share, place: int = 0):
        self.share, self.place, self.peak_mean = share, place, 0.0
        super().__init__(policy, budget, chunk, layer_idx)

    @property
    def store(self) -> Pool | None:
        return self.share.pool

    @store.setter
    def store(self, pool: Pool | None) -> None:
        self.share.pool = pool

    @property
    def peak_mean_tokens(self):
        return self.peak_mean

    @property
    def _last(self) -> bool:
        return self.place == self.share.layers - 1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.store = Pool(self.budget, self.share.layers, key_states, value_states, self.policy.state, self.facts)
        self.share.waiting.clear()

    def update(self, key_states, value_states, *args, **kwargs):
        T = key_states.shape[2]
        if self.share.layers > 1 and self.chunk is not None and T > self.chunk:
            raise ValueError(
                f"a budget of scope global cuts all layers together, after a forward of at most {self.chunk} tokens, "
                f"and got {T}: feed the prompt with trimkv.prefill, or make the cache with a larger chunk or chunk=None"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        pool = self.store
        if (keys.shape[1], keys.shape[3], values.shape[3]) != (pool.H, pool.k.shape[2], pool.v.shape[2]):
            raise ValueError("a budget of scope global needs the same heads in all layers; use scope layer")
        if keys.device != pool.device:
            raise ValueError("a budget of scope global needs all layers on one device; use scope layer")
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return keys, values

    def reset(self) -> None:
        super().reset()
        self.share.waiting.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.place == 0:  # the pool is everyone's
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.place == 0:
            super().batch_select_indices(indices)

    def offload(self) -> None:
        if self.place == 0:
            super().offload()

    def prefetch(self) -> None:
        if self.place == 0:
            super().prefetch()

    # The work.

    def _decode(self, new: NewTokens, real) -> torch.Tensor:
        pool, real_B = self.store, None if real is None else real[:, 0]
        if self.place == 0:
            self._expire(arriving=1)
        if pool.fits(1):
            self._append(new, real)
        else:
            if self.place == 0:
                pool.make_room(lambda slots, head: self._order(slots, head, arriving=1), real_B)
            pool.write(self.place, new)
        held = pool.view(self.place)
        self.transient_bytes = max(self.transient_bytes, held.nbytes, pool.choice_bytes(0))
        mask = None if pool.tight else held.valid[:, :, None, :]
        if mask is not None and real is not None:
            mask = mask | ~real[:, None, None, :]
        out = self._attend(held, new, real, mask)
        if self._last:
            held = pool.held
            self.peak_decode_tokens = self._most(self.peak_decode_tokens, held.amax())
            self.peak_mean = self._most(self.peak_mean, held.sum(-1).amax() / pool.N)
            pool.advance(1, real)
        return out

    def _prefill(self, new: NewTokens, real) -> torch.Tensor:
        pool, share, T = self.store, self.share, new.k.shape[2]
        fits, first = pool.fits(T), pool.used == 0
        if fits:
            self._append(new, real)
        together = new if first else pool.view(self.place) if fits else self._with_new(new)
        mask = None
        if real is not None or not pool.tight:
            mask = attention.position_rule(new.position[:, 0], together.position)
        elif not first:
            mask = attention.causal_mask(T, together.k.shape[2], new.k.device)
        out = self._attend(together, new, real, mask)
        if not fits:
            share.waiting.append(self._owned(new))
        waiting = sum(part.nbytes for part in share.waiting) if share.layers > 1 else 0
        # What was gathered and, beside it, the same with the chunk.
        copies = 0 if first else together.nbytes if fits else together.nbytes * (2 * pool.width + T) // (pool.width + T)
        choice = pool.choice_bytes(T) if self._last and not fits else 0
        self.transient_bytes = max(self.transient_bytes, waiting + max(copies, choice))
        del together
        if self._last:
            arrived = 0 if fits else T if real is None else real.sum(-1, keepdim=True)
            self.peak_prefill_tokens = self._most(self.peak_prefill_tokens, (pool.held + arrived).amax())
            pool.advance(T, real)
            if not fits:
                pool.select(self._order, share.waiting)
                share.waiting.clear()
            self._expire()
        return out

    def _expire(self, arriving: int = 0) -> None:
        if self.budget.threshold:
            self.store.expire(lambda slots: self._score(slots, arriving), math.log(self.budget.threshold))

    def _append(self, new: NewTokens, real) -> None:
        pool = self.store
        if self.place == 0:
            pool.width += new.k.shape[2]
            pool.tight &= real is None
        pool.append(self.place, new)

    def _with_new(self, new: Slots) -> Slots:
        held = self.store.view(self.place)
        k, v = torch.cat([held.k, new.k], 2), torch.cat([held.v, new.v], 2)
        return Slots(k, v, torch.cat([held.position, new.position], 2), {}, self.facts)

    def _owned(self, new: Slots) -> Slots:
        """New tokens that wait for other layers: copies, for they may be views of a larger tensor."""
        k, v = (t.clone() if self.share.layers > 1 else t for t in (new.k, new.v))
        return Slots(k, v, new.position, new.state, self.facts)

    def _order(self, slots: Slots, head: torch.Tensor, arriving: int = 0) -> torch.Tensor:
        """``shares.order`` by the policy's score; sinks and recent tokens of every head are protected."""
        now = self.store.seen[:, None, None]
        return shares.order(self._score(slots, arriving), slots.position, now, head, self.store.N)

    @staticmethod
    def _most(peak, value: torch.Tensor) -> torch.Tensor:
        """The larger one, on the device: a decode step reads nothing back."""
        return torch.maximum(peak, value) if isinstance(peak, torch.Tensor) else value

    # A row, copied out and put back: the first layer has the pool, the others their numbers.

    def snapshot(self, row: int) -> dict:
        held = self.store.snapshot(row) if self.store is not None and self.place == 0 else None
        return {"store": held, "columns": self.columns, "padded": self.padded, "count": 0}

    def restore(self, row: int, snapshot: dict, rows: int) -> None:
        held = snapshot["store"]
        if held is None and self.place == 0:
            self.reset()
            return
        if held is not None:
            if self.store is None or self.store.seen.shape[0] != rows:
                k, v = held["tensors"]["k"], held["tensors"]["v"]
                self.lazy_initialization(*(t.new_empty(rows, held["heads"], 0, t.shape[-1]) for t in (k, v)))
            self.store.restore(row, held)
            self.share.waiting.clear()
        self.padded = snapshot["padded"] if rows == 1 else True
        self.columns = snapshot["columns"]
