"""Eviction after a chunk on a GPU: real shapes and dtypes against torch, and from a graph."""

import pytest
import torch

from attention import test_keep_triton as shared

keep_triton = shared.keep_triton
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [(1, 8, 1024, 256, 128), (1, 8, 1000, 512, 64), (3, 2, 37, 5, 80), (1, 2, 7000, 9, 256)]  # B, H, C, T, D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", shared.OPTIONS)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_kernels_equal_the_reference(shape, dtype, options, empty):
    options = dict(options)
    given = shared.chunk(*shape, empty, dtype, "cuda", options.pop("ties", False), options["score"])
    shared.check(given, options)


def test_a_graph_evicts_what_a_call_evicts():
    given = shared.chunk(1, 8, 1024, 256, 128, 0.4, torch.bfloat16, "cuda")
    options = {"score": "retention", "sinks": 4, "recent": 8}
    expect = shared.after(given, keep_triton.keep, options)
    held = {name: x.clone() for name, x in given.items()}
    beta = held.pop("log_beta_new"), held.pop("log_beta")
    names = ("k", "v", "position")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        keep_triton.keep(*held.values(), *beta, **options)
    for name in names:
        held[name].copy_(given[name])
    beta[1].copy_(given["log_beta"])
    graph.replay()
    assert all(torch.equal(held[name], expect[name]) for name in names)
    assert torch.equal(beta[1], expect["log_beta"])
