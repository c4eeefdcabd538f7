"""Gives slot attention a name that stock transformers models know: ``attn_implementation="trimkv"``."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import slots

NAME = "trimkv"


def trimkv_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux=None,
    **kwargs,
):
    """Attention of one layer, in the signature of transformers' AttentionInterface.

    A layer whose slots were handed over by the cache's hook (``module.slots_in_use``) attends to those slots. Every
    other layer (sliding windows, a model without a bounded cache) behaves like sdpa, with softcap and s_aux honoured.

    Args:
        query: [B, Q, T, D] rotated; key, value: [B, H, T, D], the new tokens only where slots are in use.

    Returns:
        ([B, T, Q, D], None): attention weights are never materialised.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if hasattr(s_aux, "to_local"):  # a parameter that is sharded by heads, as the queries are
        s_aux = s_aux.to_local()
    layer = module.__dict__.pop("slots_in_use", None)
    if layer is not None:
        out = layer.attend(module, query, key, value, scaling, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    mask = attention_mask
    if mask is None and query.shape[2] > 1:
        mask = slots.causal_mask(query.shape[2], key.shape[2], query.device)
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask == 0  # a caller's additive mask
    return slots.attend(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None


def register() -> str:
    """Registers the attention and, for layers without slots, sdpa's mask. Returns the name."""
    AttentionInterface.register(NAME, trimkv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
