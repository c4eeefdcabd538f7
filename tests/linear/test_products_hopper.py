"""The products for Hopper, compiled: they cannot be interpreted, and test_products_gpu.py runs them."""

import pytest

import hopper

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
    kernel = hopper.compiled(products_hopper._linear_kernel, SIGNATURE, constants, products_hopper.WARPS)
    assert 2 * (kernel.metadata.shared + RESERVED) <= SM_BYTES
    ptx = kernel.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == 1 and "wgmma.mma_async" in ptx
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert before.count("cp.async.commit_group") == stages - 1, "weights are on their way before it waits"
    assert "st.global" not in before, "nothing is written before it waits"
    loop = hopper.between(ptx, "wgmma.wait_group", "wgmma.mma_async")
    assert any("bar.sync" in line for line in loop) and any("fence.proxy.async" in line for line in loop)
