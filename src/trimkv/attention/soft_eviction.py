"""Training attention that knows about the budget: a key fades as it falls below the M best of its head.

Decayed attention teaches gates how long a token is needed; it does not know where the budget will cut. Here the cut is
part of the forward pass. With u_ij = log(-log beta_j) + log(i - j), the log of how far token j's worth has decayed for
query i, and c_i the M-th smallest of them,

    logit_ij = scaling * q_i . k_j + logsigmoid((c_i - u_ij) / temperature)

so that the M best are seen in full, the rest are not, and near the border the gradient says which side is right. Only
the order within a head counts: the border moves with the scores (c_i is differentiated implicitly, from the sum of the
gates being constant), so raising all of them changes nothing.

Shapes: B rows, T tokens, H KV heads, Q query heads, G = Q/H, D head dim. Memory is O(T^2) for one layer: meant for a
second stage at moderate context, under gradient checkpointing.
"""

import torch
import torch.nn.functional as F

_STEPS = 14  # halvings of a range of 32 nats: the border is found to 0.002


def soft_eviction_attention(
    q_BQTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    log_beta_BHT: torch.Tensor,
    scaling: float,
    budget_B: torch.Tensor,
    temperature: float,
    start_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over softly the ``budget_B`` best keys of each head. Returns [B, Q, T, D].

    Args:
        log_beta_BHT: fp32, < 0, differentiable.
        budget_B: tokens per head, one budget a row; queries with no more keys than that see all of them.
        temperature: width of the border in nats of worth; the smaller, the harder the cut.
        start_BT: index of the first token of each token's document, see ``decayed_attention``.
    """
    B, Q, T, D = q_BQTD.shape
    H = k_BHTD.shape[1]
    G = Q // H
    index = torch.arange(T, device=q_BQTD.device)
    age = index[:, None] - index
    seen = (age >= 0).expand(B, 1, T, T)
    if start_BT is not None:
        seen = seen & (index >= start_BT[:, :, None])[:, None]
    bias = _bias(log_beta_BHT, age, seen, budget_B, temperature)
    logits = (q_BQTD.reshape(B, H, G * T, D) @ k_BHTD.transpose(2, 3)).view(B, H, G, T, T).float() * scaling
    weights = (logits + bias[:, :, None]).masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    return (weights.to(v_BHTD.dtype).view(B, H, G * T, T) @ v_BHTD).reshape(B, Q, T, v_BHTD.shape[-1])


def _bias(log_beta_BHT, age_TT, seen_B1TT, budget_B, temperature: float) -> torch.Tensor:
    """log of how much of each key is left, [B, H, T, T]; anything where it is not seen."""
    # A token is never past its own border: age 0 has u = -inf, for which a very small age stands.
    u = log_beta_BHT.neg().clamp(min=1e-30).log()[:, :, None, :] + age_TT.clamp(min=0).float().clamp(min=1e-4).log()
    with torch.no_grad():
        hidden = u.masked_fill(~seen_B1TT, float("inf"))
        border = _border(hidden, budget_B)
        gate = torch.sigmoid((border - hidden) / temperature)
        slope = gate * (1 - gate)
        slope /= slope.sum(-1, keepdim=True).clamp(min=1e-6)
    # d border = sum slope * du: the border's own gradient, with no change to its value.
    border = border + (slope * (u - u.detach())).sum(-1, keepdim=True)
    fits = seen_B1TT.sum(-1, keepdim=True) <= budget_B[:, None, None, None]
    return F.logsigmoid((border - u) / temperature).masked_fill(fits, 0.0)


def _border(u: torch.Tensor, num_B: torch.Tensor) -> torch.Tensor:
    """Half way between the ``num_B`` smallest entries of the last axis and the rest, by halving: [..., 1]."""
    low, high = torch.full_like(u[..., :1], -20.0), torch.full_like(u[..., :1], 12.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = (u < middle).sum(-1, keepdim=True) >= num_B[:, None, None, None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    last_in = u.masked_fill(u >= high, -20.0).amax(-1, keepdim=True)
    first_out = u.masked_fill(u < high, torch.inf).amin(-1, keepdim=True)
    return torch.where(first_out.isinf(), high, (last_in + first_out) / 2)
