"""The eviction rule as Python loops over one row and one head, independent of the package's tensors.

A row is fed in chunks, as its cache was. What is kept after each chunk follows from the formulae alone.
"""

import math


class BruteHead:
    """Kept tokens of one head of one row: position -> worth, by the definition of the policy."""

    def __init__(self, policy, budget, buffer=0, sinks=0, recent=0, distance=0, seed=0):
        self.policy, self.M, self.W = policy, budget, buffer
        self.sinks, self.recent, self.distance, self.seed = sinks, recent, distance, seed
        self.kept: dict[int, tuple[float, float]] = {}
        self.seen = 0

    def score(self, position: int, now: int, first_recent: int) -> tuple[float, int]:
        log_beta, log_norm = self.kept[position]
        if position < self.sinks or position >= first_recent:
            return math.inf, position
        if self.policy == "trimkv":
            return log_beta * (now + self.distance - position), position
        if self.policy == "knorm_alpha":
            return log_beta * (now + self.distance - position) + log_norm, position
        return float(position), position  # streaming_llm: the newest

    def cut(self, size: int, first_recent: int) -> None:
        ranked = sorted(self.kept, key=lambda p: self.score(p, self.seen, first_recent), reverse=True)
        self.kept = {p: self.kept[p] for p in ranked[:size]}

    def feed(self, tokens: list[tuple[float, float]]) -> list[int]:
        """Feeds a chunk of (log_beta, log_norm); returns the positions attended to by its last token."""
        if len(tokens) == 1 and not self.W and len(self.kept) == self.M:
            self.cut(self.M - 1, self.seen - self.recent + 1)
        for token in tokens:
            self.kept[self.seen] = token
            self.seen += 1
        attended = sorted(self.kept)
        limit = max(self.M + self.W - 1, self.M)
        if len(self.kept) > limit:
            self.cut(self.M, self.seen - self.recent)
        return attended


def chunks(length: int, chunk: int | None) -> list[int]:
    step = chunk or length
    return [min(step, length - start) for start in range(0, length, step)]
