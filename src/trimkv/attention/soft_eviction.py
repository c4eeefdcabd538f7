"""Training attention that knows about the budget: a key fades as it falls below the M best of its head.

Decayed attention teaches gates how long a token is needed; it does not know where the budget will cut. Here the cut is
part of the forward pass. With u_ij = log(-log beta_j) + log(i - j), the log of how far token j's worth has decayed for
query i, and c_i the M-th smallest of them,

    logit_ij = scaling * q_i . k_j + logsigmoid((c_i - u_ij) / temperature)

so that the M best are seen in full, the rest are not, and near the border the gradient says which side is right. Only
the order within a head counts: the border moves with the scores (c_i is differentiated implicitly, from the sum of the
gates being constant), so raising all of them changes nothing.

Two paths give the same numbers. Fused kernels on a GPU (soft_eviction_triton.py) keep O(T) numbers: the output, and per
query a log-sum and a border. Torch, everywhere, is the truth they are tested against; it keeps several [B, H, T, T] and
[B, Q, T, T] tensors for the backward pass, which means moderate context and gradient checkpointing.

Shapes: B rows, T tokens, H KV heads, Q query heads, G = Q/H, D head dim.
"""

import torch
import torch.nn.functional as F

from .. import device
from .decay import _check

# The border is looked for in this range of log(-log beta) + log(age), and found to (HIGHEST - LOWEST) / 2 ** HALVINGS.
LOWEST, HIGHEST, HALVINGS = -20.0, 12.0, 14
# A token is never past its own border: age 0 has u = -inf, for which a very small age stands.
YOUNGEST = 1e-4


def soft_eviction_attention(
    q_BQTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    log_beta_BHT: torch.Tensor,
    scaling: float,
    budget_B: torch.Tensor,
    temperature: float | torch.Tensor,
    start_BT: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Causal attention over softly the ``budget_B`` best keys of each head. Returns [B, Q, T, D], with all gradients.

    Memory beyond inputs and output: O(T) with the kernels, O(T^2) with torch.

    Args:
        log_beta_BHT: fp32, < 0, differentiable.
        budget_B: tokens per head, one budget a row, int or float; queries with no more keys than that see all of them.
        temperature: width of the border in nats of worth, > 0; the smaller, the harder the cut. A number, or a tensor
            with one element (not differentiated) where a captured graph is to see it change.
        start_BT: index of the first token of each token's document, see ``decayed_attention``.
        implementation: "torch", "triton", or "auto": triton for CUDA tensors that it supports (fp32, bf16 and fp16,
            head dims up to 256), else torch.

    Raises:
        ValueError: shapes that do not fit, an unknown name, or "triton" for what it cannot do.
    """
    _check(q_BQTD, k_BHTD, v_BHTD, log_beta_BHT, start_BT, None, "additive", implementation)
    if budget_B.shape != q_BQTD.shape[:1]:
        raise ValueError(f"budget is {tuple(budget_B.shape)}: one per row, {tuple(q_BQTD.shape[:1])}, is needed")
    if not isinstance(temperature, torch.Tensor) and temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0; 0.01 is nearly a hard cut")
    worth_BHT = log_beta_BHT.to(torch.promote_types(log_beta_BHT.dtype, torch.float32)).neg().clamp(min=1e-30).log()
    ages_T = torch.arange(q_BQTD.shape[2], device=q_BQTD.device, dtype=worth_BHT.dtype)
    log_ages_T = ages_T.clamp(min=YOUNGEST).log()
    if implementation == "triton" or (implementation == "auto" and q_BQTD.is_cuda and device.has_triton()):
        from . import soft_eviction_triton

        problem = soft_eviction_triton.unsupported(q_BQTD, v_BHTD)
        if problem is None:
            return soft_eviction_triton.attend(
                q_BQTD, k_BHTD, v_BHTD, worth_BHT, log_ages_T, scaling, budget_B, temperature, start_BT
            )
        if implementation == "triton":
            raise ValueError(f'{problem}: use implementation="torch"')
    return _dense(q_BQTD, k_BHTD, v_BHTD, worth_BHT, log_ages_T, scaling, budget_B, temperature, start_BT)


def _dense(q_BQTD, k_BHTD, v_BHTD, worth_BHT, log_ages_T, scaling, budget_B, temperature, start_BT) -> torch.Tensor:
    B, Q, T, D = q_BQTD.shape
    H = k_BHTD.shape[1]
    G = Q // H
    index = torch.arange(T, device=q_BQTD.device)
    age = index[:, None] - index
    seen = (age >= 0).expand(B, 1, T, T)
    if start_BT is not None:
        seen = seen & (index >= start_BT[:, :, None])[:, None]
    u = worth_BHT[:, :, None, :] + log_ages_T[age.clamp(min=0)]
    bias = _bias(u, seen, budget_B, temperature)
    logits = (q_BQTD.reshape(B, H, G * T, D) @ k_BHTD.transpose(2, 3)).view(B, H, G, T, T)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scaling
    weights = (logits + bias[:, :, None]).masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    return (weights.to(v_BHTD.dtype).view(B, H, G * T, T) @ v_BHTD).reshape(B, Q, T, v_BHTD.shape[-1])


def _bias(u: torch.Tensor, seen_B1TT: torch.Tensor, budget_B: torch.Tensor, temperature) -> torch.Tensor:
    """log of how much of each key is left, [B, H, T, T]; anything where it is not seen."""
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
    low, high = torch.full_like(u[..., :1], LOWEST), torch.full_like(u[..., :1], HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (u < middle).sum(-1, keepdim=True) >= num_B[:, None, None, None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    last_in = u.masked_fill(u >= high, LOWEST).amax(-1, keepdim=True)
    first_out = u.masked_fill(u < high, torch.inf).amin(-1, keepdim=True)
    return torch.where(first_out.isinf(), high, (last_in + first_out) / 2)
