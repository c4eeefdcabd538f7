"""The decode step from projections on a GPU of Hopper's kind, against the two operators that it is made of."""

import pytest
import torch

from linear import test_products as shared
from trimkv import device
from trimkv.attention import slots_triton
from trimkv.attention.reference import relative_error
from trimkv.linear import products

slots_hopper = pytest.importorskip("trimkv.attention.slots_hopper", exc_type=ImportError)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not device.hopper(torch.empty(1, device="cuda")),
        reason="needs a GPU of compute capability 9",
    ),
]
# Rows, query and KV heads, head dim, width of the gate, slots.
SHAPES = [(1, 32, 8, 128, 512, 1024), (3, 9, 3, 64, 160, 100), (5, 64, 8, 128, 100, 257), (2, 32, 2, 64, 512, 3000)]


class Case:
    """A store with holes whose contents are no numbers, rows that are idle, and one step after the other over it."""

    def __init__(self, shape, dtype, score, norm=True, sinks=0, recent=0, offset=0):
        self.B, self.Q, self.H, self.D, self.width, self.C = shape
        self.dtype, self.score, self.norm = dtype, score, norm
        self.protected = dict(sinks=sinks, recent=recent, offset=offset)
        B, H, C, D = self.B, self.H, self.C, self.D
        torch.manual_seed(0)
        self.k, self.v = (torch.randn(B, H, C, D, device="cuda").to(dtype) for _ in range(2))
        order = torch.rand(B, H, 3 * C, device="cuda").argsort(-1)[..., :C]
        self.position = order.int().contiguous()
        empty = torch.rand(B, H, C, device="cuda") < torch.linspace(0, 1, B, device="cuda")[:, None, None]
        self.position[empty] = -1
        self.k[empty], self.v[empty] = float("nan"), float("nan")
        self.log_beta = -(torch.rand(B, H, C, device="cuda") ** 4)
        self.slot = torch.randint(C, (B, H), device="cuda", dtype=torch.int32)
        self.seen = torch.full((B,), 3 * C, device="cuda", dtype=torch.int32)
        self.counters = torch.zeros(B * H, device="cuda", dtype=torch.int32)

    def store(self):
        return self.k, self.v, self.position, self.log_beta if self.score == "retention" else None

    def projections(self, seed):
        torch.manual_seed(seed)
        width = self.width if self.score == "retention" else 0
        given = shared.projections(self.B, self.Q, self.H, self.D, width, self.dtype, "cuda", self.norm)
        if given["gate"]:
            given["gate"] = given["gate"][0] * 0.1, given["gate"][1] - 14
        return given

    def step(self, seed, parts=None):
        """The kernel's step; returns (out, next slots) of it and of the reference, and both stores."""
        given = self.projections(seed)
        slot = self.slot.clone()
        if seed % 3 == 1:
            slot[seed % self.B] = -1  # an idle row
        k, v, position, log_beta = (None if x is None else x.clone() for x in self.store())
        Q, H, D = self.Q, self.H, self.D
        weight, bias = given["gate"] or (None, None)
        qk, beta = products.heads_reference(*list(given.values())[:-1], weight, bias)
        value = given["qkv_BN"][:, (Q + H) * D : (Q + 2 * H) * D].unflatten(1, (H, D))
        expect = slots_triton.decode_reference(
            *(qk[:, :Q], qk[:, Q:], value, k, v, position, slot, self.seen, D**-0.5),
            log_beta_new=beta if log_beta is not None else None,
            log_beta=log_beta,
            score=self.score,
            **self.protected,
        )
        next_slot = torch.full_like(slot, -7)
        out = slots_hopper.decode(
            *(given["qkv_BN"], Q, given["cos_BD"], given["sin_BD"], given["q_norm_D"], given["k_norm_D"], given["eps"]),
            *(given["gate"], *self.store(), slot, self.seen, D**-0.5, self.score, *self.protected.values()),
            *(next_slot, self.counters, parts),
        )
        written = slot >= 0
        if self.score != "none":
            self.slot = next_slot
        self.seen = self.seen + written[:, 0].int()
        return (out, next_slot), (expect.out.flatten(1), expect.next_slot), (k, v, position, log_beta), written[:, 0]

    def check(self, seed, parts=None):
        got, expect, store, written = self.step(seed, parts)
        assert got[0].isfinite().all() and relative_error(got[0], expect[0]) < 1e-2
        assert not got[0][~written].any(), "idle rows give zeros"
        if self.score != "none":
            assert torch.equal(got[1], expect[1])
        for mine, other in zip(self.store(), store, strict=True):
            if other is not None:
                torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2, equal_nan=True)
        assert torch.equal(self.position, store[2]) and not self.counters.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["retention", "position", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_two_operators(shape, score, dtype):
    case = Case(shape, dtype, score, norm=shape[0] != 3, sinks=2 * (shape[0] == 5), recent=3 * (shape[0] == 5))
    for seed in range(8):
        case.check(seed)


@pytest.mark.parametrize("parts", [1, 2, 5, 16])
def test_any_number_of_parts(parts):
    case = Case(SHAPES[0], torch.bfloat16, "retention", offset=1)
    for seed in range(4):
        case.check(seed, parts)


def test_a_thousand_steps_are_the_same_bits():
    """Whoever arrives last joins the parts in one order."""
    case = Case((4, 32, 8, 128, 512, 1024), torch.bfloat16, "none")
    first = case.step(0)[0][0]
    for _ in range(1000):
        again = slots_hopper.decode(
            *(lambda g: (g["qkv_BN"], 32, g["cos_BD"], g["sin_BD"], g["q_norm_D"], g["k_norm_D"], g["eps"]))(
                case.projections(0)
            ),
            *(None, *case.store(), case.slot, case.seen - 1, 128**-0.5, "none", 0, 0, 0, case.slot, case.counters),
        )
    assert torch.equal(first, again)
