"""trimkv: language models that run for ever in a fixed amount of KV memory."""

from importlib import import_module

__version__ = "0.1.0"

# Resolved on first use, so that `import trimkv` costs nothing and the command line can answer without torch.
_HOME = {
    "Budget": "trimkv.budget",
    "attach": "trimkv.gates.attach",
    "detach": "trimkv.gates.attach",
    "GateSet": "trimkv.gates.files",
    "load_gates": "trimkv.gates.files",
    "save_gates": "trimkv.gates.files",
    "bounded_cache": "trimkv.cache.build",
    "prefill": "trimkv.cache.prefill",
    # what the released package of this name exports
    "TrimKVCache": "trimkv.cache_utils",
    "PagedTrimKVCache": "trimkv.cache_utils",
    "TrimKVQwen3ForCausalLM": "trimkv.models.qwen3",
    "TrimKVPhi3ForCausalLM": "trimkv.models.phi3",
    "Policy": "trimkv.cache.policies",
    "Engine": "trimkv.engine.engine",
    "SamplingParams": "trimkv.engine.request",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'trimkv' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
