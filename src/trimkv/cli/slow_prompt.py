"""Warns before a prompt that will take minutes: --profile paper with a policy that scores by attention, on a CPU."""

import time

from . import loading
from .training_progress import duration

WORTH_SAYING = 20.0  # seconds


def warn(model, cache, policy, chunk: int | None, tokens: int) -> None:
    """Says how long the attention of the prompt will take and why, if that is long.

    With ``chunk`` None every token attends to all before it, and policies that score by attention need each of these
    weights, block by block in plain torch: time grows with the square of the prompt.

    Args:
        policy: the policy object.
        tokens: of the prompt.
    """
    if chunk is not None or "attention" not in policy.needs or model.device.type != "cpu":
        return
    from ..cache.build import DEFAULT_CHUNK

    layers = len(cache.slot_layers)
    seconds = layers * _seconds_of_a_layer(model, tokens)
    budget = cache.slot_layers[0].budget.tokens
    chunked = seconds * min(1.0, (budget + DEFAULT_CHUNK) / tokens)
    if seconds < WORTH_SAYING or seconds < 2 * chunked:
        return
    loading.note(
        f"--profile paper lets each of the {tokens:,} prompt tokens attend to all before it, and {policy.name} needs "
        f"every one of these weights: about {duration(seconds)} for them alone, against about {duration(chunked)} in "
        f"chunks of {DEFAULT_CHUNK} (leave --profile out). Policies that do not score by attention are faster too"
    )


def _seconds_of_a_layer(model, tokens: int) -> float:
    """What the prompt's attention takes in one layer, by one block of its queries."""
    import torch

    from ..attention import slots

    config = model.config.get_text_config(decoder=True)
    Q, H = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // Q
    q = torch.zeros(1, Q, min(tokens, slots.QUERIES), D, dtype=model.dtype)
    k = torch.zeros(1, H, tokens, D, dtype=model.dtype)
    at, keys_at = torch.arange(q.shape[2])[None], torch.arange(tokens).expand(1, H, -1)
    with torch.inference_mode():
        start = time.perf_counter()
        lse = slots.attend_with_lse(q, k, k, at, keys_at, 1.0)[1]
        slots.probabilities(q, k, lse, at, keys_at, 1.0)
        return (time.perf_counter() - start) * tokens / q.shape[2]
