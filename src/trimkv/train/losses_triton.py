"""Losses of positions and their gradients by the logits in two readings of the logits, instead of fifteen.

Shapes: N positions, V vocabulary.
"""

import torch
import triton
import triton.language as tl

KINDS = ("kl", "ntp")


def loss_and_gradient(
    kind: str, student_NV: torch.Tensor, teacher_NV: torch.Tensor, targets_N: torch.Tensor, weight_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each position, fp32 [N], and the gradient of its weighted sum by the student's logits [N, V].

    "kl" is KL(teacher || student), its gradient softmax(student) - softmax(teacher); "ntp" is the cross entropy of the
    targets, its gradient softmax(student) - onehot(target).
    """
    N, V = student_NV.shape
    loss = torch.empty(N, device=student_NV.device)
    gradient = torch.empty_like(student_NV)
    block = min(8192, triton.next_power_of_2(V))
    strides = student_NV.stride(0), teacher_NV.stride(0), gradient.stride(0)
    assert student_NV.stride(1) == 1 and teacher_NV.stride(1) == 1
    args = student_NV, teacher_NV, targets_N, weight_N, loss, gradient, *strides, V
    _kernel[(N,)](*args, KL=kind == "kl", BLOCK=block, num_warps=8)
    return loss, gradient


@triton.jit
def _kernel(
    student, teacher, targets, weights, losses, gradients, s_row, t_row, g_row, V, KL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    student += row * s_row
    teacher += row * t_row
    gradients += row * g_row
    weight = tl.load(weights + row)
    target = tl.load(targets + row)
    lanes = tl.arange(0, BLOCK)
    low = -3.0e38
    # Largest logit and sum of exponentials, lane by lane; the lanes are brought together at the end.
    s_max = tl.full([BLOCK], low, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_max = tl.full([BLOCK], low, tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        seen = begin + lanes < V
        x = tl.load(student + begin + lanes, mask=seen, other=low).to(tl.float32)
        x = tl.maximum(x, low)  # a vocabulary may be masked with -inf
        top = tl.maximum(s_max, x)
        s_sum = s_sum * tl.exp(s_max - top) + tl.where(x > low, tl.exp(x - top), 0.0)
        s_max = top
        if KL:
            y = tl.load(teacher + begin + lanes, mask=seen, other=low).to(tl.float32)
            y = tl.maximum(y, low)
            top = tl.maximum(t_max, y)
            t_sum = t_sum * tl.exp(t_max - top) + tl.where(y > low, tl.exp(y - top), 0.0)
            t_max = top
    s_top = tl.max(s_max, 0)
    s_lse = s_top + tl.log(tl.sum(s_sum * tl.exp(s_max - s_top), 0))
    t_top = tl.max(t_max, 0)
    t_lse = t_top
    if KL:
        t_lse = t_top + tl.log(tl.sum(t_sum * tl.exp(t_max - t_top), 0))
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        index = begin + lanes
        seen = index < V
        x = tl.load(student + index, mask=seen, other=low).to(tl.float32)
        log_q = x - s_lse
        q = tl.where(seen, tl.exp(log_q), 0.0)
        if KL:
            y = tl.load(teacher + index, mask=seen, other=low).to(tl.float32)
            log_p = y - t_lse
            p = tl.where(seen & (y > low), tl.exp(log_p), 0.0)
            total += tl.where(p > 0.0, p * (log_p - log_q), 0.0)
        else:
            p = tl.where(index == target, 1.0, 0.0)
            total += tl.where(index == target, -log_q, 0.0)
        tl.store(gradients + index, ((q - p) * weight).to(gradients.dtype.element_ty), mask=seen)
    tl.store(losses + row, tl.sum(total, 0))
