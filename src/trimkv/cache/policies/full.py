from .base import Policy


class Full(Policy):
    """Keeps everything: the reference that all others are measured against. Ignores the budget."""

    name = "full"
    source = "the stock cache"
    bounded = False

    def score(self, slots, now_B11):
        return slots.position.float()
