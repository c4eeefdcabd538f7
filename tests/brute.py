"""The eviction rule as Python loops over one row and one head, independent of the package's tensors.

A row is fed in chunks, as its cache was. What is kept after each chunk follows from the formulae alone.
"""

import math

import numpy as np


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


class BruteRow:
    """Kept tokens of all heads of one row, for policies that look at keys, values or attention: numpy in float64.

    Args:
        formula: (row, head, position, now) -> worth.
        k, v: [H, tokens, D] of the row's real tokens; q: [H, G, tokens, D].
    """

    def __init__(self, formula, q, k, v, budget, buffer=0, sinks=0, recent=0, softcap=None, s_aux=None, **options):
        self.formula, self.q, self.k, self.v = formula, *(x.double().numpy() for x in (q, k, v))
        self.M, self.W, self.sinks, self.recent, self.softcap = budget, buffer, sinks, recent, softcap
        self.s_aux = None if s_aux is None else s_aux.double().numpy()  # [H, G]
        self.options = options
        self.H, self.seen = len(self.k), 0
        self.held: list[list[int]] = [[] for _ in range(self.H)]
        self.mass = [{} for _ in range(self.H)]  # attention received so far, over the group's heads
        self.last: list[dict] = [{} for _ in range(self.H)]  # from the last query: list over the group's heads
        self.queries_seen = [{} for _ in range(self.H)]

    def cut(self, h: int, size: int, recent: int) -> None:
        def rank(p):
            safe = p < self.sinks or p >= self.seen - recent
            return math.inf if safe else self.formula(self, h, p, self.seen), p

        ranks = {p: rank(p) for p in self.held[h]}
        self.held[h] = sorted(sorted(self.held[h], key=ranks.get, reverse=True)[:size])

    def attend(self, h: int, t: int) -> None:
        visible = [p for p in self.held[h] if p <= t]
        group = []
        for g in range(self.q.shape[1]):
            x = self.k[h, visible] @ self.q[h, g, t] * self.k.shape[-1] ** -0.5
            x = x if self.softcap is None else self.softcap * np.tanh(x / self.softcap)
            sink = 0.0 if self.s_aux is None else math.exp(self.s_aux[h, g])
            group.append(np.exp(x) / (np.exp(x).sum() + sink))
        for i, p in enumerate(visible):
            self.mass[h][p] = self.mass[h].get(p, 0.0) + sum(w[i] for w in group)
            self.queries_seen[h][p] = self.queries_seen[h].get(p, 0) + 1
        self.last[h] = {p: [w[i] for w in group] for i, p in enumerate(visible)}

    def feed(self, num: int, alone: bool) -> list[list[int]]:
        """Feeds the next tokens of the row, as a decode step (``alone``) or a chunk. Returns what its last attended."""
        if alone and not self.W and len(self.held[0]) == self.M:
            for h in range(self.H):
                self.cut(h, self.M - 1, self.recent - 1)
        new = range(self.seen, self.seen + num)
        for h in range(self.H):
            self.held[h] += new
            for t in new:
                self.attend(h, t)
        self.seen += num
        attended = [list(held) for held in self.held]
        if len(self.held[0]) > max(self.M + self.W - 1, self.M):
            for h in range(self.H):
                self.cut(h, self.M, self.recent)
        return attended


def _unit(x):
    return x / np.linalg.norm(x)


def keydiff(row, h, p, now):
    anchor = sum(_unit(row.k[h, j]) for j in row.held[h]) / len(row.held[h])
    return -float(_unit(row.k[h, p]) @ _unit(anchor))


def tova(row, h, p, now):
    if p == now - 1:
        return math.inf
    return float(np.mean([weight for head in row.last for weight in head[p]]))


def lagkv(row, h, p, now):
    n, lag, order = row.options["first"], row.options["lag"], sorted(row.held[h])
    i = order.index(p) - n
    part, inside = divmod(i, lag)
    if i < 0 or n + (part + 2) * lag > len(order):
        return 1.0
    mine, following = (order[n + j * lag : n + (j + 1) * lag] for j in (part, part + 1))
    worth = np.zeros(lag)
    for x in (row.k[h], row.v[h]):
        low, high = x[following].min(0), x[following].max(0)
        flat = high == low
        scaled = np.where(flat, 0.0, (x[mine] - low) / np.where(flat, 1.0, high - low))
        spread = scaled.std(1, ddof=1)
        spread = np.exp(spread - spread.max())
        worth += (spread / spread.sum()).astype(np.float32) / 2  # tiny probabilities are 0, as ours are
    return sum(w < worth[inside] or (w == worth[inside] and j < inside) for j, w in enumerate(worth)) / lag


FORMULAE = {
    "knorm": lambda row, h, p, now: -float(np.linalg.norm(row.k[h, p])),
    "keydiff": keydiff,
    "tova": tova,
    "h2o": lambda row, h, p, now: row.mass[h][p],
    "h2o_age": lambda row, h, p, now: row.mass[h][p] / row.queries_seen[h][p],
    "lagkv": lagkv,
    "streaming_llm": lambda row, h, p, now: float(p),
}
