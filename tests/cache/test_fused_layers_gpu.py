"""Fused decode steps on a GPU: graphs that equal stock steps."""

import pytest
import torch

import tiny
from cache import test_fused_layers as shared
from trimkv import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "h2o"])
def test_a_captured_fused_step_is_a_stock_step(name, policy):
    shared.compare(shared.build(name).cuda(), policy, device="cuda", limit=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding(dtype):
    model = tiny.gated("qwen3", hidden_size=512, head_dim=128, num_hidden_layers=2, gain=1.0, vocab_size=1024)
    shared.compare(model.to("cuda", dtype), "streaming_llm", steps=20, device="cuda", limit=0.1)


def test_the_engine_takes_fused_steps_where_it_can():
    with Engine(tiny.gated("qwen3").cuda(), "trimkv", 16, rows=3, chunk=8) as engine:
        assert engine.runner.fused is not None
    with Engine(tiny.gated("olmo").cuda(), "trimkv", 16, rows=3, chunk=8) as engine:
        assert engine.runner.fused is None
