"""Released names that are not here: importing one says in a line what to use."""

from collections.abc import Callable

VISION = (
    "{module} is not supported: gates on a model that reads images are not; for text, load the stock model, then "
    "trimkv.attach(model, gates=...) and trimkv.bounded_cache(model)"
)


def companions(module: str, family: str) -> Callable[[str], object]:
    """A module's ``__getattr__``: the released classes beside ``TrimKV...ForCausalLM`` are the stock ones here.

    Raises:
        ImportError: from the returned function, for one of these names.
    """
    instead = {
        f"TrimKV{family}Config": f"transformers.{family}Config; settings such as memory_size go to "
        f"TrimKV{family}ForCausalLM.from_pretrained or model.config",
        f"TrimKV{family}Model": f"TrimKV{family}ForCausalLM.from_pretrained(...).model",
        f"TrimKV{family}PreTrainedModel": f"transformers.{family}PreTrainedModel",
    }

    def __getattr__(name: str):
        if name in instead:
            raise ImportError(f"{module} has no {name}: use {instead[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
