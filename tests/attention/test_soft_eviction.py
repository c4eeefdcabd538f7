"""Soft eviction against a loop over pairs, and its kernels against torch; test_soft_eviction_gpu.py is on a GPU.

Triton decides when it is imported whether it interprets: the kernels' tests run in a process of their own.
"""

import math

import pytest
import torch

import interpreter
from attention import test_decay as shared
from trimkv.attention.soft_eviction import soft_eviction_attention

INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_the_kernels_in_the_interpreter")
NAMES = ("out", "dq", "dk", "dv", "dlog_beta")
poisoned_memory = shared.poisoned_memory


def inputs(B, H, G, T, D, dtype=torch.float32, device="cpu", start=None):
    """Random q, k, v, log_beta that want gradients, and start."""
    (q, k, v, _), start = shared.inputs(B, H, G, T, D, dtype, device, start)
    log_beta = -torch.exp(1.5 * torch.randn(B, H, T, device=device) - 2)
    return [q, k, v, log_beta.requires_grad_()], start


def results(tensors, start, budgets, temperature, implementation):
    q = tensors[0]
    budget = torch.tensor(budgets, device=q.device)
    out = soft_eviction_attention(*tensors, q.shape[-1] ** -0.5, budget, temperature, start, implementation)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype).to(out)
    return out, *torch.autograd.grad(out, tensors, dout)


def check(tensors, start, budgets, temperature=0.3):
    """Relative RMS of the output and of every gradient; the truth is in fp32 whatever the tensors are in."""
    got = results(tensors, start, budgets, temperature, "triton")
    assert [x.dtype for x in got] == [tensors[0].dtype] + [x.dtype for x in tensors]
    wide = [x.detach().float().requires_grad_() for x in tensors]
    expect = results(wide, start, budgets, temperature, "torch")

    def relative(a, b):
        a, b = a.double(), b.double()
        return ((a - b).pow(2).mean() / b.pow(2).mean().clamp_min(1e-6)).sqrt().item()

    found = {name: relative(a, b) for name, a, b in zip(NAMES, got, expect, strict=True)}
    limit = shared.LIMIT[tensors[0].dtype]
    assert all(error < limit for error in found.values()), found  # a NaN is not smaller than the limit


def by_pairs(tensors, start, budgets, temperature, scaling, sums=None):
    """The output by loops, and the sum of the gates of every border; given ``sums``, borders are moved to them."""
    q, k, v, log_beta = (x.detach().double() for x in tensors)
    (B, Q, T, _), H = q.shape, k.shape[1]
    out, found = torch.zeros(B, Q, T, v.shape[-1], dtype=torch.float64), {}
    for b, h, i in [(b, h, i) for b in range(B) for h in range(H) for i in range(T)]:
        keys = range(0 if start is None else int(start[b, i]), i + 1)
        u = [math.log(-log_beta[b, h, j].item()) + math.log(max(i - j, 1e-4)) for j in keys]
        bias = [0.0] * len(u)
        if len(u) > budgets[b]:
            M, ordered = math.ceil(budgets[b]), sorted(u)
            low = high = (ordered[M - 1] + ordered[M]) / 2
            if sums is not None:
                low, high = low - 1, high + 1
                for _ in range(50):
                    middle = (low + high) / 2
                    total = sum(1 / (1 + math.exp((x - middle) / temperature)) for x in u)
                    low, high = (middle, high) if total < sums[b, h, i] else (low, middle)
            found[b, h, i] = sum(1 / (1 + math.exp((x - low) / temperature)) for x in u)
            bias = [-math.log1p(math.exp((x - low) / temperature)) for x in u]
        for n in range(h * Q // H, (h + 1) * Q // H):
            logits = [scaling * (q[b, n, i] @ k[b, h, j]).item() + x for j, x in zip(keys, bias, strict=True)]
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
            out[b, n, i] = weights @ v[b, h, keys.start : i + 1]
    return out, found


@pytest.mark.parametrize("start", [None, "packed"])
def test_torch_equals_a_loop_over_pairs(start):
    tensors, start = inputs(2, 2, 2, 14, 4, start=start)
    tensors = [x.detach().double() for x in tensors]
    expect, _ = by_pairs(tensors, start, [3, 20], 0.4, 0.5)
    got = soft_eviction_attention(*tensors, 0.5, torch.tensor([3.0, 20.0]), 0.4, start)
    torch.testing.assert_close(got, expect, atol=1e-6, rtol=1e-6)


def test_the_gradients_of_torch_by_finite_differences():
    """Also of the borders, which move so that the sum of the gates stays what it is."""
    tensors, start = inputs(2, 1, 2, 9, 4, start="packed")
    q, k, v, log_beta = tensors = [x.detach().double().requires_grad_() for x in tensors]
    budgets = [2, 3]

    def function(q, k, v):
        return soft_eviction_attention(q, k, v, log_beta.detach(), 0.5, torch.tensor(budgets), 0.4, start)

    assert torch.autograd.gradcheck(function, (q, k, v))

    out = soft_eviction_attention(*tensors, 0.5, torch.tensor(budgets), 0.4, start)
    dout = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, log_beta, dout)
    _, sums = by_pairs(tensors, start, budgets, 0.4, 0.5)
    expect, step = torch.zeros_like(log_beta), 1e-5
    for at in [(b, 0, t) for b in range(2) for t in range(9)]:
        for sign in (1, -1):
            moved = log_beta.detach().clone()
            moved[at] *= 1 + sign * step
            moved_out, _ = by_pairs([q, k, v, moved], start, budgets, 0.4, 0.5, sums)
            expect[at] += sign * (moved_out * dout).sum().detach() / (2 * step * log_beta.detach()[at])
    assert expect.abs().max() > 1e-2
    torch.testing.assert_close(got, expect.detach(), atol=1e-5, rtol=1e-4)


def test_a_budget_of_all_tokens_is_plain_attention():
    (q, k, v, log_beta), _ = inputs(2, 2, 3, 12, 8)
    got = soft_eviction_attention(q, k, v, log_beta, 0.3, torch.tensor([12, 99]), 0.2)
    expect = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expect)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(implementation="fast"), "unknown implementation"),
        (dict(budget_B=torch.ones(2)), "budget"),
        (dict(temperature=0.0), "temperature"),
        (dict(log_beta_BHT=torch.zeros(1, 4, 5)), "log_beta"),
    ],
)
def test_wrong_input_is_refused(change, words):
    (q, k, v, log_beta), _ = inputs(1, 2, 2, 5, 8)
    arguments = dict(q_BQTD=q, k_BHTD=k, v_BHTD=v, log_beta_BHT=log_beta, scaling=1.0)
    with pytest.raises(ValueError, match=words):
        soft_eviction_attention(**{**arguments, "budget_B": torch.ones(1), "temperature": 0.3, **change})


# The Triton kernels. bf16 is left to the GPU: triton's interpreter multiplies its bits as integers.


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    interpreter.run_interpreted_tests(__file__)


@interpreted
@pytest.mark.parametrize(
    "shape, start, budgets, temperature, dtype",
    [
        ((1, 1, 1, 1, 16), None, [4], 0.3, torch.float32),
        ((1, 1, 1, 9, 16), None, [1.5], 1.0, torch.float32),
        ((2, 2, 1, 37, 16), "packed", [3, 10], 0.3, torch.float32),
        ((2, 1, 3, 67, 80), "left", [2.0, 4.5], 0.05, torch.float32),
        ((1, 1, 4, 128, 64), None, [30.0], 0.01, torch.float32),
        ((3, 1, 3, 149, 16), "packed", [5.0, 17.0, 1000.0], 0.15, torch.float32),
        ((1, 1, 1, 261, 16), None, [40], 0.5, torch.float16),
        ((1, 1, 1, 384, 64), "packed", [20], 0.3, torch.float16),
    ],
)
def test_interpreted_kernels_equal_torch(shape, start, budgets, temperature, dtype):
    check(*inputs(*shape, dtype=dtype, start=start), budgets, temperature)


@interpreted
def test_interpreted_kernels_at_the_ends():
    """Gates that never forget, ones that forget at once, and ties, do not make a NaN; a temperature may be a tensor."""
    tensors, start = inputs(1, 2, 2, 70, 16)
    with torch.no_grad():
        tensors[3][0, 0, ::2] = 0.0
        tensors[3][0, 0, 1::4] = -1e30
        tensors[3][0, 1] = -0.5
    check(tensors, start, [16.0], torch.tensor(0.2))


@interpreted
def test_interpreted_kernels_refuse_what_they_do_not_know():
    (q, k, v, log_beta), _ = inputs(1, 2, 2, 5, 16)
    with pytest.raises(ValueError, match="float64.*torch"):
        soft_eviction_attention(q.double(), k, v, log_beta, 1.0, torch.ones(1), 0.3, implementation="triton")
