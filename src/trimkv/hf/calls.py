"""How models are called with a cache, whose argument has another name from release to release of transformers."""

import functools
import inspect

from transformers.cache_utils import Cache

from .model import decoder_of

NAMES = ("cache", "past_key_values")  # the first from transformers 5.18 on


def cache_argument(model) -> str:
    """The name of the argument of a model, its decoder and ``generate`` that takes the cache."""
    return _name(type(decoder_of(model)))


def with_cache(model, cache) -> dict:
    """The keyword argument that hands a cache to a model, its decoder or ``generate``."""
    return {cache_argument(model): cache}


def cache_in(args: tuple, kwargs: dict) -> Cache | None:
    """The cache among the arguments of a call, whatever its name there."""
    for name in NAMES:
        found = kwargs.get(name)
        if found is not None:
            return found
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)


@functools.cache
def _name(decoder_class: type) -> str:
    parameters = inspect.signature(decoder_class.forward).parameters
    return next((name for name in NAMES if name in parameters), NAMES[-1])
