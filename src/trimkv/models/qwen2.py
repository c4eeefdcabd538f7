from transformers import Qwen2ForCausalLM

from .absent import companions
from .published import DEFAULTS, PublishedModel


class TrimKVQwen2ForCausalLM(PublishedModel, Qwen2ForCausalLM):
    """Qwen2 with retention gates: ``from_pretrained`` takes a published gate folder."""

    published_defaults = {**DEFAULTS, "logit_block_size": -1}


__all__ = ["TrimKVQwen2ForCausalLM"]
__getattr__ = companions(__name__, "Qwen2")
