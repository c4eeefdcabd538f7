from transformers import Phi3ForCausalLM

from .absent import companions
from .published import DEFAULTS, PublishedModel


class TrimKVPhi3ForCausalLM(PublishedModel, Phi3ForCausalLM):
    """Phi-3 with retention gates: ``from_pretrained`` takes a published gate folder. Compression is off by default."""

    published_defaults = {**DEFAULTS, "retention_gate_intermediate_size": 1024, "compress_memory": False}


__all__ = ["TrimKVPhi3ForCausalLM"]
__getattr__ = companions(__name__, "Phi3")
