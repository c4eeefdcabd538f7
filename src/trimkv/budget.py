"""How many tokens a KV head may hold, and what that costs in bytes."""

from dataclasses import dataclass

SCOPES = ("head",)


@dataclass(frozen=True)
class Budget:
    """The number of tokens that each KV head may attend to.

    Args:
        tokens: M, the number of slots per KV head. With ``buffer=0`` no decode step ever attends to more.
        buffer: W, tokens allowed above M before an eviction pass brings a head back to M. A decode step then attends
            to at most M + W tokens. 0 evicts one token at every step, before attention.
        sinks: the first tokens of a sequence that are never evicted (StreamingLLM, arXiv 2309.17453).
        recent: the newest tokens that are never evicted.
        scope: "head" gives every KV head its own M.

    Raises:
        ValueError: with a one-line message that says what to change.
    """

    tokens: int
    buffer: int = 0
    sinks: int = 0
    recent: int = 0
    scope: str = "head"

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

    @property
    def slots(self) -> int:
        """Slots allocated per KV head: M + W."""
        return self.tokens + self.buffer

    @classmethod
    def of(cls, value: "int | Budget") -> "Budget":
        """A Budget from itself or from a plain number of tokens."""
        return value if isinstance(value, cls) else cls(value)


def bytes_per_sequence(config, budget: "int | Budget", dtype_bytes: int = 2, state_bytes: int = 4) -> int:
    """Bytes of slots that one sequence takes in all full-attention layers, known before anything is allocated.

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
    return layers * heads * Budget.of(budget).slots * (2 * head_dim * dtype_bytes + 4 + state_bytes)
