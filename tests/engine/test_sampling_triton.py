"""The kernels at the end of a step do what the torch code does, whatever the rows ask for."""

import pytest
import torch

import interpreter
from trimkv.engine.request import DRAWN, GREEDY, KINDS, LIMITED, Request, SamplingParams
from trimkv.engine.rows import Rows
from trimkv.engine.sampling import adjusted, choose, lowest_kept

pytest.importorskip("triton")
DEVICES = [
    pytest.param("cpu", id="interpreted", marks=pytest.mark.skipif(not interpreter.INTERPRETED, reason="see below")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
ASKED = {
    GREEDY: {},
    DRAWN: {"temperature": 0.8, "repetition_penalty": 1.4},
    LIMITED: {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 0.8},
}


def rows_of(many, vocabulary, device):
    rows = Rows.empty(len(many), vocabulary, torch.device(device))
    for i, params in enumerate(many):
        prompt = [1, (7 * i + 3) % vocabulary]
        rows.place(i, Request(i, prompt, params, params.stop, 11 * i), torch.tensor(prompt, device=device))
    return rows


def compare(logits, many, kind, steps=3):
    """Several steps by the kernels and by torch, which must leave the same."""
    from trimkv.engine import sampling_triton

    got, truth = (rows_of(many, logits.shape[1], logits.device) for _ in range(2))
    for rows in (got, truth):
        rows.active[2] = False  # a free row
    for step in range(steps):
        one = logits.roll(step, 1)
        sampling_triton.choose_and_advance(one, got, kind)
        truth.advance(*choose(one, truth, kind))
        for name, expect in vars(truth).items():
            assert torch.equal(getattr(got, name), expect), (name, step)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary, dtype", [(50, torch.float32), (2048, torch.bfloat16), (5003, torch.float32)])
def test_steps(vocabulary, dtype, kind, device):
    """Rows that ask for what the kind is, and rows that ask for less; one without a request."""
    logits = (3 * torch.randn(6, vocabulary)).to(device, dtype)
    asked = SamplingParams(9, **ASKED[kind])
    got = compare(logits, [asked, SamplingParams(2), asked, asked, SamplingParams(9), asked], kind)
    assert got.produced.tolist() == [3, 2, 0, 3, 3, 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_ends(kind, device):
    """Stop tokens, limits, logits that are no numbers, ties: the first token of the largest logit."""
    logits = torch.randn(7, 3000).to(device)
    logits[0, 2100] = logits[0, 5] = 30.0
    logits[1, 17] = float("nan")
    logits[3] = float("-inf")
    logits[4, 99] = float("inf")
    stop = int(logits[5].argmax())
    many = [SamplingParams(9, **(ASKED[kind] if i in (1, 3, 4) else {}), stop=(stop,)) for i in range(7)]
    got = compare(logits, many, kind)
    assert not got.active[[1, 3, 4, 5]].any()
    assert got.seen[0, 5] and not got.seen[0, 2100]


LIMITS = ((1, 1.0), (20, 0.95), (40, 1.0), (1024, 0.5), (0, 0.9), (0, 0.05), (0, 0.9999), (1000, 0.999), (0, 1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits", ["normal", "coarse", "flat", "clustered", "masked"])
@pytest.mark.parametrize("vocabulary", [3, 50, 5003, 20_000, 151_936])
def test_the_lowest_token_that_may_be_drawn(logits, vocabulary, device):
    """Of every kind of limit. "coarse" has ties, of "flat" all reach the bound, "clustered" are the best together."""
    from trimkv.engine.limits_triton import adjusted_and_lowest

    if device == "cpu" and (vocabulary > 20_000 or (logits == "flat" and vocabulary > 5003)):
        return  # minutes of an interpreter
    many = [SamplingParams(9, temperature=0.7, top_k=k, top_p=p, repetition_penalty=1.2) for k, p in LIMITS]
    rows = rows_of([*many, SamplingParams(9)], vocabulary, device)
    x = {
        "normal": lambda: 3 * torch.randn(len(many) + 1, vocabulary),
        "coarse": lambda: (2 * torch.randn(len(many) + 1, vocabulary)).round() / 2,
        "flat": lambda: torch.full((len(many) + 1, vocabulary), 1.5),
        "clustered": lambda: torch.linspace(9, -9, vocabulary).expand(len(many) + 1, -1).contiguous(),
        "masked": lambda: torch.randn(len(many) + 1, vocabulary).masked_fill(torch.arange(vocabulary) > 30, -torch.inf),
    }[logits]()
    x = x.to(device)
    got, lowest = adjusted_and_lowest(x, rows)
    expect = adjusted(x, rows)
    assert torch.equal(got, expect)
    truth = lowest_kept(expect, rows.top_k, rows.top_p)
    for i, limit in enumerate((*LIMITS, None)):
        kept, wanted = expect[i] >= lowest[i], expect[i] >= truth[i]
        if limit is None:
            assert kept.all(), "a greedy row has no limits"
        elif not torch.equal(kept, wanted):
            # At the very edge of a nucleus sums that are rounded otherwise may tell one token from another.
            p, mass = limit[1], expect[i].softmax(-1)[kept].sum()
            assert (kept != wanted).sum() <= 1 and limit[0] == 0 and abs(mass - p) < 1e-4, (limit, kept.sum())


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_the_rows_is_stepped(device):
    """As in a step of fewer rows than there are: the others keep what they hold."""
    from trimkv.engine import sampling_triton

    rows = rows_of([SamplingParams(9)] * 4, 100, device)
    logits = torch.randn(2, 3, 100, device=device)[:, -1]
    sampling_triton.choose_and_advance(logits, rows.part(0, 2), GREEDY)
    assert rows.token[:2].tolist() == logits.argmax(-1).tolist() and rows.produced.tolist() == [1, 1, 0, 0]


def test_kernels_in_tritons_interpreter():
    interpreter.run_interpreted_tests(__file__)
