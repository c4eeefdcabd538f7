"""Static mode: every layer's slots are allocated at once, so that a decode step is the same launches for ever."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from ..budget import Budget
from ..ranks import part_of
from .policies import Policy

MOVING_ROPE = ("longrope", "dynamic")  # frequencies that depend on how long a sequence is


@dataclass(frozen=True)
class Keys:
    """What the keys and values of one attention module will look like, known before it has run.

    Attributes:
        heads: KV heads that are in this process: all, unless the model is sharded.
        queries: query heads, likewise.
        key_dim, value_dim: head dims.
        dtype, device: of what the module computes.
    """

    heads: int
    queries: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of no tokens for so many rows: [B, H, 0, D]."""

        def none(dim: int) -> torch.Tensor:
            return torch.empty(rows, self.heads, 0, dim, dtype=self.dtype, device=self.device)

        return none(self.key_dim), none(self.value_dim)

    def fits(self, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor) -> bool:
        """Whether arriving keys and values are what was expected."""
        shapes = (self.heads, self.key_dim), (self.heads, self.value_dim)
        same = (k_BHTD.shape[1::2], v_BHTD.shape[1::2]) == shapes
        return same and k_BHTD.dtype == v_BHTD.dtype == self.dtype and k_BHTD.device == self.device


def heads_of(model, module) -> tuple[int, int]:
    """KV heads of a whole attention module, and their dimension."""
    config = model.config.get_text_config(decoder=True)
    queries = config.num_attention_heads
    key_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // queries
    if hasattr(module, "k_proj"):  # some models have other numbers of heads on some layers
        return module.k_proj.out_features // key_dim, key_dim
    return getattr(config, "num_key_value_heads", None) or queries, key_dim


def keys_of(model, module) -> Keys:
    """What an attention module of a stock model will give, from its projections and the model's configuration."""
    queries = model.config.get_text_config(decoder=True).num_attention_heads
    heads, key_dim = heads_of(model, module)
    value_dim = module.v_proj.out_features // heads if hasattr(module, "v_proj") else key_dim
    part = part_of(model, module, heads)
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.dtype.is_floating_point else model.dtype
    device = torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or parameter.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Keys(part.num, queries // heads * part.num, key_dim, value_dim, dtype, device)


def check_static(model, policy: Policy, budget: Budget, rows: int) -> None:
    """Refuses what cannot be static.

    Raises:
        ValueError: with what to change.
    """
    name = type(model).__name__
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be a whole number of at least 1, got {rows!r}")
    if policy.selects or policy.grows:
        raise ValueError(f"policy {policy.name} keeps every decoded token; a static cache needs a policy that does not")
    if budget.shared:
        raise ValueError(f"a static cache needs a budget of scope head, not {budget.scope}")
    kinds = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise ValueError(f"{name} has layers of kind {', '.join(others)}; a static cache takes full attention only")
    types = getattr(getattr(model.get_decoder(), "rotary_emb", None), "rope_type", "default")
    moving = [kind for kind in (types.values() if isinstance(types, dict) else [types]) if kind in MOVING_ROPE]
    if moving:
        raise ValueError(f"{name} rotates by the length of a sequence ({moving[0]}); a static cache cannot follow that")
