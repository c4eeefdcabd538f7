"""Processes that train together: what a launcher (torchrun, accelerate launch) tells each of them."""

import os


def number() -> int:
    """Which of the processes this is, from 0; number 0 speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_gpu() -> None:
    """Makes "cuda" mean this process's own GPU.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    import torch

    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"process {local + 1} of this machine has no GPU, there are {gpus}: start {gpus} processes")
    torch.cuda.set_device(local)


def wait() -> None:
    """Until all processes are here: what number 0 has written can be read."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Ends the communication, so that the launcher has nothing to warn of."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        wait()
        dist.destroy_process_group()
