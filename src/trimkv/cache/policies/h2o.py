import torch

from .base import Policy, Published


class H2O(Policy):
    """Heavy hitters: keeps what received most attention so far, and the newest tokens in half of the budget.

    Args:
        age_normalised: divides the attention received by the number of queries that could give it, without which old
            tokens win by their age alone.
    """

    name = "h2o"
    published = Published(buffer=1)
    needs = frozenset({"attention"})
    source = "arXiv 2306.14048, section 4; FMInference/H2O@ac75c2a h2o_hf/utils_real_drop"
    recent_share = 0.5
    state = {"mass": torch.float32}
    formula = "sum of the attention received, over all queries and the query heads of the group; half the budget recent"
    deviations = (
        "Sums are per KV head and not per query head (whose caches would be G times as large), in fp32 and not in the "
        "model's dtype; attends after the eviction instead of before, so that M is never exceeded."
    )

    def __init__(self, age_normalised: bool = False):
        self.age_normalised = age_normalised
        if age_normalised:
            self.name, self.formula = H2ONormalised.name, H2ONormalised.formula
            self.deviations = H2ONormalised.deviations

    def new_state(self, new):
        return {"mass": torch.zeros_like(new.position, dtype=torch.float32)}

    def observe(self, slots, seen):
        slots.state["mass"].add_(seen.column_sums())

    def score(self, slots, now_B11):
        mass = slots.state["mass"]
        # Every real query from the token's own on has seen it: as many as it is old.
        return mass / (now_B11 - slots.position) if self.age_normalised else mass


class H2ONormalised(H2O):
    """Heavy hitters by the attention that each of their queries gave on average: age alone wins nothing."""

    name = "h2o_normalised"
    published = None
    formula = "attention received, divided by the number of queries that could give it; half the budget recent"
    deviations = (
        "Not in the paper: the mean in place of the sum, as kvpress's ObservedAttentionPress has it. " + H2O.deviations
    )

    def __init__(self):
        super().__init__(age_normalised=True)
