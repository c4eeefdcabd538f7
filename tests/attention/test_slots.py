"""Slot attention and the choice of victims against the plain reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv.attention import reference, slots


def relative(a, b):
    return ((a - b).pow(2).mean() / b.pow(2).mean().clamp_min(1e-12)).sqrt().item()


def random_case(B, H, G, T, S, D, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H * G, T, D, generator=g).to(dtype)
    k, v = (torch.randn(B, H, S, D, generator=g).to(dtype) for _ in range(2))
    order = torch.rand(B, H, S, generator=g).argsort(-1).int()
    key_position = order.masked_fill(torch.rand(B, H, S, generator=g) < 0.3, -1)
    query_position = torch.randint(-1, 2 * S, (B, T), generator=g).int()
    return q, k, v, query_position, key_position


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 3, 4, 5, 24)]),
    D=st.sampled_from([8, 64, 80]),
    softcap=st.sampled_from([None, 5.0]),
    aux=st.booleans(),
    seed=st.integers(0, 999),
)
def test_attention_follows_the_position_rule(shape, D, softcap, aux, seed):
    B, H, G, T, S = shape
    q, k, v, query_position, key_position = random_case(B, H, G, T, S, D, seed)
    s_aux = torch.randn(H * G) if aux else None
    mask = slots.position_rule(query_position, key_position)
    got = slots.attend(q, k, v, mask, D**-0.5, softcap, s_aux)
    expect = reference.slot_attention(q, k, v, query_position, key_position, D**-0.5, softcap, s_aux)
    assert torch.isfinite(got).all(), "a padding query must not become NaN"
    visible = reference.position_rule(query_position, key_position).any(-1).repeat_interleave(G, 1)
    torch.testing.assert_close(got[visible], expect[visible], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v, query_position, key_position = random_case(2, 2, 3, 1, 64, 64, 0, dtype)
    query_position = torch.full_like(query_position, 100)
    got = slots.attend(q, k, v, slots.position_rule(query_position, key_position), 0.125)
    assert got.dtype == dtype
    assert relative(got.float(), reference.slot_attention(q, k, v, query_position, key_position, 0.125)) < 2e-2


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_causal_chunk_needs_no_mask(group, aux):
    q, k, v, _, _ = random_case(2, 2, group, 9, 9, 16, 1)
    position = torch.arange(9).expand(2, 9)
    s_aux = torch.randn(2 * group) if aux else None
    got = slots.attend_causal(q, k, v, 0.25, None, s_aux)
    expect = reference.slot_attention(q, k, v, position, position[:, None].expand(2, 2, 9), 0.25, None, s_aux)
    torch.testing.assert_close(got, expect, atol=1e-5, rtol=1e-4)


scores = st.one_of(
    st.sampled_from([0.0, -0.0, -1.5, 2.0, float("inf"), float("-inf")]), st.floats(-(2.0**99), 2.0**99, width=32)
)


@settings(max_examples=200, deadline=None)
@given(score=st.lists(scores, min_size=1, max_size=24), data=st.data())
def test_victim_and_best_break_ties_towards_the_newer_token(score, data):
    n = len(score)
    position = data.draw(st.permutations(range(n)))
    position = [p if data.draw(st.integers(0, 4)) else -1 for p in position]
    s, p = torch.tensor(score), torch.tensor(position, dtype=torch.int32)
    s = slots.protect(s[None, None], p[None, None])
    chosen = slots.victim(s, p[None, None]).item()
    expected = reference.victim(score, position)
    assert position[chosen] == position[expected]
    num = data.draw(st.integers(1, n))
    kept = p[slots.best(s, p[None, None], num)[0, 0]].tolist()
    assert sorted(x for x in kept if x >= 0) == reference.best(score, position, num)
    valid = [x >= 0 for x in kept]
    assert valid == sorted(valid, reverse=True), "empty slots come last"


def test_protection_is_above_any_score_and_empty_slots_below():
    score = torch.tensor([[[1e30, -1e30, 5.0, 1.0, 3.0]]])
    position = torch.tensor([[[7, 0, -1, 9, 4]]], dtype=torch.int32)
    now = torch.tensor([[[10]]])
    protected = slots.protect(score, position, sinks=1, recent_from=now - 1)
    assert protected.tolist() == [[[pytest.approx(1e30), float("inf"), float("-inf"), float("inf"), 3.0]]]


def test_a_million_positions_still_rank_exactly():
    position = torch.tensor([[[2**24, 2**24 + 1, 2**30]]], dtype=torch.int32)
    assert slots.victim(position.float(), position).item() == 0  # equal as fp32: the older goes
