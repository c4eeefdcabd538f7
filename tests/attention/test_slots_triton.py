"""The slot kernels in the interpreter against torch, and torch against the cache's own steps; test_slots_triton_gpu.py
is on a GPU.

Triton decides when it is imported whether it interprets: the kernels' tests run in a process of their own.
"""

import pytest
import torch

import interpreter
from trimkv.attention import reference, slots

slots_triton = pytest.importorskip("trimkv.attention.slots_triton")

from attention import test_decay as shared  # noqa: E402

INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_the_kernels_in_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="runs in the main process")
poisoned_memory = shared.poisoned_memory
LIMIT = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS


def step(B, H, G, C, D, dtype=torch.float32, device="cpu", empty=0.3, idle=(), ties=False, integer=torch.int64):
    """Arguments of ``decode`` by name: a store in which ``empty`` of the slots hold no token and NaN instead.

    Row 1 holds nothing at all, rows named in ``idle`` write nothing and have NaN for a new token.
    """
    k, v = (torch.randn(B, H, C, D, device=device).to(dtype) for _ in range(2))
    position = torch.rand(B, H, 3 * C, device=device).argsort(-1)[:, :, :C].int()
    position[torch.rand(B, H, C, device=device) < empty] = -1
    if empty and B > 1:
        position[1] = -1
    log_beta = -torch.rand(B, H, C, device=device).exp() * 0.01
    if ties:
        position[:, :, ::2], log_beta = position[:, :, ::2].clamp_max(-1), log_beta.new_full((B, H, C), -0.0)
    hole = position < 0
    k[hole], v[hole], log_beta[hole] = float("nan"), float("nan"), float("nan")
    slot = torch.randint(C, (B, H), device=device, dtype=integer)
    # As in the cache: an empty slot if there is one.
    slot = torch.where(hole.any(-1), hole.int().argmax(-1), slot).to(integer)
    q, k_new, v_new = (torch.randn(B, n, D, device=device).to(dtype) for n in (H * G, H, H))
    for row in idle:
        slot[row] = -1
        q[row], k_new[row], v_new[row] = float("nan"), float("nan"), float("nan")
    return dict(
        q=q,
        k_new=k_new,
        v_new=v_new,
        k=k,
        v=v,
        position=position,
        slot=slot,
        now=torch.arange(B, dtype=torch.int32, device=device) + 3 * C,
        scaling=D**-0.5,
        log_beta_new=-torch.rand(B, H, device=device) * 0.01,
        log_beta=log_beta,
    )


def clone(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).pow(2).mean() / b.pow(2).mean().clamp_min(1e-12)).sqrt().item()


def check(given, **options):
    """One step by the operator and by the reference: output, store and the next slot."""
    options = {"lse": True, "probabilities": True, **options}
    ours, truth = ({name: clone(x) for name, x in given.items()} for _ in range(2))
    splits, joins = options.pop("splits", None), options.pop("joins", False)
    counters = torch.zeros(given["slot"].numel(), dtype=torch.int32, device=given["q"].device) if joins else None
    got = slots_triton.decode(*ours.values(), **options, splits=splits, counters=counters)
    assert not joins or not counters.any(), "the next call counts from zero"
    expect = slots_triton.decode_reference(*truth.values(), **options)
    for name in given:  # the store, empty slots and their NaN included; inputs are not touched
        torch.testing.assert_close(ours[name], truth[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert got.out.dtype == given["q"].dtype and got.next_slot.dtype == given["slot"].dtype
    assert torch.equal(got.next_slot, expect.next_slot), (got.next_slot, expect.next_slot)
    limit = LIMIT[given["q"].dtype]
    assert relative(got.out, expect.out) < limit, relative(got.out, expect.out)
    idle = (given["slot"][:, 0] < 0)[:, None].expand(got.out.shape[:2])
    assert not got.out[idle].any()
    if options["lse"]:
        assert got.lse[idle].eq(float("inf")).all()
        torch.testing.assert_close(got.lse[~idle], expect.lse[~idle], rtol=limit, atol=limit)
    if options["probabilities"]:
        torch.testing.assert_close(got.probabilities, expect.probabilities, rtol=20 * limit, atol=limit)
    return got, ours


def chunk(B, H, G, C, T, D, dtype=torch.float32, device="cpu", empty=0.3, padded=True):
    """Arguments of ``attend_chunk`` by name; row 0 is padded on the left, row 1 on the right and holds nothing."""
    given = step(B, H, G, max(C, 1), D, dtype, device, empty)
    k_new, v_new = (torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    real = torch.ones(B, T, dtype=torch.bool, device=device)
    if padded:
        real[0, : T // 3] = False
        if B > 1:
            real[1, T // 2 + 1 :] = False
    new_position = torch.where(real, 3 * C + real.cumsum(1) - 1, -1).int()
    hole = ~real[:, None, :].expand(B, H, T)
    k_new[hole], v_new[hole] = float("nan"), float("nan")
    return dict(
        q=torch.randn(B, T, H * G, D, device=device).to(dtype).transpose(1, 2),
        k_new=k_new,
        v_new=v_new,
        new_position=new_position,
        k=given["k"][:, :, :C],
        v=given["v"][:, :, :C],
        position=given["position"][:, :, :C],
        scaling=D**-0.5,
    )


def check_chunk(given, **options):
    options = {"lse": True, **options}
    out, lse = slots_triton.attend_chunk(*given.values(), **options)
    expect, expect_lse = slots_triton.attend_chunk_reference(*given.values(), **options)
    assert out.dtype == given["q"].dtype
    limit = LIMIT[out.dtype]
    assert relative(out, expect) < limit, relative(out, expect)
    torch.testing.assert_close(lse, expect_lse, rtol=limit, atol=limit)


OPTIONS = [
    dict(),
    dict(score="position", sinks=2, recent=3),
    dict(score="none", lse=False, probabilities=False),
    dict(softcap=2.0, sinks=3, offset=1),
    dict(aux=True, recent=5, lse=False),
    dict(aux=True, softcap=5.0, probabilities=False),
]


def with_aux(options, given):
    """``aux=True`` becomes a tensor."""
    options = dict(options)
    if options.pop("aux", False):
        options["s_aux_Q"] = torch.randn(given["q"].shape[1], device=given["q"].device)
    return options


# The reference, and the operator on the CPU.


@not_interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_write_attend_and_victim(options):
    """The same in the cache's own steps: positions of the updated store, slot_attention, protect, victim."""
    given = step(3, 2, 3, 13, 16, idle=(2,))
    options = with_aux(options, given)
    before = {name: clone(x) for name, x in given.items()}
    names = {"lse": True, "probabilities": True, **options}
    got = slots_triton.decode_reference(*given.values(), **names)
    k, v, position, slot, now = (given[name] for name in ("k", "v", "position", "slot", "now"))
    for b, h in [(b, h) for b in range(3) for h in range(2)]:
        untouched = [c for c in range(13) if c != slot[b, h]]
        for name in ("k", "v", "position", "log_beta"):
            old, new = before[name][b, h], given[name][b, h]
            assert torch.equal(old[untouched].nan_to_num(7.0), new[untouched].nan_to_num(7.0)), "others stay"
        if slot[b, h] >= 0:
            assert torch.equal(k[b, h, slot[b, h]], before["k_new"][b, h]) and position[b, h, slot[b, h]] == now[b]

    query_position = now[:, None].masked_fill((slot[:, :1] < 0), -1)
    q = given["q"].nan_to_num(0.0)[:, :, None]
    how = given["scaling"], options.get("softcap"), options.get("s_aux_Q")
    expect = reference.slot_attention(q, k.nan_to_num(0.0), v.nan_to_num(0.0), query_position, position, *how)
    torch.testing.assert_close(got.out, expect[:, :, 0], atol=1e-5, rtol=1e-4)
    if names["probabilities"]:
        share = reference.slot_probabilities(q, k.nan_to_num(0.0), query_position, position, *how)
        torch.testing.assert_close(got.probabilities, share[:, :, 0].unflatten(1, (2, 3)).sum(2), atol=1e-5, rtol=1e-4)
    if options.get("score") != "none":
        next_now = (now[:, None] + (slot >= 0).int())[..., None]
        score = given["log_beta"] * (next_now + options.get("offset", 0) - position)
        if options.get("score") == "position":
            score = position.float()
        recent = options.get("recent", 0)
        score = slots.protect(score, position, options.get("sinks", 0), next_now - recent if recent else None)
        assert torch.equal(got.next_slot, slots.victim(score, position)[..., 0])


@not_interpreted
def test_the_operators_are_well_behaved():
    """torch's own checks of schema, fake tensors and mutation; and one graph under torch.compile."""
    given = step(2, 2, 2, 9, 16, empty=0.0)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    rest = (None, None, "retention", 1, 2, 0, 9, True, True, True, None, None, torch.zeros(4, dtype=torch.int32))
    torch.library.opcheck(torch.ops.trimkv.decode_slots, (*given.values(), *rest), test_utils=tests)
    given = chunk(2, 2, 2, 9, 5, 16, empty=0.0, padded=False)
    torch.library.opcheck(torch.ops.trimkv.attend_chunk, (*given.values(), None, None, 9, True, True), test_utils=tests)


@not_interpreted
def test_a_store_that_is_partly_used():
    given = step(2, 2, 2, 17, 16, empty=0.0)
    given["slot"] = torch.full((2, 2), 6)
    for name in ("k", "v", "log_beta"):
        given[name][:, :, 7:] = float("nan")
    given["position"][:, :, 6:] = -1
    got, store = check(given, used=7, any_empty=False)
    assert got.next_slot.max() < 7 and not got.probabilities[:, :, 7:].any()


@not_interpreted
def test_wrong_calls_are_stopped():
    given = step(1, 2, 2, 5, 16)
    with pytest.raises(AssertionError, match="fastest"):
        slots_triton.decode(*given.values(), score="fastest")
    given["log_beta"] = given["log_beta_new"] = None
    with pytest.raises(AssertionError, match="log_beta"):
        slots_triton.decode(*given.values())
    assert "float64" in slots_triton.unsupported(given["q"].double(), given["k"], given["v"])
    assert "one dtype" in slots_triton.unsupported(given["q"].half(), given["k"], given["v"])
    assert "TRITON_INTERPRET" in slots_triton.unsupported(given["q"], given["k"], given["v"])


# The Triton kernels. bf16 is left to the GPU: triton's interpreter multiplies its bits as integers.


def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and parts at shapes that an interpreter can do."""
    for name in ("DECODE", "DECODE_FP32"):
        monkeypatch.setattr(slots_triton, name, dict.fromkeys((64, 128, 256), (16, 4, 1)))
    for name in ("CHUNK", "CHUNK_FP32"):
        monkeypatch.setattr(slots_triton, name, dict.fromkeys((64, 128, 256), (16, 16, 4, 1)))


@interpreted
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_interpreted_decode_equals_the_reference(options, splits, small_blocks):
    given = step(3, 2, 3, 45, 16, idle=(2,))
    options = with_aux(options, given)
    check(given, splits=splits, **options)
    check(given, splits=splits, joins=True, **options)


@interpreted
def test_interpreted_decode_of_other_groups_and_of_full_slots(small_blocks):
    for splits, joins in ((1, False), (3, False), (3, True)):
        given = step(3, 2, 3, 45, 16, idle=(2,))
        check(given, splits=splits, joins=joins)
        check(step(3, 1, 5, 70, 80), splits=splits, joins=joins)
        check(step(2, 2, 1, 37, 16, empty=0.0), splits=splits, joins=joins, any_empty=False)


@interpreted
@pytest.mark.parametrize(
    "shape, dtype, integer, splits",
    [
        ((2, 1, 1, 1, 16), torch.float32, torch.int64, 1),  # one slot
        ((2, 1, 8, 1, 64), torch.float32, torch.int32, 2),
        ((3, 1, 2, 33, 80), torch.float32, torch.int32, 2),
        ((2, 1, 5, 32, 96), torch.float16, torch.int64, 5),
        ((2, 1, 8, 70, 128), torch.float16, torch.int64, 2),
        ((2, 1, 1, 20, 256), torch.float32, torch.int64, 1),
        ((1, 1, 4, 300, 16), torch.float32, torch.int64, 18),  # more parts than are joined at a time
    ],
)
def test_interpreted_decode_of_every_shape(shape, dtype, integer, splits, small_blocks):
    check(step(*shape, dtype=dtype, integer=integer), splits=splits, joins=True)
    check(step(*shape, dtype=dtype, integer=integer, empty=0.0), splits=splits, any_empty=False)


@interpreted
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_interpreted_search_at_the_ends(splits, small_blocks):
    """Ties; no slot that may go; the new token is the victim; a row without a token; gates that forget at once."""
    check(step(2, 2, 1, 37, 16, empty=0.0, ties=True), splits=splits)
    given = step(3, 2, 1, 37, 16, empty=0.0, idle=(0,))
    got, _ = check(given, splits=splits, sinks=1000)
    stored = given["position"].scatter(2, given["slot"].clamp_min(0)[..., None], 10**6)
    assert torch.equal(got.next_slot[1:], stored.argmin(-1)[1:]), "all protected: the oldest goes"
    check(given, splits=splits, recent=1000)
    given["log_beta_new"].fill_(-1e9)
    got, _ = check(given, splits=splits)
    assert torch.equal(got.next_slot[1:], given["slot"][1:]), "the new token is worth least"
    check(step(3, 1, 1, 37, 16, empty=1.0, idle=(2,)), splits=splits)
    given = step(2, 2, 1, 37, 16)
    given["log_beta"][:, 0], given["log_beta"][:, 1, ::2] = -1e38, float("-inf")
    check(given, splits=splits)


@interpreted
def test_interpreted_ages_are_those_of_the_next_token(small_blocks):
    """A row that writes looks one past now; one that does not looks at now, where its token is still to come."""
    given = step(2, 1, 1, 3, 16, empty=0.0, idle=(1,))
    given["position"][:], given["log_beta"][:] = torch.tensor([97, 92, 99]), torch.tensor([-1.0, -0.4, -0.1])
    given["slot"][0], given["now"][:] = 2, 100
    got, _ = check(given)
    assert got.next_slot.tolist() == [[0], [1]], "-4.0 < -3.6 at 101, -3.0 > -3.2 at 100"


@interpreted
def test_interpreted_store_may_be_a_view(small_blocks):
    """Of more slots than are used, in which nothing has been written yet; queries as a projection leaves them."""
    given = step(3, 2, 2, 45, 16, empty=0.0)
    given["slot"] = torch.full((3, 2), 20)
    for name in ("k", "v", "log_beta"):
        given[name][:, :, 20:] = float("nan")
    given["position"][:, :, 20:] = -1
    given["q"] = torch.randn(3, 1, 4, 16).transpose(1, 2)[:, :, 0]
    for splits in (1, 2):
        check(given, used=21, any_empty=False, splits=splits)
        check({name: x[:, :, :21] if name in slots_triton.STORE else x for name, x in given.items()}, splits=splits)


@interpreted
def test_interpreted_steps_in_a_row(small_blocks):
    """Each step takes the slot that the one before it found; rows are idle now and then."""
    given = step(2, 2, 2, 19, 16, empty=0.2)
    for n in range(20):
        got, store = check(given, splits=1 + n % 3, sinks=2, recent=2, lse=False, probabilities=False)
        written = given["slot"][:, 0] >= 0
        given = {**given, **{name: store[name] for name in slots_triton.STORE}}
        for name in ("q", "k_new", "v_new"):
            given[name] = torch.randn_like(given[name])
        given["log_beta_new"] = -torch.rand(2, 2) * 0.01
        given["now"] = given["now"] + written.int()
        given["slot"] = got.next_slot.masked_fill(torch.tensor([n % 4 == 3, n % 7 == 5])[:, None], -1)


@interpreted
@pytest.mark.parametrize(
    "shape, dtype, options",
    [
        ((2, 2, 3, 21, 23, 16), torch.float32, dict()),
        ((2, 1, 1, 1, 1, 64), torch.float32, dict(aux=True)),
        ((2, 1, 4, 33, 7, 80), torch.float32, dict(softcap=3.0, aux=True)),
        ((2, 1, 8, 16, 5, 96), torch.float16, dict(softcap=3.0)),
        ((1, 1, 2, 0, 37, 128), torch.float32, dict(lse=True)),
        ((2, 1, 2, 17, 18, 256), torch.float16, dict()),
    ],
)
def test_interpreted_chunk_equals_the_reference(shape, dtype, options, small_blocks):
    given = chunk(*shape, dtype=dtype)
    check_chunk(given, **with_aux(options, given))
    given = chunk(*shape, dtype=dtype, empty=0.0, padded=False)
    check_chunk(given, any_empty=False, **with_aux(options, given))
    check_chunk(given, used=shape[3] // 2, any_empty=False)


@interpreted
def test_interpreted_kernels_refuse_what_they_do_not_know():
    given = step(1, 1, 2, 5, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64.*slots.py"):
        slots_triton.decode(*given.values())
