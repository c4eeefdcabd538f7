"""A decode step of a static cache, captured once as a CUDA graph and replayed for ever."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ..hf.calls import with_cache
from ..hf.lasting import lasting
from .bounded import BoundedCache
from .compiled import compiled_parts
from .fused_layers import recognise

WARM_UP = 3  # eager steps before the capture: kernels compile and libraries allocate their workspaces


class DecodeStep:
    """One token per row through a model with a static cache; on a GPU a graph, elsewhere the same forward.

    Call it as often as you like. Between calls rows may be copied in, restored and cleared; that is seen to here.

    Args:
        model: the model that the cache was made for.
        cache: a static one. What it holds is not touched.
        compile: also torch.compile for the small parts between matrix products (compiled.py). Half a minute's wait
            once, then a fraction of the launches.
        overlap: let gates run beside the projections, as a branch of the graph.
        fused: whole layers as a few launches each (fused_layers.py), which leaves nothing to ``compile``, ``overlap``.

    Raises:
        ValueError: a cache that is not static; with ``fused``, a model that is not recognised.
    """

    @lasting
    def __init__(self, model, cache: BoundedCache, compile: bool = False, overlap: bool = False, fused: bool = False):
        if not cache.static:
            raise ValueError("a decode step for ever needs a static cache: make one with bounded_cache(..., rows=R)")
        self.model, self.cache, self.compile = model, cache, compile
        self.fused = recognise(model, cache.slot_layers[0].policy) if fused else None
        rows, device = len(cache.seen), cache.seen.device
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.active = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.logits = self.graph = None
        if device.type == "cuda":
            if overlap and not fused and cache.ahead is not None:
                cache.ahead.stream = torch.cuda.Stream(device)
            try:
                self._capture()
            finally:
                if cache.ahead is not None:
                    cache.ahead.stream = None

    @torch.no_grad()
    def __call__(self, token_B: torch.Tensor, active_B: torch.Tensor | None = None) -> torch.Tensor:
        """Feeds a token to each active row (None: all are). Returns logits [B, V], overwritten by the next call."""
        self.token.copy_(token_B[:, None])
        if active_B is None:
            self.active.fill_(True)
        else:
            self.active.copy_(active_B[:, None])
        self.cache.refresh()
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()
        return self.logits

    def _parts(self) -> AbstractContextManager:
        if self.fused is not None:
            return self.fused.running()
        return compiled_parts(self.model) if self.compile else nullcontext()

    def _forward(self) -> None:
        # Fused layers need no positions of their own; given none, the cache's hook would make some.
        position = None if self.fused is None else self.cache.seen[:, None]
        given = dict(attention_mask=self.active, position_ids=position, use_cache=True)
        with self._parts():
            out = self.model(self.token, **given, **with_cache(self.model, self.cache))
        self.logits = out.logits[:, -1]

    @torch.no_grad()
    def _capture(self) -> None:
        """Warms up and captures with no row active: nothing that the cache holds changes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.refresh()
        self.graph = torch.cuda.CUDAGraph()
        # A library's workspace belongs to the stream that was captured. Who works on a stream of his own, as steps that
        # run side by side do, has one of his own by capturing there.
        current = torch.cuda.current_stream()
        own = None if current == torch.cuda.default_stream() else current
        with torch.cuda.graph(self.graph, stream=own):
            self._forward()
