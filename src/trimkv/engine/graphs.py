"""A step as CUDA graphs: thousands of small kernels without a launch each."""

import gc
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
        # It is tried on the stream that is current: each further stream would take a workspace of cuBLAS for good.
        with self.idle():
            for _ in range(2):
                self.step(*key)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(*key)
        self.pool = self.pool or graph.pool()
        self.captured[key] = graph


def give_back() -> None:
    """After graphs are gone: gives their memory back to the device.

    In capturing them, torch has lent cuBLAS a workspace (32 MB on Hopper) that it never takes back by itself. All such
    workspaces are taken back, and lent again when they are needed. Not where other graphs are left in this process:
    they have the workspaces' addresses.
    """
    gc.collect()
    if not any(issubclass(type(one), torch.cuda.CUDAGraph) for one in gc.get_objects()):
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
