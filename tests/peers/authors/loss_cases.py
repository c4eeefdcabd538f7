"""What both packages compute losses of, seed by seed, and what ours makes of it."""

import numpy as np

from peers.authors.exact_random import integers, uniform

LAYERS, HEADS, ROWS, TOKENS = 3, 2, 2, 32  # a power of two, which the authors' kernel asks for
HIDDEN, VOCABULARY = 16, 31
BASE_LOSSES = {"fwkl": ("kl",), "ntp": ("ntp",), "rvkl": ("reverse_kl",), "fwkl+ntp": ("kl", "ntp")}


def capacity(seed: int) -> dict:
    """A capacity loss: log retention of each token and head, documents in rows, a budget.

    One row under scope "head": the authors' code divides [B, L * H, T] by [B, T] there.

    Returns:
        log_beta: fp32 [B, L, H, T]; start: int64 [B, T], where each token's document begins; budget: a number;
        scope: "head" or "global".
    """
    scope, rows = (("head", 1), ("global", ROWS))[seed % 2]
    log_beta = -(10.0 ** (2 * uniform(rows, LAYERS, HEADS, TOKENS, seed=(seed, 0)) - 1.5)).astype(np.float32)
    borders = np.sort(integers(1, TOKENS, rows, 2, seed=(seed, 1)), axis=1)
    if seed % 3 == 0:  # one document a row
        borders[:] = 0
    start = np.zeros((rows, TOKENS), dtype=np.int64)
    for row, places in zip(start, borders, strict=True):
        for place in places:
            row[place:] = place
    budget = float(integers(1, 12, 1, seed=(seed, 2))[0]) / 2
    return {"log_beta": log_beta, "start": start, "budget": budget, "scope": scope}


def base(seed: int) -> dict:
    """A base loss: hidden states of student and teacher [B, T, E], the output matrix [V, E], labels [B, T]."""
    labels = integers(0, VOCABULARY, ROWS, TOKENS, seed=(seed, 3))
    labels[uniform(ROWS, TOKENS, seed=(seed, 4)) < -0.4] = -100
    return {
        "student": 2 * uniform(ROWS, TOKENS, HIDDEN, seed=(seed, 5)),
        "teacher": 2 * uniform(ROWS, TOKENS, HIDDEN, seed=(seed, 6)),
        "head": uniform(VOCABULARY, HIDDEN, seed=(seed, 7)),
        "labels": labels,
    }


def our_capacity(seed: int) -> float:
    import torch

    from trimkv.attention.retention_sum import retention_sum
    from trimkv.train.losses import capacity_loss

    case = capacity(seed)
    log_beta, start = torch.from_numpy(case["log_beta"]), torch.from_numpy(case["start"])
    sums = retention_sum(log_beta.flatten(1, 2), start)
    return capacity_loss(sums, case["budget"], start, normaliser="released", scope=case["scope"]).item()


def our_base(seed: int, kinds: str) -> float:
    """Theirs counts the divergences at position t where labels[t] counts, ours where labels[t + 1] does."""
    import torch

    from trimkv.train.losses import combine, distillation_losses

    case = {name: torch.from_numpy(array) for name, array in base(seed).items()}
    pad, losses = torch.nn.functional.pad, {}
    for kind in BASE_LOSSES[kinds]:
        student, teacher, labels = case["student"], case["teacher"], case["labels"]
        if kind != "ntp":
            student, teacher = (pad(hidden, (0, 0, 0, 1)) for hidden in (student, teacher))
            labels = pad(labels, (1, 0), value=-100)
        losses |= distillation_losses(student, teacher, lambda hidden: hidden @ case["head"].T, labels, (kind,))
    return combine(losses, torch.zeros(()), average=True).item()
