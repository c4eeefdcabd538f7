"""Retention sums as two Triton kernels: the blocks of retention_sum.py, in fp32 registers.

A program of the forward pass holds A blocks of C queries and walks over the keys before them; one of the backward pass
holds K keys and walks over the queries after them. Each step is a product of [A, K] and [K, C] tables, (A + C) * K
powers for A * C * K pairs. Pairs within a block are done one distance at a time. A document's borders end the walks.
"""

import torch
import triton
import triton.language as tl

# Of those tried on an H100 the best at T = 2,048 and at 16,384; larger blocks spill registers in the backward pass.
SIZES = {"A": 32, "C": 32, "K": 64}
PRECISION = "ieee"  # of the products


def sums(log_beta_NT: torch.Tensor, start_BT: torch.Tensor | None, heads: int) -> torch.Tensor:
    """S, fp32 [N, T]; ``heads`` rows in a row share one row of ``start_BT``."""
    N, T = log_beta_NT.shape
    out = torch.empty_like(log_beta_NT, memory_format=torch.contiguous_format)
    start = None if start_BT is None else start_BT.int().contiguous()
    grid = (N, triton.cdiv(T, SIZES["A"] * SIZES["C"]))
    with torch.cuda.device_of(log_beta_NT):
        _sums[grid](log_beta_NT.contiguous(), start, out, heads, T, start is not None, PRECISION=PRECISION, **SIZES)
    return out


def gradients(
    log_beta_NT: torch.Tensor, start_BT: torch.Tensor | None, grad_NT: torch.Tensor, heads: int
) -> torch.Tensor:
    """The gradient of log beta, fp32 [N, T], from that of S."""
    N, T = log_beta_NT.shape
    out = torch.empty_like(log_beta_NT, memory_format=torch.contiguous_format)
    start = end = None
    if start_BT is not None:
        start = start_BT.int().contiguous()
        index = torch.arange(T, device=start.device, dtype=torch.int32).expand_as(start).contiguous()
        end = torch.searchsorted(start, index, right=True, out_int32=True)  # where each token's document ends
    with torch.cuda.device_of(log_beta_NT):
        _gradients[(N, triton.cdiv(T, SIZES["K"]))](
            log_beta_NT.contiguous(),
            start,
            end,
            grad_NT.contiguous(),
            out,
            heads,
            T,
            start is not None,
            PRECISION=PRECISION,
            **SIZES,
        )
    return out


@triton.jit
def _sums(
    LOG_BETA,
    START,
    OUT,
    heads,
    T,
    PACKED: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * (A * C)
    LOG_BETA += n * T
    t0 = begin + C * tl.arange(0, A)
    b = tl.arange(0, C)
    t = t0[:, None] + b[None, :]
    low = 0
    if PACKED:
        START += (n // heads) * T
        low = tl.load(START + begin) // K * K
        first = tl.load(START + t0, mask=t0 < T, other=T)
        start = tl.load(START + t, mask=t < T, other=T)
    acc = tl.zeros([A, C], tl.float32)
    for k in range(low, tl.minimum(begin + A * C, T), K):
        i = k + tl.arange(0, K)
        log_beta = tl.load(LOG_BETA + i, mask=i < T, other=0.0)
        age = t0[:, None] - i[None, :]
        keep = age > 0
        if PACKED:
            keep = keep & (i[None, :] >= first[:, None])
        coarse = tl.where(keep, tl.exp(log_beta[None, :] * age), 0.0)
        fine = tl.exp(log_beta[:, None] * b[None, :])
        acc = tl.dot(coarse, fine, acc, input_precision=PRECISION)
    if PACKED:
        acc = tl.where(start == first[:, None], acc, 0.0)
    for d in range(0, C):
        keep = (b[None, :] >= d) & (t < T)
        if PACKED:
            keep = keep & (t - d >= start)
        log_beta = tl.load(LOG_BETA + t - d, mask=keep, other=0.0)
        acc += tl.where(keep, tl.exp(log_beta * d), 0.0)
    tl.store(OUT + n * T + t, acc, mask=t < T)


@triton.jit
def _gradients(
    LOG_BETA,
    START,
    END,
    GRAD,
    OUT,
    heads,
    T,
    PACKED: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * K
    LOG_BETA += n * T
    GRAD += n * T
    i = begin + tl.arange(0, K)
    b = tl.arange(0, C)
    log_beta = tl.load(LOG_BETA + i, mask=i < T, other=0.0)
    fine = tl.exp(b[:, None] * log_beta[None, :])
    aged = fine * b[:, None]
    high = T
    end = tl.full([K], T, tl.int32)
    if PACKED:
        START += (n // heads) * T
        END += (n // heads) * T
        high = tl.load(END + tl.minimum(begin + K, T) - 1)
        end = tl.load(END + i, mask=i < T, other=0)
    acc = tl.zeros([K], tl.float32)
    for block in range(begin // C * C, high, A * C):
        t0 = block + C * tl.arange(0, A)
        t = t0[:, None] + b[None, :]
        grad = tl.load(GRAD + t, mask=t < T, other=0.0)
        age = t0[:, None] - i[None, :]
        keep = (age > 0) & (t0[:, None] < T)
        if PACKED:
            first = tl.load(START + t0, mask=t0 < T, other=T)
            start = tl.load(START + t, mask=t < T, other=T)
            grad = tl.where(start == first[:, None], grad, 0.0)
            keep = keep & (i[None, :] >= first[:, None])
        near = tl.dot(grad, aged, input_precision=PRECISION)
        far = tl.dot(grad, fine, input_precision=PRECISION)
        coarse = tl.where(keep, tl.exp(log_beta[None, :] * age), 0.0)
        acc += tl.sum(tl.where(keep, coarse * (age * far + near), 0.0), 0)
    for d in range(1, C):
        keep = (i % C + d < C) & (i + d < end)
        grad = tl.load(GRAD + i + d, mask=keep, other=0.0)
        acc += tl.where(keep, grad * d * tl.exp(log_beta * d), 0.0)
    tl.store(OUT + n * T + i, acc, mask=i < T)
