import torch

from .base import Policy, Published

STRATEGIES = ("alpha", "knorm_alpha")
DISTANCES = ("exact", "reference")


class TrimKV(Policy):
    """Learned retention: a token is worth beta^age, and beta was given to it by a trained gate at its creation.

    Args:
        strategy: "alpha" scores log beta * age; "knorm_alpha" adds the log of the key's norm.
        distance: "exact" counts the age as the next query's distance, as in training; "reference" counts one more, as
            the released code does (methods differ only between tokens of unequal beta).
    """

    name = "trimkv"
    published = Published({"distance": "reference"}, buffer=128, split="even")
    needs = frozenset({"log_beta"})
    trained = True
    comparable = True
    search = "retention"
    source = "arXiv 2512.03324, section 4; ngocbh/trimkv@0456bc4"
    state = {"log_beta": torch.float32}
    formula = "age * log beta"
    deviations = (
        "The released code attends first and then cuts M + W to M (here: a Budget with a buffer, or TrimKVCache), and "
        'counts ages one higher (distance="reference").'
    )

    def __init__(self, strategy: str = "alpha", distance: str = "exact"):
        if strategy not in STRATEGIES:
            raise ValueError(f"policy trimkv: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if distance not in DISTANCES:
            raise ValueError(f"policy trimkv: distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
        self.strategy, self.offset = strategy, DISTANCES.index(distance)
        if strategy == "knorm_alpha":
            self.needs, self.search = frozenset({"log_beta", "keys"}), ""
            self.state = {**self.state, "log_norm": torch.float32}

    def new_state(self, new):
        state = {"log_beta": new.log_beta.float()}
        if self.strategy == "knorm_alpha":
            state["log_norm"] = new.k.float().norm(dim=-1).log()
        return state

    def score(self, slots, now_B11):
        score = slots.state["log_beta"] * (now_B11 + self.offset - slots.position)
        return score + slots.state["log_norm"] if self.strategy == "knorm_alpha" else score
