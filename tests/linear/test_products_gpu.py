"""Products of few rows on a GPU: every dtype, the shapes of real models, the same bits every time."""

import pytest
import torch

from linear import test_products as shared
from trimkv.linear import products

products_triton = pytest.importorskip("trimkv.linear.products_triton")
poisoned_memory = shared.poisoned_memory
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64, 130])
def test_products(rows, dtype):
    for K, widths, options in (
        (2560, (4096, 1024, 1024, 512), {"activation": "silu_last", "normed": True, "biases": (3,)}),
        (1024, (640,), {"residual": True, "norm": True}),
        (576, (1536, 1536), {"activation": "gated", "normed": True}),
        (1535, (577, 63), {"biases": (0,)}),
        (9728, (2560,), {"residual": True, "norm": True}),
    ):
        shared.check(shared.product(rows, K, widths, dtype, "cuda", **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32, 8, 128, 512), (8, 9, 3, 64, 512), (64, 6, 2, 80, 100), (3, 4, 4, 96, 0)])
def test_heads(shape, dtype):
    for norm in (True, False):
        shared.check_heads(shared.projections(*shape, dtype, "cuda", norm))


def test_retention_is_exact_at_both_ends():
    z = torch.tensor([-90.0, -3.0, 0.0, 1e-3, 2.0, 9.0, 18.0, 25.0, 80.0], device="cuda")
    given = shared.projections(1, 1, len(z), 4, 3, device="cuda")
    given["gate"] = torch.zeros(len(z), 3, device="cuda"), z
    expect = -torch.nn.functional.softplus(-z.double(), threshold=1e3)
    torch.testing.assert_close(products.heads(**given)[2][0].double(), expect, rtol=1e-5, atol=1e-38)


def test_a_thousand_split_products_are_the_same_bits():
    """Whoever arrives last at a tile adds the parts, always in one order; counters serve the next product."""
    counters = torch.zeros(4096, dtype=torch.int32, device="cuda")
    given = shared.product(8, 9728, (2560,), torch.bfloat16, "cuda", residual=True, norm=True)
    assert products_triton.plan(given["x"], given["weights"], "plain").splits > 1
    first = products.linear(**given, counters=counters)[0].clone()
    for _ in range(1000):
        again = products.linear(**given, counters=counters)[0]
    assert torch.equal(first, again) and not counters.any()
