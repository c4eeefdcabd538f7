import torch

from .base import Policy

STABILIZERS, LOCAL = 2500, 100  # published, for a budget of 6,000


class Locret(Policy):
    """Trained retaining heads: each token is worth what its head said at its creation, for ever.

    After a chunk of a prompt its last tokens (stabilizers) stay by force, but not after the last chunk, where the
    scores alone decide beside the newest ``local_len`` tokens.

    Args:
        stabilizers: how many; None takes the published share of the budget, 2500 / 6000.
        local_len: newest tokens that are never evicted; None takes the published 100, or a quarter of a budget below
            400.
    """

    name = "locret"
    trained = True
    head = "retaining_head"
    source = "arXiv 2410.01805, sections 3 and 4; huangyuxiang03/Locret@28995c5 locret/inference/infer.py"
    state = {"score": torch.float32}
    formula = "the retaining head's output; newest local_len = min(100, M / 4) kept"
    deviations = (
        "Evicts at each decode step too, where the source appends and grows. The local tokens count in the budget and "
        "are a part of the last chunk, where the source takes them off the prompt and adds them to the budget. Keys "
        "stay at their true positions, where the source numbers them anew inside the cache."
    )

    def __init__(self, stabilizers: int | None = None, local_len: int | None = None):
        for name, value in (("stabilizers", stabilizers), ("local_len", local_len)):
            if value is not None and value < 0:
                raise ValueError(f"policy locret: {name} must not be negative, got {value}")
        self.stabilizers, self.local_len = stabilizers, local_len

    def new_state(self, new):
        return {"score": new.module.retaining_head.take(new.position.shape[2])}

    def score(self, slots, now_B11):
        M = slots.layer.budget
        kept = min(LOCAL, M // 4) if self.local_len is None else self.local_len
        if slots.layer.more_follows:
            kept = max(kept, M * STABILIZERS // 6000 if self.stabilizers is None else self.stabilizers)
        return slots.state["score"].masked_fill(slots.position >= now_B11 - kept, float("inf"))
