"""The operators of products.py as kernels that run at the speed at which weights can be read.

A program owns BN rows of a matrix and a part of their columns, and walks over it in blocks of BK with several blocks in
flight. The weights are the left factor of the tensor cores' product, so that the few rows of x fill its narrow side.
Where blocks of rows are too few to fill the device, columns are split over several programs; the last one to arrive at
a tile adds their parts in one order, so that the same input gives the same bits every time.

Names in kernels: n a row of a matrix (a column of y), m a row of x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import device, overlap
from .products import GATED, SILU_LAST, four

try:
    from . import products_hopper as hopper
except ImportError:  # a Triton without this Gluon
    hopper = None

# fp32 as three tf32 products on tensor cores: fp32's precision. bf16 and fp16 don't care.
EXACT = tl.constexpr("tf32x3")
PROGRAMS = 1  # on a multiprocessor, that a product should be spread over
LEAST_BLOCKS = 4  # of columns that a program walks over, where they are split


class Plan(NamedTuple):
    """How a product is cut: rows of x, rows of a matrix and columns in a block; programs over the columns."""

    BM: int
    BN: int
    BK: int
    splits: int
    num_warps: int
    num_stages: int


# Widths of all outputs, columns, rows of x up to -> BN, BK, splits, warps, stages, where a device has been asked.
TUNED: dict[tuple[int, int, int], tuple[int, int, int, int, int]] = {}
# Rows of x up to -> BN, BK, warps, stages: the best of some twenty on an H200, within a step of 4, 8 and 64 rows.
PLAIN_BLOCKS = dict.fromkeys((16, 32, 64), (64, 128, 4, 6))
PLAIN_SMALL = {16: (64, 128, 4, 4), 32: (64, 128, 4, 4), 64: (64, 64, 4, 5)}  # for 99 KB of shared memory
GATED_BLOCKS = {16: (64, 64, 4, 5), 32: (64, 64, 4, 5), 64: (64, 64, 4, 4)}
FP32_BLOCKS = {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 32, 4, 3)}


def plan(x: torch.Tensor, weights: list[torch.Tensor], activation: str) -> Plan:
    """How to multiply rows x with these matrices."""
    (rows, K), gated = x.shape, activation == GATED
    BM = min(max(16, triton.next_power_of_2(rows)), 64)
    known = TUNED.get((sum(w.shape[0] for w in weights), K, BM)) if x.dtype.itemsize == 2 else None
    if known:
        BN, BK, splits, num_warps, num_stages = known
        return Plan(BM, BN, BK, splits, num_warps, num_stages)
    if x.dtype == torch.float32:
        table = FP32_BLOCKS
    else:
        table = GATED_BLOCKS if gated else PLAIN_BLOCKS if device.much_shared_memory(x) else PLAIN_SMALL
    BN, BK, num_warps, num_stages = table[BM]
    blocks = triton.cdiv(K, BK)
    tiles = _tiles(weights, BN, gated) * triton.cdiv(rows, BM)
    multiprocessors = device.multiprocessors(x) if x.is_cuda else 1
    wanted = PROGRAMS * multiprocessors / tiles
    splits = max(1, min(int(wanted), blocks // LEAST_BLOCKS))  # one wave: a few programs more would be another
    return Plan(BM, BN, BK, triton.cdiv(blocks, triton.cdiv(blocks, splits)), num_warps, num_stages)


def _tiles(weights, BN: int, gated: bool) -> int:
    return sum(triton.cdiv(w.shape[0], BN) for w in (weights[:1] if gated else weights))


def linear(x, weights, biases, has_bias, squares, eps, activation, residual, norm, counters):
    """``products.linear`` on the device of x."""
    given = x, weights, biases, has_bias, squares, eps, activation, residual, norm, counters
    if hopper is not None and hopper.serves(x, weights, counters):
        return hopper.linear(*given)
    gated, how = activation == GATED, plan(x, weights, activation)
    (rows, K), dtype = x.shape, x.dtype
    assert all(w.dtype == dtype and w.stride(1) == 1 and w.shape[1] == K for w in weights), "matrices as x"
    assert x.stride(1) == 1 and (residual is None or residual.is_contiguous())
    assert not gated or weights[0].shape == weights[1].shape
    N = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    tiles, row_blocks = _tiles(weights, how.BN, gated), triton.cdiv(rows, how.BM)
    splits, parts = how.splits, None
    if splits > 1:
        size = row_blocks * tiles * splits * (1 + gated) * how.BM * how.BN
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
        if counters is None:
            counters = torch.zeros(row_blocks * tiles, dtype=torch.int32, device=x.device)
        assert counters.numel() >= row_blocks * tiles, "more counters, please"
    y = x.new_empty(rows, N)
    y_norm = x.new_empty(y.shape if norm is not None else (0,))
    y_squares = torch.empty((rows, tiles) if norm is not None else (0,), dtype=torch.float32, device=x.device)
    matrices, biases, widths = four(x, weights, biases, has_bias)
    per = triton.cdiv(triton.cdiv(K, how.BK), splits)  # blocks: a multiple of BK that the compiler can see
    early = overlap.overlaps(x)
    with torch.cuda.device_of(x):
        _linear_kernel[(tiles, splits, row_blocks)](
            *(x, *matrices, *biases, squares, residual, norm, y, y_norm, y_squares, parts, counters),
            *(rows, K, x.stride(0), *(w.stride(0) for w in matrices), *widths, N, per, eps),
            *(0 if squares is None else squares.shape[1],),
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.shape[1]),
            MATRICES=1 if gated else len(weights),
            BIASES=sum(has << i for i, has in enumerate(has_bias)),
            GATED=gated,
            SILU_LAST=activation == SILU_LAST,
            SCALED=squares is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_NORM=norm is not None,
            SPLIT=splits > 1,
            EVEN_N=all(w.shape[0] % how.BN == 0 for w in weights),
            EVEN_K=K % how.BK == 0,
            BM=how.BM,
            BN=how.BN,
            BK=how.BK,
            EARLY=early,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
            **overlap.launch(early),
        )
    return y, y_norm, y_squares


def norm_input(x, weight):
    """``products.norm_input`` on the device of x."""
    rows, E = x.shape
    assert x.stride(1) == 1
    y, squares = x.new_empty(rows, E), torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm_input_kernel[(rows,)](x, weight, y, squares, x.stride(0), E, BE=triton.next_power_of_2(E), num_warps=8)
    return y, squares


def heads(qkv, Q, H, D, cos, sin, q_norm, k_norm, eps, weight, bias):
    """``products.heads`` on the device of qkv."""
    rows = qkv.shape[0]
    assert D % 2 == 0 and qkv.stride(1) == cos.stride(1) == sin.stride(1) == 1
    assert cos.shape == sin.shape == (rows, D), "a rotation of the whole head, for each row"
    assert (q_norm is None) == (k_norm is None)
    assert weight is None or weight.is_contiguous() and weight.shape[0] == H
    qk = qkv.new_empty(rows, Q + H, D)
    log_beta = torch.empty((rows, H) if weight is not None else (0,), dtype=torch.float32, device=qkv.device)
    width = 0 if weight is None else weight.shape[1]
    early = overlap.overlaps(qkv)
    with torch.cuda.device_of(qkv):
        _heads_kernel[(rows, Q + H + (weight is not None))](
            *(qkv, cos, sin, q_norm, k_norm, weight, bias, qk, log_beta),
            *(qkv.stride(0), cos.stride(0), sin.stride(0), eps),
            Q=Q,
            H=H,
            D=D,
            WIDTH=width,
            BD=triton.next_power_of_2(D // 2),
            BH=triton.next_power_of_2(H),
            BI=min(512, triton.next_power_of_2(max(width, 1))),
            HAS_NORM=q_norm is not None,
            EARLY=early,
            num_warps=4 if weight is not None else 1,
            **overlap.launch(early),
        )
    return qk, log_beta


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _finish(
    acc, up, n, m, inside, b_at, up_b_at, y_at, which, squares, residual, norm, y, y_norm, y_squares, tile,
    rows, K, N_all, eps, num_squares, has_bias,
    SQUARES: tl.constexpr, MATRICES: tl.constexpr, BIASES: tl.constexpr, GATED: tl.constexpr,
    SILU_LAST: tl.constexpr, SCALED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """From whole sums [BN, BM] to what is stored."""
    mask = inside[:, None] & (m < rows)[None, :]
    if SCALED:
        s = tl.arange(0, SQUARES)
        given = (m < rows)[:, None] & (s < num_squares)[None, :]
        sums = tl.load(squares + m[:, None] * num_squares + s[None, :], mask=given, other=0.0)
        scale = tl.rsqrt(tl.sum(sums, 1) / K + eps)
        acc = acc * scale[None, :]
        if GATED:
            up = up * scale[None, :]
    if BIASES != 0:
        acc += tl.load(b_at + n, mask=inside & has_bias, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIASES >= 2:
            up += tl.load(up_b_at + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        acc = _silu(acc) * up
    if SILU_LAST:
        acc = tl.where(which == MATRICES - 1, _silu(acc), acc)
    at = m.to(tl.int64)[None, :] * N_all + y_at + n[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    out = acc.to(y.dtype.element_ty)
    tl.store(y + at, out, mask=mask)
    if HAS_NORM:
        wide = tl.where(mask, out.to(tl.float32), 0.0)
        weight = tl.load(norm + y_at + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_norm + at, (wide * weight[:, None]).to(y.dtype.element_ty), mask=mask)
        tl.store(y_squares + m * tl.num_programs(0) + tile, tl.sum(wide * wide, 0), mask=m < rows)


@triton.jit(do_not_specialize=["per", "num_squares"])
def _linear_kernel(
    x, w0, w1, w2, w3, b0, b1, b2, b3, squares, residual, norm, y, y_norm, y_squares, parts, counters,
    rows, K, x_m, w0_n, w1_n, w2_n, w3_n, N0, N1, N2, N3, N_all, per, eps, num_squares,
    SQUARES: tl.constexpr, MATRICES: tl.constexpr, BIASES: tl.constexpr, GATED: tl.constexpr,
    SILU_LAST: tl.constexpr, SCALED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs [tile of outputs, part of the columns, block of rows]."""
    tile, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Which matrix: tiles of the first, then those of the second ...
    w, b, w_n, N = w0, b0, w0_n, N0
    first, y_at, which = 0, 0, 0  # tile and column of y where the matrix begins
    if MATRICES > 1:
        t1 = tl.cdiv(N0, BN)
        later = tile >= t1
        w, b, w_n = tl.where(later, w1, w), tl.where(later, b1, b), tl.where(later, w1_n, w_n)
        N, first, y_at = tl.where(later, N1, N), tl.where(later, t1, 0), tl.where(later, N0, 0)
        which += later.to(tl.int32)
    if MATRICES > 2:
        t2 = t1 + tl.cdiv(N1, BN)
        later = tile >= t2
        w, b, w_n = tl.where(later, w2, w), tl.where(later, b2, b), tl.where(later, w2_n, w_n)
        N, first, y_at = tl.where(later, N2, N), tl.where(later, t2, first), tl.where(later, N0 + N1, y_at)
        which += later.to(tl.int32)
    if MATRICES > 3:
        t3 = t2 + tl.cdiv(N2, BN)
        later = tile >= t3
        w, b, w_n = tl.where(later, w3, w), tl.where(later, b3, b), tl.where(later, w3_n, w_n)
        N, first, y_at = tl.where(later, N3, N), tl.where(later, t3, first), tl.where(later, N0 + N1 + N2, y_at)
        which += later.to(tl.int32)

    n = (tile - first) * BN + tl.arange(0, BN)
    m = block * BM + tl.arange(0, BM)
    kk = tl.arange(0, BK)
    inside = n < N
    w_at = w + n.to(tl.int64)[:, None] * w_n + kk[None, :]
    if GATED:
        up_at = w1 + n.to(tl.int64)[:, None] * w1_n + kk[None, :]
    x_at = x + m[:, None] * x_m + kk[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32)
    lo = part * per * BK
    hi = tl.minimum(lo + per * BK, K)
    if EARLY:
        overlap.let_next_begin()
        overlap.wait()
    for k0 in range(lo, hi, BK):
        if EVEN_K:
            x_mask = (m < rows)[:, None]
        else:
            x_mask = (m < rows)[:, None] & (k0 + kk < K)[None, :]
        few = tl.trans(tl.load(x_at + k0, mask=x_mask, other=0.0))
        # Weights are read once a step: what else lies in the cache may stay there.
        if EVEN_N and EVEN_K:
            many = tl.load(w_at + k0, eviction_policy="evict_first")
        else:
            mask = inside[:, None] & (k0 + kk < K)[None, :]
            many = tl.load(w_at + k0, mask=mask, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(many, few, acc, input_precision=EXACT)
        if GATED:
            if EVEN_N and EVEN_K:
                many = tl.load(up_at + k0, eviction_policy="evict_first")
            else:
                many = tl.load(up_at + k0, mask=mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(many, few, up, input_precision=EXACT)

    has_bias = ((BIASES >> which) & 1) != 0
    if SPLIT:
        here = block * tl.num_programs(0) + tile
        each: tl.constexpr = BN * BM * (2 if GATED else 1)
        splits = tl.num_programs(1)
        own = parts + here.to(tl.int64) * splits * each
        own += tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(own + part * each, acc)
        if GATED:
            tl.store(own + part * each + BN * BM, up)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + here, 1, sem="acq_rel")
        if arrived == splits - 1:
            acc = tl.zeros([BN, BM], tl.float32)
            up = tl.zeros([BN, BM], tl.float32)
            for s in range(splits):
                acc += tl.load(own + s * each, cache_modifier=".cg")
                if GATED:
                    up += tl.load(own + s * each + BN * BM, cache_modifier=".cg")
            tl.store(counters + here, 0)
            _finish(
                acc, up, n, m, inside, b, b1, y_at, which, squares, residual, norm, y, y_norm, y_squares, tile,
                rows, K, N_all, eps, num_squares, has_bias,
                SQUARES, MATRICES, BIASES, GATED, SILU_LAST, SCALED, HAS_RESIDUAL, HAS_NORM,
            )  # fmt: skip
    else:
        _finish(
            acc, up, n, m, inside, b, b1, y_at, which, squares, residual, norm, y, y_norm, y_squares, tile,
            rows, K, N_all, eps, num_squares, has_bias,
            SQUARES, MATRICES, BIASES, GATED, SILU_LAST, SCALED, HAS_RESIDUAL, HAS_NORM,
        )  # fmt: skip


@triton.jit
def _norm_input_kernel(x, weight, y, squares, x_m, E, BE: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BE)
    wide = tl.load(x + m * x_m + e, mask=e < E, other=0.0).to(tl.float32)
    factor = tl.load(weight + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(y + m * E + e, (wide * factor).to(y.dtype.element_ty), mask=e < E)
    tl.store(squares + m, tl.sum(wide * wide, 0))


@triton.jit
def _log_sigmoid(z):
    """Exact to fp32's last bits also where it is nearly 0: log1p(u) = 2 atanh(u / (2 + u)), as a series."""
    u = tl.exp(-tl.abs(z))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 17.0
    for i in tl.static_range(8):
        series = series * q + 1.0 / (15.0 - 2.0 * i)
    return tl.minimum(z, 0.0) - 2.0 * s * series


@triton.jit
def _heads_kernel(
    qkv, cos, sin, q_norm, k_norm, weight, bias, qk, log_beta, qkv_m, cos_m, sin_m, eps,
    Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr, HAS_NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs [row, head]: queries, keys, and in the end the gate."""
    if EARLY:
        overlap.let_next_begin()
        overlap.wait()
    m = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    qkv += m * qkv_m
    if head < Q + H:
        c = tl.arange(0, BD)
        inside = c < HALF
        low = tl.load(qkv + head * D + c, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(qkv + head * D + HALF + c, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            norm = tl.where(head < Q, q_norm, k_norm)
            scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D + eps)
            low *= scale * tl.load(norm + c, mask=inside, other=0.0).to(tl.float32)
            high *= scale * tl.load(norm + HALF + c, mask=inside, other=0.0).to(tl.float32)
        cos += m * cos_m
        sin += m * sin_m
        new_low = low * tl.load(cos + c, mask=inside, other=0.0).to(tl.float32)
        new_low -= high * tl.load(sin + c, mask=inside, other=0.0).to(tl.float32)
        new_high = high * tl.load(cos + HALF + c, mask=inside, other=0.0).to(tl.float32)
        new_high += low * tl.load(sin + HALF + c, mask=inside, other=0.0).to(tl.float32)
        at = (m * (Q + H) + head) * D + c
        tl.store(qk + at, new_low.to(qk.dtype.element_ty), mask=inside)
        tl.store(qk + at + HALF, new_high.to(qk.dtype.element_ty), mask=inside)
    elif WIDTH > 0:
        h = tl.arange(0, BH)
        z = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)
        for i0 in range(0, WIDTH, BI):
            i = i0 + tl.arange(0, BI)
            hidden = tl.load(qkv + (Q + 2 * H) * D + i, mask=i < WIDTH, other=0.0).to(tl.float32)
            mask = (h < H)[:, None] & (i < WIDTH)[None, :]
            rows = tl.load(weight + h[:, None] * WIDTH + i[None, :], mask=mask, other=0.0).to(tl.float32)
            z += tl.sum(rows * hidden[None, :], 1)
        tl.store(log_beta + m * H + h, _log_sigmoid(z), mask=h < H)
