"""The decode step from projections, compiled: it cannot be interpreted, and test_slots_hopper_gpu.py runs it."""

import pytest
import torch

import hopper
from linear import test_products as shared

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
    kernel = hopper.compiled(slots_hopper._decode_kernel, SIGNATURE, constants, num_warps=slots_hopper.WARPS)
    assert slots_hopper.RESIDENT * (kernel.metadata.shared + 1024) <= 228 * 1024
    ptx = kernel.asm["ptx"]
    begun = ptx[: ptx.rindex("griddepcontrol.wait")]
    assert begun.count("cp.async.commit_group") == stages, "slots are on their way before it waits"
    assert "st.global" not in begun, "nothing is written before it waits"
    refill = hopper.between(ptx, "ldmatrix", "cp.async.cg")
    assert any("bar.sync" in line for line in refill), "all have read a stage before it is filled again"


@pytest.mark.parametrize(
    ("B", "C", "score", "parts"), [(4, 1024, "retention", 8), (16, 1024, "position", 2), (1, 40, "none", 1)]
)
def test_a_launch_has_all_arguments(monkeypatch, B, C, score, parts):
    launch = hopper.without_a_gpu(monkeypatch, slots_hopper, "_decode_kernel")
    Q, H, D = 32, 8, 128
    given = shared.projections(B, Q, H, D, 512 if score == "retention" else 0, torch.bfloat16)
    k, v = torch.zeros(2, B, H, C, D, dtype=torch.bfloat16)
    position, slot = torch.zeros(B, H, C, dtype=torch.int32), torch.zeros(B, H, dtype=torch.int32)
    monkeypatch.setattr(slots_hopper.device, "hopper", lambda x: True)
    assert slots_hopper.serves(Q, k) and not slots_hopper.serves(Q, k.float())
    out = slots_hopper.decode(
        *(given["qkv_BN"], Q, given["cos_BD"], given["sin_BD"], given["q_norm_D"], given["k_norm_D"], given["eps"]),
        *(given["gate"], k, v, position, torch.zeros(B, H, C) if given["gate"] else None),
        *(slot, torch.zeros(B, dtype=torch.int32), D**-0.5, score, 0, 0, 0, slot.clone(), slot.flatten()),
    )
    assert out.shape == (B, Q * D)
    [(grid, values)] = launch.calls
    assert values["PARTS"] == parts and grid == (max(132, B * H * parts),)
    assert values["per"] * parts >= C and values["per"] % slots_hopper.BN == 0
    assert (values["part_acc"] is None) == (parts == 1)
