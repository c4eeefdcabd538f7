"""How a stock model finds its slots: a pre-hook on its decoder, no change to the model's code.

All that is known of what was done lies on the decoder, so that a model and its wrappers (PEFT, DataParallel, a
multimodal model around it) share one set of hooks. Hooks are functions of this file, so that models can be pickled.
"""

import threading
from dataclasses import dataclass, field

import torch
from transformers import GenerationMixin

from ..attention.register import NAME, register
from ..hf.calls import cache_in
from ..hf.model import causal_model_of, decoder_of
from .bounded import BoundedCache
from .masks import check_causal, check_past, real_tokens
from .rope import follow_long_rope

_installing = threading.Lock()


@dataclass
class Hooks:
    """What was done to a model, and how to undo it."""

    previous_attention: str
    handles: list = field(default_factory=list)
    wrapped: object = None  # the model whose prepare_inputs_for_generation was replaced
    removed: bool = False

    def remove(self, decoder) -> None:
        self.removed = True
        for handle in self.handles:
            handle.remove()
        if self.wrapped is not None:
            del self.wrapped.prepare_inputs_for_generation
        if decoder.config._attn_implementation == NAME:
            decoder.set_attn_implementation(self.previous_attention)
        decoder._trimkv_hooks = None


def install(model) -> Hooks:
    """Puts the hooks on a model's decoder and selects slot attention there. Doing it again changes nothing, from
    whatever wrapper.

    Without a bounded cache the model behaves as before, with sdpa in place of its former attention function.
    """
    model, decoder = causal_model_of(model), decoder_of(model)
    with _installing:
        done = getattr(decoder, "_trimkv_hooks", None)
        if done is not None:
            return done
        done = Hooks(previous_attention=decoder.config._attn_implementation)
        try:
            done.handles.append(decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True))
            if model.config is not decoder.config:  # what is around the decoder makes masks for it
                done.handles.append(model.register_forward_pre_hook(_before_model, with_kwargs=True))
            decoder.set_attn_implementation(register())
            if getattr(model.config, "original_max_position_embeddings", None) is not None:
                model.prepare_inputs_for_generation = _KeepCache(model)
                done.wrapped = model
        except BaseException:
            done.remove(decoder)
            raise
        decoder._trimkv_hooks = done
        return done


def remove(model) -> None:
    """Takes off what ``install`` put on, from whatever wrapper."""
    decoder = decoder_of(model)
    with _installing:
        if getattr(decoder, "_trimkv_hooks", None) is not None:
            decoder._trimkv_hooks.remove(decoder)


def _before_model(model, args, kwargs):
    """Keeps the 2D mask of a call, of which a multimodal model makes masks that a bounded cache cannot read."""
    cache = cache_in(args, kwargs)
    if isinstance(cache, BoundedCache):
        cache.given_mask = kwargs.get("attention_mask")


def _before_decoder(decoder, args, kwargs):
    """Tells the cache which new tokens are padding; runs before masks are made."""
    cache = cache_in(args, kwargs)
    if not isinstance(cache, BoundedCache):
        return None
    cache.bind(decoder)
    if decoder.config._attn_implementation != NAME:
        decoder.set_attn_implementation(register())
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
    rows, num_new = tokens.shape[:2]
    if cache.static and rows != len(cache.seen):
        raise ValueError(f"this cache is static, for {len(cache.seen)} rows, and got {rows}")
    mask, outer, cache.given_mask = kwargs.get("attention_mask"), cache.given_mask, None
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2 and outer is not None):
        check_causal(mask, num_new)
        mask = outer
    check_past(mask, num_new, cache)
    cache.stage_padding(real_tokens(mask, num_new, cache))
    position_ids = kwargs.get("position_ids")
    cache.check_positions(position_ids)
    follow_long_rope(decoder, cache, position_ids, num_new)
    if cache.static and position_ids is None:
        kwargs = {**kwargs, "position_ids": _own_positions(cache.seen, cache.slot_layers[0].real, num_new)}
    if cache.static and num_new == 1:
        cache.begin_step(cache.slot_layers[0].real)
    if isinstance(kwargs.get("attention_mask"), torch.Tensor) and cache.all_slots:
        # No layer will read a mask made from it, and making one costs a host sync per step on a GPU.
        return args, {**kwargs, "attention_mask": None}
    return (args, kwargs) if cache.static else None


def _own_positions(seen_B: torch.Tensor, real_BT: torch.Tensor | None, num_new: int) -> torch.Tensor:
    """int64 [B, T]: where each row goes on, whatever its age; padding is somewhere."""
    if real_BT is None:
        return seen_B[:, None].long() + torch.arange(num_new, device=seen_B.device)
    return (seen_B[:, None] + real_BT.to(seen_B.device).cumsum(-1) - 1).clamp_min(0)


class _KeepCache:
    """Stands in ``prepare_inputs_for_generation`` of models with LongRoPE. Phi-3 drops the whole cache when a sequence
    grows past the original context, to recompute it with other rotations. It then feeds one token, so that everything
    is forgotten. Slots are re-rotated instead (rope.py)."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        inputs = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        if isinstance(cache_in(args, kwargs), BoundedCache) and cache_in((), inputs) is None:
            return GenerationMixin.prepare_inputs_for_generation(self.model, *args, **kwargs)
        return inputs
