import torch

from .base import Policy, Published


class Tova(Policy):
    """Keeps what the last query attended to, averaged over all query heads: one set for all heads of a layer.

    All KV heads hold the same tokens in the same slots, so that a mean over slots is one over tokens. Where heads are
    shared out over processes, the mean is made over all of them, once per layer and step.
    """

    name = "tova"
    published = Published(buffer=1)
    needs = frozenset({"attention"})
    source = "arXiv 2401.06104, section 3.2; NVIDIA/kvpress v0.5.4 presses/tova_press.py"
    state = {"weight": torch.float32}
    formula = "attention of the last query, mean over all query heads; the last token always stays"
    deviations = "Attends after the eviction instead of before, so that M is never exceeded."

    def new_state(self, new):
        return {"weight": torch.zeros_like(new.position, dtype=torch.float32)}

    def observe(self, slots, seen):
        weight = slots.state["weight"]
        mean = slots.layer.mean_over_heads(seen.last_mean())
        weight.copy_(seen.where_real(mean[:, None].expand_as(weight), weight))

    def score(self, slots, now_B11):
        return slots.state["weight"].masked_fill(slots.position == now_B11 - 1, float("inf"))
