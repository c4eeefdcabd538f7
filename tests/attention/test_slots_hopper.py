"""The decode step from projections, compiled: it cannot be interpreted, and test_slots_hopper_gpu.py runs it."""

import pytest

import hopper

slots_hopper = pytest.importorskip("trimkv.attention.slots_hopper", exc_type=ImportError)
SIGNATURE = {
    **dict.fromkeys("qkv cos sin q_norm k_norm gate gate_bias k v out".split(), "*bf16"),
    **dict.fromkeys("log_beta part_acc part_top part_total part_worst".split(), "*fp32"),
    **dict.fromkeys("position slot now next_slot counters part_place".split(), "*i32"),
    **dict.fromkeys("qkv_m cos_m sin_m k_b k_h k_t v_b v_h v_t p_b p_h lb_b lb_h".split(), "i32"),
    **dict.fromkeys("H heads C per sinks recent offset".split(), "i32"),
    **{"scaling": "fp32", "eps": "fp32"},
}


@pytest.mark.parametrize(
    ("D", "G", "parts", "score", "norm"),
    [(128, 4, 8, "retention", True), (64, 3, 1, "position", False), (128, 16, 4, "none", True)],
)
def test_it_compiles_and_fills_no_stage_that_is_read(D, G, parts, score, norm):
    stages = slots_hopper.STAGES[D]
    constants = {
        **dict(G=G, GP=8 if G <= 8 else 16, D=D, WIDTH=512 if score == "retention" else 0, BI=512, SN=256),
        **dict(BN=slots_hopper.BN, STAGES=stages, PARTS=parts, SCORE=score, HAS_NORM=norm, EARLY=True),
        **dict(num_warps=slots_hopper.WARPS),
        **({} if score == "retention" else dict.fromkeys(("gate", "gate_bias", "log_beta"))),
        **({} if norm else dict.fromkeys(("q_norm", "k_norm"))),
        **({} if parts > 1 else dict.fromkeys(x for x in SIGNATURE if x.startswith("part_"))),
    }
    kernel = hopper.compiled(slots_hopper._decode_kernel, SIGNATURE, constants, slots_hopper.WARPS)
    assert slots_hopper.RESIDENT * (kernel.metadata.shared + 1024) <= 228 * 1024
    ptx = kernel.asm["ptx"]
    begun = ptx[: ptx.rindex("griddepcontrol.wait")]
    assert begun.count("cp.async.commit_group") == stages, "slots are on their way before it waits"
    assert "st.global" not in begun, "nothing is written before it waits"
    refill = hopper.between(ptx, "ldmatrix", "cp.async.cg")
    assert any("bar.sync" in line for line in refill), "all have read a stage before it is filled again"
