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


def slot_probabilities(
    q_BQTD: torch.Tensor,
    k_BHSD: torch.Tensor,
    query_position_BT: torch.Tensor,
    key_position_BHS: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights of ``slot_attention``: fp32 [B, Q, T, S], zeros for padding queries."""
    B, H, S, _ = k_BHSD.shape
    one_hot = torch.eye(S).expand(B, H, S, S)
    return slot_attention(q_BQTD, k_BHSD, one_hot, query_position_BT, key_position_BHS, scaling, softcap, s_aux_Q)


def victim(score: list[float], position: list[int]) -> int:
    """Index of the slot to overwrite: an empty one, else the lowest score, among equals the oldest token."""
    return min(range(len(score)), key=lambda i: (position[i] >= 0, score[i], position[i]))


def best(score: list[float], position: list[int], budget: int) -> list[int]:
    """Positions of the ``budget`` tokens worth keeping, among equals the newer ones, in order of position."""
    valid = [i for i in range(len(score)) if position[i] >= 0]
    valid.sort(key=lambda i: (score[i], position[i]), reverse=True)
    return sorted(position[i] for i in valid[:budget])


def document_rule(num_tokens: int, start_BT: torch.Tensor | None = None, device=None) -> torch.Tensor:
    """Which tokens a token of a training sequence may see: bool [B or 1, T, T], row i true at start[i] <= j <= i."""
    i = torch.arange(num_tokens, device=device)
    seen = (i[None, :] <= i[:, None])[None]
    return seen if start_BT is None else seen & (i >= start_BT[:, :, None])


def decayed_attention(
    q_BQTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    log_beta_BHT: torch.Tensor,
    scaling: float,
    start_BT: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
    variant: str = "additive",
) -> torch.Tensor:
    """Attention in which key j fades by beta_j per token of age. Returns fp32 [B, Q, T, D] (fp64 stays fp64).

    The logit of query i and key j is  c(scaling * q_i . k_j) + (i - j) * log_beta_j,  c being the softcap: the weight
    exp(logit) is multiplied by beta_j ** (i - j) (arXiv 2512.03324, equation 3). ``variant="multiplicative"`` scales
    the logit itself by beta_j ** (i - j) instead, which promotes old keys with a negative logit; see decay.py.
    """
    wide = torch.promote_types(q_BQTD.dtype, torch.float32)
    group, T = q_BQTD.shape[1] // k_BHTD.shape[1], q_BQTD.shape[2]
    k, v, log_beta = (x.to(wide).repeat_interleave(group, 1) for x in (k_BHTD, v_BHTD, log_beta_BHT))
    seen = document_rule(T, start_BT, q_BQTD.device)[:, None]
    i = torch.arange(T, device=q_BQTD.device)
    age = (i[:, None] - i[None, :]).clamp_min(0).to(wide)
    logits = q_BQTD.to(wide) @ k.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    decay = age * log_beta[:, :, None, :]
    logits = logits * decay.exp() if variant == "multiplicative" else logits + decay
    logits = logits.masked_fill(~seen, float("-inf"))
    if s_aux_Q is not None:
        sink = s_aux_Q.to(wide)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1)[..., :T] @ v


def retention_sum(log_beta_BHT: torch.Tensor, start_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens that a head still holds at each step: S_t = sum of beta_j ** (t - j) over j <= t of t's document.

    Returns fp32 [B, H, T] (fp64 stays fp64); 1 <= S_t <= tokens of the document so far.
    """
    T = log_beta_BHT.shape[-1]
    log_beta = log_beta_BHT.to(torch.promote_types(log_beta_BHT.dtype, torch.float32))
    i = torch.arange(T, device=log_beta.device)
    age = (i[:, None] - i[None, :]).clamp_min(0)
    seen = document_rule(T, start_BT, log_beta.device)[:, None]
    return (age * log_beta[:, :, None, :]).exp().masked_fill(~seen, 0.0).sum(-1)


def relative_error(got: torch.Tensor, expect: torch.Tensor) -> float:
    """Relative root mean square of a difference; infinite for what is not a number."""
    got, expect = got.float(), expect.float()
    error = ((got - expect).norm() / expect.norm().clamp_min(1e-12)).item()
    return error if error == error else float("inf")
