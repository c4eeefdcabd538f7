"""Kernels of a decode step that are launched before the one before them is done (programmatic dependent launch).

A step is two hundred launches of a few microseconds, and the memory stands still between two of them. On Hopper and
later a kernel may be launched early: its programs take their places, do what does not depend on the kernel before, and
wait for it. products_hopper.py and slots_hopper.py fill shared memory with weights and slots meanwhile. To fetch them
into registers or the L2 cache, in Triton's own language, was tried and lost (docs/LOG.md).

Every program of a kernel that is launched so must wait: the kernel after it relies on this one having seen its own
predecessors through. Before it waits it may read weights, what earlier steps have written, and what the first kernel of
a step has, which is not launched early and lets nobody begin before it is done: a kernel begins when the one before it
has begun, so that all but the first come after the first. It reads nothing else, and writes nothing.
"""

import torch
import triton
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
