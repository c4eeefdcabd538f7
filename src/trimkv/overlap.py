"""Kernels of a decode step that begin before the one before them is done (programmatic dependent launch).

A step is two hundred launches of a few microseconds. Between two of them the memory would stand still: the last blocks
of one end, the next is launched, its first loads travel. On Hopper and later a kernel may be launched early: it fetches
what nobody writes, its weights, into the L2 cache, and only then waits for the results of the kernel before it.

What a kernel may do before ``wait``: read what no kernel of the step writes, and fetch anything (a fetch only moves
lines into the cache that all share). Every program of a kernel that is launched so must wait: the kernel after it
relies on this one having seen its own predecessors through.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

ON = True  # whether kernels overlap where the device can


def overlaps(x: torch.Tensor) -> bool:
    """Whether kernels on the device of x can be launched early."""
    return ON and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch(early: bool) -> dict:
    """Options of a kernel's launch; ``early`` as ``overlaps`` said."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def let_next_begin():
    """From here on the next kernel may be launched: once every program of this one has come by."""
    cuda.gdc_launch_dependents()


@triton.jit
def wait():
    """Until all kernels before this one are done and what they wrote can be seen."""
    cuda.gdc_wait()


@triton.jit
def fetch(pointers, size):
    """Brings so many bytes from each of these addresses on into the L2 cache; nobody waits for them.

    Addresses and sizes are multiples of 16, and what they cover is allocated.
    """
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
