"""All numbers of a training in one place."""

from dataclasses import dataclass, field

STAGES = ("decay", "eviction")
LOSSES = ("kl", "ntp", "reverse_kl")
NORMALISERS = ("paper", "released")
SCOPES = ("head", "global")


@dataclass(frozen=True)
class GateConfig:
    """How gates are trained. Defaults are those that worked for small models (docs/LOG.md); ``paper`` has the paper's.

    Args:
        budget: M of the capacity loss, tokens per head. Smaller than the budgets that the gates shall serve.
        context: tokens per sample.
        steps: optimizer steps.
        batch_size: samples per device and backward pass.
        accumulation: backward passes per optimizer step.
        stage: "decay", the paper's training, or "eviction", a second stage in which the forward pass cuts (softly) at
            budgets drawn for each row, so that gates learn the order that eviction will use.
        losses: of "kl", "ntp", "reverse_kl".
        average_losses: take their mean, as the authors' released trainer does, instead of their sum, as the paper does.
        capacity_weight: factor on the capacity loss.
        normaliser: "paper" or "released", see ``capacity_loss``.
        scope: "head" or "global", likewise.
        learning_rate: of the gates' weights.
        bias_learning_rate: of their output biases, which set the overall retention and have a long way to go.
        min_learning_rate: share of both at the end of the cosine.
        warmup_steps, weight_decay, betas, epsilon: AdamW's. Gradients of a nearly saturated sigmoid are tiny: an
            epsilon of 1e-8 would swallow them.
        clip: largest norm of the gradient.
        kind, intermediate_size: of new gates.
        budgets: range from which the eviction stage draws, log-uniformly.
        temperatures: width of its cut, in nats of worth, at the first and at the last step.
        budget_power: its rows weigh (budget / 128) ** budget_power, because the loss at a large budget is small.
        seed: of new gates, of drawn budgets and of the data's order.
        checkpointing: recompute activations in the backward pass. Saves memory, costs a third of the speed.
        cuda_graph: replay the whole step as one CUDA graph: for small models, whose kernels are shorter than their
            launches. Positions without a label cost as much as others then.
        compile: fuse what lies between attention and gates with torch.compile: a minute's wait, then half the time for
            small models.
        save_steps: a checkpoint every so many steps; 0 saves at the end only.
    """

    budget: float = 32
    context: int = 2048
    steps: int = 300
    batch_size: int = 4
    accumulation: int = 1
    stage: str = "decay"
    losses: tuple[str, ...] = ("kl",)
    average_losses: bool = False
    capacity_weight: float = 4.0
    normaliser: str = "paper"
    scope: str = "head"
    learning_rate: float = 3e-3
    bias_learning_rate: float = 5e-2
    min_learning_rate: float = 0.02
    warmup_steps: int = 10
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-12
    clip: float = 1.0
    kind: str = "rg"
    intermediate_size: int = 128
    budgets: tuple[int, int] = (48, 640)
    temperatures: tuple[float, float] = (0.4, 0.03)
    budget_power: float = 0.75
    seed: int = 0
    checkpointing: bool = True
    cuda_graph: bool = False
    compile: bool = False
    save_steps: int = 0
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        for name, known in (("normaliser", NORMALISERS), ("scope", SCOPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.losses or not set(self.losses) <= set(LOSSES):
            raise ValueError(f"losses must be of {', '.join(LOSSES)}, got {', '.join(self.losses) or 'none'}")
        for name in ("budget", "steps", "batch_size", "accumulation", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {self.context}")
        if self.budget >= self.context and self.capacity_weight:
            raise ValueError(f"a budget of {self.budget:g} is never exceeded in a context of {self.context} tokens")
        if self.stage == "eviction" and self.budgets[0] >= self.context:
            raise ValueError(
                f"budgets from {self.budgets[0]} up evict nothing in a context of {self.context} tokens: lengthen it"
            )

    @classmethod
    def paper(cls, **changes) -> "GateConfig":
        """The paper's settings (arXiv 2512.03324, section 5, and the authors' scripts): OpenR1-Math, 16K, M = 512."""
        settings = {
            "budget": 512,
            "context": 16384,
            "batch_size": 1,
            "accumulation": 4,
            "losses": ("kl", "ntp"),
            "capacity_weight": 1.0,
            "learning_rate": 2e-4,
            "bias_learning_rate": 2e-4,
            "min_learning_rate": 5e-3,
            "warmup_steps": 100,
            "weight_decay": 0.01,
            "betas": (0.9, 0.999),
            "intermediate_size": 512,
        }
        return cls(**{**settings, **changes})
