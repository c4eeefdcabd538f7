import copy

import torch

from ...attention.slots import rank_key
from ..slots import RowState
from .base import Policy

FORCED = ("within", "beside")


class SeerAttentionR(Policy):
    """Retrieval, not eviction: keeps every token, and each decoded token attends to the blocks that a trained gate
    picks. Attention is bounded by the budget, memory is not.

    The block in which the query lies is always attended to. What else is picked: the blocks with the largest gate
    logits, per KV head. A prompt attends in full, as published. The size of blocks is the trained gate's.

    Args:
        forced: "within" counts the query's own block in the budget, so that M tokens are the most that are attended to
            (one block at least); "beside" is the published rule, M // block_size picked blocks and the own one.
    """

    name = "seer_attention_r"
    needs = frozenset({"keys", "rotation"})
    trained = True
    head = "attn_gate"
    source = "arXiv 2506.08889, section 3; microsoft/SeerAttention@aba03e3 seer_attn/decode_sparse"
    bounded = False
    selects = selects_at_once = True
    formula = "gate logit of the token's block; blocks are picked anew at each decode step"
    evicts = "never: memory is that of the full cache"
    peak_decode = "M, rounded down to blocks"
    peak_prefill = "all tokens"
    deviations = (
        "The query's own block counts in the budget instead of coming on top. A block that is completed while decoding "
        "is rotated by its beginning, as in a prompt and in training; the source takes its end. Blocks may be smaller "
        "than the published 64 (a trained gate's choice): budgets of 64 to 512 would be 1 to 8 blocks. Blocks that "
        "were not picked are masked, which saves no time."
    )

    def __init__(self, forced: str = "within"):
        if forced not in FORCED:
            raise ValueError(f"policy seer_attention_r: forced must be one of {', '.join(FORCED)}, got {forced!r}")
        self.forced, self.block_size, self.width = forced, 64, 128

    def fitted(self, modules):
        super().fitted(modules)
        gate = next(iter(modules.values())).attn_gate
        policy = copy.copy(self)
        policy.block_size, policy.width = gate.block_size, gate.width
        return policy

    def attended(self, M):
        return (self._picked(M) + 1) * self.block_size

    def row_state(self, Q, H, D):
        """pool: of the block that is being filled, largest coordinates of keys, of minus keys, and their sum, before
        rotation; summary: the gate's view of each block, of use when the block is complete."""
        return {"pool": RowState((H, 3, D)), "summary": RowState((H, self.width), every=self.block_size)}

    def new_state(self, new):
        position = new.position[:, 0]  # [B, T]
        B, T = position.shape
        H, D = new.k.shape[1], new.k.shape[3]
        size, real = self.block_size, position >= 0
        N = (T + size - 2) // size + 1  # blocks that T tokens can touch
        some = real.any(-1)
        first = position.where(real, torch.iinfo(position.dtype).max).amin(-1).where(some, 0)
        base = first // size
        block = (position // size - base[:, None]).where(real, N)  # padding goes into a place of its own
        last = block.where(real, 0).amax(-1)

        k = new.layer.rotation.turn(new.k.float(), -new.position)
        pool = new.rows["pool"]
        begun = (first % size != 0)[:, None, None]
        extremes = k.new_full((B, H, N + 1, 2 * D), float("-inf"))
        extremes[:, :, 0] = pool[:, :, :2].flatten(2).where(begun, float("-inf"))
        total = k.new_zeros(B, H, N + 1, D)
        total[:, :, 0] = pool[:, :, 2] * begun
        index = block[:, None, :, None].long()
        extremes.scatter_reduce_(2, index.expand(B, H, T, 2 * D), torch.cat([k, -k], -1), "amax")
        total.scatter_add_(2, index.expand(B, H, T, D), k)

        at = last[:, None, None, None].long().expand(B, H, 1, 3 * D)
        filling = torch.cat([extremes, total], -1).gather(2, at).view(B, H, 3, D)
        pool.copy_(torch.where(some[:, None, None, None], filling, pool))

        pooled = torch.cat([extremes[..., :D], -extremes[..., D:], total / size], -1)[:, :, :N]
        pooled = pooled.nan_to_num(0.0, 0.0, 0.0)
        begin = (base[:, None] + torch.arange(N, device=base.device)) * size
        summary = new.module.attn_gate.summary(pooled, begin).transpose(1, 2)  # [B, N, H, W]
        touched = torch.arange(N, device=base.device).minimum(last[:, None]).long()[:, :, None, None]
        where = (touched + base[:, None, None, None]).expand_as(summary)
        summary = summary.gather(1, touched.expand_as(summary))
        stored = new.rows["summary"]
        stored.scatter_(1, where, torch.where(some[:, None, None, None], summary, stored.gather(1, where)))
        return {}

    def visible(self, slots, new):
        gate, size = new.module.attn_gate, self.block_size
        position = new.position[:, :1]  # [B, 1, T]
        q = new.layer.rotation.turn(new.q.float(), -position)
        summary = slots.rows["summary"].transpose(1, 2)  # [B, H, N, W]
        logits = gate.logits(gate.query(q, position[:, 0]), summary)  # [B, H, T, N]
        block = torch.arange(logits.shape[3], dtype=torch.int32, device=logits.device)
        position = position[..., None]
        own = block == position // size
        chosen = own.expand_as(logits)
        picked = min(self._picked(slots.layer.budget), logits.shape[3])
        if picked:
            candidates = (block < position // size).expand_as(logits)
            if self.forced == "beside":  # an incomplete block's summary is zero in the source, and competes
                complete = position % size == size - 1
                logits = logits.where(~own | complete, 0.0)
                candidates = candidates | own
            rank = rank_key(logits.masked_fill(~candidates, float("-inf")), block)
            best = torch.zeros_like(chosen).scatter(3, rank.topk(picked, dim=-1).indices, True)
            chosen = chosen | (best & candidates)
        where = (slots.position.clamp_min(0) // size).long()[:, :, None]  # [B, H, 1, S]
        return chosen.gather(3, where.expand(-1, -1, chosen.shape[2], -1)) & slots.valid[:, :, None]

    def score(self, slots, now_B11):
        return slots.position.float()

    def _picked(self, M: int) -> int:
        """How many blocks are picked beside the query's own."""
        return max(M // self.block_size, 1) - (self.forced == "within")
