"""Plain torch in fp32, written to be read: the truth that every other path is tested against.

Shapes: B rows, T new tokens, S keys (kept slots, then the new tokens), H KV heads, Q query heads, G = Q/H, D head dim.
"""

import torch


def position_rule(query_position_BT: torch.Tensor, key_position_BHS: torch.Tensor) -> torch.Tensor:
    """Which keys a query may see: every valid one (position >= 0) that is not younger than itself.

    Returns bool [B, H, T, S]. Padding is a key, or a query, of position -1; a padding query sees nothing.
    """
    query, key = query_position_BT[:, None, :, None], key_position_BHS[:, :, None, :]
    return (key >= 0) & (key <= query)


def slot_attention(
    q_BQTD: torch.Tensor,
    k_BHSD: torch.Tensor,
    v_BHSD: torch.Tensor,
    query_position_BT: torch.Tensor,
    key_position_BHS: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention under the position rule. Returns fp32 [B, Q, T, D]; zeros for padding queries.

    Args:
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        s_aux_Q: a learned logit per query head that joins the softmax denominator only (GPT-OSS attention sinks).
    """
    group = q_BQTD.shape[1] // k_BHSD.shape[1]
    k = k_BHSD.float().repeat_interleave(group, 1)
    v = v_BHSD.float().repeat_interleave(group, 1)
    seen = position_rule(query_position_BT, key_position_BHS).repeat_interleave(group, 1)
    logits = q_BQTD.float() @ k.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~seen, float("-inf")).exp()
    denominator = weights.sum(-1, keepdim=True)
    if s_aux_Q is not None:
        denominator = denominator + s_aux_Q.float().exp()[None, :, None, None]
    return torch.where(seen.any(-1, keepdim=True), (weights @ v) / denominator, 0.0)


def victim(score: list[float], position: list[int]) -> int:
    """Index of the slot to overwrite: an empty one, else the lowest score, among equals the oldest token."""
    return min(range(len(score)), key=lambda i: (position[i] >= 0, score[i], position[i]))


def best(score: list[float], position: list[int], budget: int) -> list[int]:
    """Positions of the ``budget`` tokens worth keeping, among equals the newer ones, in order of position."""
    valid = [i for i in range(len(score)) if position[i] >= 0]
    valid.sort(key=lambda i: (score[i], position[i]), reverse=True)
    return sorted(position[i] for i in valid[:budget])
