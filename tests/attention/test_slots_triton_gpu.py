"""The slot kernels on a GPU: real shapes and dtypes against torch, many steps in a row, torch.compile, CUDA graphs."""

import pytest
import torch

from attention import test_slots_triton as shared

slots_triton = shared.slots_triton
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("true_fp32")]
poisoned_memory = shared.poisoned_memory


@pytest.mark.parametrize("any_empty", [False, True])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_of_every_head_dim_and_dtype(D, dtype, any_empty):
    given = shared.step(3, 2, 4, 777, D, dtype, "cuda", 0.3 * any_empty, idle=(2,))
    for splits in (None, 1, 5):
        shared.check(given, splits=splits, any_empty=any_empty)


@pytest.mark.parametrize("options", shared.OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 4, 1024, 128), (16, 8, 4, 1024, 128), (64, 3, 3, 256, 64), (4, 8, 1, 1, 64)])
def test_decode_of_real_shapes(shape, options):
    given = shared.step(*shape, torch.bfloat16, "cuda", idle=(0,) if shape[0] > 4 else ())
    shared.check(given, **shared.with_aux(options, given))


@pytest.mark.parametrize("group", range(1, 9))
def test_decode_of_every_group(group):
    for splits in (1, 3):
        shared.check(shared.step(3, 2, group, 300, 128, torch.bfloat16, "cuda"), splits=splits)


def test_search_at_the_ends():
    for splits in (1, 4):
        shared.check(shared.step(2, 2, 1, 999, 64, device="cuda", empty=0.0, ties=True), splits=splits)
        given = shared.step(3, 2, 1, 5000, 64, device="cuda", empty=0.0, idle=(0,))
        shared.check(given, splits=splits, sinks=10**6)
        shared.check(given, splits=splits, recent=10**6)
        given["log_beta_new"].fill_(-1e9)
        shared.check(given, splits=splits)
        shared.check(shared.step(3, 1, 1, 333, 64, device="cuda", empty=1.0, idle=(2,)), splits=splits)


@pytest.mark.parametrize("splits", [1, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_hundred_steps(dtype, splits):
    """Rows that start empty, partly filled and full fill up and then evict: victims are the reference's, always."""
    given = shared.step(3, 4, 4, 150, 128, dtype, "cuda", empty=0.5)
    truth = {name: shared.clone(x) for name, x in given.items()}
    for _ in range(200):
        new = {name: torch.randn_like(given[name]) for name in ("q", "k_new", "v_new")}
        new["log_beta_new"] = -torch.rand(3, 4, device="cuda") * 0.01
        given, truth = {**given, **new}, {**truth, **new}
        got = slots_triton.decode(*given.values(), sinks=2, recent=3, splits=splits)
        expect = slots_triton.decode_reference(*truth.values(), sinks=2, recent=3)
        assert torch.equal(got.next_slot, expect.next_slot)
        assert shared.relative(got.out, expect.out) < shared.LIMIT[dtype]
        given["slot"] = truth["slot"] = got.next_slot
        given["now"] = truth["now"] = given["now"] + 1
    for name in slots_triton.STORE:
        torch.testing.assert_close(given[name], truth[name], rtol=0, atol=0)
    assert (given["position"] >= 0).all()


def test_the_same_twice():
    given = shared.step(4, 8, 4, 2048, 128, torch.bfloat16, "cuda")
    outs = [slots_triton.decode(*{n: shared.clone(x) for n, x in given.items()}.values(), lse=True) for _ in range(20)]
    for one in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, outs[0], strict=True))


@pytest.mark.parametrize("splits", [2, 7, 16])
def test_parts_joined_by_the_last_to_arrive(splits):
    """In the order of the slots, whoever that is: the same bits every time, and counters that serve the next step."""
    for dtype in (torch.bfloat16, torch.float32):
        shared.check(shared.step(3, 8, 4, 1024, 128, dtype, "cuda", idle=(2,)), splits=splits, joins=True)
    given = shared.step(8, 8, 4, 1024, 128, torch.bfloat16, "cuda", empty=0.0)
    counters = torch.zeros(64, dtype=torch.int32, device="cuda")
    first = None
    for _ in range(200):
        one = {name: shared.clone(x) for name, x in given.items()}
        out = slots_triton.decode(*one.values(), splits=splits, counters=counters).out
        first = out if first is None else first
        assert torch.equal(out, first)
    assert not counters.any()


def layer(given, calls):
    """``calls`` steps, each with the slot that the one before found; what a model's compiled decode step looks like."""
    out, slot, now = given["q"], given["slot"], given["now"]
    for _ in range(calls):
        values = {**given, "q": out * 2.0, "slot": slot, "now": now}
        got = slots_triton.decode(*values.values(), sinks=1)
        out, slot, now = got.out + given["q"], got.next_slot, now + 1
    return out, slot


def test_torch_compile_sees_one_operator():
    given = shared.step(2, 4, 2, 200, 64, torch.float32, "cuda")
    alone = {name: shared.clone(x) for name, x in given.items()}
    expect = layer(alone, 3)
    got = torch.compile(layer, fullgraph=True)(given, 3)
    torch.testing.assert_close(got[0], expect[0])
    assert torch.equal(got[1], expect[1])
    for name in slots_triton.STORE:
        torch.testing.assert_close(given[name], alone[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_cuda_graph_replays_steps(splits):
    """Captured once, replayed with new inputs in the same places; nothing in a step waits for the host."""
    given = shared.step(2, 4, 4, 200, 128, torch.float32, "cuda", empty=0.2)
    truth = {name: shared.clone(x) for name, x in given.items()}
    warm = {name: shared.clone(x) for name, x in given.items()}
    slots_triton.decode(*warm.values(), recent=2, splits=splits, lse=True, probabilities=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = slots_triton.decode(*given.values(), recent=2, splits=splits, lse=True, probabilities=True)
        given["slot"].copy_(got.next_slot)
        given["now"].add_(1)
    for _ in range(50):
        new = {name: torch.randn_like(given[name]) for name in ("q", "k_new", "v_new")}
        for name, x in new.items():
            given[name].copy_(x)
            truth[name].copy_(x)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        expect = slots_triton.decode_reference(*truth.values(), recent=2, lse=True, probabilities=True)
        truth["slot"], truth["now"] = expect.next_slot, truth["now"] + 1
        assert torch.equal(got.next_slot, expect.next_slot)
        torch.testing.assert_close(got.out, expect.out, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(got.lse, expect.lse, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.probabilities, expect.probabilities, atol=3e-5, rtol=1e-4)


def test_a_step_never_waits_for_the_host():
    given = shared.step(2, 4, 4, 200, 128, torch.bfloat16, "cuda")
    slots_triton.decode(*given.values())
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        slots_triton.decode(*given.values(), lse=True, probabilities=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("any_empty", [False, True])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunk_of_every_head_dim_and_dtype(D, dtype, any_empty):
    given = shared.chunk(2, 2, 4, 301, 213, D, dtype, "cuda", 0.3 * any_empty, padded=any_empty)
    shared.check_chunk(given, any_empty=any_empty)


@pytest.mark.parametrize("options", [dict(), dict(aux=True, softcap=5.0)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 8, 4, 4096, 1024, 128), (4, 3, 3, 256, 512, 64), (2, 2, 8, 0, 700, 128)], ids=str
)
def test_chunk_of_real_shapes(shape, options):
    given = shared.chunk(*shape, torch.bfloat16, "cuda")
    shared.check_chunk(given, **shared.with_aux(options, given))
    given = shared.chunk(*shape, torch.bfloat16, "cuda", empty=0.0, padded=False)
    shared.check_chunk(given, any_empty=False, **shared.with_aux(options, given))
