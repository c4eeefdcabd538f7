"""Gives slot attention a name that stock transformers models know: ``attn_implementation="trimkv"``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import slots

NAME = "trimkv"

_observer: ContextVar[Callable | None] = ContextVar("attention observer", default=None)


def hand_over(key: torch.Tensor, layer) -> torch.Tensor:
    """Marks keys that a cache layer gives back from ``update``, so that the attention that gets them finds the layer.

    The mark is on the tensor: it belongs to this call alone, whatever other threads or caches do with the same model.
    """
    key = key.view_as(key)  # a tensor object of its own
    key.trimkv_layer = layer
    return key


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

    Keys that come from a bounded cache layer (``hand_over``) attend to that layer's slots. Every other call (sliding
    windows, a model without a bounded cache) behaves like sdpa, with softcap and s_aux honoured.

    Args:
        query: [B, Q, T, D] rotated; key, value: [B, H, T, D], the new tokens only where slots are in use.

    Returns:
        ([B, T, Q, D], None): attention weights are never materialised.

    Raises:
        ValueError: attention for which slots would give a wrong answer, see ``BoundedLayer.attend``.
    """
    observer = _observer.get()
    if observer is not None:
        return observer(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if hasattr(s_aux, "to_local"):  # a parameter that is sharded by heads, as the queries are
        s_aux = s_aux.to_local()
    layer = getattr(key, "trimkv_layer", None)
    if layer is not None:
        if kwargs.get("position_bias") is not None:
            raise ValueError(f"{type(module).__name__} adds a bias to its attention; slots can't serve that")
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


@contextmanager
def observed_by(observer: Callable) -> Iterator[None]:
    """Within it, and in this thread alone, ``observer`` is called in the place of ``trimkv_attention``."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def register() -> str:
    """Registers the attention and, for layers without slots, sdpa's mask. Returns the name."""
    AttentionInterface.register(NAME, trimkv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
