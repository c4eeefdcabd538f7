import torch
import torch.nn.functional as F

from .base import Policy, Published
from .window import push, window_logits, window_state

POOLING = ("avg", "max")
GROUP = ("mean", "max")
DENOMINATOR = ("all", "old")
# Beats every score, and loses to the sinks and recent tokens of the budget, whose score is infinite.
FORCED = torch.finfo(torch.float32).max


class SnapKV(Policy):
    """Keeps what the last ``window`` queries attend to, smoothed over neighbouring tokens, and the window's own tokens.

    The window slides on while decoding, one query a step, and every step evicts: the extension that later papers
    measure as SnapKV. ``decoding=False`` with ``bounded_cache(..., chunk=None)`` is the paper's own form: one cut after
    the prompt, and all that is decoded stays.

    Neighbours are the held tokens next to each other in the order of positions, as they were in the source's cache.

    Args:
        window: queries that vote and whose tokens stay; the source's classes say 64, its set-up code 32.
        kernel: tokens that are pooled, odd; 5, and 7 in the source's LongBench runs.
        pooling: "avg" counts nothing beyond both ends and in the window (borders shrink); "max" in LongBench.
        group: what a KV head makes of its query heads' pooled votes. The baseline of the R-KV paper takes the maximum
            of the logits instead, which is ``r_kv`` with mix_lambda=1.
        denominator: "all" normalises attention over all keys held, "old" over those before the window (R-KV's code).
        decoding: whether decoded tokens evict.
    """

    name = "snapkv"
    published = Published({"decoding": False})
    needs = frozenset({"keys", "queries"})
    source = "arXiv 2404.14469, section 4; FasterDecoding/SnapKV@e216ddc snapkv/monkeypatch/snapkv_utils.py"
    formula = "pool over positions of the attention of the last w queries, summed; mean over the group's query heads"
    deviations = (
        "One set per KV head (mean over its query heads) and not per query head, whose caches would be G times as "
        "large; decoded tokens evict too, by a window that slides (decoding=False: as published); fp32 and not the "
        "model's dtype; at most half of the budget is window; learned attention sinks are part of the denominator."
    )

    def __init__(
        self,
        window: int = 32,
        kernel: int = 5,
        pooling: str = "avg",
        group: str = "mean",
        denominator: str = "all",
        decoding: bool = True,
    ):
        check_window("snapkv", window, kernel)
        for option, value, known in (
            ("pooling", pooling, POOLING),
            ("group", group, GROUP),
            ("denominator", denominator, DENOMINATOR),
        ):
            if value not in known:
                raise ValueError(f"policy snapkv: {option} must be one of {', '.join(known)}, got {value!r}")
        self.window, self.kernel, self.pooling = window, kernel, pooling
        self.group, self.denominator = group, denominator
        if not decoding:
            self.grows, self.evicts = True, "after each chunk of a prompt"
            self.peak_decode = "M + decoded tokens"

    def row_state(self, Q, H, D):
        return window_state(self.window, Q, D)

    def observe(self, slots, seen):
        push(slots, seen)

    def score(self, slots, now_B11):
        x, voters, old = window_votes(slots, now_B11, self.window)
        if self.denominator == "old":
            x = x.masked_fill(~old[:, :, None, None], float("-inf"))
        total = x.logsumexp(-1, keepdim=True)
        if slots.layer.s_aux is not None and self.denominator == "all":
            total = torch.logaddexp(total, slots.layer.s_aux.float().view(1, *x.shape[1:3], 1, 1))
        counts = voters[:, None, None, :, None] & old[:, :, None, None]
        votes = torch.where(counts, (x - total).exp(), 0.0).sum(3)
        votes = pool_neighbours(votes, slots.position, self.kernel, self.pooling)
        votes = votes.mean(2) if self.group == "mean" else votes.amax(2)
        return torch.where(old, votes, FORCED)


def check_window(policy: str, window: int, kernel: int) -> None:
    """Raises a ValueError for a window or a pooling kernel that cannot be."""
    if window < 1:
        raise ValueError(f"policy {policy}: window must be at least 1 query, got {window}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"policy {policy}: kernel must be odd, so that a token is in its middle, got {kernel}")


def window_votes(slots, now_B11: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the last ``window`` queries say of the tokens before them; at most half of the budget is window.

    Returns:
        fp32 [B, H, G, w, S]: their logits, -inf where a query does not see a slot; bool [B, w]: which of the w places
        hold a query that counts; bool [B, H, S]: the slots whose tokens are older than the window.
    """
    if slots.layer.budget:
        window = min(window, max(1, slots.layer.budget // 2))
    x, filled = window_logits(slots)
    first = now_B11 - window
    voters = filled & (slots.rows["order"] > first[:, 0])  # order is position + 1
    return x, voters, slots.valid & (slots.position < first)


def pool_neighbours(x_BHGS: torch.Tensor, position_BHS: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Pools values >= 0 over each ``kernel`` slots that follow each other in position; the rest of a border counts 0.

    Slots are in no order: values are gathered by position and scattered back. Empty slots sort before the first token,
    so they border on it as nothing would, as long as their value is 0.
    """
    order = position_BHS.argsort(-1)[:, :, None].expand_as(x_BHGS)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    pooled = pool(x_BHGS.gather(-1, order).flatten(0, 1), kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(x_BHGS).scatter_(-1, order, pooled.view_as(x_BHGS))
