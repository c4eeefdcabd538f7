"""What generate and chat have in common: a request that was checked, then a model and a cache that are ready."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from . import loading, show
from .errors import mendable


@dataclass
class Run:
    """A checked request. Nothing slow has happened yet, except for the tokenizer."""

    options: SimpleNamespace
    decides: Any  # the policy
    budget: Any
    chunk: int | None
    choice: loading.Choice
    device: str
    dtype: str
    tokenizer: Any

    @classmethod
    def check(cls, options: SimpleNamespace) -> "Run":
        """Everything that can be refused before the weights are read."""
        from ..budget import Budget

        show.starting()
        with mendable():
            budget = Budget(
                options.budget,
                buffer=options.buffer,
                sinks=options.sinks,
                recent=options.recent,
                scope=options.scope,
                floor=options.floor,
                split=options.split,
            )
        loading.check_model_name(options.model)
        loading.import_torch()
        from ..cache.build import check_sharing
        from ..cache.policies import as_published, make

        choice = loading.choose((options.policy,) if options.policy else (), options.model, options.gates)
        loading.check_budget(budget, choice.policies)
        policy, chunk = make(choice.policies[0]), options.prefill_chunk
        with mendable():
            if options.profile == "paper":
                policy, budget, chunk = as_published(policy.name, budget, chunk)
            check_sharing(policy, budget)
        device = loading.pick_device(options.device)
        dtype = loading.pick_dtype(options.dtype, device)
        tokenizer = loading.load_tokenizer(options.model)
        return cls(options, policy, budget, chunk, choice, device, dtype, tokenizer)

    def start(self):
        """The model with its gates, and its empty cache."""
        import torch

        model = self.load_model()
        cache = self.new_cache(model)
        torch.manual_seed(self.options.seed)
        return model, cache

    def load_model(self):
        """The model with its gates."""
        o = self.options
        return loading.load_model(o.model, self.device, self.dtype, self.choice.gates, self.choice.heads)

    def new_cache(self, model):
        """An empty cache for a model that ``load_model`` gave, of this run or of one that needs the same gates."""
        from .. import bounded_cache

        with mendable():
            cache = bounded_cache(model, policy=self.decides, budget=self.budget, chunk=self.chunk)
        if self.choice.remark:
            loading.note(self.choice.remark)
        return cache

    def runs_on_model_of(self, other: "Run") -> bool:
        """Whether the model that another run loaded has all that this one needs."""
        mine, theirs = self.choice, other.choice
        same = self.options.model == other.options.model and self.options.gates == other.options.gates
        gates = mine.gates is None or theirs.gates is not None
        return same and gates and (not mine.heads or mine.policies == theirs.policies)

    @property
    def policy(self) -> str:
        return self.decides.name

    @property
    def bounded(self) -> bool:
        return self.decides.bounded

    @property
    def sampling(self):
        from .answer import Sampling

        o = self.options
        return Sampling(o.max_new_tokens, o.temperature, o.top_p, o.repetition_penalty)

    def report(self, cache) -> dict:
        """What the cache took at its worst, and what a full one would take for the same tokens."""
        return {
            "peak_tokens_per_head": cache.peak_tokens,
            "peak_tokens_per_head_prefill": cache.peak_prefill_tokens,
            "peak_tokens_per_head_decode": cache.peak_decode_tokens,
            "mean_tokens_per_head": cache.peak_mean_tokens,
            "mean_tokens_per_head_decode": cache.peak_mean_tokens,
            "profile": self.options.profile,
            "scope": self.budget.scope if self.bounded else "head",
            "split": self.budget.split,
            "peak_cache_bytes": cache.peak_bytes,
            "full_cache_bytes": cache.full_cache_bytes(cache.get_seq_length()),
            "device": self.device,
            "dtype": self.dtype,
        }


class LengthWarning:
    """Says once that a text grew past the positions that the model was trained on. A bounded cache takes any length;
    the model's answers may suffer all the same, and nobody should have to guess why."""

    def __init__(self, model, name: str):
        self.trained = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.name, self.said = name, False

    def check(self, tokens: int) -> None:
        if self.trained and tokens > self.trained and not self.said:
            self.said = True
            loading.note(f"{self.name} was trained on {self.trained:,} positions; past them its answers may get worse")
