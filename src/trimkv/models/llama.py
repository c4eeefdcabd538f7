from transformers import LlamaForCausalLM

from .absent import companions
from .published import DEFAULTS, PublishedModel


class TrimKVLlamaForCausalLM(PublishedModel, LlamaForCausalLM):
    """Llama with retention gates: ``from_pretrained`` takes a published gate folder."""

    published_defaults = {**DEFAULTS, "memory_size": 2048, "rg_dropout": 0.1, "skip_layers": 0}


__all__ = ["TrimKVLlamaForCausalLM"]
__getattr__ = companions(__name__, "Llama")
