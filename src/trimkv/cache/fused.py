"""Which decode steps the fused kernels take over. They are imported only where they can run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import device

_off = False


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within it, plain torch serves: to compare with. A static cache keeps what it was made with."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """The module of fused kernels if it can serve such tensors, else None: then it is plain torch."""
    if _off or not device.runs_kernels(q):
        return None
    try:
        from ..attention import slots_triton
    except ImportError:  # a build of torch without triton
        return None
    return None if slots_triton.unsupported(q, k, v) else slots_triton


def projected_kernels(num_query_heads: int, k: torch.Tensor):
    """The module that decodes from a layer's projections if it can serve a store of such keys, [B, H, C, D], else
    None."""
    if _off or not k.is_cuda:
        return None
    try:
        from ..attention import slots_hopper
    except ImportError:  # no Triton, or one without this Gluon
        return None
    return slots_hopper if slots_hopper.serves(num_query_heads, k) else None
