"""Which decode steps the fused kernels take over. They are imported only where they can run."""

import os

import torch


def kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """The module of fused kernels if it can serve such tensors, else None: then it is plain torch."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from ..attention import slots_triton
    except ImportError:  # a build of torch without triton
        return None
    return None if slots_triton.unsupported(q, k, v) else slots_triton
