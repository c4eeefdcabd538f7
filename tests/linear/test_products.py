"""Products of few rows: the reference against stock modules, the kernels in the interpreter against the reference;
test_products_gpu.py is on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import interpreter
import tiny
from trimkv.gates.gate import RetentionGate
from trimkv.linear import products

products_triton = pytest.importorskip("trimkv.linear.products_triton")

INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_the_kernels_in_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="runs in the main process")
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Results that nobody writes are NaN, so that nobody can do without writing them."""

    def poison(make):
        def poisoned(*args, **options):
            made = make(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def product(rows, K, widths, dtype=torch.float32, device="cpu", biases=(), activation=products.PLAIN, **parts):
    """Arguments of ``linear`` by name; ``biases``: which matrices have one; ``parts``: "normed", "residual", "norm"."""

    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    N = widths[0] if activation == products.GATED else sum(widths)
    x = normal(rows, K)
    return dict(
        x=products.norm_input(x, normal(K), 1e-5) if parts.get("normed") else x,
        weights=[normal(n, K) / K**0.5 for n in widths],
        biases=[normal(n) if i in biases else None for i, n in enumerate(widths)],
        activation=activation,
        residual_BN=normal(rows, N) if parts.get("residual") else None,
        norm=(normal(N), 1e-6) if parts.get("norm") else None,
    )


def truth(given):
    x, squares, eps = given["x"] if isinstance(given["x"], products.Normed) else (given["x"], None, 0.0)
    biases = given["biases"]
    weight = None if given["norm"] is None else given["norm"][0]
    return products.linear_reference(
        *(x, given["weights"], [b for b in biases if b is not None], [b is not None for b in biases], squares, eps),
        *(given["activation"], given["residual_BN"], weight, None),
    )


def check(given, **options):
    """``linear`` against the reference; the same bits twice."""
    got, again = products.linear(**given, **options), products.linear(**given, **options)
    y, y_norm, squares = truth(given)
    if given["norm"] is not None:
        (got, normed), (again, _) = got, again
        limit = LIMIT[y.dtype]
        assert relative(normed.x, y_norm) < limit and normed.eps == 1e-6
        assert relative(normed.squares.sum(1), squares.sum(1)) < limit
    assert got.dtype == y.dtype and got.shape == y.shape
    assert relative(got, y) < LIMIT[y.dtype], relative(got, y)
    assert torch.equal(got, again)


def projections(B, Q, H, D, width, dtype=torch.float32, device="cpu", norm=True):
    """Arguments of ``heads`` by name."""

    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    angle = torch.rand(B, D // 2, device=device).repeat(1, 2) * 6
    return dict(
        qkv_BN=normal(B, (Q + 2 * H) * D + width),
        num_query_heads=Q,
        num_heads=H,
        head_dim=D,
        cos_BD=angle.cos().to(dtype),
        sin_BD=angle.sin().to(dtype),
        q_norm_D=normal(D) if norm else None,
        k_norm_D=normal(D) if norm else None,
        eps=1e-6 if norm else 0.0,
        gate=(normal(H, width), normal(H) + 18) if width else None,
    )


def check_heads(given):
    got = products.heads(**given)
    weight, bias = given["gate"] or (None, None)
    Q = given["num_query_heads"]
    qk, log_beta = products.heads_reference(*list(given.values())[:-1], weight, bias)
    limit = LIMIT[qk.dtype]
    assert got[0].dtype == qk.dtype and relative(got[0], qk[:, :Q]) < limit and relative(got[1], qk[:, Q:]) < limit
    if weight is None:
        assert got[2] is None
    else:  # each on its own: they lie decades apart, and victims are chosen by the last digits
        torch.testing.assert_close(got[2], log_beta, rtol=5e-4, atol=0)


# The reference.


@not_interpreted
def test_the_reference_is_the_stock_feed_forward_block():
    layer = tiny.build("qwen3").model.layers[0]
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    x = torch.randn(3, 64)
    normed = products.norm_input(x, norm.weight, norm.variance_epsilon)
    hidden = products.linear(normed, [mlp.gate_proj.weight, mlp.up_proj.weight], activation="gated")
    next_norm = layer.input_layernorm
    out, handed_on = products.linear(
        hidden, [mlp.down_proj.weight], residual_BN=x, norm=(next_norm.weight, next_norm.variance_epsilon)
    )
    expect = x + mlp(norm(x))
    torch.testing.assert_close(out, expect)
    weight = torch.randn(7, 64)
    torch.testing.assert_close(products.linear(handed_on, [weight]), next_norm(expect) @ weight.T)


@not_interpreted
@pytest.mark.parametrize("norm", [True, False])
def test_the_reference_is_the_stock_rotation_and_gate(norm):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    Q, H, D, E, width = 6, 2, 16, 24, 10
    gate = RetentionGate("rg", E, H, D, width)
    gate.initialise(100, std=1.0)
    x, norms = torch.randn(3, E), [Qwen3RMSNorm(D), Qwen3RMSNorm(D)]
    for one in norms:
        torch.nn.init.normal_(one.weight)
    weights = [torch.randn((Q + 2 * H) * D, E), gate.linear1.weight]
    qkv = products.linear(x, weights, [None, gate.linear1.bias], "silu_last")
    angle = torch.rand(3, D // 2).repeat(1, 2)
    weights = [one.weight if norm else None for one in norms]
    got = products.heads(qkv, Q, H, D, angle.cos(), angle.sin(), *weights, 1e-6, (gate.linear2.weight, gate.bias))
    q, k = qkv[:, : Q * D].view(3, Q, 1, D), qkv[:, Q * D : (Q + H) * D].view(3, H, 1, D)
    q, k = (one(y) if norm else y for one, y in zip(norms, (q, k), strict=True))
    q, k = apply_rotary_pos_emb(q, k, angle.cos()[:, None], angle.sin()[:, None])
    torch.testing.assert_close(got[0], q[:, :, 0])
    torch.testing.assert_close(got[1], k[:, :, 0])
    torch.testing.assert_close(got[2], gate(x[:, None])[:, :, 0])


@not_interpreted
def test_the_operators_are_well_behaved():
    """torch's own checks of schema, fake tensors and mutation."""
    tests = ("test_schema", "test_faketensor")
    x, w = torch.randn(3, 16), [torch.randn(8, 16), torch.randn(4, 16)]
    rest = [torch.randn(4)], [False, True], torch.rand(3, 2), 1e-6
    torch.library.opcheck(
        torch.ops.trimkv.skinny_linear,
        (x, w, *rest, "silu_last", torch.randn(3, 12), torch.randn(12), torch.zeros(4, dtype=torch.int32)),
        test_utils=tests,
    )
    torch.library.opcheck(torch.ops.trimkv.norm_input, (x, torch.randn(16)), test_utils=tests)
    given = projections(3, 4, 2, 16, 8)
    arguments = *list(given.values())[:-1], *given["gate"]
    torch.library.opcheck(torch.ops.trimkv.skinny_heads, arguments, test_utils=tests)


# The Triton kernels. bf16 is left to the GPU: triton's interpreter multiplies its bits as integers.


def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def small_blocks(monkeypatch, request):
    """Several tiles and parts at shapes that an interpreter can do."""
    for name in ("PLAIN_BLOCKS", "GATED_BLOCKS", "FP32_BLOCKS"):
        monkeypatch.setattr(products_triton, name, dict.fromkeys((16, 32, 64), (16, 16, 4, 1)))
    monkeypatch.setattr(products_triton, "PROGRAMS", 10**6 if request.param > 1 else 0)
    monkeypatch.setattr(products_triton, "LEAST_BLOCKS", 1)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64, 70])
def test_interpreted_products_of_any_number_of_rows(small_blocks, rows):
    check(product(rows, 48, (32,)))
    check(product(rows, 40, (33,), normed=True, residual=True, norm=True))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "widths, biases, activation",
    [
        ((16,), (0,), "plain"),
        ((37, 20), (1,), "plain"),
        ((40, 16, 16), (0, 1, 2), "plain"),
        ((40, 16, 16, 9), (3,), "silu_last"),
        ((64, 16, 17, 32), (), "silu_last"),
        ((32, 32), (), "gated"),
        ((23, 23), (0, 1), "gated"),
    ],
)
def test_interpreted_several_matrices(small_blocks, widths, biases, activation, dtype):
    for K in (32, 50):
        check(product(5, K, widths, dtype, biases=biases, activation=activation))
        check(product(5, K, widths, dtype, biases=biases, activation=activation, normed=True))


@interpreted
def test_interpreted_counters_are_left_as_they_were(small_blocks):
    """The next product uses the same ones."""
    counters = torch.zeros(64, dtype=torch.int32)
    check(product(3, 64, (48,), normed=True), counters=counters)
    check(product(20, 64, (16, 16), activation="gated"), counters=counters)
    assert not counters.any()


@interpreted
def test_interpreted_results_go_from_product_to_product(small_blocks):
    """A row whose norm is scaled twice: sums of squares in parts, of an odd number of tiles."""
    first = product(5, 48, (40,), residual=True, norm=True)
    y, normed = products.linear(**first)
    assert normed.squares.shape == (5, 3)
    weight = torch.randn(20, 40)
    expect = F.rms_norm(y, (40,), first["norm"][0], 1e-6) @ weight.T
    torch.testing.assert_close(products.linear(normed, [weight]), expect, atol=1e-5, rtol=1e-4)


@interpreted
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 2, 16, 8), (3, 6, 2, 16, 10), (8, 2, 1, 80, 600), (17, 3, 3, 64, 0), (2, 8, 1, 96, 7), (64, 1, 1, 6, 5)],
)
@pytest.mark.parametrize("norm", [True, False])
def test_interpreted_heads(shape, norm):
    check_heads(projections(*shape, norm=norm))
    check_heads(projections(*shape, dtype=torch.float16, norm=norm))


@interpreted
def test_interpreted_retention_is_exact_at_both_ends():
    """Near an output bias of 18 log_beta is 1e-8: rounding that to 0 would make all tokens equal."""
    z = torch.tensor([-90.0, -20.0, -3.0, -1e-3, 0.0, 1e-3, 0.4, 2.0, 9.0, 18.0, 25.0, 80.0])
    given = projections(1, 1, len(z), 4, 3)
    given["gate"] = torch.zeros(len(z), 3), z
    got = products.heads(**given)[2]
    torch.testing.assert_close(got[0].double(), -F.softplus(-z.double(), threshold=1e3), rtol=2e-6, atol=1e-38)
