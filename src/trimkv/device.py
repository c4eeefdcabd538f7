"""What kernels ask of the device that they run on.

Triton launches on the current device, which need not be the tensor's: launches stand within torch.cuda.device_of.
"""

import functools
import os

import torch

HOPPER_BYTES = 227 * 1024  # of shared memory for one block of threads


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is installed with torch for CUDA."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether Triton kernels run on the device of x: a GPU, or any in Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def multiprocessors(x: torch.Tensor) -> int:
    """How many there are on the GPU of x."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def much_shared_memory(x: torch.Tensor) -> bool:
    """Whether a block of threads has a Hopper's shared memory on the device of x; without a GPU there is no limit."""
    return not x.is_cuda or torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin >= HOPPER_BYTES


def hopper(x: torch.Tensor) -> bool:
    """Whether x is on a GPU of compute capability 9, which products_hopper.py and slots_hopper.py are written for."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
