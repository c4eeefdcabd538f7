"""Static mode: every layer's slots are allocated at once, so that a decode step is the same launches for ever."""

from dataclasses import dataclass

import torch

from ..budget import Budget
from ..hf import model as stock
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


def keys_of(model, module) -> Keys:
    """What an attention module of a stock model will give, from its shape and the model's configuration."""
    heads, key_dim = stock.key_heads(model, module)
    part = part_of(model, module, heads)
    queries = stock.query_heads(model, module) // heads * part.num
    dtype, device = stock.compute_dtype(model), stock.compute_device(model, module)
    return Keys(part.num, queries, key_dim, stock.value_dim(model, module), dtype, device)


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
    reason = stock.why_unserved(model)
    if reason is not None:
        raise ValueError(f"a bounded cache can't serve {name}: it {reason}")
    others = sorted({stock.kind_of(one) for one in stock.cache_layers(model) if not stock.is_full_attention(one)})
    if others:
        raise ValueError(f"{name} has layers of kind {', '.join(others)}; a static cache takes full attention only")
    types = getattr(getattr(stock.decoder_of(model), "rotary_emb", None), "rope_type", "default")
    moving = [kind for kind in (types.values() if isinstance(types, dict) else [types]) if kind in MOVING_ROPE]
    if moving:
        raise ValueError(f"{name} rotates by the length of a sequence ({moving[0]}); a static cache cannot follow that")
