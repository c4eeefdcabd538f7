"""torch.compile for what lies between a model's matrix products, for the time of a captured decode step.

Norms, feed-forward blocks, gates and rotary embedding are a dozen small launches each when they run as they are
written. Compiled apart from the layer around them, they need no hook, cache or attention to be traced, and one
compilation serves all layers.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..hf.model import decoder_of
from ..hf.substitute import stock, substituted
from ..ranks import sharded

ROTATION = "apply_rotary_pos_emb"  # in the file of every model that rotates its keys


@contextmanager
def compiled_parts(model) -> Iterator[None]:
    """Within it, and in this thread alone, the small parts of a decoder run compiled."""
    decoder = decoder_of(model)
    parts = [module for name, module in decoder.named_modules() if _is_part(name, module)]
    files = {sys.modules[type(module).__module__] for module in decoder.modules()}
    files = [file for file in files if hasattr(file, ROTATION)]
    compiled = [(module, torch.compile(stock(module), dynamic=False)) for module in parts]
    rotations = [(file, torch.compile(stock(file, ROTATION), dynamic=False)) for file in files]
    # The norms of all layers, and of heads, are one code with a few shapes.
    with substituted(compiled), substituted(rotations, ROTATION), torch._dynamo.config.patch(recompile_limit=64):
        yield


def _is_part(name: str, module: torch.nn.Module) -> bool:
    kind, last = type(module).__name__, name.rsplit(".", 1)[-1]
    if last == "mlp" and sharded(module) or getattr(module, "sums", False):
        return False  # sums over processes are not for the compiler
    return kind.endswith(("RMSNorm", "LayerNorm")) or last in ("mlp", "retention_gate")
