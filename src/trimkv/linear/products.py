"""What a decode step computes between two attentions, as three operators that read weights where they lie.

RMSNorm needs the mean square of a whole row, which nobody who reads a part of it knows. So whoever makes a row leaves
sums of squares of its parts beside it, and the row times the norm's weight: a normed product is then a plain product
whose result is scaled at the end.

Rounding differs from the stock modules': products, biases, residuals and norms are in fp32 and each result is rounded
once, where stock modules round in between, and an input is rounded after the norm's weight and before its scale. In
fp16 a row times the norm's weight must stay below 65,504.

Shapes: B rows, E inputs, N outputs, H KV heads, Q query heads, D head dim, I width of a gate.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import device

PLAIN, GATED, SILU_LAST = "plain", "gated", "silu_last"
ACTIVATIONS = (PLAIN, GATED, SILU_LAST)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATRICES = 4  # that one launch goes through at most


class Normed(NamedTuple):
    """Rows to be normed by whoever reads them.

    Attributes:
        x: [B, E] times the norm's weight.
        squares: fp32 [B, S], sums of squares of parts of the row without that weight.
        eps: of the norm.
    """

    x: torch.Tensor
    squares: torch.Tensor
    eps: float


def unsupported(x: torch.Tensor) -> str | None:
    """Why the kernels cannot serve a tensor, or None."""
    if x.dtype not in DTYPES:
        return f"the Triton kernels take fp32, bf16 and fp16, not {x.dtype}"
    if not device.runs_kernels(x):
        return "the Triton kernels need CUDA tensors (or TRITON_INTERPRET=1)"
    return None


def linear(
    x: torch.Tensor | Normed,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None] | None = None,
    activation: str = PLAIN,
    residual_BN: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Normed]:
    """Products of a few rows with matrices [N, E], in one launch.

    Args:
        x: [B, E], or what a norm leaves.
        weights, biases: of up to four torch.nn.Linear of the same input; outputs stand beside each other.
        activation: "plain"; "gated": of two matrices, SiLU of the first output times the second; "silu_last": the last
            matrix's output goes through SiLU.
        residual_BN: is added.
        norm: weight [N] and eps of the norm that reads the result.
        counters: zeros, int32, that this call may use and leaves zero: of one stream's calls. None makes some.

    Returns:
        [B, N] in the dtype of x; with ``norm`` also the result for that norm.
    """
    assert activation in ACTIVATIONS and 1 <= len(weights) <= MATRICES, (activation, len(weights))
    x, squares, eps = x if isinstance(x, Normed) else (x, None, 0.0)
    weight, next_eps = norm or (None, 0.0)
    biases = biases or [None] * len(weights)
    given = x, weights, [b for b in biases if b is not None], [b is not None for b in biases]
    rest = squares, eps, activation, residual_BN, weight, counters
    y, y_norm, y_squares = torch.ops.trimkv.skinny_linear(*given, *rest)
    return (y, Normed(y_norm, y_squares, next_eps)) if norm else y


def linear_reference(x, weights, biases, has_bias, squares, eps, activation, residual, norm, counters, width=None):
    """``linear`` in plain torch and fp32: the truth, and what runs on the CPU."""
    biases, dtype, x = iter(biases), x.dtype, x.float()
    parts = [x @ w.float().T for w in weights]
    if squares is not None:
        scale = torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[1] + eps)
        parts = [part * scale for part in parts]
    parts = [part + next(biases).float() if has else part for part, has in zip(parts, has_bias, strict=True)]
    if activation == GATED:
        parts = [F.silu(parts[0]) * parts[1]]
    elif activation == SILU_LAST:
        parts[-1] = F.silu(parts[-1])
    y = torch.cat(parts, 1)
    if residual is not None:
        y = y + residual.float()
    y = y.to(dtype)
    if norm is None:
        return y, y.new_empty(0), x.new_empty(0)
    return y, *norm_input_reference(y, norm, width)


def four(x, weights: list, biases: list, has_bias: list[bool]) -> tuple[list, list, list[int]]:
    """Matrices, biases and widths for the MATRICES places of a kernel; something stands in those that it leaves out."""
    missing, given = MATRICES - len(weights), iter(biases)
    matrices = [*weights, *weights[-1:] * missing]
    biases = [next(given) if has else x for has in has_bias] + [x] * missing
    return matrices, biases, [w.shape[0] for w in weights] + [0] * missing


def norm_input(x_BE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> Normed:
    """Rows for a norm where nobody who made them has left anything."""
    return Normed(*torch.ops.trimkv.norm_input(x_BE, weight_E), eps)


def norm_input_reference(x, weight, width=None) -> tuple[torch.Tensor, torch.Tensor]:
    """``norm_input`` in plain torch. ``width``: columns of one sum of squares."""
    wide = x.float()
    width = width or x.shape[1]
    squares = F.pad(wide.square(), (0, -x.shape[1] % width)).unflatten(1, (-1, width)).sum(2)
    return (wide * weight.float()).to(x.dtype), squares


def heads(
    qkv_BN: torch.Tensor,
    num_query_heads: int,
    num_heads: int,
    head_dim: int,
    cos_BD: torch.Tensor,
    sin_BD: torch.Tensor,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """From a layer's projections to rotated heads, and to retention.

    Args:
        qkv_BN: outputs for queries, keys and values beside each other, then, with ``gate``, of the gate's first linear
            with its activation.
        cos_BD, sin_BD: of each row's position; the second half of a head is the first one's partner (rotate_half).
        q_norm_D, k_norm_D, eps: RMSNorm over each head, before the rotation.
        gate: the weight [H, I] and bias [H] of the gate's second linear.

    Returns:
        q [B, Q, D] and k [B, H, D] in the dtype of qkv; log_beta fp32 [B, H] or None.
    """
    weight, bias = gate or (None, None)
    qk, log_beta = torch.ops.trimkv.skinny_heads(
        qkv_BN, num_query_heads, num_heads, head_dim, cos_BD, sin_BD, q_norm_D, k_norm_D, eps, weight, bias
    )
    return qk[:, :num_query_heads], qk[:, num_query_heads:], None if gate is None else log_beta


def heads_reference(qkv, Q, H, D, cos, sin, q_norm, k_norm, eps, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """``heads`` in plain torch and fp32: the truth, and what runs on the CPU."""
    x = qkv[:, : (Q + H) * D].float().unflatten(1, (Q + H, D))
    parts = []
    for part, norm in ((x[:, :Q], q_norm), (x[:, Q:], k_norm)):
        if norm is not None:
            part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps) * norm.float()
        parts.append(part)
    x = torch.cat(parts, 1)
    turned = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    x = x * cos.float()[:, None] + turned * sin.float()[:, None]
    log_beta = qkv.new_empty(0, dtype=torch.float32)
    if weight is not None:
        z = qkv[:, (Q + 2 * H) * D :].float() @ weight.float().T + bias.float()
        log_beta = -F.softplus(-z)
    return x.to(qkv.dtype), log_beta


def _kernels():
    from . import products_triton

    return products_triton


LINEAR_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] biases, bool[] has_bias, Tensor? squares, float eps, str activation, "
    "Tensor? residual, Tensor? norm, Tensor(a!)? counters) -> (Tensor, Tensor, Tensor)"
)
HEADS_SCHEMA = (
    "(Tensor qkv, int query_heads, int heads, int head_dim, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, "
    "float eps, Tensor? gate_weight, Tensor? gate_bias) -> (Tensor, Tensor)"
)


@torch.library.custom_op("trimkv::skinny_linear", mutates_args=("counters",), schema=LINEAR_SCHEMA)
def _linear_op(*args):
    return _kernels().linear(*args) if device.runs_kernels(args[0]) else linear_reference(*args)


@_linear_op.register_fake
def _linear_fake(x, weights, biases, has_bias, squares, eps, activation, residual, norm, counters):
    N = weights[0].shape[0] if activation == GATED else sum(w.shape[0] for w in weights)
    width = _kernels().plan(x, weights, activation).BN if device.runs_kernels(x) else N
    sums = (x.shape[0], -(-N // width)) if norm is not None else (0,)
    y = x.new_empty(x.shape[0], N)
    return y, x.new_empty(y.shape if norm is not None else (0,)), x.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op("trimkv::norm_input", mutates_args=(), schema="(Tensor x, Tensor weight) -> (Tensor, Tensor)")
def _norm_input_op(x, weight):
    return _kernels().norm_input(x, weight) if device.runs_kernels(x) else norm_input_reference(x, weight)


@_norm_input_op.register_fake
def _norm_input_fake(x, weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("trimkv::skinny_heads", mutates_args=(), schema=HEADS_SCHEMA)
def _heads_op(*args):
    return (_kernels().heads if device.runs_kernels(args[0]) else heads_reference)(*args)


@_heads_op.register_fake
def _heads_fake(qkv, Q, H, D, cos, sin, q_norm, k_norm, eps, weight, bias):
    B = qkv.shape[0]
    log_beta = qkv.new_empty((B, H) if weight is not None else (0,), dtype=torch.float32)
    return qkv.new_empty(B, Q + H, D), log_beta
