import torch

from .base import Policy


class KeyDiff(Policy):
    """Keeps the keys that point away from the mean direction of the keys held by their head.

    The anchor is the mean of the unit keys of the candidates. It is summed anew at every step: the scores pass over all
    keys anyway, and a sum that is only updated would drift.
    """

    name = "keydiff"
    needs = frozenset({"keys"})
    source = "arXiv 2504.15364, section 3; NVIDIA/kvpress v0.5.4 presses/keydiff_press.py"
    state = {"inverse_norm": torch.float32}
    formula = "-cos(k, mean of the unit keys held)"
    deviations = (
        "The paper evicts after blocks of 128 tokens, here every decoded token evicts one (chunk=128 gives its blocks "
        "for prompts)."
    )

    def new_state(self, new):
        return {"inverse_norm": 1 / new.k.float().norm(dim=-1).clamp_min(1e-8)}

    def score(self, slots, now_B11):
        k, inverse_norm = slots.k.float(), slots.state["inverse_norm"]
        anchor = (inverse_norm * slots.valid)[:, :, None] @ k  # [B, H, 1, D], times the number of keys
        anchor = torch.nn.functional.normalize(anchor, dim=-1)
        return -(k @ anchor.transpose(2, 3))[..., 0] * inverse_norm
