"""Losses that the authors' package computes, as JSON. Runs in its environment; parity.sh calls it.

TRITON_INTERPRET=1 lets its retention sums run on a CPU.
"""

import json
import sys

import torch

from peers.authors import loss_cases
from peers.authors.decode import without_flash_attn


def model(**settings):
    from trimkv.models.qwen3 import TrimKVQwen3Config, TrimKVQwen3ForCausalLM

    return TrimKVQwen3ForCausalLM(
        TrimKVQwen3Config(
            hidden_size=loss_cases.HIDDEN,
            vocab_size=loss_cases.VOCABULARY,
            intermediate_size=16,
            num_hidden_layers=loss_cases.LAYERS,
            num_attention_heads=2,
            num_key_value_heads=loss_cases.HEADS,
            head_dim=8,
            tie_word_embeddings=False,
            retention_gate_intermediate_size=4,
            **settings,
        )
    )


def capacity(seed: int) -> float:
    case = loss_cases.capacity(seed)
    start = torch.from_numpy(case["start"])
    peer = model(memory_size=case["budget"], global_capacity=case["scope"] == "global")
    log_beta = torch.from_numpy(case["log_beta"])
    return float(peer.compute_retention_loss(log_beta, None, torch.arange(start.shape[1]) - start))


def base(seed: int, kinds: str) -> float:
    case = {name: torch.from_numpy(array) for name, array in loss_cases.base(seed).items()}
    peer = model(base_loss=kinds)
    with torch.no_grad():
        peer.lm_head.weight.copy_(case["head"])
        logits = peer.lm_head(case["teacher"])
        return float(peer.compute_base_loss(case["student"], case["labels"], logits))


def main(number: int) -> None:
    values = {"capacity": [capacity(seed) for seed in range(number)]}
    values |= {kinds: [base(seed, kinds) for seed in range(number)] for kinds in loss_cases.BASE_LOSSES}
    print(json.dumps(values))


if __name__ == "__main__":
    without_flash_attn()
    main(int(sys.argv[1]))
