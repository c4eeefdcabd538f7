"""The model classes of the published Quick Start: stock models that load with their gates."""

from importlib import import_module

_HOME = {
    "TrimKVLlamaForCausalLM": "llama",
    "TrimKVPhi3ForCausalLM": "phi3",
    "TrimKVQwen2ForCausalLM": "qwen2",
    "TrimKVQwen3ForCausalLM": "qwen3",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
