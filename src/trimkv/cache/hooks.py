"""How a stock model finds its slots: two pre-hooks, no change to the model's code."""

from dataclasses import dataclass, field

import torch

from ..attention.register import NAME, register
from .bounded import BoundedCache
from .layers import BoundedLayer
from .rope import follow_long_rope


@dataclass
class Hooks:
    """What was done to a model, and how to undo it."""

    previous_attention: str
    handles: list = field(default_factory=list)
    wrapped_prepare: bool = False

    def remove(self, model) -> None:
        for handle in self.handles:
            handle.remove()
        if self.wrapped_prepare:
            del model.prepare_inputs_for_generation
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(self.previous_attention)
        model._trimkv_hooks = None


def attention_modules(model) -> dict[int, torch.nn.Module]:
    """The attention modules of a decoder by layer number (vision towers and encoders are not walked)."""
    decoder = model.get_decoder()
    return {
        module.layer_idx: module
        for name, module in decoder.named_modules()
        if name.rsplit(".", 1)[-1] == "self_attn" and hasattr(module, "layer_idx")
    }


def install(model) -> None:
    """Puts the hooks on a model and selects slot attention. Doing it again changes nothing.

    Without a bounded cache the model behaves as before, with sdpa in place of its former attention function.
    """
    if getattr(model, "_trimkv_hooks", None) is not None:
        return
    done = Hooks(previous_attention=model.config._attn_implementation)
    try:
        decoder = model.get_decoder()

        def before_decoder(module, args, kwargs):
            return _before_decoder(model, decoder, args, kwargs)

        done.handles.append(decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
        for module in attention_modules(model).values():
            done.handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
        model.set_attn_implementation(register())
        _keep_cache_across_long_rope(model, done)
    except BaseException:
        done.remove(model)
        raise
    model._trimkv_hooks = done


def _before_decoder(model, decoder, args, kwargs):
    """Tells the cache which new tokens are padding; runs before masks are made."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, BoundedCache):
        return None
    cache.bind(model)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(register())
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
    if cache.static and tokens.shape[0] != len(cache.seen):
        raise ValueError(f"this cache is static, for {len(cache.seen)} rows, and got {tokens.shape[0]}")
    mask = kwargs.get("attention_mask")
    cache.stage_padding(_real_tokens(mask, tokens.shape[1], cache))
    follow_long_rope(decoder, cache, kwargs.get("position_ids"), tokens.shape[1])
    if cache.static and kwargs.get("position_ids") is None:
        kwargs = {**kwargs, "position_ids": _own_positions(cache.seen, cache.slot_layers[0].real, tokens.shape[1])}
    if cache.static and tokens.shape[1] == 1:
        cache.begin_step(cache.slot_layers[0].real)
    if isinstance(mask, torch.Tensor) and cache.all_slots:
        # No layer will read a mask made from it, and making one costs a host sync per step on a GPU.
        return args, {**kwargs, "attention_mask": None}
    return (args, kwargs) if cache.static else None


def _own_positions(seen_B: torch.Tensor, real_BT: torch.Tensor | None, num_new: int) -> torch.Tensor:
    """int64 [B, T]: where each row goes on, whatever its age; padding is somewhere."""
    if real_BT is None:
        return seen_B[:, None].long() + torch.arange(num_new, device=seen_B.device)
    return (seen_B[:, None] + real_BT.to(seen_B.device).cumsum(-1) - 1).clamp_min(0)


def _real_tokens(mask, num_new: int, cache: BoundedCache) -> torch.Tensor | None:
    """bool [B, T]: which of the new tokens are real, or None if all are."""
    if mask is None:
        return None
    if isinstance(mask, dict) or mask.ndim != 2:
        raise ValueError("a bounded cache takes a 2D attention_mask (1 = token, 0 = padding), not a prepared 4D mask")
    real = mask[:, -num_new:].bool()
    if cache.static and (num_new == 1 or cache.padded):
        return real  # followed on the device, whatever it holds
    fresh = cache.get_seq_length() == 0
    if num_new > 1 or fresh or mask.device.type == "cpu":
        return None if bool(real.all()) else real
    # A decode step on a GPU: looking at the mask would wait for the device. One row alone is never padded from outside
    # after it has begun; in a batch, the mask is followed on the device.
    return real if real.shape[0] > 1 or cache.padded else None


def _before_attention(module, args, kwargs):
    """Hands a layer's slots to the attention function of the same forward."""
    cache = kwargs.get("past_key_values")
    layer = None
    if isinstance(cache, BoundedCache) and module.layer_idx < len(cache.layers):
        layer = cache.layers[module.layer_idx]
    module.__dict__.pop("slots_in_use", None)
    if isinstance(layer, BoundedLayer):
        module.__dict__["slots_in_use"] = layer


def _keep_cache_across_long_rope(model, done: Hooks) -> None:
    """Phi-3 drops the whole cache when a sequence grows past the original context, to recompute it with other
    rotations. It then feeds one token, so that everything is forgotten. Slots are re-rotated instead (rope.py)."""
    if getattr(model.config, "original_max_position_embeddings", None) is None:
        return
    original = model.prepare_inputs_for_generation

    def prepare_inputs_for_generation(*args, past_key_values=None, **kwargs):
        inputs = original(*args, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, BoundedCache):
            inputs["past_key_values"] = past_key_values
        return inputs

    model.prepare_inputs_for_generation = prepare_inputs_for_generation
    done.wrapped_prepare = True
