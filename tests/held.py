"""What tensors hold memory now, as torch.cuda.memory_allocated says it on a GPU."""

import contextlib
import gc

import torch


def storages() -> dict[int, int]:
    """Address -> bytes of the memory of all tensors that Python knows."""
    found = {}
    for one in gc.get_objects():
        # A FakeTensor is a compiler's stand-in, which has no memory.
        if not issubclass(type(one), torch.Tensor) or issubclass(type(one), torch._subclasses.FakeTensor):
            continue
        if one.device.type == "cpu" and one.layout == torch.strided:
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)  # of tensors without elements
    return found


@contextlib.contextmanager
def no_more_than_before():
    """Fails if, at its end, there is memory that was not held at its start. Python's collector rests meanwhile: what
    only it would free counts."""
    gc.collect()
    gc.disable()
    try:
        before = storages()
        yield
        left = {place: size for place, size in storages().items() if place not in before}
        assert not left, f"{sum(left.values()):,} B in {len(left)} tensors: {sorted(left.values(), reverse=True)[:8]}"
    finally:
        gc.enable()
