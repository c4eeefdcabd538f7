"""Decayed attention and its gradients against the plain reference; here on the CPU, test_decay_gpu.py on a GPU.

Triton decides when it is imported whether it interprets: the kernels' tests run in a process of their own.
"""

import pytest
import torch
import torch.nn.functional as F

import interpreter
from trimkv.attention import decay, reference

INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_the_kernels_in_the_interpreter")
NAMES = ("out", "dq", "dk", "dv", "dlog_beta", "ds_aux")
LIMIT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def documents(kind, B, T):
    """start [B, T] of packed documents (some of one token), of left padding, or None."""
    if kind is None:
        return None
    if kind == "packed":
        first = torch.rand(B, T) < 6 / T
        first[0, T // 2 : T // 2 + 3] = True
    else:
        first = torch.arange(T) <= torch.randint(0, T, (B, 1))
    first[:, 0] = True
    start = torch.where(first, torch.arange(T), 0).cummax(1).values
    return start if kind == "packed" else start.int()


def inputs(B, H, G, T, D, dtype=torch.float32, device="cpu", start=None, aux=False, bias=2.0):
    """Random q, k, v, log_beta, s_aux that want gradients, and start; q lies in memory as models make it."""
    q = torch.randn(B, T, H * G, D, device=device).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, H, T, D, device=device).to(dtype) for _ in range(2))
    log_beta = F.logsigmoid(3 * torch.randn(B, H, T, device=device) + bias)
    tensors = [q, k, v, log_beta] + ([torch.randn(H * G, device=device)] if aux else [])
    start = documents(start, B, T)
    return [x.requires_grad_() for x in tensors], None if start is None else start.to(device)


def results(function, tensors, start, **options):
    q, k, v, log_beta, *aux = tensors
    generator = torch.Generator().manual_seed(1)
    out = function(q, k, v, log_beta, q.shape[-1] ** -0.5, start, s_aux_Q=aux[0] if aux else None, **options)
    dout = torch.randn(out.shape, generator=generator).to(q.dtype).to(out)
    return out, *torch.autograd.grad(out, tensors, dout)


def errors(tensors, start, implementation, **options):
    """Relative RMS of the output and of every gradient."""
    expect = results(reference.decayed_attention, tensors, start, **options)
    got = results(decay.decayed_attention, tensors, start, implementation=implementation, **options)
    assert got[0].dtype == tensors[0].dtype

    def relative(a, b):
        a, b = a.double(), b.double()
        return ((a - b).pow(2).mean() / b.pow(2).mean().clamp_min(1e-6)).sqrt().item()  # a lone token's dq is zero

    return {name: relative(a, b) for name, a, b in zip(NAMES, got, expect, strict=False)}


def check(tensors, start, implementation, **options):
    found = errors(tensors, start, implementation, **options)
    limit = LIMIT[tensors[0].dtype]
    assert all(error < limit for error in found.values()), found  # a NaN is not smaller than the limit


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What the code does not write is NaN, not by chance zero."""

    def poisoned(function):
        def call(*args, **kwargs):
            x = function(*args, **kwargs)
            with torch.no_grad():  # compilers make leaves that require gradients
                return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 2, 1, 37, 16),
    (2, 1, 3, 150, 64),
    (1, 2, 4, 129, 80),
    (1, 1, 8, 67, 96),
    (2, 3, 3, 128, 64),
]


@pytest.mark.parametrize("start", [None, "packed", "left"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_path_equals_the_reference(shape, start, dtype):
    check(*inputs(*shape, dtype=dtype, start=start), "torch")


@pytest.mark.parametrize("variant", decay.VARIANTS)
@pytest.mark.parametrize("softcap, aux", [(None, True), (2.0, False), (2.0, True), (None, False)])
def test_softcap_sinks_and_the_multiplicative_variant(variant, softcap, aux):
    check(*inputs(2, 2, 3, 70, 16, start="packed", aux=aux), "torch", variant=variant, softcap=softcap)


def test_the_variants_differ():
    tensors, _ = inputs(1, 2, 2, 40, 16)
    plus, times = (results(decay.decayed_attention, tensors, None, variant=name)[0] for name in decay.VARIANTS)
    assert (plus - times).abs().max() > 0.1


@pytest.mark.parametrize("variant", decay.VARIANTS)
@pytest.mark.parametrize("softcap, aux", [(None, False), (1.5, True)])
def test_gradients_by_finite_differences(variant, softcap, aux, monkeypatch):
    monkeypatch.setattr(decay, "MAX_QUERIES", {"cpu": 8})
    tensors, start = inputs(1, 2, 2, 11, 4, dtype=torch.float64, start="packed", aux=aux)
    tensors = [x.detach().double().requires_grad_() for x in tensors]

    def function(q, k, v, log_beta, s_aux=None):
        return decay.decayed_attention(q, k, v, log_beta, 0.5, start, softcap, s_aux, variant, "torch")

    assert torch.autograd.gradcheck(function, tensors)


def check_that_beta_one_is_plain_attention(implementation, T, device="cpu"):
    (q, k, v, log_beta), _ = inputs(2, 2, 3, T, 64, device=device)
    log_beta = torch.full_like(log_beta, -1e-9)
    got = decay.decayed_attention(q, k, v, log_beta, 0.125, implementation=implementation)
    expect = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expect, atol=2e-5, rtol=1e-4)


def check_strong_decay(implementation, device="cpu"):
    """A gate that forgets at once, beside one that never does: no NaN, and the reference's numbers."""
    tensors, start = inputs(1, 2, 2, 140, 16, device=device)
    with torch.no_grad():
        tensors[3][0, 0, ::2] = -1e30
        tensors[3][0, 0, 1::4] = -50.0
        tensors[3][0, 1, ::3] = 0.0
    check(tensors, start, implementation)


def check_left_padding(implementation, device="cpu"):
    """A padded row gives what the row alone gives, and its padding gets no gradient."""
    T, pad = 50, 13
    (q, k, v, log_beta), _ = inputs(1, 2, 3, T, 16, device=device)
    index = torch.arange(T, device=device)
    start = torch.where(index < pad, index, pad)[None]
    got = results(decay.decayed_attention, [q, k, v, log_beta], start, implementation=implementation)
    alone = [x[:, :, pad:].detach().requires_grad_() for x in (q, k, v, log_beta)]
    single = decay.decayed_attention(*alone, 0.25, implementation=implementation)
    torch.testing.assert_close(got[0][:, :, pad:], single, atol=1e-5, rtol=1e-4)
    assert not got[4][:, :, :pad].any() and got[1][:, :, :pad].abs().max() < 1e-5  # rounding


def check_long_ages(implementation, T, device="cpu"):
    """With a beta near one the last query sees the first key with exp(-1), however old; its gradient has that age."""
    q, v = (torch.zeros(1, 1, T, 16, device=device) for _ in range(2))
    v[0, 0, 0] = 1.0
    log_beta = torch.full((1, 1, T), -200.0, device=device)
    log_beta[0, 0, 0] = -1 / (T - 1)
    log_beta.requires_grad_()
    out = decay.decayed_attention(q, q, v, log_beta, 1.0, implementation=implementation)[0, 0, -1, 0]
    weight = torch.sigmoid(torch.tensor(-1.0, device=device))
    torch.testing.assert_close(out, weight, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(out, log_beta)
    torch.testing.assert_close(grad[0, 0, 0], weight * (1 - weight) * (T - 1), rtol=1e-4, atol=0)


def test_beta_one_is_plain_attention():
    check_that_beta_one_is_plain_attention("torch", 130)


def test_strong_decay():
    check_strong_decay("torch")


def test_left_padding():
    check_left_padding("torch")


def test_long_ages():
    check_long_ages("torch", 6001)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(variant="divisive"), "unknown variant"),
        (dict(implementation="fast"), "unknown implementation"),
        (dict(start_BT=torch.zeros(1, 3)), "start"),
        (dict(s_aux_Q=torch.zeros(3)), "s_aux"),
        (dict(log_beta_BHT=torch.zeros(1, 4, 5)), "log_beta"),
        (dict(k_BHTD=torch.zeros(1, 3, 5, 8)), "must be"),
    ],
)
def test_wrong_input_is_refused(change, words):
    (q, k, v, log_beta), _ = inputs(1, 2, 2, 5, 8)
    arguments = dict(q_BQTD=q, k_BHTD=k, v_BHTD=v, log_beta_BHT=log_beta, scaling=1.0)
    with pytest.raises(ValueError, match=words):
        decay.decayed_attention(**{**arguments, **change})


@pytest.mark.parametrize("kind", ["packed", "left", None])
def test_retention_sum_of_the_reference(kind):
    B, H, T = 2, 2, 9
    log_beta, start = -torch.rand(B, H, T), documents(kind, B, T)
    got = reference.retention_sum(log_beta, start)
    for b, h, t in [(b, h, t) for b in range(B) for h in range(H) for t in range(T)]:
        first = 0 if start is None else int(start[b, t])
        expect = sum(float(log_beta[b, h, j].exp()) ** (t - j) for j in range(first, t + 1))
        assert abs(got[b, h, t].item() - expect) < 1e-4


# The Triton kernels. bf16 is left to the GPU: triton's interpreter multiplies its bits as integers.


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    interpreter.run_interpreted_tests(__file__)


@interpreted
@pytest.mark.parametrize(
    "shape, start, aux, softcap, dtype",
    [
        ((1, 1, 1, 1, 16), None, False, None, torch.float32),
        ((2, 2, 1, 37, 16), "packed", False, None, torch.float32),
        ((1, 1, 3, 129, 16), "left", True, 5.0, torch.float32),
        ((1, 1, 8, 67, 80), "packed", True, None, torch.float32),
        ((1, 2, 4, 128, 64), None, False, 2.0, torch.float32),
        ((2, 1, 3, 261, 64), "packed", False, None, torch.float16),
        ((1, 1, 1, 384, 128), "packed", False, None, torch.float16),
    ],
)
def test_interpreted_kernels_equal_the_reference(shape, start, aux, softcap, dtype):
    check(*inputs(*shape, dtype=dtype, start=start, aux=aux), "triton", softcap=softcap)


@interpreted
def test_interpreted_kernels_at_the_ends():
    check_that_beta_one_is_plain_attention("triton", 65)
    check_strong_decay("triton")
    check_left_padding("triton")


@interpreted
def test_interpreted_kernels_refuse_the_multiplicative_variant():
    (q, k, v, log_beta), _ = inputs(1, 2, 2, 5, 16)
    with pytest.raises(ValueError, match="multiplicative.*torch"):
        decay.decayed_attention(q, k, v, log_beta, 1.0, variant="multiplicative", implementation="triton")
