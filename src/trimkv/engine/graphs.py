"""A step as CUDA graphs: thousands of small kernels without a launch each."""

from collections.abc import Callable

import torch


class Graphs:
    """Calls ``step(*key)`` as a graph, one per key, all in one pool of memory.

    ``step`` works on the same tensors at every call, returns nothing, and launches the same kernels for a key.

    Args:
        idle: a context in which a step changes nothing that counts: kernels are compiled and libraries get their
            workspaces by running it a few times before it is captured.
        pool: of memory, shared with other graphs: what a step leaves behind for others lies in tensors outside of it.
    """

    def __init__(self, step: Callable[..., None], idle: Callable, pool=None):
        self.step, self.idle, self.pool = step, idle, pool
        self.captured: dict[tuple, torch.cuda.CUDAGraph] = {}

    def __call__(self, *key) -> None:
        if key not in self.captured:
            self.capture(*key)
        self.captured[key].replay()

    def capture(self, *key) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        with self.idle():
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.step(*key)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(*key)
        self.pool = self.pool or graph.pool()
        self.captured[key] = graph
