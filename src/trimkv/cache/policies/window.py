"""The last few queries of a sequence, for policies that judge keys by them (SnapKV, R-KV)."""

import torch

from ...attention import slots as attention
from ..seen import Seen
from ..slots import RowState, Slots


def window_state(size: int, Q: int, D: int) -> dict[str, RowState]:
    """Row state of a window: queries [Q, size, D], oldest first, and ``order`` [size], position + 1, 0 where empty."""
    return {"queries": RowState((Q, size, D)), "order": RowState((size,), torch.int32)}


def push(slots: Slots, seen: Seen) -> None:
    """Moves a forward's real queries into the window; padding leaves no trace."""
    queries, order = slots.rows["queries"], slots.rows["order"]
    new = torch.where(seen.position >= 0, seen.position + 1, -1)  # padding ranks below an empty place
    both = torch.cat([order, new], 1)
    newest = both.topk(order.shape[1], dim=1).indices.flip(1)
    index = newest[:, None, :, None].expand_as(queries)
    queries.copy_(torch.cat([queries, seen.q.to(queries.dtype)], 2).gather(2, index))
    order.copy_(both.gather(1, newest))


def window_logits(slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [B, H, G, w, S]: logits of the window's queries with the slots, -inf where a query came before a key or a
    slot is empty; and bool [B, w], which places of the window hold a query (the others' logits are all -inf)."""
    layer, position = slots.layer, slots.rows["order"] - 1
    x = attention.logits(slots.rows["queries"].to(slots.k.dtype), slots.k, layer.scaling, layer.softcap)
    mask = attention.position_rule(position, slots.position, blank_rows=False)
    return x.masked_fill_(~mask[:, :, None], float("-inf")), position >= 0
