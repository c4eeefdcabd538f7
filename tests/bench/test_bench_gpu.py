"""Every system of `trimkv bench` runs on a GPU, and is right there."""

import pytest
import torch

from trimkv.bench import attention, decode, models, prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("compile", [False, True])
def test_decode(compile):
    model = models.build("tiny", "cuda", torch.bfloat16)
    options = decode.Options((300,), (1, 3), 64, steps=4, compile=compile)
    for row in decode.measure(model, options, 1e12):
        assert "error" not in row, row


def test_prefill_and_attention():
    model = models.build("tiny", "cuda", torch.bfloat16)
    for row in prefill.measure(model, prefill.Options((700,), (2,), 64, 128), 1e12):
        assert "error" not in row, row
    for row in attention.measure(attention.Options("qwen3-4b", (2, 16), (256,)), CUDA, torch.bfloat16, 1e12):
        assert "error" not in row, row
