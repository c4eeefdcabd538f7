"""``products.linear`` for Hopper: weights come into shared memory while the kernel before is still at work.

A decode step is a chain of products, each of which needs all of what the one before it gives, but none of it for its
weights. So a program takes its place early (overlap.py), fills a ring of blocks of its weights, and only then waits for
its input. What it needs besides sums is on its way before they are made. Where tiles are too few for the device, the
columns of one are split over several programs, and the last one to arrive adds their parts in one order, so that the
same input gives the same bits.

The same sums as in products_triton.py, in Gluon, Triton's language with explicit layouts and copies: Triton's own
pipelining cannot begin with one factor of a product while it waits for the other.

Names in kernels: n a row of a matrix (a column of y), m a row of x; f a block of columns.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from .. import device, overlap
from .products import GATED, SILU_LAST, four

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 | 3.6
ROWS = 16  # of x at most
BN, WARPS = 64, 4
# Columns in a block and stages of the ring, by rows of x up to: 111 KB at most, so that a multiprocessor takes one
# program of this kernel and one of the next. On an H200 more stages, and fewer, were slower.
PLAIN_RING = {8: (128, 6), 16: (128, 5)}
GATED_RING = {8: (128, 3), 16: (64, 5)}
LEAST_BLOCKS = 4  # of a program


def serves(x: torch.Tensor, weights: list[torch.Tensor], counters: torch.Tensor | None) -> bool:
    """Whether the kernel takes this product: few rows in 16 bits, aligned for copies of 16 bytes."""
    if x.dtype.itemsize != 2 or x.shape[0] > ROWS or x.shape[1] % 16 or not device.hopper(x):
        return False
    tiles = sum(triton.cdiv(w.shape[0], BN) for w in weights)
    aligned = all(one.stride(0) % 16 == 0 and one.data_ptr() % 16 == 0 for one in (x, *weights))
    aligned = aligned and all(w.stride(0) == weights[0].stride(0) for w in weights)
    return aligned and (counters is None or tiles <= counters.numel())


def linear(x, weights, biases, has_bias, squares, eps, activation, residual, norm, counters):
    """``products.linear`` where ``serves`` says so."""
    (rows, K), gated = x.shape, activation == GATED
    assert residual is None or residual.is_contiguous()
    assert not gated or weights[0].shape == weights[1].shape
    BM = 8 if rows <= 8 else 16
    BK, stages = (GATED_RING if gated else PLAIN_RING)[BM]
    outputs = weights[:1] if gated else weights
    N, tiles = sum(w.shape[0] for w in outputs), sum(triton.cdiv(w.shape[0], BN) for w in outputs)
    blocks = triton.cdiv(K, BK)
    programs = device.multiprocessors(x)
    splits = max(1, min(programs // tiles, blocks // LEAST_BLOCKS))
    parts = None
    if splits > 1:
        parts = torch.empty(tiles * splits * (1 + gated) * BM * BN, dtype=torch.float32, device=x.device)
    if counters is None:
        counters = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    y = x.new_empty(rows, N)
    y_norm = x.new_empty(y.shape if norm is not None else (0,))
    y_squares = torch.empty((rows, tiles) if norm is not None else (0,), dtype=torch.float32, device=x.device)
    matrices, biases, widths = four(x, weights, biases, has_bias)
    early = overlap.overlaps(x)
    with torch.cuda.device_of(x):
        _linear_kernel[(tiles, splits)](
            *(x, *matrices, *biases, squares, residual, norm, y, y_norm, y_squares, parts, counters),
            *(rows, K, x.stride(0), weights[0].stride(0), *widths, N, blocks, eps),
            *(0 if squares is None else squares.shape[1],),
            SPLITS=splits,
            SQUARES=1 if squares is None else triton.next_power_of_2(squares.shape[1]),
            MATRICES=1 if gated else len(weights),
            BIASES=sum(has << i for i, has in enumerate(has_bias)),
            GATED=gated,
            SILU_LAST=activation == SILU_LAST,
            SCALED=squares is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_NORM=norm is not None,
            EVEN_N=all(w.shape[0] % BN == 0 for w in weights),
            EVEN_K=K % BK == 0,
            BM=BM,
            BN=BN,
            BK=BK,
            EARLY=early,
            STAGES=stages,
            num_warps=WARPS,
            **overlap.launch(early),
        )
    return y, y_norm, y_squares


@gluon.jit
def _silu(x):
    return x / (1.0 + gl.exp(-x))


@gluon.jit
def _matrix(
    tile, w0, w1, w2, w3, b0, b1, b2, b3, N0, N1, N2, N3, BN: gl.constexpr, MATRICES: gl.constexpr,
):  # fmt: skip
    """The matrix of a tile, its bias and rows; the first of its tiles, its column of y, and its number."""
    w, b, N = w0, b0, N0
    first, y_at, which = 0, 0, 0
    if MATRICES > 1:
        t1 = gl.cdiv(N0, BN)
        if tile >= t1:
            w, b, N, first, y_at, which = w1, b1, N1, t1, N0, 1
    if MATRICES > 2:
        t2 = t1 + gl.cdiv(N1, BN)
        if tile >= t2:
            w, b, N, first, y_at, which = w2, b2, N2, t2, N0 + N1, 2
    if MATRICES > 3:
        t3 = t2 + gl.cdiv(N2, BN)
        if tile >= t3:
            w, b, N, first, y_at, which = w3, b3, N3, t3, N0 + N1 + N2, 3
    return w, b, N, first, y_at, which


@gluon.jit
def _fetch(
    ring, stage, matrix, stride, rows, f, hi, K, BN: gl.constexpr, BK: gl.constexpr,
    EVEN_N: gl.constexpr, EVEN_K: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Block f of the columns of some rows into a stage of the ring, if there is one."""
    r = gl.arange(0, BN, gl.SliceLayout(1, COPY))[:, None]
    c = gl.arange(0, BK, gl.SliceLayout(0, COPY))[None, :]
    mask = (f < hi) & (r >= 0)
    if not EVEN_N:
        mask = mask & (r < rows)
    if not EVEN_K:
        mask = mask & (c < K - f * BK)
    async_copy.async_copy_global_to_shared(ring.index(stage), matrix + f * BK + (r * stride + c), mask=mask)


@gluon.jit(do_not_specialize=["blocks", "num_squares"])
def _linear_kernel(
    x, w0, w1, w2, w3, b0, b1, b2, b3, squares, residual, norm, y, y_norm, y_squares, parts, counters,
    rows, K, x_m, w_n, N0, N1, N2, N3, N_all, blocks, eps, num_squares,
    SPLITS: gl.constexpr, SQUARES: gl.constexpr, MATRICES: gl.constexpr, BIASES: gl.constexpr, GATED: gl.constexpr,
    SILU_LAST: gl.constexpr, SCALED: gl.constexpr, HAS_RESIDUAL: gl.constexpr, HAS_NORM: gl.constexpr,
    EVEN_N: gl.constexpr, EVEN_K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    EARLY: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Programs [tile of outputs, part of its columns]; ``blocks`` of columns to a tile."""
    if EARLY:
        cuda.gdc_launch_dependents()
    tile, part = gl.program_id(0), gl.program_id(1)
    lo = part * blocks // SPLITS
    hi = (part + 1) * blocks // SPLITS
    w, b, N, first, y_at, which = _matrix(tile, w0, w1, w2, w3, b0, b1, b2, b3, N0, N1, N2, N3, BN, MATRICES)
    corner = ((tile - first) * BN).to(gl.int64) * w_n
    left = N - (tile - first) * BN

    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BM, 16])
    LANES: gl.constexpr = BK // 8 if BK < 256 else 32
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = w0.dtype.element_ty
    MANY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    FEW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    many = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], MANY)
    few = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], FEW)
    ups = many
    if GATED:
        ups = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], MANY)
    for s in gl.static_range(STAGES - 1):
        _fetch(many, s, w + corner, w_n, left, lo + s, hi, K, BN, BK, EVEN_N, EVEN_K, COPY)
        if GATED:
            _fetch(ups, s, w1 + corner, w_n, left, lo + s, hi, K, BN, BK, EVEN_N, EVEN_K, COPY)
        async_copy.commit_group()
    m = gl.arange(0, BM, gl.SliceLayout(0, MMA))
    n = gl.arange(0, BN, gl.SliceLayout(1, MMA))
    inside = n < left
    mask = inside[:, None] & (m < rows)[None, :]
    n += (tile - first) * BN
    at = m.to(gl.int64)[None, :] * N_all + y_at + n[:, None]
    if BIASES != 0:
        bias = gl.load(b + n, mask=inside & (((BIASES >> which) & 1) != 0), other=0.0).to(gl.float32)
    if BIASES >= 2 and GATED:
        up_bias = gl.load(b1 + n, mask=inside, other=0.0).to(gl.float32)
    if HAS_NORM:
        weight = gl.load(norm + y_at + n, mask=inside, other=0.0).to(gl.float32)

    if EARLY:
        cuda.gdc_wait()
    for s in gl.static_range(STAGES - 1):
        _fetch(few, s, x, x_m, rows, lo + s, hi, K, BM, BK, False, EVEN_K, COPY)
    async_copy.commit_group()
    if HAS_RESIDUAL:
        before = gl.load(residual + at, mask=mask, other=0.0).to(gl.float32)
    if SCALED:
        SUMS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [num_warps, 1], [1, 0])
        c = gl.arange(0, SQUARES, gl.SliceLayout(0, SUMS))
        own = gl.arange(0, BM, gl.SliceLayout(1, SUMS))
        given = (own < rows)[:, None] & (c < num_squares)[None, :]
        sums = gl.load(squares + own[:, None] * num_squares + c[None, :], mask=given, other=0.0)
        scale = gl.convert_layout(gl.rsqrt(gl.sum(sums, 1) / K + eps), gl.SliceLayout(0, MMA))

    stage = 0
    going = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, MMA))
    going_up = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, MMA))
    async_copy.wait_group(0)
    for f in range(lo, hi):
        if GATED:
            acc, up = warpgroup_mma_wait(0, deps=[going, going_up])
        else:
            acc = warpgroup_mma_wait(0, deps=[going])
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _barrier()  # all copies of this stage are there, and nobody reads the one before it any more
        right = few.index(stage).permute((1, 0))
        going = warpgroup_mma(many.index(stage), right, acc, is_async=True)
        if GATED:
            going_up = warpgroup_mma(ups.index(stage), right, up, is_async=True)
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        ahead = f + STAGES - 1
        _fetch(many, free, w + corner, w_n, left, ahead, hi, K, BN, BK, EVEN_N, EVEN_K, COPY)
        if GATED:
            _fetch(ups, free, w1 + corner, w_n, left, ahead, hi, K, BN, BK, EVEN_N, EVEN_K, COPY)
        _fetch(few, free, x, x_m, rows, ahead, hi, K, BM, BK, False, EVEN_K, COPY)
        async_copy.commit_group()
        stage = gl.where(stage + 1 == STAGES, 0, stage + 1)
    if GATED:
        acc, up = warpgroup_mma_wait(0, deps=[going, going_up])
    else:
        acc = warpgroup_mma_wait(0, deps=[going])
        up = acc
    # Copies past the last block are zeros that may still be on their way, to where sums will stand.
    async_copy.wait_group(0)

    last = True
    if SPLITS == 1 and HAS_NORM:
        _barrier()
    if SPLITS > 1:
        each: gl.constexpr = BN * BM * (2 if GATED else 1)
        inner = gl.arange(0, BN, gl.SliceLayout(1, MMA))[:, None] * BM + m[None, :]
        own_parts = parts + (tile * SPLITS).to(gl.int64) * each + inner
        gl.store(own_parts + part * each, acc)
        if GATED:
            gl.store(own_parts + part * each + BN * BM, up)
        _barrier()  # all threads have stored before one of them says so
        last = gl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = gl.zeros([BN, BM], gl.float32, MMA)
            up = gl.zeros([BN, BM], gl.float32, MMA)
            for i in gl.static_range(SPLITS):
                acc += gl.load(own_parts + i * each, cache_modifier=".cg")
                if GATED:
                    up += gl.load(own_parts + i * each + BN * BM, cache_modifier=".cg")
            gl.store(counters + tile, 0)
    if last:
        if SCALED:
            acc = acc * scale[None, :]
            if GATED:
                up = up * scale[None, :]
        if BIASES != 0:
            acc += bias[:, None]
        if GATED:
            if BIASES >= 2:
                up += up_bias[:, None]
            acc = _silu(acc) * up
        if SILU_LAST:
            acc = gl.where(which == MATRICES - 1, _silu(acc), acc)
        if HAS_RESIDUAL:
            acc += before
        out = acc.to(y.dtype.element_ty)
        gl.store(y + at, out, mask=mask)
        if HAS_NORM:
            wide = gl.where(mask, out.to(gl.float32), 0.0)
            gl.store(y_norm + at, (wide * weight[:, None]).to(y.dtype.element_ty), mask=mask)
            gl.store(y_squares + m * gl.num_programs(0) + tile, gl.sum(wide * wide, 0), mask=m < rows)
