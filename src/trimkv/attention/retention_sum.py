"""Retention sums: how many tokens' worth of slots a gate asks for at each step.

    S_t = sum over start_t <= i <= t of beta_i^(t - i)

Pairs (t, i) are many, but t = t0 + b, where t0 begins a block of C tokens, splits the power: beta_i^(t0 - i) *
beta_i^b. So all keys before a block meet all its queries in one matrix product of two small tables, and T^2 / 2 powers
become T * C + T^2 / (2 * C). Both factors are at most 1: nothing can overflow. Memory is O(T).

Shapes: B rows, H KV heads, T tokens, N = B * H, C tokens in a block, A = T / C blocks.
"""

import torch
import torch.nn.functional as F

from .. import device

CPU_ELEMENTS = 1 << 19  # numbers in flight at a time on a CPU: few enough to stay in its cache
GPU_ELEMENTS = 1 << 26


def retention_sum(
    log_beta_BHT: torch.Tensor, start_BT: torch.Tensor | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """S_t = sum of exp(log_beta_i * (t - i)) over the tokens i <= t of t's document (arXiv 2512.03324, section 4.3).

    Args:
        log_beta_BHT: finite, at most 0. Layers may be stacked into H or, with ``start_BT`` repeated, into B.
        start_BT: integers, the index of the first token of each token's document, never falling along T; padding is
            a document of its own for every token. None if each row is one document.
        implementation: "torch", "triton", or "auto": Triton on CUDA, torch elsewhere (and where
            Triton is not installed).

    Returns:
        [B, H, T], fp32 (fp64 for fp64); differentiable in ``log_beta_BHT``.
    """
    if implementation == "auto":
        fits = log_beta_BHT.is_cuda and log_beta_BHT.dtype != torch.float64
        implementation = "triton" if fits and device.has_triton() else "torch"
    assert implementation in ("torch", "triton"), implementation
    B, _, T = log_beta_BHT.shape
    assert start_BT is None or start_BT.shape == (B, T), start_BT.shape
    if log_beta_BHT.dtype != torch.float64:
        log_beta_BHT = log_beta_BHT.float()
    if log_beta_BHT.numel() == 0:
        return log_beta_BHT.clone()
    return _RetentionSum.apply(log_beta_BHT, start_BT, implementation)


class _RetentionSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_beta, start, implementation):
        ctx.save_for_backward(log_beta, start)
        ctx.implementation = implementation
        return _run(log_beta, start, None, implementation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        log_beta, start = ctx.saved_tensors
        return _run(log_beta, start, grad, ctx.implementation), None, None


def _run(log_beta, start, grad, implementation):
    """S if ``grad`` is None, else the gradient of log beta."""
    B, H, T = log_beta.shape
    log_beta_NT = log_beta.reshape(B * H, T)
    grad_NT = None if grad is None else grad.reshape(B * H, T)
    if implementation == "triton":
        from . import retention_sum_triton as kernels

        if grad is None:
            return kernels.sums(log_beta_NT, start, H).view(B, H, T)
        return kernels.gradients(log_beta_NT, start, grad_NT, H).view(B, H, T)
    return _in_groups(log_beta_NT, start, grad_NT, H).view(B, H, T)


def _in_groups(log_beta_NT, start_BT, grad_NT, H):
    """Torch, a few rows at a time. T is filled up to whole blocks with tokens that no real one sees."""
    N, T = log_beta_NT.shape
    C = 16
    while C * C < T and C < 256:
        C *= 2
    rest = -T % C
    out = torch.empty_like(log_beta_NT)
    start_BT = None if start_BT is None else F.pad(start_BT, (0, rest), value=T)
    size = max(1, (GPU_ELEMENTS if log_beta_NT.is_cuda else CPU_ELEMENTS) // (T + C * C))
    for rows in torch.arange(N, device=log_beta_NT.device).split(size):
        blocks = F.pad(log_beta_NT[rows], (0, rest)).unflatten(1, (-1, C))
        start = None if start_BT is None else start_BT[rows // H].unflatten(1, (-1, C))
        if grad_NT is None:
            done = _sums(blocks, start)
        else:
            done = _gradients(blocks, start, F.pad(grad_NT[rows], (0, rest)).unflatten(1, (-1, C)))
        out[rows] = done.flatten(1)[:, :T]
    return out


def _sums(log_beta_NAC, start_NAC):
    own, before = torch.empty_like(log_beta_NAC), torch.zeros_like(log_beta_NAC)
    for j, fine, coarse, _, same in _tables(log_beta_NAC, start_NAC):
        own[:, j] = _skew(fine).mul_(same).sum(1)
        before[:, j + 1 :] += coarse @ fine
    return own + before if start_NAC is None else own + before * _unbroken(start_NAC)


def _gradients(log_beta_NAC, start_NAC, grad_NAC):
    out = torch.empty_like(log_beta_NAC)
    outer = grad_NAC if start_NAC is None else grad_NAC * _unbroken(start_NAC)
    for j, fine, coarse, age, same in _tables(log_beta_NAC, start_NAC):
        aged = fine * torch.arange(fine.shape[-1], device=fine.device)
        own = (_skew(aged).mul_(same) * grad_NAC[:, j, None]).sum(2)
        after = outer[:, j + 1 :]  # (t - i) = (t0 - i) + b
        far = coarse * ((after @ fine.mT).mul_(age) + after @ aged.mT)
        out[:, j] = own + far.sum(1)
    return out


def _tables(log_beta_NAC, start_NAC):
    """For each block j of keys: beta^b [N, C, C]; beta^(t0 - i) for the blocks after it [N, A - j - 1, C], with the
    ages t0 - i; and which queries of its own block see a key [N or 1, C, C]."""
    _, A, C = log_beta_NAC.shape
    b = torch.arange(C, device=log_beta_NAC.device)
    begin = C * torch.arange(A, device=log_beta_NAC.device)
    causal = b[:, None] <= b
    for j in range(A):
        i, log_beta = j * C + b, log_beta_NAC[:, j]
        age = begin[j + 1 :, None] - i
        fine = (log_beta[:, :, None] * b).exp_()
        coarse = (log_beta[:, None] * age).exp_()
        same = causal
        if start_NAC is not None:
            coarse *= i >= start_NAC[:, j + 1 :, :1]
            same = causal & (start_NAC[:, j, None] <= i[:, None])
        yield j, fine, coarse, age, same


def _unbroken(start_NAC):
    """The queries that belong to the document of the first one of their block: the only ones to see earlier blocks."""
    return start_NAC == start_NAC[:, :, :1]


def _skew(x_NCC):
    """Row i moved i places to the right, zeros before it: entry b goes to i + b."""
    C = x_NCC.shape[-1]
    return F.pad(x_NCC, (0, C)).flatten(1)[:, : C * (2 * C - 1)].unflatten(1, (C, -1))[:, :, :C].contiguous()
