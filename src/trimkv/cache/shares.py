"""How heads share one budget: an order over the tokens of all of them, and who goes by it.

Every head is sure of its best ``floor`` tokens and holds at most ``ceiling``; all the other tokens compete by score,
whatever their head. Sinks and recent tokens are protected per head, by the score itself.

Shapes: B rows, N heads that share (KV heads, of one layer or of all), P tokens of budget for all of them, W places in a
head's list. Numbers that rank are int64; ``EMPTY`` ranks below every token.
"""

import torch

from ..attention.slots import rank_key

EMPTY, SAFE = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
FORCED = EMPTY + 1


def order(score: torch.Tensor, position: torch.Tensor, now: torch.Tensor, head: torch.Tensor, heads: int):
    """One int64 per token that sorts tokens of different heads: by score; among equals the newer ranks higher, and of
    one position the head with the higher number. No two tokens are equal.

    Args:
        score, position: fp32 and int32, of one shape; position -1 = empty.
        now: position of the next query. Age and head share 32 bits, so that ages of many millions count as equal.
        head: the token's number among the ``heads`` that share.
    """
    bits = (heads - 1).bit_length()
    oldest = (1 << (32 - bits)) - 1
    youth = oldest - (now - position).to(torch.int64).clamp(0, oldest)
    key = (rank_key(score, torch.full_like(position, -1)) | (youth << bits)) + head
    return key.masked_fill_(position < 0, EMPTY)


def nth_largest(key_BNW: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of each list, or its smallest where it is shorter: [B, N, 1]."""
    W = key_BNW.shape[-1]
    return key_BNW.kthvalue(max(W - n, 0) + 1, -1, keepdim=True).values


def victims(key_BP: torch.Tensor, table_BNW: torch.Tensor, floor: int, full: bool) -> torch.Tensor:
    """The N slots of the pool that N arriving tokens, one per head, shall take: [B, N]. Empty ones come first.

    A head that is at its ceiling gives up its own worst. No head goes below ``floor``, its arriving token included.

    Args:
        key_BP: ``order`` of the pool's slots, changed in place; one more column at the end stands for no slot.
        table_BNW: each head's slots; P where there is none.
        full: whether a head may be at its ceiling, with all W places taken.
    """
    P = key_BP.shape[1] - 1
    if full or floor > 1:
        table_BNW = table_BNW.long()
        mine = key_BP.gather(1, table_BNW.flatten(1)).view(table_BNW.shape)
        if floor > 1:
            safe = mine >= nth_largest(mine, floor - 1)
            key_BP.scatter_(1, table_BNW.where(safe, P).flatten(1), SAFE)
        if full:
            worst = table_BNW.gather(2, mine.argmin(-1, keepdim=True))[..., 0]
            at_ceiling = (table_BNW < P).all(-1)
            key_BP.scatter_(1, worst.where(at_ceiling, P), FORCED)
    return key_BP[:, :P].topk(table_BNW.shape[1], -1, largest=False, sorted=False).indices


def keepers(key_BNW: torch.Tensor, tokens: int, floor: int, ceiling: int) -> torch.Tensor:
    """Which tokens stay when all heads' tokens are cut to the budget: bool [B, N, W].

    Args:
        key_BNW: ``order`` of the tokens of each head.
        tokens: P, what all heads together may hold.
    """
    W = key_BNW.shape[2]
    key, held = key_BNW, key_BNW > EMPTY
    if W > ceiling:
        key = key.masked_fill(key < nth_largest(key_BNW, ceiling), EMPTY)
    if floor:
        key = key.masked_fill((key_BNW >= nth_largest(key_BNW, floor)) & held, SAFE)
    if key[0].numel() > tokens:
        key = key.masked_fill(key < nth_largest(key.flatten(1), tokens)[..., None], EMPTY)
    return key > EMPTY
