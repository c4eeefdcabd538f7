"""The fused kernels of decayed attention on a GPU: real head dims and dtypes, against the plain reference."""

import pytest
import torch

from attention import test_decay as shared
from trimkv.attention import decay

pytestmark = pytest.mark.gpu
poisoned_memory = shared.poisoned_memory


@pytest.mark.parametrize("start", [None, "packed"])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_head_dim_and_dtype(D, dtype, start):
    # as many tokens as make several blocks, and a last one that is not full
    T = {torch.float32: 331}.get(dtype, 1023)
    shared.check(*shared.inputs(2, 2, 3, T, D, dtype, "cuda", start), "triton")


@pytest.mark.parametrize("start", [None, "packed", "left"])
@pytest.mark.parametrize("shape", [(1, 2, 4, 2048, 128), (2, 3, 3, 2049, 64), (3, 1, 8, 1, 64), (1, 4, 1, 255, 128)])
def test_lengths_and_groups(shape, start):
    shared.check(*shared.inputs(*shape, torch.bfloat16, "cuda", start, bias=6.0), "triton")


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("softcap, aux", [(None, True), (20.0, False), (20.0, True)])
def test_softcap_and_sinks(softcap, aux, implementation):
    tensors, start = shared.inputs(2, 2, 4, 300, 64, torch.bfloat16, "cuda", "packed", aux)
    shared.check(tensors, start, implementation, softcap=softcap)


def test_the_ends():
    shared.check_that_beta_one_is_plain_attention("triton", 200, "cuda")
    shared.check_strong_decay("triton", "cuda")
    shared.check_left_padding("triton", "cuda")
    shared.check_long_ages("triton", 131_073, "cuda")


def test_auto_takes_the_kernels_where_they_can():
    (q, k, v, log_beta), _ = shared.inputs(1, 1, 2, 64, 64, torch.bfloat16, "cuda")
    fused = decay.decayed_attention(q, k, v, log_beta, 0.125)
    assert torch.equal(fused, decay.decayed_attention(q, k, v, log_beta, 0.125, implementation="triton"))
    with pytest.raises(ValueError, match="multiplicative"):
        decay.decayed_attention(q, k, v, log_beta, 0.125, variant="multiplicative", implementation="triton")
    decay.decayed_attention(q, k, v, log_beta, 0.125, variant="multiplicative")


def test_memory_grows_with_the_length_only():
    peaks = []
    for T in (4096, 16384):
        tensors, _ = shared.inputs(1, 2, 4, T, 64, torch.bfloat16, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = decay.decayed_attention(*tensors, 0.125)
        torch.autograd.grad(out.sum(), tensors)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del tensors, out
    assert peaks[1] < 4.5 * peaks[0], peaks
