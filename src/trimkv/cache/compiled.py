"""torch.compile for what lies between a model's matrix products, for the time of a captured decode step.

Norms, feed-forward blocks, gates and rotary embedding are a dozen small launches each when they run as they are
written. Compiled apart from the layer around them, they need no hook, cache or attention to be traced, and one
compilation serves all layers.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..ranks import sharded

ROTATION = "apply_rotary_pos_emb"  # in the file of every model that rotates its keys


@contextmanager
def compiled_parts(model) -> Iterator[None]:
    """Within it, the small parts of a decoder run compiled; after it, the model is as it was."""
    decoder = model.get_decoder()
    parts = [module for name, module in decoder.named_modules() if _is_part(name, module)]
    files = {sys.modules[type(module).__module__] for module in decoder.modules()}
    files = [file for file in files if hasattr(file, ROTATION)]
    rotations = [getattr(file, ROTATION) for file in files]
    try:
        for module in parts:
            module.forward = torch.compile(module.forward, dynamic=False)
        for file, rotation in zip(files, rotations, strict=True):
            setattr(file, ROTATION, torch.compile(rotation, dynamic=False))
        # The norms of all layers, and of heads, are one code with a few shapes.
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        for module in parts:
            module.__dict__.pop("forward", None)
        for file, rotation in zip(files, rotations, strict=True):
            setattr(file, ROTATION, rotation)


def _is_part(name: str, module: torch.nn.Module) -> bool:
    kind, last = type(module).__name__, name.rsplit(".", 1)[-1]
    if last == "mlp" and sharded(module) or getattr(module, "sums", False):
        return False  # sums over processes are not for the compiler
    return kind.endswith(("RMSNorm", "LayerNorm")) or last in ("mlp", "retention_gate")
