"""The beginning of a fused decode step: what the decoder's own code embeds and rotates, and slots, in one launch."""

import pytest
import torch

import interpreter
import tiny
from trimkv.cache.beginning import Beginning, begin_reference, recognise_beginning

pytest.importorskip("triton")
DEVICES = [
    pytest.param("cpu", id="interpreted", marks=pytest.mark.skipif(not interpreter.INTERPRETED, reason="see below")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def given(B, E, L, H, half, dtype, device):
    """Arguments of an operator that works on the first B of B + 2 rows."""
    torch.manual_seed(0)
    whole = torch.randint(100, (L, B + 2), dtype=torch.int32)
    return [
        one.to(device)
        for one in (
            torch.randint(50, (B, 1)),
            torch.randint(1_000_000, (B, 1)),
            torch.rand(B, 1) < 0.7,
            torch.randn(50, E).to(dtype),
            torch.randn(E).to(dtype),
            10_000.0 ** -(torch.arange(half) / half),
        )
    ] + [whole.to(device), torch.randint(64, (L, B + 2, H), dtype=torch.int32).to(device)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 2560, 36, 8, 64), (3, 576, 30, 3, 32), (1, 20, 1, 1, 5)])
def test_the_launch_is_the_reference(device, dtype, shape):
    token, position, real, embedding, weight, frequencies, seen, next_slot = given(*shape, dtype, device)
    B = shape[0]
    counts = [seen.clone(), seen.clone()]
    found = Beginning(embedding, frequencies, 1.25)
    got = found.step(token[:, 0], position[:, 0], real[:, 0], (weight, 1e-6), counts[0][:, :B], next_slot[:, :B])
    expect = begin_reference(
        *(token[:, 0], position[:, 0].cpu().to(device), real[:, 0], embedding, weight, frequencies, 1.25),
        *(counts[1][:, :B], next_slot[:, :B]),
    )
    x, normed, rotation, places = got
    got = x, normed.x, normed.squares, *rotation, *places
    for one, other in zip(got, expect, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(got[0], expect[0]) and torch.equal(got[-2], expect[-2]) and torch.equal(got[-1], expect[-1])
    assert torch.equal(counts[0], counts[1]), "other rows are left alone"
    assert torch.equal(counts[0][:, :B] - seen[:, :B], real[:, 0].int().expand(shape[2], B))


@pytest.mark.parametrize("device", DEVICES)
def test_positions_may_be_the_counts_that_change(device):
    token, _, real, embedding, weight, frequencies, seen, next_slot = given(3, 64, 4, 2, 8, torch.float32, device)
    seen = seen[:, :3]
    before = seen.clone()
    rotation, (_, now) = Beginning(embedding, frequencies, 1.0).step(
        token[:, 0], seen[0], real[:, 0], (weight, 1e-6), seen, next_slot[:, :3]
    )[2:]
    torch.testing.assert_close(rotation[0][:, :8], (before[0][:, None] * frequencies).cos(), rtol=1e-4, atol=1e-5)
    assert torch.equal(now, before[0])


@pytest.mark.skipif(interpreter.INTERPRETED, reason="runs in the main process")
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "mistral"])
def test_stock_decoders_are_recognised(name):
    model = tiny.build(name)
    decoder = model.get_decoder()
    found = recognise_beginning(decoder, decoder.layers[0].self_attn.head_dim)
    assert found.embedding is decoder.embed_tokens.weight
    position = torch.tensor([[5, 99, 1234]])
    expect = decoder.rotary_emb(torch.zeros(1), position)
    rows = torch.zeros(3, dtype=torch.long)
    got = found.step(
        *(rows, position[0], rows == 0, (torch.ones(found.embedding.shape[1]), 1e-6)),
        *(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, 1, dtype=torch.int32)),
    )
    for one, other in zip(got[2], expect, strict=True):
        torch.testing.assert_close(one, other[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(interpreter.INTERPRETED, reason="runs in the main process")
def test_decoders_that_do_more_begin_by_themselves():
    scaled = tiny.build("granite", embedding_multiplier=3.0).get_decoder()
    assert recognise_beginning(scaled, scaled.layers[0].self_attn.head_dim) is None
    heard = tiny.build("llama").get_decoder()
    heard.embed_tokens.register_forward_hook(lambda *args: None)
    assert recognise_beginning(heard, heard.layers[0].self_attn.head_dim) is None
    other = tiny.build("llama").get_decoder()
    other.rotary_emb.attention_scaling = 1.0
    other.rotary_emb.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    assert recognise_beginning(other, other.layers[0].self_attn.head_dim) is None


def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)
