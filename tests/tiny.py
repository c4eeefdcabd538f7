"""Tiny random models of many architectures, built from configurations: no downloads."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import trimkv
from trimkv.gates.attach import new_gates
from trimkv.gates.head_sets import attach_heads, new_heads

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HALF_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, dict] = {
    "qwen3": {"head_dim": 16},
    "llama": {},
    "phi3": {},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "glm4": {"head_dim": 16},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "qwen3_moe": {"head_dim": 16, **MOE},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "gemma2": {"head_dim": 16, **HALF_SLIDING},
    "gemma3_text": {"head_dim": 16, **HALF_SLIDING},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 128,
        **HALF_SLIDING,
    },
    "olmo3": HALF_SLIDING,
    "cohere2": HALF_SLIDING,
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **HALF_SLIDING},
    "qwen3_next": {
        "head_dim": 16,
        **MOE,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
HYBRID = ("gemma2", "gemma3_text", "gemma4_text", "olmo3", "cohere2", "gpt_oss", "qwen3_next")


def build(name: str, seed: int = 0, gain: float = 4.0, **changes):
    """A random model in eager attention, the implementation that honours softcap and sinks everywhere.

    ``gain`` scales the matrices: at the default initialisation attention is nearly uniform and hides mistakes.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**BASE, **MODELS[name], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
            elif parameter.ndim == 1 and "sinks" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, length), generator=generator)


GENERATE = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def gated(name: str, **changes):
    """A tiny model with gates whose retention differs from token to token, and with the heads of trained baselines."""
    model = build(name, **changes)
    gates = new_gates(model, intermediate_size=16, training_length=16)
    for parameters in gates.layers.values():
        parameters["linear2.weight"].mul_(200)
    attach_heads(model, new_heads(model, "locret", width=16))
    attach_heads(model, new_heads(model, "seer_attention_r", width=8, block_size=4))
    return trimkv.attach(model, gates)


def generate(model, ids, cache=None, new=20, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **{**GENERATE, **options})
    return out.sequences, torch.stack(out.logits, 1)


def left_padded(pads: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths and their attention mask."""
    ids = tokens(len(pads), length)
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask
