"""What the compiler makes of the products for a Hopper GPU, seen without one."""

import pytest

import hopper
import interpreter

pytest.importorskip("triton")

from trimkv import device, overlap  # noqa: E402
from trimkv.linear import products_triton  # noqa: E402

pytestmark = pytest.mark.skipif(interpreter.INTERPRETED, reason="runs in the main process")
NUMBERS = "rows K x_m w0_n w1_n w2_n w3_n N0 N1 N2 N3 N_all per num_squares".split()


def compiled(BM: int, gated: bool, split: bool, matrices: int, early: bool):
    table = products_triton.GATED_BLOCKS if gated else products_triton.PLAIN_BLOCKS
    BN, BK, num_warps, num_stages = table[BM]
    flags = {
        "GATED": gated,
        "SPLIT": split,
        "MATRICES": matrices,
        "SCALED": True,
        "EVEN_N": True,
        "EVEN_K": True,
        "EARLY": early,
    }
    sizes = {"SQUARES": 64, "BIASES": 0, "BM": BM, "BN": BN, "BK": BK}
    off = {"SILU_LAST": False, "HAS_RESIDUAL": False, "HAS_NORM": False, "residual": None, "norm": None}
    constants = {**flags, **sizes, **off, **({} if split else {"parts": None, "counters": None})}
    kernel = products_triton._linear_kernel
    wide = {"squares": "*fp32", "parts": "*fp32", "y_squares": "*fp32", "counters": "*i32", "eps": "fp32"}
    signature = {name: "i32" if name in NUMBERS else wide.get(name, "*bf16") for name in kernel.arg_names}
    options = {"num_warps": num_warps, "num_stages": num_stages, **overlap.launch(early)}
    return hopper.compiled(kernel, signature, constants, **options)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("BM", [16, 64])
@pytest.mark.parametrize("gated, split, matrices", [(False, True, 1), (False, True, 4), (True, False, 1)])
def test_weights_are_fetched_ahead_16_bytes_at_a_time(BM, gated, split, matrices, early):
    """A loop that starts at a number of unknown divisors reads 2 bytes at a time: ten times slower, with right results.
    Shared memory is what several programs of a multiprocessor must find room in."""
    made = compiled(BM, gated, split, matrices, early)
    text = made.asm["ptx"]
    assert "cp.async.cg.shared.global" in text and "wgmma" in text
    assert "cp.async.ca.shared.global" not in text, "narrow copies"
    assert text.count("griddepcontrol.wait") == text.count("griddepcontrol.launch_dependents") == int(early)
    assert made.metadata.shared <= device.HOPPER_BYTES // products_triton.PROGRAMS
