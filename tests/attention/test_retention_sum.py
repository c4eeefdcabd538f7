"""Retention sums equal the double loop they stand for, documents apart, whatever the length."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from trimkv.attention.retention_sum import retention_sum

LENGTHS = [1, 2, 15, 16, 17, 33, 65, 130, 259]
gpu = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def brute(log_beta, start=None):
    """Every pair of tokens at once, in fp64."""
    T = log_beta.shape[-1]
    index = torch.arange(T, device=log_beta.device)
    keep = index <= index[:, None]
    if start is not None:
        keep = keep & (start[:, None, :, None] <= index)
    age = (index[:, None] - index).clamp(min=0)
    return ((log_beta.double()[:, :, None] * age).exp() * keep).sum(-1)


def random_log_beta(*shape, **options):
    """Retentions from nearly nothing to nearly for ever."""
    return (-torch.empty(*shape).uniform_(-12, 2).exp()).to(**options).requires_grad_()


def random_start(B, T, share=0.05):
    """Packed rows: documents of every length, and some of one token."""
    border = torch.rand(B, T) < share
    border |= (torch.arange(T) % 41 > 36) & (torch.rand(B, 1) < 0.5)
    border[:, 0] = True
    return torch.where(border, torch.arange(T), 0).cummax(1).values


def check(log_beta, start, implementation, tolerance=1e-5):
    ours, truth = retention_sum(log_beta, start, implementation), brute(log_beta, start)
    direction = torch.randn_like(ours)
    (grad,) = torch.autograd.grad(ours, log_beta, direction)
    (true_grad,) = torch.autograd.grad(truth, log_beta, direction.double())
    assert ours.dtype == torch.promote_types(log_beta.dtype, torch.float32) and ours.shape == log_beta.shape
    for x, y in ((ours, truth), (grad, true_grad)):
        error = (x.double() - y).square().mean().sqrt() / y.double().square().mean().sqrt().clamp(min=1e-12)
        assert error < tolerance, (tuple(log_beta.shape), start is not None, error.item())


def check_all(implementation, device, lengths, rows=((2, 3), (3, 1))):
    poison = torch.empty_like

    def poisoned(*args, **options):
        return poison(*args, **options).fill_(float("nan"))

    torch.empty_like = poisoned  # what is read before it is written shows
    try:
        for T in lengths:
            for B, H in rows:
                log_beta = random_log_beta(B, H, T, device=device)
                for start in (None, random_start(B, T).to(device), random_start(B, T, 0.3).int().to(device)):
                    check(log_beta, start, implementation)
    finally:
        torch.empty_like = poison


@pytest.mark.parametrize("T", LENGTHS)
def test_sums_and_gradients_are_those_of_the_double_loop(T):
    check_all("torch", "cpu", [T])


def test_blocks_of_rows_do_not_mix(monkeypatch):
    monkeypatch.setattr("trimkv.attention.retention_sum.CPU_ELEMENTS", 4000)
    check(random_log_beta(4, 5, 70), random_start(4, 70), "torch")


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    log_beta = random_log_beta(2, 2, 19, dtype=torch.float64)
    start = random_start(2, 19, 0.2) if packed else None
    assert torch.autograd.gradcheck(lambda x: retention_sum(x, start), log_beta)


def test_a_token_that_is_kept_for_ever_counts_for_ever():
    sums = retention_sum(torch.zeros(1, 1, 100))
    assert torch.equal(sums[0, 0], torch.arange(1.0, 101.0))
    assert torch.allclose(retention_sum(torch.full((1, 1, 50), -200.0)), torch.ones(1, 1, 50))


def test_documents_and_padding_do_not_see_each_other():
    log_beta = random_log_beta(1, 2, 60).detach()
    start = torch.arange(60)[None].clone()
    start[:, 5:30], start[:, 30:50] = 5, 30  # five tokens of padding before, ten behind
    sums = retention_sum(log_beta, start)
    for begin, end in ((5, 30), (30, 50)):
        alone = retention_sum(log_beta[..., begin:end])
        assert torch.allclose(sums[..., begin:end], alone, rtol=1e-5)
    assert (sums[..., :5] == 1).all() and (sums[..., 50:] == 1).all()


def test_half_precision_is_summed_in_fp32():
    log_beta = random_log_beta(1, 2, 50, dtype=torch.bfloat16)
    sums = retention_sum(log_beta)
    assert sums.dtype == torch.float32 and torch.allclose(sums.double(), brute(log_beta), rtol=1e-5)
    sums.sum().backward()
    assert log_beta.grad.dtype == torch.bfloat16


def test_memory_does_not_grow_with_the_square_of_the_length():
    """The largest tensor of a pass over 20,000 tokens is far from 20,000 x 20,000."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    log_beta = random_log_beta(1, 1, 20_000)
    with Watch():
        retention_sum(log_beta).sum().backward()
    assert largest < 200 * 20_000


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_kernels_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    program = "import torch, test_retention_sum as t; torch.set_num_threads(1); torch.manual_seed(0); t.interpreted()"
    here = os.path.dirname(__file__)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def interpreted():
    """Runs in the process that the test above starts."""
    from trimkv.attention import retention_sum_triton

    retention_sum_triton.SIZES = {"A": 4, "C": 4, "K": 8}
    check_all("triton", "cpu", [1, 37], [(2, 2)])
    retention_sum_triton.SIZES = {"A": 16, "C": 16, "K": 16}
    check_all("triton", "cpu", [270], [(2, 1)])


@gpu
@no_cuda
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_sums_on_a_gpu(implementation):
    check_all(implementation, "cuda", [1, 31, 33, 1023, 1025, 2500])


@gpu
@no_cuda
def test_a_gpu_takes_the_kernels_and_little_memory():
    B, H, T = 1, 64, 16_384
    log_beta = random_log_beta(B, H, T, device="cuda")
    expected = retention_sum(log_beta, None, "torch")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sums = retention_sum(log_beta)
    sums.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * log_beta.nbytes
    assert torch.allclose(sums, expected, rtol=1e-4)
