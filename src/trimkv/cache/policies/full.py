from .base import Policy


class Full(Policy):
    """Keeps everything: the reference that all others are measured against. Ignores the budget."""

    name = "full"
    source = "the stock cache"
    bounded = False
    formula = "none"
    search = "position"  # of use in a static cache only, where a sequence may be longer than the slots
    evicts = "never"
    peak_decode = peak_prefill = "all tokens"

    def score(self, slots, now_B11):
        return slots.position.float()
