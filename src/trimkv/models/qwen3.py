from transformers import Qwen3ForCausalLM

from .absent import companions
from .published import DEFAULTS, PublishedModel


class TrimKVQwen3ForCausalLM(PublishedModel, Qwen3ForCausalLM):
    """Qwen3 with retention gates: ``from_pretrained`` takes a published gate folder."""

    published_defaults = {
        **DEFAULTS,
        "buffer_size": 128,
        "alpha_threshold": 0.0,
        "max_seq_len": 131072,
        "logit_block_size": -1,
    }


__all__ = ["TrimKVQwen3ForCausalLM"]
__getattr__ = companions(__name__, "Qwen3")
