import torch

from .base import Policy, Published
from .snapkv import FORCED, check_window, pool_neighbours, window_votes
from .window import push, window_state

BLOCK = 2**22  # similarities that exist at a time: 16 MiB in fp32


class RKV(Policy):
    """Keeps tokens that the last queries attend to and whose keys do not say again what other keys say.

    Importance: maximum of the group's logits, softmax over the keys before the window, mean over the window's queries,
    max-pooled over neighbours. Redundancy: softmax over the keys of their mean cosine similarity with all held keys,
    where each key overlooks the newest one that is more similar to it than ``threshold``, so that of several alike the
    newest stays. A key without any such overlooks the oldest held token instead: as the published code does, which
    finds index 0 there. The window's tokens stay.

    Evicts at every step; ``Budget(M, buffer=128)`` evicts every 128 steps, as published.

    Args:
        window: queries that vote and whose tokens stay (alpha in the paper).
        kernel: tokens that are pooled, odd.
        mix_lambda: weight of importance; redundancy weighs 1 - lambda. 0.1 in the paper; the code's default was 0.07
            until a later commit. 1.0 is the "SnapKV" that the R-KV and TRIM-KV papers compare with.
        threshold: cosine similarity from which two keys are alike.
    """

    name = "r_kv"
    published = Published(buffer=128)
    needs = frozenset({"keys", "queries"})
    source = (
        "arXiv 2505.24133, importance and redundancy; Zefan-Cai/R-KV@d15c976 rkv/compression/r1_kv.py, rkv/utils.py"
    )
    formula = "lambda * importance to the last w queries - (1 - lambda) * redundancy among the keys held"
    deviations = (
        "Redundancy is each sample's own (the code gives all of a batch that of sample 0); fp32 and not the model's "
        "dtype; every step evicts, before attention (a buffer of 128 gives the published rhythm); at most half of the "
        "budget is window; no state outlives a sequence."
    )

    def __init__(self, window: int = 8, kernel: int = 7, mix_lambda: float = 0.1, threshold: float = 0.5):
        check_window("r_kv", window, kernel)
        if not 0 <= mix_lambda <= 1:
            raise ValueError(f"policy r_kv: mix_lambda must be between 0 and 1, got {mix_lambda}")
        self.window, self.kernel = window, kernel
        self.mix_lambda, self.threshold = mix_lambda, threshold

    def row_state(self, Q, H, D):
        return window_state(self.window, Q, D)

    def observe(self, slots, seen):
        push(slots, seen)

    def score(self, slots, now_B11):
        x, voters, old = window_votes(slots, now_B11, self.window)
        counts = voters[:, None, :, None] & old[:, :, None]
        weights = x.amax(2).masked_fill_(~old[:, :, None], float("-inf")).softmax(-1)
        votes = torch.where(counts, weights, 0.0).sum(2) / voters.sum(-1).clamp_min(1)[:, None, None]
        importance = pool_neighbours(votes[:, :, None], slots.position, self.kernel, "max")[:, :, 0]
        score = self.mix_lambda * importance - (1 - self.mix_lambda) * redundancy(slots, self.threshold)
        return torch.where(old, score, FORCED)


def redundancy(slots, threshold: float) -> torch.Tensor:
    """fp32 [B, H, S]: a probability over the tokens held, highest for keys that are like many others."""
    position, valid = slots.position, slots.valid
    unit = slots.k.float()
    unit = unit / (unit.norm(dim=-1, keepdim=True) + 1e-8) * valid[..., None]
    B, H, S, _ = unit.shape
    # What a row overlooks: the highest of these, with the position in place of the second wherever keys are alike.
    oldest = position == position.where(valid, torch.iinfo(position.dtype).max).amin(-1, keepdim=True)
    otherwise = torch.where(oldest, -1, -2).to(position.dtype)[:, :, None]
    total = torch.zeros_like(position, dtype=torch.float32)
    step = max(1, BLOCK // (B * H * S))
    for start in range(0, S, step):
        similar = unit[:, :, start : start + step] @ unit.transpose(2, 3)  # [B, H, step, S]
        similar.diagonal(start, -2, -1).zero_()
        overlooked = torch.where(similar > threshold, position[:, :, None], otherwise).argmax(-1, keepdim=True)
        total += similar.scatter_(-1, overlooked, 0.0).sum(2)
    mean = total / valid.sum(-1, keepdim=True).clamp_min(1)
    return mean.masked_fill_(~valid, torch.finfo(mean.dtype).min).softmax(-1)
