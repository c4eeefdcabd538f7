"""What is known before a decode step of a static cache begins, for all its layers at once.

A step is hundreds of small launches, and each costs as much as a good part of a layer's attention. So what every layer
needs alike is made once a step: where the new tokens stand, and the slots they go to, which the step before has found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..hf.lasting import lasting
from . import fused
from .layers import BoundedLayer


class Ahead:
    """The common tensors of the L layers of a static cache, whose addresses never change.

    Attributes:
        seen: int32 [L, B]; each store's ``seen`` is a row of it.
        next_slot: int32 [L, B, H], where the next token goes: written by the kernels, and found anew where anything
            else has touched a store.
        counters: int32 [B * H], zero between launches: who of a head's programs arrives last joins its parts.
        kernels: what does the steps.
        stream: where gates run while a step is captured, beside the projections, which do not wait for them; None
            leaves them where they are.
        real: bool [B, 1], which rows the step that is running is for; None: all.
        slot, now: of that step, once a layer has asked for its places: [L, B, H], -1 in rows that are not real; [B].
        stale: whether ``next_slot`` must be found anew. A host flag: what changes a store outside of a step is called
            by the host.
    """

    @lasting
    def __init__(self, layers: list[BoundedLayer]):
        L, B, H = len(layers), len(layers[0].store.seen), layers[0].static.heads
        device = layers[0].static.device
        self.layers = layers
        self.seen = torch.zeros(L, B, dtype=torch.int32, device=device)
        self.next_slot = torch.zeros(L, B, H, dtype=torch.int32, device=device)
        self.counters = torch.zeros(B * H, dtype=torch.int32, device=device)
        self.real = self.slot = self.now = None
        self.stale = True
        self.stream: torch.cuda.Stream | None = None
        self.kernels = self._kernels(layers[0])
        for i, layer in enumerate(layers):
            layer.store.seen = self.seen[i]
            layer.ahead, layer.which = self, i

    @staticmethod
    def possible(layers: list[BoundedLayer]) -> bool:
        """Whether the kernels can look ahead for these layers: alike, on one device, by a score known beforehand."""
        first = layers[0]
        same = all(layer.static == first.static for layer in layers)
        return same and first.looks_ahead and Ahead._kernels(first) is not None

    @staticmethod
    def _kernels(layer: BoundedLayer):
        k, v = layer.static.empty(1)
        return fused.kernels(k, k, v)

    def begin(self, real_B1: torch.Tensor | None) -> None:
        """Starts a step: rows that are not real write nothing and see nothing."""
        self.refresh()
        self.real, self.slot, self.now = real_B1, None, None

    def places(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a layer's new tokens go in this step, [B, H], and their positions, [B]."""
        if self.slot is None:  # nobody who begins steps for all layers has done it (beginning.py)
            self.now = self.seen[0].clone()
            if self.real is None:
                self.slot = self.next_slot.clone()
                self.seen += 1
            else:
                real_B1 = self.real.to(self.seen.device)
                self.slot = self.next_slot.masked_fill(~real_B1, -1)
                self.seen += real_B1[:, 0]
        return self.slot[layer], self.now

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work that is not waited for before ``join``."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Waits, on the device, for what was done beside."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def refresh(self) -> None:
        """Finds the next slots by plain torch if anything but a step has touched the stores."""
        if not self.stale:
            return
        if self.seen.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call cache.refresh() before capturing a graph: rows have changed since the last step")
        self.find()

    def find(self) -> None:
        """``refresh`` whatever has happened, which may be captured."""
        for layer, next_slot in zip(self.layers, self.next_slot, strict=True):
            next_slot.copy_(layer.find_slot()[..., 0])
        self.stale = False
