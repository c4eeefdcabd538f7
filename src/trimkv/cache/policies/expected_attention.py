import math

import torch

from ..slots import RowState
from .base import Policy


class ExpectedAttention(Policy):
    """Keeps what queries of the coming positions can be expected to attend to, times the length of the value.

    A head's queries before rotation are taken for normally distributed, with the mean and covariance of those seen so
    far. Turned by the average rotation of the next ``future`` positions, they attend to key k by
    E[exp(s q.k)] = exp(s mean.k + s^2/2 k.Cov k), s the attention's scaling: normalised over the keys held, averaged
    over the query heads of the group. The first tokens stay, and their queries and keys count nowhere.

    Scores are logarithms: the same order, and a key that is worth e^-200 still has a rank.

    Args:
        sinks: first tokens that stay.
        future: coming positions, counted from the true position of the next token.
        covariance: False takes the mean alone, and saves D x D numbers per query head.
        value_norm: whether scores are multiplied by the norm of the value.
        epsilon: added to the expected attention before that.
    """

    name = "expected_attention"
    needs = frozenset({"keys", "values", "rotation", "queries"})
    source = "arXiv 2510.00636, expected attention score; NVIDIA/kvpress v0.5.4 presses/expected_attention_press.py"
    state = {"value_norm": torch.float32}
    formula = "(softmax over keys of (mean q.k + k.Cov(q) k / 2), mean over the group, + epsilon) * |v|"
    deviations = (
        "The source compresses a prompt once, by its own queries; here every decoded token evicts one, by the "
        "queries seen so far (running mean and covariance in fp32, from queries turned back by their position). A "
        "softcap on the logits is not part of the expectation."
    )

    def __init__(
        self,
        sinks: int = 4,
        future: int = 512,
        covariance: bool = True,
        value_norm: bool = True,
        epsilon: float = 0.0,
    ):
        if sinks < 0:
            raise ValueError(f"policy expected_attention: sinks must not be negative, got {sinks}")
        if future < 1:
            raise ValueError(f"policy expected_attention: future must be at least 1 position, got {future}")
        if epsilon < 0:
            raise ValueError(f"policy expected_attention: epsilon must not be negative, got {epsilon}")
        self.sinks, self.future, self.epsilon = sinks, future, epsilon
        self.covariance, self.value_norm = covariance, value_norm
        if not value_norm:
            self.needs, self.state = self.needs - {"values"}, {}

    def new_state(self, new):
        return {"value_norm": new.v.float().norm(dim=-1)} if self.value_norm else {}

    def row_state(self, Q, H, D):
        rows = {"count": RowState(()), "mean": RowState((Q, D))}
        if self.covariance:
            rows["scatter"] = RowState((Q, D, D))  # sum of the outer products of q - mean
        return rows

    def observe(self, slots, seen):
        """Joins the statistics of two sets of queries (Chan, Golub & LeVeque 1979), without a difference of sums."""
        count, mean = slots.rows["count"][:, None, None], slots.rows["mean"]
        ignored = (seen.position < self.sinks)[:, None, :, None]
        q = slots.layer.rotation.turn(seen.q.float(), -seen.position[:, None])
        q = q.masked_fill_(ignored, 0.0)
        new = (seen.position >= self.sinks).sum(-1).float()[:, None, None]
        both = (count + new).clamp_min(1.0)
        new_mean = q.sum(2) / new.clamp_min(1.0)
        apart = new_mean - mean
        if self.covariance:
            around = (q - new_mean[:, :, None]).masked_fill_(ignored, 0.0)
            x = torch.cat([around, (apart * (count * new / both).sqrt())[:, :, None]], 2).flatten(0, 1)
            slots.rows["scatter"].flatten(0, 1).baddbmm_(x.transpose(1, 2), x)
        mean.add_(apart * (new / both))
        slots.rows["count"].add_(new[:, 0, 0])

    def score(self, slots, now_B11):
        B, H, S, D = slots.k.shape
        s, rows = slots.layer.scaling, slots.rows
        # k.R Cov R'k for the average rotation R: the keys are turned back, which is one turn instead of two of D x D.
        k = slots.layer.rotation.turn_by(slots.k.float(), *self._turned_back(slots.layer.rotation, now_B11))
        k = k.transpose(2, 3)  # [B, H, D, S]
        x = s * (rows["mean"].view(B, H, -1, D) @ k)  # [B, H, G, S]
        if self.covariance:
            cov_k = (rows["scatter"].view(B, H, -1, D) @ k).view(B, H, -1, D, S)
            spread = (cov_k * k[:, :, None]).sum(3)
            x = x + s * s / 2 * spread / rows["count"].clamp_min(1.0)[:, None, None, None]
        counts = slots.valid & (slots.position >= self.sinks)
        x = x.masked_fill_(~counts[:, :, None], float("-inf")).log_softmax(-1)
        score = x.logsumexp(2) - math.log(x.shape[2])
        if self.value_norm:
            if self.epsilon:
                score = torch.logaddexp(score, torch.full_like(score, math.log(self.epsilon)))
            score = score + slots.state["value_norm"].clamp_min(1e-30).log()
        return score.masked_fill(~counts, 0.0)

    def _turned_back(self, rotation, now_B11: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, 1, 1, R / 2] of the transposed average rotation of positions now ... now + future."""
        frequency = rotation.frequency.to(now_B11.device)
        ahead = torch.arange(self.future, device=now_B11.device)[:, None] * frequency
        cos, sin = ahead.cos().mean(0), ahead.sin().mean(0)
        now = now_B11[..., None] * frequency
        return now.cos() * cos - now.sin() * sin, -(now.sin() * cos + now.cos() * sin)


class ExpectedAttention32(ExpectedAttention):
    """expected_attention that looks 32 positions ahead, not 512: far ahead is the right question for a prompt that is
    cut once, the next steps are for a cache that evicts at every step."""

    name = "expected_attention_32"
    deviations = "future = 32, where the source has 512. " + ExpectedAttention.deviations

    def __init__(self, **options):
        super().__init__(**{"future": 32, **options})
