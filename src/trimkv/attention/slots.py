"""Attention over slots, and the choice of the slot to give up.

A query at position p attends to every valid slot of its row and head whose position is <= p. That is all there is: the
order of slots means nothing to softmax, and keys carry their rotation with them. An empty slot has position -1.

Shapes: B rows, T new tokens, S keys, H KV heads, Q query heads, G = Q/H, D head dim.
"""

import torch
import torch.nn.functional as F

NO_TOKEN = -1
QUERIES = 128  # whose probabilities exist at a time where a policy asks for them: [B, H, G, 128, S], never T x T


def position_rule(
    query_position_BT: torch.Tensor, key_position_BHS: torch.Tensor, blank_rows: bool = True
) -> torch.Tensor:
    """The mask of the position rule, bool [B, H, T, S].

    With ``blank_rows`` a padding query (position -1) sees everything instead of nothing: nobody reads its output, but a
    softmax over nothing is NaN, and a NaN value poisons real rows through 0 * NaN in later layers.
    """
    query, key = query_position_BT[:, None, :, None], key_position_BHS[:, :, None, :]
    mask = (key >= 0) & (key <= query)
    return mask | (query < 0) if blank_rows else mask


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """The position rule where all keys are valid and the last ones are the queries' own: bool [T, S]."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def attend(
    q_BQTD: torch.Tensor,
    k_BHSD: torch.Tensor,
    v_BHSD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of T queries over S keys. Returns [B, Q, T, D] in the dtype of q.

    Args:
        mask: bool, True = may attend, broadcastable to [B, H, T, S]; None lets every query see every key.
        scaling: factor on the logits, usually D ** -0.5.
        softcap, s_aux_Q: see reference.slot_attention.

    All query heads of a group share one KV head, so they are folded into the query axis: keys are read once and never
    repeated.
    """
    B, Q, T, _ = q_BQTD.shape
    H = k_BHSD.shape[1]
    G = Q // H
    q = q_BQTD.reshape(B, H, G * T, q_BQTD.shape[-1])
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if T > 1 and G > 1:
            mask = mask[:, :, None].expand(-1, -1, G, -1, -1).reshape(*mask.shape[:2], G * T, mask.shape[-1])
    if softcap is None and s_aux_Q is None:
        out = F.scaled_dot_product_attention(q, k_BHSD, v_BHSD, attn_mask=mask, scale=scaling)
    else:
        logits = (q @ k_BHSD.transpose(2, 3)).float() * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            # Finite: a padding query of a sliding-window layer may see nothing, and must not become NaN.
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        if s_aux_Q is None:
            weights = logits.softmax(-1)
        else:
            sink = s_aux_Q.float().view(1, H, G, 1, 1).expand(B, H, G, T, 1).reshape(B, H, G * T, 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        out = weights.to(v_BHSD.dtype) @ v_BHSD
    return out.reshape(B, Q, T, v_BHSD.shape[-1])


def attend_causal(
    q_BQTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """``attend`` for the first chunk of unpadded rows: T queries over their own T keys, no mask tensor needed."""
    T = q_BQTD.shape[2]
    if softcap is None and s_aux_Q is None:
        return F.scaled_dot_product_attention(q_BQTD, k_BHTD, v_BHTD, is_causal=True, scale=scaling, enable_gqa=True)
    mask = causal_mask(T, T, q_BQTD.device)
    return attend(q_BQTD, k_BHTD, v_BHTD, mask, scaling, softcap, s_aux_Q)


def logits(q_BQTD: torch.Tensor, k_BHSD: torch.Tensor, scaling: float, softcap: float | None = None) -> torch.Tensor:
    """fp32 [B, H, G, T, S]: of each query head with the keys of its group, nothing masked."""
    B, Q, T, D = q_BQTD.shape
    H, S = k_BHSD.shape[1:3]
    x = (q_BQTD.reshape(B, H, Q // H * T, D) @ k_BHSD.transpose(2, 3)).float() * scaling
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x.view(B, H, Q // H, T, S)


def attend_with_lse(
    q_BQTD: torch.Tensor,
    k_BHSD: torch.Tensor,
    v_BHSD: torch.Tensor,
    query_position_BT: torch.Tensor,
    key_position_BHS: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
    sees_all: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``attend`` under the position rule, for policies that score by attention: blocks of queries, softmax in fp32.

    Args:
        sees_all: the caller knows that every query sees every key; no mask is made.

    Returns:
        out [B, Q, T, D]; the log-sum-exp of each query's logits, fp32 [B, Q, T], from which ``probabilities`` makes
        its weights again; and, where one block did, those weights [B, H, G, T, S]. A padding query's are anything.
    """
    B, Q, T, _ = q_BQTD.shape
    H = k_BHSD.shape[1]
    outs, lses, weights = [], [], None
    for start in range(0, T, QUERIES):
        part = slice(start, start + QUERIES)
        x = logits(q_BQTD[:, :, part], k_BHSD, scaling, softcap)
        if not sees_all:
            x.masked_fill_(~position_rule(query_position_BT[:, part], key_position_BHS)[:, :, None], float("-inf"))
        lse = x.logsumexp(-1, keepdim=True)
        if s_aux_Q is not None:
            lse = torch.logaddexp(lse, s_aux_Q.float().view(1, H, -1, 1, 1))
        weights = x.sub_(lse).exp_()
        out = weights.flatten(2, 3).to(v_BHSD.dtype) @ v_BHSD
        outs.append(out.view(B, Q, -1, v_BHSD.shape[-1]))
        lses.append(lse.view(B, Q, -1))
    if len(outs) > 1:
        return torch.cat(outs, 2), torch.cat(lses, 2), None
    return outs[0], lses[0], weights


def probabilities(
    q_BQTD: torch.Tensor,
    k_BHSD: torch.Tensor,
    lse_BQT: torch.Tensor,
    query_position_BT: torch.Tensor,
    key_position_BHS: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The weights of an attention that is done, from its log-sum-exp: fp32 [B, H, G, T, S], 0 for padding queries."""
    x = logits(q_BQTD, k_BHSD, scaling, softcap)
    B, H, G, T, _ = x.shape
    x = x.sub_(lse_BQT.reshape(B, H, G, T, 1)).exp_()
    return x.masked_fill_(~position_rule(query_position_BT, key_position_BHS, blank_rows=False)[:, :, None], 0.0)


def protect(
    score: torch.Tensor,
    position: torch.Tensor,
    sinks: int = 0,
    recent_from: torch.Tensor | None = None,
    any_empty: bool = True,
) -> torch.Tensor:
    """The one place where protection happens: scores become -inf for empty slots, +inf for sinks and recent tokens.

    Args:
        score, position: [B, H, S], higher = keep; position -1 = empty.
        recent_from: [B, 1, 1]; tokens of this position and later are kept.
        any_empty: False if the caller knows that every slot holds a token.
    """
    if sinks:
        score = score.masked_fill(position < sinks, float("inf"))
    if recent_from is not None:
        score = score.masked_fill(position >= recent_from, float("inf"))
    return score.masked_fill(position < 0, float("-inf")) if any_empty else score


def rank_key(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One int64 that sorts as (score, position): the fp32 score in the high half, position + 1 in the low half.

    No two valid slots of a head share a position, so there are no ties left: what is evicted does not depend on the
    device, on the order of slots or on a sort's stability. Among equal scores the newer token ranks higher, and an
    empty slot ranks below everything.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (position + 1).to(torch.int64)


def victim(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The slot to overwrite in each head, [B, H, 1]: an empty one, else the one worth least.

    The slot of the lowest ``rank_key``, found in fewer steps: a decode step does this in every layer.
    """
    lowest = score == score.amin(-1, keepdim=True)
    return position.where(lowest, torch.iinfo(position.dtype).max).argmin(-1, keepdim=True)


def best(score: torch.Tensor, position: torch.Tensor, num: int) -> torch.Tensor:
    """Indices of the ``num`` slots worth most in each head, best first, empty ones last: [B, H, num]."""
    return rank_key(score, position).topk(num, dim=-1).indices
