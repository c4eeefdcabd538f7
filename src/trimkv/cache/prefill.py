"""Feeds a prompt in chunks, so that activations are bounded as well as the cache."""

import torch

from ..hf.calls import with_cache
from .bounded import BoundedCache
from .build import DEFAULT_CHUNK


@torch.no_grad()
def prefill(model, cache, input_ids, attention_mask=None, chunk: int = DEFAULT_CHUNK) -> torch.Tensor:
    """Runs tokens through the model into the cache, ``chunk`` at a time.

    Args:
        input_ids: [B, T] new tokens, left-padded where rows differ in length.
        attention_mask: [B, T] of the new tokens, or [B, seen + T] of all; 0 = padding. For a static cache, whose rows
            may be of different ages, of the new tokens only.

    Returns:
        fp32 or model dtype [B, V]: the logits of the last position.

    Raises:
        ValueError: no tokens, or a mask of another length.
    """
    B, T = input_ids.shape
    if T == 0:
        raise ValueError("prefill: no tokens to feed")
    static = isinstance(cache, BoundedCache) and cache.static  # each row knows its own position
    seen = 0 if static else cache.get_seq_length()
    position_ids = None
    if attention_mask is not None:
        if attention_mask.shape[1] == T and seen:
            attention_mask = torch.cat([attention_mask.new_ones(B, seen), attention_mask], 1)
        if attention_mask.shape[1] != seen + T:
            raise ValueError(f"prefill: a mask of {attention_mask.shape[1]} columns for {seen} + {T} tokens")
        position_ids = None if static else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        if isinstance(cache, BoundedCache):
            cache.stage_more(end < T)
        out = model(
            input_ids=input_ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, start if static else 0 : seen + end],
            position_ids=None if position_ids is None else position_ids[:, seen + start : seen + end],
            use_cache=True,
            logits_to_keep=1,
            **with_cache(model, cache),
        )
    return out.logits[:, -1]
