"""LongRoPE: models that rotate by other frequencies once a sequence is longer than their original context."""

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .bounded import BoundedCache


def follow_long_rope(decoder, cache: BoundedCache, position_ids: torch.Tensor | None, num_new: int) -> None:
    """Re-rotates the kept keys in place when the coming forward is the first to use the long frequencies.

    Keys in slots carry the rotation of their time. When a forward crosses the original context, the model rotates its
    queries by the long frequencies, so the kept keys are turned by position * (long - short) to match.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) != "longrope" or cache.long_rope:
        return
    if position_ids is not None:
        last = int(position_ids.max()) + 1  # the model's own rotary embedding waits for this number too
    else:
        last = cache.get_seq_length() + num_new
    original_context = rotary.config.rope_parameters["original_max_position_embeddings"]
    if last <= original_context:
        return
    cache.long_rope = True
    short = rotary.original_inv_freq
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, short.device, seq_len=original_context + 1)
    for store in cache.stores:
        rotate(store.k, store.position, long.to(short) - short)


def rotate(k_BHSD: torch.Tensor, position_BHS: torch.Tensor, frequency: torch.Tensor) -> None:
    """Turns each key in place by position * frequency, over the first 2 * len(frequency) dimensions (half-split)."""
    half = frequency.shape[0]
    angle = position_BHS[..., None].clamp_min(0).float() * frequency.to(k_BHSD.device).float()
    cos, sin = angle.cos(), angle.sin()
    first, second = k_BHSD[..., :half].float(), k_BHSD[..., half : 2 * half].float()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    k_BHSD[..., : 2 * half] = turned.to(k_BHSD.dtype)
