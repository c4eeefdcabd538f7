"""Eviction after a chunk, in place and in two launches: who stays of the slots and the chunk, and who goes where.

Slots whose tokens stay are not touched. The first program of a head looks for the score that M tokens reach, bit by
bit, and gives the chunk's tokens that reach it, in their order, to the slots that become free, in theirs. Then keys
and values of those alone are copied.

Shapes: B rows, T new tokens, C slots, H KV heads, D head dim. In kernels: BS candidates, slots before new tokens, as a
power of two; j their index; BN slots in a block.
"""

import torch
import triton
import triton.language as tl

from .. import device
from . import slots
from .decay_triton import _strides
from .slots_triton import _dense, _pad, _worth

MOST = 8192  # candidates that one program looks at
LOWEST, HALF = tl.constexpr(-(2**63)), tl.constexpr(2**62)


def keep(
    k_new_BHTD: torch.Tensor,
    v_new_BHTD: torch.Tensor,
    new_position_BT: torch.Tensor,
    k_BHCD: torch.Tensor,
    v_BHCD: torch.Tensor,
    position_BHC: torch.Tensor,
    now_B: torch.Tensor,
    log_beta_new_BHT: torch.Tensor | None = None,
    log_beta_BHC: torch.Tensor | None = None,
    score: str = "retention",
    sinks: int = 0,
    recent: int = 0,
    offset: int = 0,
) -> None:
    """Leaves in the slots the C best of what they hold and of the chunk, as ``slots.best`` has it. Slots that nobody
    needs become empty; their keys and values stay.

    Nothing for the host to wait for, the same launches whatever the tensors hold.

    Args:
        k_new_BHTD, v_new_BHTD, log_beta_new_BHT: the chunk.
        new_position_BT: int32; -1 is padding.
        k_BHCD, v_BHCD, position_BHC (int32, -1 = empty), log_beta_BHC (fp32): the store, changed in place.
        now_B: int32, the positions of the tokens to come.
        score, offset: as for ``slots_triton.decode``.
        sinks, recent: tokens of position < sinks and >= now - recent stay.
    """
    assert score in ("retention", "position"), score
    assert (log_beta_BHC is None) == (log_beta_new_BHT is None) == (score != "retention")
    given = k_new_BHTD, v_new_BHTD, new_position_BT, k_BHCD, v_BHCD, position_BHC, now_B, log_beta_new_BHT, log_beta_BHC
    (_keep_triton if device.runs_kernels(k_BHCD) else keep_reference)(*given, score, sinks, recent, offset)


def possible(slots: int, tokens: int) -> bool:
    """Whether one program can look at so many slots and new tokens."""
    return slots + tokens <= MOST


def keep_reference(
    k_new, v_new, new_position, k, v, position, now, log_beta_new, log_beta, score, sinks, recent, offset
) -> None:
    """``keep`` in plain torch: the truth, and what runs on the CPU."""
    (B, H, C), T = position.shape, new_position.shape[1]
    now = now[:, None, None]
    both = torch.cat([position, new_position[:, None].expand(B, H, T)], 2)
    worth = both.float()
    if score == "retention":
        worth = torch.cat([log_beta, log_beta_new], 2) * (now + offset - both)
    worth = slots.protect(worth, both, sinks, now - recent if recent else None)
    stays = torch.zeros_like(both, dtype=torch.bool).scatter_(2, slots.best(worth, both, C), True) & (both >= 0)
    free, comes = ~stays[:, :, :C], stays[:, :, C:]
    # The n-th token that comes goes to the n-th free slot.
    order = (~comes).long().argsort(dim=-1, stable=True)
    rank = free.cumsum(-1) - 1
    taken = free & (rank < comes.sum(-1, keepdim=True))
    source = order.gather(2, rank.clamp(0, T - 1))
    position.copy_(torch.where(taken, both[:, :, C:].gather(2, source), position.masked_fill(free, slots.NO_TOKEN)))
    if log_beta is not None:
        log_beta.copy_(torch.where(taken, log_beta_new.gather(2, source), log_beta))
    for held, new in ((k, k_new), (v, v_new)):
        arrived = new.gather(2, source[..., None].expand(*source.shape, new.shape[-1]))
        held.copy_(torch.where(taken[..., None], arrived, held))


def _keep_triton(
    k_new, v_new, new_position, k, v, position, now, log_beta_new, log_beta, score, sinks, recent, offset
) -> None:
    (B, H, C), T, D = position.shape, new_position.shape[1], k.shape[-1]
    k_new, v_new = _dense(k_new), _dense(v_new)
    assert k.stride(-1) == v.stride(-1) == position.stride(-1) == 1
    assert log_beta is None or log_beta.stride(-1) == 1 and log_beta.dtype == torch.float32
    assert position.dtype == new_position.dtype == now.dtype == torch.int32
    assert v.shape[-1] == D and possible(C, T)
    new_position, now = new_position.contiguous(), now.contiguous()
    log_beta_new = None if log_beta is None else log_beta_new.float().contiguous()
    source = torch.empty(B, H, C, dtype=torch.int32, device=k.device)
    order = torch.empty(B, H, T, dtype=torch.int32, device=k.device)
    BS = triton.next_power_of_2(C + T)
    BN = 64
    with torch.cuda.device_of(k):
        _choose_kernel[(B * H,)](
            *(new_position, position, now, log_beta_new, log_beta, source, order),
            *(*position.stride()[:2], *(position if log_beta is None else log_beta).stride()[:2]),
            *(H, C, T, sinks, recent, offset),
            BS=BS,
            SCORE=score,
            HAS_BETA=log_beta is not None,
            num_warps=4 if BS <= 1024 else 8 if BS <= 4096 else 16,
        )
        _move_kernel[(B * H, triton.cdiv(C, BN))](
            *(k_new, v_new, k, v, source, *_strides(k_new, v_new, k, v), H, C),
            D=D,
            BD=_pad(D),
            BN=BN,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["C", "T"])
def _choose_kernel(
    new_position, position, now, log_beta_new, log_beta, source, order,
    p_b, p_h, lb_b, lb_h, H, C, T, sinks, recent, offset,
    BS: tl.constexpr, SCORE: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    """Decides for all candidates of a head, and writes positions and log_beta. ``source``: the new token that goes to a
    slot, or -1."""
    n = tl.program_id(0).to(tl.int64)
    row, head = n // H, n % H
    position += row * p_b + head * p_h
    new_position += row * T
    source += n * C
    order += n * T
    j = tl.arange(0, BS)
    held = j < C
    new = (j >= C) & (j < C + T)
    at = tl.load(position + j, mask=held, other=-1)
    at = tl.where(new, tl.load(new_position + (j - C), mask=new, other=-1), at)
    betas = 0.0
    if HAS_BETA:
        log_beta += row * lb_b + head * lb_h
        log_beta_new += n * T
        betas = tl.load(log_beta + j, mask=held, other=0.0)
        betas = tl.where(new, tl.load(log_beta_new + (j - C), mask=new, other=0.0), betas)
    score = _worth(betas, at, tl.load(now + row), sinks, recent, offset, SCORE)
    # slots.rank_key
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | (at + 1).to(tl.int64)
    # The largest number that C keys reach; what is beyond the candidates reaches none.
    key = tl.where(held | new, key, LOWEST)
    least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= C, tl.full([], 0, tl.int64), tl.full([], LOWEST, tl.int64))
    step = tl.full([], HALF, tl.int64)
    for _ in range(63):
        enough = tl.sum((key >= least + step).to(tl.int32), 0) >= C
        least = tl.where(enough, least + step, least)
        step = step >> 1
    stays = (key >= least) & (at >= 0)
    free = (held & (stays == 0)).to(tl.int32)
    comes = (new & stays).to(tl.int32)
    coming = tl.sum(comes, 0)
    tl.store(order + tl.cumsum(comes, 0) - 1, j - C, mask=comes != 0)
    tl.debug_barrier()  # read by other threads than wrote it
    rank = tl.cumsum(free, 0) - 1
    taken = (free != 0) & (rank < coming)
    token = tl.load(order + rank, mask=taken, other=0)
    arrived = tl.load(new_position + token, mask=taken, other=-1)
    tl.store(position + j, arrived, mask=free != 0)
    tl.store(source + j, tl.where(taken, token, -1), mask=held)
    if HAS_BETA:
        tl.store(log_beta + j, tl.load(log_beta_new + token, mask=taken, other=0.0), mask=taken)


@triton.jit(do_not_specialize=["C"])
def _move_kernel(
    k_new, v_new, k, v, source, kn_b, kn_h, kn_t, vn_b, vn_h, vn_t, k_b, k_h, k_t, v_b, v_h, v_t, H, C,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Copies keys and values to the slots that ``source`` gives away."""
    n = tl.program_id(0).to(tl.int64)
    row, head = n // H, n % H
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    token = tl.load(source + n * C + j, mask=j < C, other=-1)
    column = tl.arange(0, BD)[None, :]
    mask = (token >= 0)[:, None] & (column < D)
    token = token[:, None]
    keys = tl.load(k_new + row * kn_b + head * kn_h + token * kn_t + column, mask=mask, other=0.0)
    values = tl.load(v_new + row * vn_b + head * vn_h + token * vn_t + column, mask=mask, other=0.0)
    tl.store(k + row * k_b + head * k_h + j[:, None] * k_t + column, keys, mask=mask)
    tl.store(v + row * v_b + head * v_h + j[:, None] * v_t + column, values, mask=mask)
