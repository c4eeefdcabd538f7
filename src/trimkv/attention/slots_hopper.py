"""The decode step over slots for Hopper, from a layer's projections to what its heads give, in one launch.

``products.heads`` and ``slots_triton.decode`` in one: a program owns all query heads of a KV head and a part of its
slots. It takes its place early (overlap.py) and copies its part of the store into shared memory while the projections
are still at work, since what the store holds does not depend on them; then it waits, norms and rotates the queries of
its head for itself, attends, and the program of a head that arrives last joins the parts. The first part writes the new
token. While it waits, each looks for the token of its part that is worth least: what the next step will evict is known
before this one has begun, but for the new token's own worth.

Slots lie along the long side of the tensor cores' products and queries along the narrow one.

Names as in slots_triton.py: B rows, C slots, H KV heads, Q query heads, G = Q/H, D head dim; BN slots in a block; j a
slot, x logits in base 2, top and total a running softmax.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra import cuda

from .. import device, overlap
from ..linear import products_triton
from . import slots_triton
from .decay_triton import LOG2E, NOTHING
from .slots_triton import NEVER, NO_SCORE, RETENTION

# Functions of numbers one by one, which are the same in both languages.
_log_sigmoid = gluon.jit(products_triton._log_sigmoid.fn)
_worth = gluon.jit(slots_triton._worth.fn)
_worse = gluon.jit(slots_triton._worse.fn)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 | 3.6
HEAD_DIMS = (64, 128)
BN, WARPS = 64, 4
STAGES = {64: 3, 128: 2}  # of the ring of blocks, by head dim: 64 KB at most
RESIDENT = 2  # programs that share a multiprocessor
MAX_PARTS = 16
MOST_HEADS = 128  # of all rows: with more, slots_triton.py is faster
SEARCH = 1024  # slots that a search looks at at a time


def serves(num_query_heads: int, k_BHCD: torch.Tensor) -> bool:
    """Whether the kernel takes such heads and such a store."""
    H, D = k_BHCD.shape[1], k_BHCD.shape[3]
    fits = D in HEAD_DIMS and num_query_heads // H <= 16 and k_BHCD.dtype.itemsize == 2
    return fits and k_BHCD.shape[0] * H <= MOST_HEADS and device.hopper(k_BHCD)


def parts_of(heads: int, blocks: int, x: torch.Tensor) -> int:
    """Programs per head: not more than there is room for at once."""
    wanted = max(1, min(RESIDENT * device.multiprocessors(x) // heads, blocks, MAX_PARTS))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))  # none without a block


def decode(
    qkv_BN, num_query_heads, cos_BD, sin_BD, q_norm_D, k_norm_D, eps, gate, k_BHCD, v_BHCD, position_BHC, log_beta_BHC,
    slot_BH, now_B, scaling, score, sinks, recent, offset, next_slot_BH, counters, parts=None,
):  # fmt: skip
    """One token per row, from its projections: ``products.heads``, then ``slots_triton.decode`` with the same names.

    Args:
        gate: weight [H, I] and bias [H] of the gate's second linear, or None; then ``log_beta_BHC`` is None, too.
        parts: programs per head; None decides by the device.

    Returns:
        [B, Q D] in the dtype of qkv; zeros where nothing was written.
    """
    B, (H, C, D) = qkv_BN.shape[0], k_BHCD.shape[1:]
    Q = num_query_heads
    weight, bias = gate or (None, None)
    width = 0 if weight is None else weight.shape[1]
    assert qkv_BN.stride(1) == cos_BD.stride(1) == sin_BD.stride(1) == k_BHCD.stride(3) == v_BHCD.stride(3) == 1
    assert position_BHC.dtype == torch.int32 and position_BHC.stride(2) == 1
    assert slot_BH.is_contiguous() and now_B.is_contiguous() and next_slot_BH.is_contiguous()
    assert (weight is None) == (log_beta_BHC is None) and (weight is None or weight.is_contiguous())
    assert counters.dtype == torch.int32 and counters.numel() >= B * H
    G, blocks = Q // H, triton.cdiv(C, BN)
    GP = 8 if G <= 8 else 16
    parts = parts or parts_of(B * H, blocks, qkv_BN)
    per = triton.cdiv(blocks, parts) * BN
    out = torch.empty(B, Q * D, dtype=qkv_BN.dtype, device=qkv_BN.device)
    each = [None] * 5
    if parts > 1:
        each = [torch.empty(B * H * parts * n, dtype=torch.float32, device=out.device) for n in (D * GP, GP, GP, 1)]
        each.append(torch.empty(B * H * parts * 2, dtype=torch.int32, device=out.device))
    betas = position_BHC if log_beta_BHC is None else log_beta_BHC
    early = overlap.overlaps(qkv_BN)
    with torch.cuda.device_of(qkv_BN):
        _decode_kernel[(max(B * H * parts, device.multiprocessors(qkv_BN)),)](
            *(qkv_BN, cos_BD, sin_BD, q_norm_D, k_norm_D, weight, bias, k_BHCD, v_BHCD, position_BHC, log_beta_BHC),
            *(slot_BH, now_B, out, next_slot_BH, *each, counters),
            *(qkv_BN.stride(0), cos_BD.stride(0), sin_BD.stride(0), *k_BHCD.stride()[:3], *v_BHCD.stride()[:3]),
            *(*position_BHC.stride()[:2], *betas.stride()[:2]),
            *(H, B * H, C, per, scaling, eps, sinks, recent, offset),
            G=G,
            GP=GP,
            D=D,
            WIDTH=width,
            BI=max(128, triton.next_power_of_2(max(width, 1))),
            BN=BN,
            SN=min(max(128, triton.next_power_of_2(per)), SEARCH),
            STAGES=STAGES[D],
            PARTS=parts,
            SCORE=score,
            HAS_NORM=q_norm_D is not None,
            EARLY=early,
            num_warps=WARPS,
            **overlap.launch(early),
        )
    return out


@gluon.jit
def _line(ptr, WIDTH: gl.constexpr, BI: gl.constexpr, num_warps: gl.constexpr):
    """A vector of the gate's width in fp32."""
    LINE: gl.constexpr = gl.BlockedLayout([BI // (32 * num_warps)], [32], [num_warps], [0])
    i = gl.arange(0, BI, LINE)
    return gl.load(ptr + i, mask=i < WIDTH, other=0.0).to(gl.float32)


@gluon.jit
def _worst(score, position, slot):
    """slots.victim of a vector: the first slot of the oldest token of the lowest score."""
    lowest = gl.min(score, 0)
    position = gl.where(score == lowest, position, NEVER)
    oldest = gl.min(position, 0)
    return lowest, oldest, gl.min(gl.where((score == lowest) & (position == oldest), slot, NEVER), 0)


@gluon.jit
def _search(
    position, log_beta, at, next_now, lo, hi, sinks, recent, offset,
    SN: gl.constexpr, SCORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The worst of some slots, of which ``at`` is being written and is not read here."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    worst = gl.full([SN], float("inf"), gl.float32, LINE)
    worst_position = gl.full([SN], NEVER, gl.int32, LINE)
    worst_slot = gl.zeros([SN], gl.int32, LINE)
    for j0 in range(lo, hi, SN):
        j = j0 + gl.arange(0, SN, LINE)
        held = (j < hi) & (j != at)
        positions = gl.load(position + j, mask=held, other=NEVER)
        betas = worst * 0.0
        if SCORE == RETENTION:
            betas = gl.load(log_beta + j, mask=held, other=0.0)
        score = _worth(betas, positions, next_now, sinks, recent, offset, SCORE)
        score = gl.where(held, score, float("inf"))
        worst, worst_position, worst_slot = _worse(worst, worst_position, worst_slot, score, positions, j)
    return _worst(worst, worst_position, worst_slot)


@gluon.jit
def _copy(keys, values, stage, k, v, position, j0, hi, k_t, v_t, BN: gl.constexpr, D: gl.constexpr, COPY: gl.constexpr):
    """A block of slots into a stage of the ring; empty ones as zeros."""
    j = j0 + gl.arange(0, BN, gl.SliceLayout(1, COPY))
    column = gl.arange(0, D, gl.SliceLayout(0, COPY))[None, :]
    seen = (gl.load(position + j, mask=j < hi, other=-1) >= 0)[:, None]
    async_copy.async_copy_global_to_shared(keys.index(stage), k + j[:, None] * k_t + column, mask=seen)
    async_copy.async_copy_global_to_shared(values.index(stage), v + j[:, None] * v_t + column, mask=seen)


@gluon.jit
def _partner(d, D: gl.constexpr):
    """The dimension that each is rotated with (rotate_half)."""
    return gl.where(d < D // 2, d + D // 2, d - D // 2)


@gluon.jit
def _turned(x, g, d, cos, sin, norm, other_norm, eps, D: gl.constexpr, HAS_NORM: gl.constexpr):
    """Heads x + g D, normed and rotated, in fp32; ``g`` [G, 1] (-1 gives zeros), ``d`` and the rest [1, D]."""
    own = gl.load(x + g * D + d, mask=g >= 0, other=0.0).to(gl.float32)
    other = gl.load(x + g * D + _partner(d, D), mask=g >= 0, other=0.0).to(gl.float32)
    if HAS_NORM:
        scale = gl.rsqrt(gl.sum(own * own, 1) / D + eps)[:, None]
        own *= scale * norm
        other *= scale * other_norm
    return own * cos + gl.where(d < D // 2, -other, other) * sin


@gluon.jit(do_not_specialize=["per", "C", "heads"])
def _decode_kernel(
    qkv, cos, sin, q_norm, k_norm, gate, gate_bias, k, v, position, log_beta,
    slot, now, out, next_slot, part_acc, part_top, part_total, part_worst, part_place, counters,
    qkv_m, cos_m, sin_m, k_b, k_h, k_t, v_b, v_h, v_t, p_b, p_h, lb_b, lb_h,
    H, heads, C, per, scaling, eps, sinks, recent, offset,
    G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr, BI: gl.constexpr, BN: gl.constexpr,
    SN: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, SCORE: gl.constexpr, HAS_NORM: gl.constexpr,
    EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Programs [part, head], and idle ones."""
    if EARLY:
        cuda.gdc_launch_dependents()
    n = gl.program_id(0) % heads
    part = gl.program_id(0) // heads
    if part >= PARTS:
        if EARLY:
            cuda.gdc_wait()
        return
    row, head = (n // H).to(gl.int64), n % H
    k += row * k_b + head.to(gl.int64) * k_h
    v += row * v_b + head.to(gl.int64) * v_h
    position += row * p_b + head * p_h
    qkv += row * qkv_m
    cos += row * cos_m
    sin += row * sin_m
    hidden = qkv + (G * H + 2 * H) * D
    if WIDTH > 0:
        log_beta += row * lb_b + head * lb_h
        gate += head * WIDTH
        gate_bias += head
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    HEADS: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [num_warps, 1], [1, 0])
    keys = gl.allocate_shared_memory(k.dtype.element_ty, [STAGES, BN, D], SHARED)
    values = gl.allocate_shared_memory(v.dtype.element_ty, [STAGES, BN, D], SHARED)
    lo = part * per
    hi = gl.minimum(lo + per, C)
    for s in gl.static_range(STAGES):
        _copy(keys, values, s, k, v, position, lo + s * BN, hi, k_t, v_t, BN, D, COPY)
        async_copy.commit_group()
    # Nor do weights, rotations and the search: where new tokens stand and go is known before a step's first layer.
    g = gl.arange(0, GP, gl.SliceLayout(1, HEADS))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, HEADS))[None, :]
    cosines, sines = gl.load(cos + d).to(gl.float32), gl.load(sin + d).to(gl.float32)
    norm, other_norm, key_norm, other_key_norm = cosines, cosines, cosines, cosines
    if HAS_NORM:
        norm, other_norm = gl.load(q_norm + d).to(gl.float32), gl.load(q_norm + _partner(d, D)).to(gl.float32)
        key_norm, other_key_norm = gl.load(k_norm + d).to(gl.float32), gl.load(k_norm + _partner(d, D)).to(gl.float32)
    if WIDTH > 0:
        gate_row = _line(gate, WIDTH, BI, num_warps)
        z = gl.load(gate_bias).to(gl.float32)
    at = gl.load(slot + n).to(gl.int32)
    new_position = gl.load(now + row).to(gl.int32)
    writes = at >= 0
    next_now = new_position + writes.to(gl.int32)
    if SCORE != NO_SCORE:
        lowest, oldest, first = _search(
            position, log_beta, at, next_now, lo, hi, sinks, recent, offset, SN, SCORE, num_warps
        )  # fmt: skip
    if EARLY:
        cuda.gdc_wait()

    group = gl.where(g < G, g, -1)
    queries = _turned(qkv + head * G * D, group, d, cosines, sines, norm, other_norm, eps, D, HAS_NORM)
    queries = queries.to(qkv.dtype.element_ty)
    right = gl.convert_layout(queries.permute((1, 0)), RIGHT)

    # The new token, in the first part: into the store, and first into the softmax.
    mine = writes & (part == 0)
    top = gl.full([GP], NOTHING, gl.float32, gl.SliceLayout(0, MMA))
    total = gl.zeros([GP], gl.float32, gl.SliceLayout(0, MMA))
    acc = gl.zeros([D, GP], gl.float32, MMA)
    e = gl.arange(0, D, gl.SliceLayout(1, MMA))
    new_value = gl.load(qkv + (G * H + H + head) * D + e)
    new_beta = (at * 0).to(gl.float32)
    if mine:
        key = qkv + (G * H + head) * D
        new_key = _turned(key, g * 0, d, cosines, sines, key_norm, other_key_norm, eps, D, HAS_NORM)
        new_key = new_key.to(k.dtype.element_ty)  # G times the same
        gl.store(k + at.to(gl.int64) * k_t + d + g * 0, new_key, mask=g == 0)
        dot = gl.sum(queries.to(gl.float32) * new_key.to(gl.float32), 1) * (scaling * LOG2E)
        top = gl.convert_layout(dot, gl.SliceLayout(0, MMA))
        total += 1.0
        gl.store(v + at.to(gl.int64) * v_t + e, new_value)
        acc += new_value.to(gl.float32)[:, None]
        gl.store(position + at, new_position)
    if WIDTH > 0:  # another part has less to do
        if part == PARTS - 1:
            z += gl.sum(gate_row * _line(hidden, WIDTH, BI, num_warps), 0)
            new_beta = _log_sigmoid(z)
            gl.store(log_beta + at, new_beta, mask=writes)

    stage = 0
    for j0 in range(lo, hi, BN):
        async_copy.wait_group(STAGES - 1)
        j = j0 + gl.arange(0, BN, gl.SliceLayout(1, MMA))
        held = (j < hi) & (j != at)
        seen = (gl.load(position + j, mask=held, other=-1) >= 0) & held & writes
        x = mma_v2(keys.index(stage).load(LEFT), right, gl.zeros([BN, GP], gl.float32, MMA))
        x = gl.where(seen[:, None], x * (scaling * LOG2E), float("-inf"))
        new_top = gl.maximum(top, gl.max(x, 0))
        weights = gl.exp2(x - new_top[None, :])
        fade = gl.exp2(top - new_top)
        total = total * fade + gl.sum(weights, 0)
        top = new_top
        those = values.index(stage).permute((1, 0)).load(LEFT)
        if (at >= j0) & (at < j0 + BN):  # being written meanwhile: of weight zero, but it may be no number
            c = j0 + gl.arange(0, BN, gl.SliceLayout(0, LEFT))
            those = gl.where((c == at)[None, :], gl.zeros_like(those), those)
        acc = mma_v2(those, gl.convert_layout(weights.to(v.dtype.element_ty), RIGHT), acc * fade[None, :])
        if j0 + STAGES * BN < hi:
            _barrier()  # all threads have read this stage
            _copy(keys, values, stage, k, v, position, j0 + STAGES * BN, hi, k_t, v_t, BN, D, COPY)
        async_copy.commit_group()
        stage = gl.where(stage + 1 == STAGES, 0, stage + 1)
    async_copy.wait_group(0)

    m = gl.arange(0, GP, gl.SliceLayout(0, MMA))
    inner = e[:, None] * GP + m[None, :]
    last = True
    if PARTS > 1:
        own = n * PARTS + part
        gl.store(part_top + own * GP + m, top)
        gl.store(part_total + own * GP + m, total)
        gl.store(part_acc + own * (D * GP) + inner, acc)
        if SCORE != NO_SCORE:
            gl.store(part_worst + own, lowest)
            gl.store(part_place + own * 2, oldest)
            gl.store(part_place + own * 2 + 1, first)
        _barrier()  # all threads have stored before one of them says so
        last = gl.atomic_add(counters + n, 1, sem="acq_rel") == PARTS - 1
        if last:
            # First their tops, then sums that need no other's, so that loads wait for nothing but each other.
            top = gl.full([GP], NOTHING, gl.float32, gl.SliceLayout(0, MMA))
            for i in gl.static_range(PARTS):
                top = gl.maximum(top, gl.load(part_top + (n * PARTS + i) * GP + m, cache_modifier=".cg"))
            total = gl.zeros([GP], gl.float32, gl.SliceLayout(0, MMA))
            acc = gl.zeros([D, GP], gl.float32, MMA)
            for i in gl.static_range(PARTS):
                at_part = n * PARTS + i
                fade = gl.exp2(gl.load(part_top + at_part * GP + m, cache_modifier=".cg") - top)
                total += fade * gl.load(part_total + at_part * GP + m, cache_modifier=".cg")
                acc += fade[None, :] * gl.load(part_acc + at_part * (D * GP) + inner, cache_modifier=".cg")
            if SCORE != NO_SCORE:
                for i in gl.static_range(PARTS):
                    at_part = n * PARTS + i
                    other = gl.load(part_worst + at_part, cache_modifier=".cg")
                    other_position = gl.load(part_place + at_part * 2, cache_modifier=".cg")
                    other_slot = gl.load(part_place + at_part * 2 + 1, cache_modifier=".cg")
                    lowest, oldest, first = _worse(lowest, oldest, first, other, other_position, other_slot)
            if WIDTH > 0:
                new_beta = gl.load(log_beta + at, mask=writes, other=0.0, cache_modifier=".cg")
            gl.store(counters + n, 0)
    if last:
        if SCORE != NO_SCORE:
            score = _worth(new_beta, new_position, next_now, sinks, recent, offset, SCORE)
            score = gl.where(writes, score, float("inf"))
            candidate = gl.where(writes, new_position, NEVER)
            _, _, first = _worse(lowest, oldest, first, score, candidate, at)
            gl.store(next_slot + n, first.to(next_slot.dtype.element_ty))
        total = gl.where(total == 0.0, 1.0, total)  # only a row that writes nothing has no weight at all
        ROWS: gl.constexpr = gl.BlockedLayout([D // 32, 1], [32, 1], [1, num_warps], [0, 1])
        done = gl.convert_layout((acc / total[None, :]).to(out.dtype.element_ty), ROWS)
        to_g = gl.arange(0, GP, gl.SliceLayout(0, ROWS))
        to_d = gl.arange(0, D, gl.SliceLayout(1, ROWS))
        gl.store(out + (n * G + to_g)[None, :] * D + to_d[:, None], done, mask=(to_g < G)[None, :])
