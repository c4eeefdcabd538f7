"""Which share of attention each block of keys receives, without the logits ever reaching memory.

One program has BM queries of one query head and walks over the keys twice: for the log-sum-exp, and for the largest
probability of each block. Keys lie block after block, so that a tile holds whole blocks wherever a document begins.

Names as in decay_triton.py; S tokens in a block, N blocks of a row.
"""

import torch
import triton
import triton.language as tl

from .. import device
from ..attention import decay_triton
from ..attention.decay_triton import EXACT, _load, _no_key_yet, _scaled

TILES = {64: (128, 64), 128: (64, 64), 256: (32, 32)}  # head dim up to: (BM, BN), BN at least one block
LARGEST_BLOCK = 128


def unsupported(q: torch.Tensor, block_size: int) -> str | None:
    """Why the kernel cannot do this, or None."""
    if block_size & (block_size - 1) or block_size > LARGEST_BLOCK:
        return f"the kernel takes blocks of a power of two up to {LARGEST_BLOCK} tokens, not {block_size}"
    return decay_triton.unsupported(q, q, "additive")


def block_shares(
    q_BQTD: torch.Tensor,
    part: slice,
    k_BHNSD: torch.Tensor,
    index_BNS: torch.Tensor,
    start_BT: torch.Tensor,
    block_BT: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """The largest probability that each query gives to a key of each block, fp32 [B, Q, t, N]; 0 where it sees none.

    Args:
        part: the t queries that are asked.
        k_BHNSD: the row's keys, block after block.
        index_BNS: int32, where a key stands in its row; T or more where a block has no such token.
        start_BT: int32, where a token's document begins.
        block_BT: int32, the block of each token; it does not decrease along a row.
    """
    q = q_BQTD if q_BQTD.stride(-1) == 1 else q_BQTD.contiguous()
    (B, Q, T, D), (H, N, S) = q.shape, k_BHNSD.shape[1:4]
    t = min(part.stop, T) - part.start
    BD = max(16, triton.next_power_of_2(D))
    BM, BN = TILES[max(64, BD)]
    if q.dtype == torch.float32:
        BM, BN = 32, 32
    shares = torch.zeros(B, Q, t, N, device=q.device)
    with torch.cuda.device_of(q):
        _shares_kernel[(B * Q, triton.cdiv(t, BM))](
            *(q, k_BHNSD.to(q.dtype).contiguous(), index_BNS.contiguous(), start_BT.contiguous()),
            *(block_BT.contiguous(), None if s_aux_Q is None else s_aux_Q.float(), shares),
            *q.stride()[:3],
            *(H, T, N, part.start, part.start + t, scaling, softcap or 0.0),
            **dict(G=Q // H, D=D, BD=BD, S=S, BM=BM, BN=max(BN, S)),
            **dict(HAS_CAP=softcap is not None, HAS_AUX=s_aux_Q is not None),
            **dict(num_warps=4, num_stages=2 if device.much_shared_memory(q) else 1),
        )
    return shares


@triton.jit
def _visible_logits(
    q, k, index, i, first, n, keys, T, scaling, softcap, D: tl.constexpr, BD: tl.constexpr, HAS_CAP: tl.constexpr
):
    """Base-2 logits of a tile, and which of them count."""
    j = tl.load(index + n, mask=n < keys, other=T)
    x = tl.dot(q, tl.trans(_load(k, n, D, keys, D, BD, True)), input_precision=EXACT)
    return _scaled(x, scaling, softcap, HAS_CAP), (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None])


@triton.jit
def _shares_kernel(
    q, k, index, start, block, s_aux, shares,
    q_b, q_h, q_t, H, T, N, t0, t1, scaling, softcap,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_AUX: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64) // (H * G), tl.program_id(0).to(tl.int64) % (H * G)
    i0 = t0 + (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest walks first
    i = i0 + tl.arange(0, BM)
    keys = N * S
    k += (row * H + head // G) * keys * D
    index += row * keys
    start += row * T
    block += row * T
    first = tl.load(start + i, mask=i < t1, other=T)
    queries = _load(q + row * q_b + head * q_h, i, q_t, t1, D, BD, True)
    lo = tl.load(block + tl.load(start + i0)) * S // BN * BN
    hi = (tl.load(block + tl.minimum(i0 + BM, t1) - 1) + 1) * S
    top, total = _no_key_yet(s_aux, head, BM, HAS_AUX)
    for n0 in range(lo, hi, BN):
        n = n0 + tl.arange(0, BN)
        x, sees = _visible_logits(queries, k, index, i, first, n, keys, T, scaling, softcap, D, BD, HAS_CAP)
        x = tl.where(sees, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log2(total)
    shares += ((row * H * G + head) * (t1 - t0) + (i - t0)[:, None]) * N
    for n0 in range(lo, hi, BN):
        n = n0 + tl.arange(0, BN)
        x, sees = _visible_logits(queries, k, index, i, first, n, keys, T, scaling, softcap, D, BD, HAS_CAP)
        x = tl.where(sees, tl.exp2(x - lse[:, None]), 0.0)
        largest = tl.max(tl.reshape(x, (BM, BN // S, S)), 2)
        blocks = n0 // S + tl.arange(0, BN // S)
        tl.store(shares + blocks[None, :], largest, mask=(i[:, None] < t1) & (blocks[None, :] < N))
