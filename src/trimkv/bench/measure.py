"""Clocks, memory, and what the hardware can do at best: all of the same run."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

COPIED = 2**32  # bytes of the copies that bandwidth is measured by, on a GPU; a 64th of that on a CPU


class Wrong(Exception):
    """A system gave a wrong result: it gets no number."""


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable, device: torch.device, repeat: int = 5, inner: int = 1, warm: int = 1) -> float:
    """Median time of ``inner`` calls, by call."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeat):
        settle(device)
        start = time.perf_counter()
        for _ in range(inner):
            call()
        settle(device)
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times) * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written.

    On a GPU by its own clock, and not in a graph, where a copy engine does it, more slowly.
    """
    if device.type != "cuda":
        source = torch.ones(COPIED // 64 // 4, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 7, 3) * 1e3
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_milliseconds(lambda: target.copy_(source), 10, 2) * 1e3


def event_milliseconds(call: Callable, repeat: int, warm: int = 3) -> float:
    """Median time of a call by the GPU's own clock."""
    times = []
    for n in range(repeat + warm):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if n >= warm:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graph_milliseconds(calls: list[Callable], repeat: int) -> float:
    """Median time of a call, all of them in one graph that is replayed."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_milliseconds(graph.replay, repeat) / len(calls)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device, 5, 3) * 1e3


def replayed(calls: list[Callable], device: torch.device, repeat: int) -> float:
    """Milliseconds of a call, many in one graph where there are graphs."""
    if device.type == "cuda":
        return graph_milliseconds(calls, repeat)

    def everything() -> None:
        for call in calls:
            call()

    return milliseconds(everything, device, repeat) / len(calls)


class Peak:
    """The most memory while something runs, in bytes, weights included.

    On a GPU what its allocator gave out. On a CPU the process's resident memory at the end, which is no peak: a
    process does not forget one.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self):
        clean(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = resident_bytes()


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say (it is not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def clean(device: torch.device) -> None:
    """Gives back what the last system held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row(system: str, where: dict, measured: Callable[[], dict], device: torch.device) -> dict:
    """A row of a result. A system that is wrong, or that the memory is too small for, gets its error in place of
    numbers, and the others go on. ``mendable`` says whether other options would help."""
    mendable = False
    nothing = {"ms": None, "tokens_per_second": None, "peak_bytes": None, "floor_ms": None, "fraction_of_floor": None}
    try:
        with Peak(device) as peak:
            found = measured()
        floor = found["floor_ms"]
        numbers = {**found, "peak_bytes": peak.bytes, "fraction_of_floor": floor / found["ms"]}
        return {"system": system, **where, **{**nothing, **numbers}}
    except Wrong as error:
        text = f"wrong: {error}"
    except (RuntimeError, ValueError, NotImplementedError, AssertionError, TypeError, AttributeError) as error:
        # What torch.compile or a kernel may throw; the traceback is of no use in a table.
        memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        mendable = memory or type(error) is ValueError
        said = " ".join(str(error).split())[:300]
        text = "out of memory" if memory else said if mendable else f"{type(error).__name__}: {said}"
    finally:
        clean(device)
    return {"system": system, **where, **nothing, "error": text, "mendable": mendable}
