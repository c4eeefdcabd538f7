import torch

from .base import Policy

LEAST_LAG = 4  # a minimum and a maximum over fewer tokens measure nothing


class LagKV(Policy):
    """Keeps tokens whose keys and values vary most when measured on the scale of the tokens that follow them.

    Tokens in order of position, after the sinks, form partitions of ``lag``. Each is scaled per channel by the minimum
    and maximum of the next one; a token's score is the standard deviation over its channels, as a rank within the
    partition, keys and values averaged. The last whole partition, what follows it and the sinks stay.
    """

    name = "lagkv"
    needs = frozenset({"keys", "values"})
    source = "arXiv 2504.04704, section 3; NVIDIA/kvpress v0.5.4 presses/lagkv_press.py"
    formula = "rank within its partition of softmax(std over channels of (x - min) / (max - min) of the next partition)"
    deviations = (
        "The source compresses a prompt once and keeps everything below sinks + 2 lag tokens; here every decoded token "
        "evicts one, among the tokens held now, and lag is at most (M - sinks) / 4, so that small budgets have "
        "partitions. A channel that is constant in the next partition counts 0 instead of infinity."
    )

    def __init__(self, sinks: int = 4, lag: int = 128):
        if lag < 2:
            raise ValueError(f"policy lagkv: lag must be at least 2, got {lag}")
        self.sinks, self.lag = sinks, lag

    def score(self, slots, now_B11):
        n, S = self.sinks, slots.position.shape[2]
        lag = min(self.lag, max(LEAST_LAG, (slots.layer.budget - n) // 4))
        score = torch.ones_like(slots.position, dtype=torch.float32)
        num = (S - n) // lag  # partitions, of which the last is only a measure
        if num < 2:
            return score
        order = slots.position.where(slots.valid, torch.iinfo(torch.int32).max).argsort(-1)[:, :, n : n + num * lag]
        worth = (_spread(slots.k, order, lag) + _spread(slots.v, order, lag)) / 2
        rank = worth.argsort(dim=-1, stable=True).argsort(-1) / lag
        # Rows may hold fewer tokens than there are slots: a partition counts if the next one is whole.
        end_of_next = n + lag * torch.arange(2, num + 1, device=order.device)
        whole = end_of_next <= slots.valid.sum(-1, keepdim=True)
        rank = torch.where(whole[..., None], rank, 1.0).flatten(2)
        return score.scatter(2, order[:, :, : rank.shape[2]], rank)


def _spread(x_BHSD: torch.Tensor, order_BHN: torch.Tensor, lag: int) -> torch.Tensor:
    """fp32 [B, H, N / lag - 1, lag]: a probability over each partition but the last."""
    D = x_BHSD.shape[-1]
    x = x_BHSD.gather(2, order_BHN[..., None].expand(*order_BHN.shape, D)).float().unflatten(2, (-1, lag))
    low, high = x[:, :, 1:].aminmax(dim=-2, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (x[:, :, :-1] - low) / span, 0.0)
    return scaled.std(-1).softmax(-1)
