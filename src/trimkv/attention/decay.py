"""Retention-gated attention for training, with all gradients: a key fades by beta_j for every token of its age.

    logit_ij = c(scaling * q_i . k_j) + (i - j) * log_beta_j        start_i <= j <= i, softmax over j

Equation 3 of arXiv 2512.03324; c is the softcap where a model has one. Eviction uses plain attention over what is left:
the decay exists only in training, where it makes "how long is this token needed" differentiable.

Two paths give the same numbers: fused kernels on a GPU (decay_triton.py), blocks of queries in torch everywhere. Both
store nothing of size T x T. The truth is reference.decayed_attention.

Shapes: B rows, T tokens, H KV heads, Q query heads, G = Q/H, D head dim. Query head q reads KV head q // G.
"""

from typing import NamedTuple

import torch

from .. import device

VARIANTS = ("additive", "multiplicative")
IMPLEMENTATIONS = ("auto", "torch", "triton")
# Torch path: queries per block (on a CPU the block should stay in cache), and weights per block in all heads together.
MAX_QUERIES, MAX_WEIGHTS = {"cpu": 64, "cuda": 256}, 2**26


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
    implementation: str = "auto",
) -> torch.Tensor:
    """Causal attention whose keys decay with age. Returns [B, Q, T, D] in the dtype of q, with all gradients.

    Args:
        log_beta_BHT: fp32, <= 0, one per token and KV head. 0 is plain attention.
        scaling: factor on q . k, usually D ** -0.5.
        start_BT: int, index of the first token of the document that each token belongs to; non-decreasing along T.
            Tokens see, and decay within, their own document only. None: every row is one document. Left padding:
            a padding token is a document of its own (start = its index); right padding needs nothing.
        softcap: scaled q . k becomes softcap * tanh(it / softcap) before the decay is added (Gemma 2).
        s_aux_Q: a learned logit per query head that joins the softmax denominator only (GPT-OSS attention sinks).
        variant: "additive", or "multiplicative": the logit is multiplied by beta ** age. Not recommended, here to
            compare with: a negative logit scaled towards 0 makes an old key *more* visible. Torch path only.
        implementation: "torch", "triton", or "auto": triton for CUDA tensors that it supports, else torch.

    Raises:
        ValueError: shapes that do not fit, an unknown name, or "triton" for what it cannot do.
    """
    _check(q_BQTD, k_BHTD, v_BHTD, log_beta_BHT, start_BT, s_aux_Q, variant, implementation)
    if implementation == "triton" or (implementation == "auto" and q_BQTD.is_cuda and device.has_triton()):
        from . import decay_triton

        problem = decay_triton.unsupported(q_BQTD, v_BHTD, variant)
        if problem is None:
            return decay_triton.attend(q_BQTD, k_BHTD, v_BHTD, log_beta_BHT, scaling, start_BT, softcap, s_aux_Q)
        if implementation == "triton":
            raise ValueError(f'{problem}: use implementation="torch"')
    return _Blocks.apply(
        q_BQTD, k_BHTD, v_BHTD, log_beta_BHT, s_aux_Q, start_BT, scaling, softcap, variant == "multiplicative"
    )


def _check(q, k, v, log_beta, start, s_aux, variant, implementation):
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    B, Q, T, D = q.shape
    H = k.shape[1]
    if k.shape != (B, H, T, D) or v.shape[:3] != (B, H, T) or Q % H:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, Q or H, T, D]")
    if log_beta.shape != (B, H, T):
        raise ValueError(f"log_beta is {tuple(log_beta.shape)}: one per KV head and token, {(B, H, T)}, is needed")
    if start is not None and start.shape != (B, T):
        raise ValueError(f"start is {tuple(start.shape)}: one per token, {(B, T)}, is needed")
    if s_aux is not None and s_aux.shape != (Q,):
        raise ValueError(f"s_aux is {tuple(s_aux.shape)}: one per query head, {(Q,)}, is needed")


class _Blocks(torch.autograd.Function):
    """Blocks of queries against all keys they may see; the backward pass makes each block's weights again.

    The G query heads of a group are rows of one matrix, so keys are never repeated. Everything is computed in fp32
    (fp64 for fp64 inputs). Extra memory: fp32 copies of k and v, and one block of weights at a time.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_beta, s_aux, start, scaling, softcap, multiplicative):
        row = _Rows(q, k, v, log_beta, s_aux, start, scaling, softcap, multiplicative)
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        out_NGTD = out.view(*row.NGT, -1)
        for lo, i0, i1 in row.blocks():
            weights = row.weights(lo, i0, i1).weights
            out_NGTD[:, :, i0:i1] = row.unfold(weights @ row.v[:, lo:i1])
        ctx.save_for_backward(q, k, v, log_beta, s_aux, start)
        ctx.options = scaling, softcap, multiplicative
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, log_beta, s_aux, start = ctx.saved_tensors
        scaling, softcap, multiplicative = ctx.options
        row = _Rows(q, k, v, log_beta, s_aux, start, scaling, softcap, multiplicative)
        dout = dout.reshape(*row.NGT, -1)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dq_NGTD = dq.view(*row.NGT, -1)
        dk, dv, dlog_beta = (torch.zeros_like(x) for x in (row.k, row.v, row.log_beta))
        daux = None if s_aux is None else torch.zeros_like(row.s_aux)
        for lo, i0, i1 in row.blocks():
            block = row.weights(lo, i0, i1)
            keys = slice(lo, i1)
            do = row.fold(dout[:, :, i0:i1])
            dv[:, keys].baddbmm_(block.weights.transpose(1, 2), do)
            dweights = do @ row.v[:, keys].transpose(1, 2)
            if daux is not None:
                daux -= row.unfold(block.sink * (block.weights * dweights).sum(-1, keepdim=True)).sum((2, 3))
            dlogits = torch.ops.aten._softmax_backward_data(dweights, block.weights, -1, row.wide)
            # sum_i dlogit_ij (i - j) = sum_i dlogit_ij (i - i0)  +  (i0 - j) sum_i dlogit_ij: two columns more for the
            # product that makes dk, instead of a pass over the block.
            i = torch.arange(i1 - i0, dtype=row.wide, device=q.device)
            moments = row.fold(torch.stack([i, torch.ones_like(i)], -1).expand(*row.NGT[:2], -1, -1))
            if multiplicative:
                ages = row.ages(lo, i0, i1).clamp_min(0).repeat(row.NGT[1], 1)
                dlog_beta[:, keys] += torch.einsum("nij,ij->nj", dlogits * block.logits * block.decay, ages)
                dlogits = dlogits * block.decay
            elif softcap is not None:
                moments = dlogits.transpose(1, 2) @ moments
            if softcap is not None:
                dlogits = dlogits * (1 - (block.logits / softcap).square())
            dq_NGTD[:, :, i0:i1] = row.unfold(dlogits @ row.k[:, keys]) * scaling
            if multiplicative or softcap is not None:
                dk[:, keys].baddbmm_(dlogits.transpose(1, 2), block.q, alpha=scaling)
            else:
                both = dlogits.transpose(1, 2) @ torch.cat([block.q, moments], -1)
                dk[:, keys].add_(both[..., :-2], alpha=scaling)
                moments = both[..., -2:]
            if not multiplicative:
                j = torch.arange(lo, i1, device=q.device)
                dlog_beta[:, keys] += moments[..., 0] + (i0 - j) * moments[..., 1]
        dk, dv, dlog_beta = (d.view(x.shape).to(x.dtype) for d, x in ((dk, k), (dv, v), (dlog_beta, log_beta)))
        if daux is not None:
            daux = daux.view(q.shape[0], -1).sum(0).to(s_aux.dtype)
        return dq, dk, dv, dlog_beta, daux, None, None, None, None


class _Block(NamedTuple):
    """What a block of R queries and S keys needs again in the backward pass; N = B * H."""

    q: torch.Tensor  # [N, G * R, D]
    weights: torch.Tensor  # [N, G * R, S], after the softmax
    logits: torch.Tensor | None  # [N, G * R, S], capped but without decay; only for softcap and multiplicative
    decay: torch.Tensor | None  # [N, G * R, S], only for multiplicative
    sink: torch.Tensor | None  # [N, G * R, 1], the weight that s_aux took


class _Rows:
    """The inputs with B and H as one batch dimension N and G beside the queries, and the maths of one block of them."""

    def __init__(self, q, k, v, log_beta, s_aux, start, scaling, softcap, multiplicative):
        B, Q, T, D = q.shape
        H = k.shape[1]
        self.NGT = B * H, Q // H, T
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q = q.reshape(*self.NGT, D)
        self.k, self.v, self.log_beta = (x.to(self.wide).reshape(B * H, T, *x.shape[3:]) for x in (k, v, log_beta))
        self.s_aux = None if s_aux is None else s_aux.to(self.wide).view(H, Q // H).repeat(B, 1)
        self.start = start
        self.scaling, self.softcap, self.multiplicative = scaling, softcap, multiplicative

    def fold(self, x_NGRD):
        return x_NGRD.reshape(x_NGRD.shape[0], -1, x_NGRD.shape[-1]).to(self.wide)

    def unfold(self, x):
        return x.view(*self.NGT[:2], -1, x.shape[-1])

    def blocks(self):
        """(first key, first query, last query + 1) of every block. Keys of documents that ended before are left out."""
        N, G, T = self.NGT
        size = max(8, min(MAX_QUERIES.get(self.k.device.type, 256), MAX_WEIGHTS // (N * G * T)))
        first = range(0, T, size)
        lows = [0] * len(first)
        if self.start is not None and self.start.device.type == "cpu":  # on a GPU the skip is not worth a sync
            lows = [self.start[:, i0 : i0 + size].min().item() for i0 in first]
        return [(lo, i0, min(i0 + size, T)) for lo, i0 in zip(lows, first, strict=True)]

    def ages(self, lo, i0, i1):
        i, j = (torch.arange(*span, dtype=self.wide, device=self.k.device) for span in ((i0, i1), (lo, i1)))
        return i[:, None] - j

    def weights(self, lo, i0, i1) -> _Block:
        N, G, _ = self.NGT
        q = self.fold(self.q[:, :, i0:i1])
        k = self.k[:, lo:i1].transpose(1, 2)
        ages = self.ages(lo, i0, i1)
        decay = (ages.clamp_min(0) * self.log_beta[:, None, lo:i1]).masked_fill_(ages < 0, float("-inf"))
        if self.start is not None:
            j = torch.arange(lo, i1, device=k.device)
            hidden = (j < self.start[:, i0:i1, None]).repeat_interleave(N // self.start.shape[0], 0)
            decay.masked_fill_(hidden, float("-inf"))
        decay = decay[:, None].expand(N, G, *decay.shape[1:]).reshape(N, -1, decay.shape[-1])
        if self.softcap is None and not self.multiplicative:
            logits, total = None, torch.baddbmm(decay, q, k, alpha=self.scaling)
        else:
            logits = (q @ k) * self.scaling
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            total = logits + decay
            if self.multiplicative:
                total = torch.where(decay == float("-inf"), decay, logits * decay.exp())
                decay = decay.exp()
        if self.s_aux is None:
            return _Block(q, total.softmax(-1), logits, decay if self.multiplicative else None, None)
        sink = self.s_aux[:, :, None].expand(N, G, i1 - i0).reshape(N, -1, 1)
        weights = torch.cat([total, sink], -1).softmax(-1)
        return _Block(
            q, weights[..., :-1].contiguous(), logits, decay if self.multiplicative else None, weights[..., -1:]
        )
