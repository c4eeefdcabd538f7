"""How many tokens a KV head may hold, and what that costs in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

SCOPES = ("head", "layer", "global")
SPLITS = ("trained", "even", "gates")


@dataclass(frozen=True)
class Budget:
    """The number of tokens that each KV head may attend to.

    Args:
        tokens: M, the number of slots per KV head. With ``buffer=0`` no decode step ever attends to more. A mean
            where heads or layers share, see ``scope`` and ``split``.
        buffer: W, tokens allowed above M before an eviction pass brings a head back to M. A decode step then attends
            to at most M + W tokens. 0 evicts one token at every step, before attention.
        sinks: the first tokens of a sequence that are never evicted (StreamingLLM, arXiv 2309.17453).
        recent: the newest tokens that are never evicted.
        scope: "head" gives every KV head its own M. "layer" gives the H heads of a layer M x H tokens together, and
            "global" the heads of all L layers M x L x H; the tokens worth most stay, whatever their head. M is then the
            mean over the heads that share, and what is said of sinks and recent tokens holds for each head.
        floor: share of M that each head is sure of where heads share; 1 is scope "head". 0 as published (TRIM-KV's
            dynamic budgets, ngocbh/trimkv@0456bc4); what a head is sure of counts towards its share.
        ceiling: no head that shares holds more than this many times M.
        threshold: where heads share, tokens that score less than log(threshold) go even where there is room; for
            TRIM-KV that is beta^age < threshold. 0 lets them stay. Not together with a floor, as published.
        split: "trained" gives a layer more or fewer than M where the policy's trained gates say how much of the budget
            it should have: M is then the mean over the layers, and their sum what it would be without. "even" gives
            every layer M, "gates" any policy what TRIM-KV would have. For scope "global" it is all the same.

    Raises:
        ValueError: with a one-line message that says what to change.
    """

    tokens: int
    buffer: int = 0
    sinks: int = 0
    recent: int = 0
    scope: str = "head"
    floor: float = 0.0
    ceiling: float = 4.0
    threshold: float = 0.0
    split: str = "trained"

    def __post_init__(self):
        for name in ("tokens", "buffer", "sinks", "recent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"budget: {name} must be a whole number of tokens, got {value!r}")
        if self.tokens < 1:
            raise ValueError(f"budget: tokens must be at least 1, got {self.tokens}")
        for name in ("buffer", "sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"budget: {name} must not be negative, got {getattr(self, name)}")
        if self.tokens <= self.sinks + self.recent:
            raise ValueError(
                f"budget: {self.tokens} tokens leave no room beside {self.sinks} sinks and {self.recent} recent "
                f"tokens; use more than {self.sinks + self.recent}"
            )
        if self.scope not in SCOPES:
            raise ValueError(f"budget: scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.split not in SPLITS:
            raise ValueError(f"budget: split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"budget: floor must be a share between 0 and 1, got {self.floor!r}")
        if not 1 <= self.ceiling < float("inf"):
            raise ValueError(f"budget: ceiling must be a number of at least 1, got {self.ceiling!r}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"budget: threshold must be a number from 0 to below 1, got {self.threshold!r}")
        if (self.floor or self.threshold) and not self.shared:
            name = "floor" if self.floor else "threshold"
            raise ValueError(f"budget: a {name} is for heads that share a budget; use scope layer or global with it")
        if self.floor and self.threshold:
            raise ValueError("budget: a threshold leaves no head sure of a floor; use one of them")
        if self.buffer and self.shared:
            raise ValueError(f"budget: scope {self.scope} takes no buffer; leave it out")

    @property
    def shared(self) -> bool:
        """Whether heads share a budget."""
        return self.scope != "head"

    @property
    def least(self) -> int:
        """Tokens that each head is sure of where heads share."""
        return int(self.floor * self.tokens + 1e-9)

    def most(self, heads: int) -> int:
        """Tokens that one of so many heads that share may hold."""
        return min(int(self.ceiling * self.tokens + 1e-9), self.tokens * heads)

    @property
    def slots(self) -> int:
        """Slots allocated per KV head: M + W."""
        return self.tokens + self.buffer

    def layers(self, shares: Sequence[float], sinks: int = 0) -> "list[Budget]":
        """The budgets of layers that have these shares of all slots: together exactly as many as without.

        What is never evicted is every layer's; the rest is shared out, and each layer has at least one slot of it.

        Args:
            shares: one number > 0 per layer; only their ratios count.
            sinks: a policy's own, where they are more than the budget's.
        """
        if self.scope == "global" or len(set(shares)) == 1:
            return [self] * len(shares)
        fixed = max(self.sinks, sinks) + self.recent
        free = (self.tokens - fixed) * len(shares)
        wished = [free * share / sum(shares) for share in shares]
        given = [max(1, int(wish)) for wish in wished]
        while sum(given) != free:  # largest remainders first
            step = 1 if sum(given) < free else -1
            able = [i for i in range(len(given)) if given[i] + step >= 1]
            given[max(able, key=lambda i: step * (wished[i] - given[i]))] += step
        return [replace(self, tokens=fixed + number) for number in given]

    @classmethod
    def of(cls, value: "int | Budget") -> "Budget":
        """A Budget from itself or from a plain number of tokens."""
        return value if isinstance(value, cls) else cls(value)


def bytes_per_sequence(config, budget: "int | Budget", dtype_bytes: int = 2, state_bytes: int = 4) -> int:
    """Bytes of slots that one sequence takes in all full-attention layers, known before anything is allocated.

    Those of the whole model: where its KV heads are shared out over N processes, each holds an N-th.

    Args:
        config: a transformers model configuration.
        budget: tokens per KV head, or a Budget.
        dtype_bytes: bytes of one key or value element (2 for bf16 and fp16).
        state_bytes: bytes a slot carries beside key, value and its 4-byte position (4 for TRIM-KV's log_beta).
    """
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = getattr(config, "layer_types", None)
    layers = config.num_hidden_layers if types is None else list(types).count("full_attention")
    budget, slot_bytes = Budget.of(budget), 2 * head_dim * dtype_bytes + 4 + state_bytes
    if not budget.shared:
        return layers * heads * budget.slots * slot_bytes
    pools, sharing = (1, layers * heads) if budget.scope == "global" else (layers, heads)
    # A slot more than tokens, a 4-byte note at each slot of who has it, and lists of 4-byte numbers (cache/pool.py).
    lists = sharing * budget.most(sharing) + 1
    return pools * ((sharing * budget.tokens + 1) * (slot_bytes + 4) + 4 * lists)
