"""What a policy may look at after attention: who looked at what."""

from dataclasses import dataclass

import torch

from ..attention import slots as attention
from .slots import LayerFacts


@dataclass
class Seen:
    """An attention that was just done: T queries over the S slots that the policy is shown beside it.

    Attributes:
        q: [B, Q, T, D], rotated.
        position: int32 [B, T], the queries' positions; -1 for padding.
        real: bool [B, T], False for padding; None = all real.
        k, key_position: the keys as they were attended to, [B, H, S, D], and their positions [B, H, S].
        layer: scaling, softcap and s_aux of the attention.
        lse: fp32 [B, Q, T], log-sum-exp of each query's logits; only for policies that need "attention".
        weights: the probabilities [B, H, G, T, S] where they exist anyway.
        shares: of a single query (T = 1), their sums over the group [B, H, S], where a kernel has made those instead;
            zeros for padding.
    """

    q: torch.Tensor
    position: torch.Tensor
    real: torch.Tensor | None
    k: torch.Tensor
    key_position: torch.Tensor
    layer: LayerFacts
    lse: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    def probabilities(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """fp32 [B, H, G, end - start, S]: what queries start..end-1 gave to each slot; zero for padding queries.

        For a few queries at a time: all of a chunk at once may be large (``column_sums`` goes in blocks).
        """
        part = slice(start, end)
        if self.weights is not None:
            weights = self.weights[:, :, :, part]
            return weights if self.real is None else weights * self.real[:, None, None, part, None]
        return self._again(self.q[:, :, part], self.lse[:, :, part], self.position[:, part])

    def column_sums(self) -> torch.Tensor:
        """fp32 [B, H, S]: what each slot received from all real queries and all query heads of its group."""
        if self.shares is not None:
            return self.shares
        T, step = self.q.shape[2], attention.QUERIES
        total = self.probabilities(0, step).sum((2, 3))
        for start in range(step, T, step):
            total += self.probabilities(start, start + step).sum((2, 3))
        return total

    def last(self) -> torch.Tensor:
        """fp32 [B, H, G, S]: what each row's last real query gave to each slot; zeros where a row has none."""
        if self.real is None:
            return self.probabilities(self.q.shape[2] - 1)[:, :, :, 0]
        T = self.position.argmax(-1)[:, None]  # [B, 1]
        index = T[:, None].expand(-1, self.q.shape[1], -1)
        q = self.q.gather(2, index[..., None].expand(*index.shape, self.q.shape[-1]))
        return self._again(q, self.lse.gather(2, index), self.position.gather(1, T))[:, :, :, 0]

    def last_mean(self) -> torch.Tensor:
        """fp32 [B, S]: the mean over all query heads of what each row's last real query gave to each slot."""
        if self.shares is not None:
            return self.shares.sum(1) / self.q.shape[1]
        return self.last().mean((1, 2))

    def where_real(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """``new`` in rows that had a real query, ``old`` in rows that had only padding; both [B, ...]."""
        if self.real is None:
            return new
        return torch.where(self.real.any(-1).view(-1, *(1,) * (new.ndim - 1)), new, old)

    def _again(self, q, lse, position) -> torch.Tensor:
        layer = self.layer
        return attention.probabilities(q, self.k, lse, position, self.key_position, layer.scaling, layer.softcap)
