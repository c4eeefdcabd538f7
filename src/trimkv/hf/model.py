"""Finds the attention of a stock transformers model, and says what its keys and values look like.

Nothing goes by the names of modules. An attention module is one that keeps the contract of transformers'
AttentionInterface: it has a ``layer_idx``, is causal, and has a ``scaling``.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Attention modules that keep the contract and still cannot be served from slots, by the model's type.
NOT_PLAIN = {
    "diffllama": "calls attention twice with the same keys in every layer",
    "minimax": "takes no cache but one of its own class",
    "jetmoe": "repeats its keys for every expert after the cache has stored them",
}


def causal_model_of(model) -> nn.Module:
    """The transformers model inside of wrappers such as DistributedDataParallel and PEFT models."""
    while not hasattr(model, "get_decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # DataParallel and its kind
    inner = getattr(model, "get_base_model", None)  # PEFT
    return inner() if inner is not None else model


def decoder_of(model) -> nn.Module:
    """The text decoder of a model, without the output layer: the innermost one of a multimodal model."""
    model = causal_model_of(model)
    decoder = model.get_decoder()
    while hasattr(decoder, "get_decoder") and decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT's output layer has the name "decoder"
        decoder = model.base_model
    return decoder


def text_config(model):
    """The configuration of the text decoder."""
    return decoder_of(model).config.get_text_config(decoder=True)


def attention_modules(model) -> dict[int, nn.Module]:
    """The causal self-attention modules of a model's text decoder, by layer number.

    Vision towers, cross-attention and layers that compute their attention without AttentionInterface are left out.
    """
    found: dict[int, nn.Module] = {}
    for module in decoder_of(model).modules():
        if _is_attention(module) and module.is_causal:
            found.setdefault(module.layer_idx, module)
    return found


def cache_layers(model) -> list:
    """Fresh cache layers, one per layer of the model, as transformers' DynamicCache makes them.

    A sliding window that no position of the model's context can reach beyond is full attention, so such a layer is a
    plain DynamicLayer here.
    """
    config = text_config(model)
    layers = DynamicCache(config=config).layers
    context = getattr(config, "max_position_embeddings", None)
    return [DynamicLayer() if _never_slides(layer, context) else layer for layer in layers]


def full_attention_layers(model) -> list[int]:
    """The numbers of the layers that store keys and values of every token: those that slots can bound."""
    return [i for i, layer in enumerate(cache_layers(model)) if is_full_attention(layer)]


def full_attention_modules(model) -> dict[int, nn.Module]:
    """The attention modules of ``full_attention_layers``, by layer number; layers without one are left out."""
    modules = attention_modules(model)
    return {i: modules[i] for i in full_attention_layers(model) if i in modules}


def is_full_attention(layer) -> bool:
    """Whether a stock cache layer stores plain keys and values of every token."""
    return type(layer) is DynamicLayer


def is_bounded(layer) -> bool:
    """Whether a stock cache layer needs the same memory whatever the number of tokens: sliding windows, the states of
    linear attention, and layers that store nothing."""
    if getattr(layer, "is_sliding", False):
        return True
    return not isinstance(layer, CacheLayerMixin)


def why_unserved(model) -> str | None:
    """Why slots cannot hold the keys of this model; None if they can. Completes "MODEL ...": one line."""
    config = text_config(model)
    if config.model_type in NOT_PLAIN:
        return NOT_PLAIN[config.model_type]
    if causal_model_of(model).config.is_encoder_decoder:
        return "is an encoder-decoder model; slots serve decoders alone"
    if getattr(config, "num_kv_shared_layers", None):
        return "shares keys and values between layers"
    try:
        layers = cache_layers(model)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        return f"has no cache of keys and values that transformers can make from its configuration ({error})"
    modules, full = attention_modules(model), [i for i, layer in enumerate(layers) if is_full_attention(layer)]
    unbounded = {type(layer).__name__ for layer in layers if not is_full_attention(layer) and not is_bounded(layer)}
    if unbounded:
        return f"stores more than plain keys and values in some layers ({', '.join(sorted(unbounded))})"
    if not full:
        return f"has no full-attention layer ({', '.join(sorted({kind_of(one) for one in layers}))}): nothing to bound"
    if getattr(config, "kv_lora_rank", None):
        return "stores compressed keys and values (multi-head latent attention)"
    if not modules and any(_is_attention(module) for module in decoder_of(model).modules()):
        return "has attention that is not marked as causal"
    if not modules:
        return "computes its attention in its own code, without transformers' AttentionInterface"
    missing = [i for i in full if i not in modules]
    if missing:
        return f"has no causal self-attention by transformers' AttentionInterface in layers {numbers(missing)}"
    return None


def kind_of(layer) -> str:
    """What a stock cache layer is, in words."""
    if is_full_attention(layer):
        return "full attention"
    if getattr(layer, "is_sliding", False):
        return "sliding window"
    return "linear attention" if hasattr(layer, "recurrent_states") else type(layer).__name__


def query_heads(model, module) -> int:
    """Query heads of a whole attention module."""
    own = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
    return own if isinstance(own, int) else text_config(model).num_attention_heads


def key_heads(model, module) -> tuple[int, int]:
    """KV heads of a whole attention module, and their dimension."""
    config, queries = text_config(model), query_heads(model, module)
    names = ("head_dim", "head_size", "attention_head_size")
    dim = next((getattr(module, name) for name in names if _is_int(module, name)), None)
    dim = dim or getattr(config, "head_dim", None) or config.hidden_size // queries
    if _is_int(module, "num_key_value_groups"):
        return queries // module.num_key_value_groups, dim
    if _is_int(getattr(module, "k_proj", None), "out_features"):
        return module.k_proj.out_features // dim, dim
    return getattr(config, "num_key_value_heads", None) or queries, dim


def value_dim(model, module) -> int:
    """Dimension of an attention module's value heads."""
    heads, dim = key_heads(model, module)
    if _is_int(getattr(module, "v_proj", None), "out_features"):
        return module.v_proj.out_features // heads
    return module.v_head_dim if _is_int(module, "v_head_dim") else dim


def compute_dtype(model) -> torch.dtype:
    """The dtype of the hidden states: that of the embedding, as the first parameter of a quantised layer may be in
    float8 or in whole numbers."""
    weight = getattr(causal_model_of(model).get_input_embeddings(), "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype in PLAIN_DTYPES:
        return weight.dtype
    dtype = getattr(text_config(model), "dtype", None)
    return dtype if dtype in PLAIN_DTYPES else torch.get_default_dtype()


def compute_device(model, module) -> torch.device:
    """The device that a module of a model computes on, also where accelerate keeps its weights elsewhere or its
    weights are neither parameters nor buffers."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        embedding = getattr(causal_model_of(model).get_input_embeddings(), "weight", None)
        device = next((t.device for t in (*_tensors(module), embedding) if isinstance(t, torch.Tensor)), "cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "meta" else device


def numbers(found) -> str:
    """Layer numbers, short: "0..5", "3, 7"."""
    found = sorted(found)
    together = len(found) > 2 and found[-1] - found[0] == len(found) - 1
    return f"{found[0]}..{found[-1]}" if together else ", ".join(map(str, found))


def _is_attention(module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and hasattr(module, "scaling")
    )


def _never_slides(layer, context: int | None) -> bool:
    plain = type(layer) is DynamicSlidingWindowLayer
    return plain and context is not None and layer.sliding_window >= context


def _is_int(owner, name: str) -> bool:
    value = getattr(owner, name, None)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _tensors(module):
    yield from module.parameters()
    yield from module.buffers()
