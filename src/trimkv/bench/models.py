"""A model of a known shape with random weights, made where it will run."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..gates.attach import attach, new_gates
from .shapes import SHAPES

POSITIONS = 2**21  # of what a shape says it can be used for; random weights know no limit
GATE_WIDTH = 512  # as in the published gate sets


def config_of(shape: str, layers: int | None = None):
    """The configuration of a shape, with so many layers instead of its own.

    Raises:
        ValueError: an unknown one; the message lists those that are known.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known shapes: {', '.join(SHAPES)}")
    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    return AutoConfig.for_model(sizes.pop("model_type"), max_position_embeddings=POSITIONS, **sizes)


def build(
    shape: str, device: str, dtype: torch.dtype, gates: bool = True, layers: int | None = None
) -> PreTrainedModel:
    """A model with random weights and, with ``gates``, with random retention gates. Nothing is downloaded."""
    config = config_of(shape, layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    if gates:
        attach(model, new_gates(model, intermediate_size=GATE_WIDTH))
    return model


def step_weights(model) -> int:
    """Bytes of weights that a decode step reads: all but an embedding table that is only looked up, and gates."""
    own = {id(p): p for name, p in model.named_parameters() if "retention_gate" not in name}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table is not head:
        own.pop(id(table), None)
    return sum(p.nbytes for p in own.values())


def token_bytes(model) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config
    heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * model.dtype.itemsize
