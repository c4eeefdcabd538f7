"""The products for Hopper, compiled: they cannot be interpreted, and test_products_gpu.py runs them."""

import re

import pytest
import torch

import hopper
from linear import test_products as shared
from trimkv.linear import products

products_hopper = pytest.importorskip("trimkv.linear.products_hopper", exc_type=ImportError)
SM_BYTES, RESERVED = 228 * 1024, 1024  # of a Hopper multiprocessor; of each of its programs
SIGNATURE = {
    **dict.fromkeys("x w0 w1 w2 w3 b0 b1 b2 b3 residual norm y y_norm".split(), "*bf16"),
    **dict.fromkeys("squares y_squares parts".split(), "*fp32"),
    **dict.fromkeys("rows K x_m w_n N0 N1 N2 N3 N_all blocks num_squares".split(), "i32"),
    **{"counters": "*i32", "eps": "fp32"},
}
NOTHING_AFTER = {"residual": None, "norm": None, "HAS_RESIDUAL": False, "HAS_NORM": False}


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("kind", ["output", "gated", "projections", "ragged"])
def test_two_programs_fit_on_a_multiprocessor(kind, rows):
    gated, splits = kind == "gated", 3 if kind == "output" else 1
    BK, stages = (products_hopper.GATED_RING if gated else products_hopper.PLAIN_RING)[rows]
    constants = {
        **dict(SPLITS=splits, SQUARES=64, MATRICES=4 if kind == "projections" else 1, BIASES=8 * (kind != "output")),
        **dict(GATED=gated, SILU_LAST=kind == "projections", SCALED=True, HAS_RESIDUAL=True, HAS_NORM=True),
        **dict(EVEN_N=kind != "ragged", EVEN_K=kind != "ragged", BM=rows, BN=products_hopper.BN, BK=BK),
        **dict(EARLY=True, STAGES=stages, num_warps=products_hopper.WARPS),
        **({} if splits > 1 else {"parts": None}),
        **({} if kind == "output" else NOTHING_AFTER),
    }
    kernel = hopper.compiled(products_hopper._linear_kernel, SIGNATURE, constants, num_warps=products_hopper.WARPS)
    assert 2 * (kernel.metadata.shared + RESERVED) <= SM_BYTES
    ptx = kernel.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == 1 and "wgmma.mma_async" in ptx
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert before.count("cp.async.commit_group") == stages - 1, "weights are on their way before it waits"
    assert "st.global" not in before, "nothing is written before it waits"
    loop = hopper.between(ptx, "wgmma.wait_group", "wgmma.mma_async")
    assert any("bar.sync" in line for line in loop) and any("fence.proxy.async" in line for line in loop)
    after = ptx[ptx.rindex("wgmma.wait_group") :].partition("st.shared")
    settled = re.search(r"cp\.async\.wait_group\s+0x?0?;", after[0])
    assert settled, "zeros past the last block may land on sums"
    assert not after[1] or "bar.sync" in after[0][settled.end() :], "other threads' copies are not awaited"


@pytest.mark.parametrize(
    ("K", "widths", "options", "grid"),
    [
        (2560, (4096, 1024, 1024, 512), {"activation": "silu_last", "normed": True, "biases": (3,)}, (104, 1)),
        (4096, (2560,), {"residual": True, "norm": True}, (40, 3)),
        (2560, (9728, 9728), {"activation": "gated", "normed": True}, (152, 1)),
        (64, (70,), {"biases": (0,)}, (2, 1)),
    ],
)
def test_a_launch_has_all_arguments_and_fills_the_device_once(monkeypatch, K, widths, options, grid):
    launch = hopper.without_a_gpu(monkeypatch, products_hopper, "_linear_kernel")
    given = shared.product(5, K, widths, torch.bfloat16, **options)
    monkeypatch.setattr(products_hopper.device, "hopper", lambda x: True)
    x = given["x"].x if isinstance(given["x"], products.Normed) else given["x"]
    assert products_hopper.serves(x, given["weights"], None)
    assert not products_hopper.serves(x.float(), given["weights"], None)
    assert not products_hopper.serves(x.repeat(4, 1), given["weights"], None), "too many rows"
    with monkeypatch.context() as context:
        context.setattr(products.device, "runs_kernels", lambda x: True)
        context.setattr(products, "_kernels", lambda: products_hopper)
        out = products.linear(**given)
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape == (5, widths[0] if options.get("activation") == "gated" else sum(widths))
    [(where, values)] = launch.calls
    assert where == grid and values["SPLITS"] == grid[1] and values["blocks"] == -(-K // values["BK"])
    assert values["N0"] == widths[0] and (values["parts"] is None) == (grid[1] == 1)
