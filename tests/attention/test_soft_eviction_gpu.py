"""The fused kernels of soft eviction on a GPU: real shapes and dtypes, against torch."""

import pytest
import torch

from attention import test_soft_eviction as shared
from trimkv.attention.soft_eviction import soft_eviction_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("true_fp32")]
poisoned_memory = shared.poisoned_memory


@pytest.mark.parametrize("start", [None, "packed"])
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_head_dim_and_dtype(D, dtype, start):
    # as many tokens as make several blocks, and a last one that is not full
    T = {torch.float32: 331}.get(dtype, 1023)
    shared.check(*shared.inputs(2, 2, 3, T, D, dtype, "cuda", start), [40.0, 150.0])


@pytest.mark.parametrize("start", [None, "packed", "left"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_shape_of_training(dtype, start):
    shared.check(*shared.inputs(4, 3, 3, 2048, 64, dtype, "cuda", start), [32.0, 128.0, 500.0, 9999.0], 0.15)


@pytest.mark.parametrize("shape", [(1, 2, 4, 1025, 128), (3, 1, 8, 1, 64), (1, 4, 1, 255, 128)])
def test_lengths_and_groups(shape):
    tensors, start = shared.inputs(*shape, torch.bfloat16, "cuda", "packed")
    shared.check(tensors, start, [20] * shape[0], torch.tensor(0.3, device="cuda"))


def test_a_border_is_the_same_in_both():
    """At a temperature this low a border that is off by 0.001 would change the output."""
    tensors, _ = shared.inputs(1, 2, 1, 700, 64, torch.float32, "cuda")
    with torch.no_grad():
        outs = [
            soft_eviction_attention(*tensors, 0.125, torch.tensor([64.0], device="cuda"), 0.01, None, implementation)
            for implementation in ("triton", "torch")
        ]
    torch.testing.assert_close(*outs, atol=2e-3, rtol=2e-3)


def test_the_same_twice_and_auto_takes_the_kernels():
    tensors, start = shared.inputs(2, 2, 3, 500, 64, torch.bfloat16, "cuda", "packed")
    one, two = (shared.results(tensors, start, [32, 100], 0.3, name) for name in ("auto", "triton"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="float64"):
        soft_eviction_attention(
            tensors[0].double(), *tensors[1:], 0.1, torch.ones(2, device="cuda"), 0.3, None, "triton"
        )


def test_memory_grows_with_the_length_only():
    peaks = []
    for T in (8192, 16384):
        tensors, _ = shared.inputs(1, 2, 2, T, 64, torch.bfloat16, "cuda")
        budget = torch.tensor([256.0], device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = soft_eviction_attention(*tensors, 0.125, budget, 0.2)
        torch.autograd.grad(out.sum(), tensors)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del tensors, out
    assert peaks[0] < 8192 * 8192 * 4 / 4, peaks
    assert peaks[1] < 2.3 * peaks[0], peaks
