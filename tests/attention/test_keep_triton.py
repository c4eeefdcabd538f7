"""Eviction after a chunk: the kernels in the interpreter against torch, and torch against a choice of the best."""

import pytest
import torch

import interpreter
from trimkv.attention import slots

keep_triton = pytest.importorskip("trimkv.attention.keep_triton")

interpreted = pytest.mark.skipif(not interpreter.INTERPRETED, reason="runs in a process of its own")
not_interpreted = pytest.mark.skipif(interpreter.INTERPRETED, reason="runs in the main process")
SHAPES = [(2, 2, 16, 8, 16), (1, 3, 7, 20, 8), (2, 1, 33, 1, 16), (1, 1, 40, 64, 32)]  # B, H, C, T, D
OPTIONS = [
    {"score": "retention"},
    {"score": "retention", "sinks": 2, "recent": 4, "offset": 1},
    {"score": "position", "sinks": 3},
    {"score": "retention", "ties": True},
]


def chunk(B, H, C, T, D, empty, dtype=torch.float32, device="cpu", ties=False, score="retention") -> dict:
    """Arguments of ``keep`` by name; rows have seen different numbers of tokens, and padding is on the right."""
    g = torch.Generator().manual_seed(C + T)
    seen = torch.randint(C, 3 * C, (B,), generator=g)
    real = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    new_position = torch.where(real, seen[:, None] + torch.arange(T), -1).int()
    position = torch.stack([torch.rand(H, int(n), generator=g).argsort(-1)[:, :C] for n in seen]).int()
    position[torch.rand(B, H, C, generator=g) < empty] = -1
    given = {
        "k_new": torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2),
        "v_new": torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2),
        "new_position": new_position,
        "k": torch.randn(B, H, C, D, generator=g).to(dtype),
        "v": torch.randn(B, H, C, D, generator=g).to(dtype),
        "position": position,
        "now": (seen + real.sum(-1)).int(),
    }
    if score == "retention":
        log_beta, log_beta_new = (-torch.rand(B, n, H, generator=g).transpose(1, 2) for n in (C, T))
        if ties:
            log_beta, log_beta_new = (torch.full_like(x, -0.0) for x in (log_beta, log_beta_new))
        given |= {"log_beta_new": log_beta_new, "log_beta": log_beta.contiguous()}
    return {name: x.to(device) for name, x in given.items()}


def after(given: dict, run, options: dict) -> dict:
    given = {name: x.clone() for name, x in given.items()}
    rest = {"score": "retention", "sinks": 0, "recent": 0, "offset": 0, **options}
    beta = given.pop("log_beta_new", None), given.pop("log_beta", None)
    run(*given.values(), *beta, **rest)
    return {name: given[name] for name in ("k", "v", "position")} | {"log_beta": beta[1]}


def check(given: dict, options: dict) -> None:
    got, expect = (after(given, run, options) for run in (keep_triton.keep, keep_triton.keep_reference))
    for name, x in expect.items():
        assert x is None or torch.equal(got[name], x), name


@not_interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_the_best_stay_and_bring_all_that_is_theirs(shape, options, empty):
    options = dict(options)
    given = chunk(*shape, empty, ties=options.pop("ties", False), score=options["score"])
    got = after(given, keep_triton.keep_reference, options)
    B, H, C, T, D = shape
    both = torch.cat([given["position"], given["new_position"][:, None].expand(B, H, T)], 2)
    now, score = given["now"][:, None, None], both.float()
    if options["score"] == "retention":
        score = torch.cat([given["log_beta"], given["log_beta_new"]], 2) * (now + options.get("offset", 0) - both)
    recent = now - options["recent"] if options.get("recent") else None
    index = slots.best(slots.protect(score, both, options.get("sinks", 0), recent), both, C)
    expect = both.gather(2, index)
    assert torch.equal(got["position"].sort(-1).values, expect.sort(-1).values)
    for name in ("k", "v", "log_beta"):
        if got[name] is None:
            continue
        x = torch.cat([given[name], given[f"{name}_new"]], 2)
        for b in range(B):
            for h in range(H):
                for c, p in enumerate(got["position"][b, h].tolist()):
                    if p >= 0:
                        where = int((both[b, h] == p).nonzero()[0])
                        assert torch.equal(got[name][b, h, c], x[b, h, where]) and (where >= C or where == c)


@not_interpreted
def test_the_kernels_in_the_interpreter():
    interpreter.run_interpreted_tests(__file__)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_interpreted_kernels_equal_the_reference(shape, options, empty):
    options = dict(options)
    check(chunk(*shape, empty, ties=options.pop("ties", False), score=options["score"]), options)
