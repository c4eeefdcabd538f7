"""Puts other functions in the place of modules' ``forward`` for one thread: other threads see the stock ones."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

_active: ContextVar = ContextVar("substituted functions", default=MappingProxyType({}))
_lock = threading.Lock()


class _Dispatch:
    """Stands in ``owner.name``: calls the substitute of the running context, elsewhere the stock function."""

    def __init__(self, owner, name: str):
        self.owner, self.name, self.users = owner, name, 0
        self.own = vars(owner).get(name)  # None where a class has it
        self.stock = getattr(owner, name)

    def __call__(self, *args, **kwargs):
        return _active.get().get((id(self.owner), self.name), self.stock)(*args, **kwargs)


def stock(owner, name: str = "forward") -> Callable:
    """The function that was there before any substitute."""
    found = vars(owner).get(name)
    return found.stock if isinstance(found, _Dispatch) else getattr(owner, name)


@contextmanager
def substituted(places: Sequence[tuple], name: str = "forward") -> Iterator[None]:
    """Within it, calls in this thread of ``owner.name`` go to ``function``, for each (owner, function) of ``places``.

    Several threads may do so at once, with the same owners. A substitute that wants the function whose place it takes
    asks ``stock`` for it.
    """
    with _lock:
        for owner, _ in places:
            found = vars(owner).get(name)
            if not isinstance(found, _Dispatch):
                found = _Dispatch(owner, name)
                setattr(owner, name, found)
            found.users += 1
    token = _active.set({**_active.get(), **{(id(owner), name): function for owner, function in places}})
    try:
        yield
    finally:
        _active.reset(token)
        with _lock:
            for owner, _ in places:
                found = vars(owner)[name]
                found.users -= 1
                if found.users:
                    continue
                if found.own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, found.own)
