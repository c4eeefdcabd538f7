import torch

from .base import Policy


class Knorm(Policy):
    """Keeps the tokens with the shortest keys: a short key is one that queries look at (rotation keeps its length)."""

    name = "knorm"
    needs = frozenset({"keys"})
    source = "arXiv 2406.11430, section 3; NVIDIA/kvpress v0.5.4 presses/knorm_press.py"
    state = {"norm": torch.float32}
    formula = "-|k|"
    deviations = "The source compresses a prompt once; here every decoded token evicts one."

    def new_state(self, new):
        return {"norm": new.k.float().norm(dim=-1)}

    def score(self, slots, now_B11):
        return -slots.state["norm"]
