"""What a request of the engine is compared with: the same prompt alone, through a cache and the model."""

import torch

import tiny
import trimkv
from trimkv import SamplingParams

BUDGET, CHUNK = 16, 8


def prompt(length: int, seed: int = 0) -> list[int]:
    return tiny.tokens(1, length, seed=seed + length)[0].tolist()


def long(n: int, **options) -> SamplingParams:
    """Exactly n tokens."""
    return SamplingParams(n, ignore_eos=True, **options)


def alone(model, policy, ids: list[int], new: int, budget=BUDGET, chunk: int = CHUNK) -> list[int]:
    """The greedy tokens of one request."""
    device = model.device
    cache = trimkv.bounded_cache(model, policy, budget, chunk=chunk)
    logits, out = trimkv.prefill(model, cache, torch.tensor([ids], device=device), chunk=chunk), []
    for _ in range(new):
        out.append(int(logits.argmax()))
        with torch.no_grad():
            logits = model(torch.tensor([out[-1:]], device=device), past_key_values=cache).logits[:, -1]
    return out
