"""Which token comes next: the argmax, or a draw that depends on nothing but the request."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimkv.engine.request import DRAWN, ERROR, GREEDY, LENGTH, LIMITED, RUNNING, STOP, Request, SamplingParams
from trimkv.engine.rows import Rows
from trimkv.engine.sampling import choose, gumbel, kind_of, lowest_kept


def rows_of(*params, vocabulary=50, prompts=None):
    rows = Rows.empty(len(params), vocabulary, torch.device("cpu"))
    for i, one in enumerate(params):
        ids = prompts[i] if prompts else [1]
        rows.place(i, Request(i, ids, one, one.stop, one.seed or 0), torch.tensor(ids))
    return rows


def test_greedy_rows_take_the_argmax_also_beside_rows_that_draw():
    logits = torch.randn(3, 50)
    greedy, drawn = SamplingParams(), SamplingParams(temperature=5.0, top_k=3, top_p=0.4, seed=1)
    for params in ((greedy, greedy, greedy), (greedy, drawn, greedy)):
        token, sound = choose(logits, rows_of(*params), kind_of(params))
        assert token[0] == logits[0].argmax() and token[2] == logits[2].argmax()
        assert sound.all()
    assert not torch.equal(logits, torch.randn(3, 50))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.5), (1, 1.0), (50, 0.999)])
@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_what_may_be_drawn_is_what_transformers_would_allow(top_k, top_p, penalty):
    """And the shares are those of the softmax: 20,000 draws of each row."""
    prompt, temperature, draws = [4, 9, 9, 30], 0.7, 20_000
    logits = 2 * torch.randn(1, 50)
    ids = torch.tensor([prompt])
    x = logits if penalty == 1 else RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    x = TemperatureLogitsWarper(temperature)(ids, x)
    x = TopKLogitsWarper(top_k)(ids, x) if top_k else x
    x = TopPLogitsWarper(top_p)(ids, x) if top_p < 1 else x
    truth = x.softmax(-1)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=3)
    rows = rows_of(params, prompts=[prompt])
    many = Rows(**{name: t.expand(draws, *t.shape[1:]).clone() for name, t in vars(rows).items()})
    many.produced.copy_(torch.arange(draws))
    token, sound = choose(logits.expand(draws, -1), many, params.kind)
    share = token.bincount(minlength=50) / draws
    assert sound.all()
    assert not share[truth == 0].any(), "a token was drawn that is cut off"
    assert (share - truth).abs().max() < 5 * (0.25 / draws) ** 0.5


def test_noise_is_gumbels_and_no_two_numbers_of_it_are_related():
    noise = gumbel(torch.arange(64), torch.zeros(64, dtype=torch.int32), 4096)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - 1.6449) < 0.02
    later = gumbel(torch.arange(64), torch.ones(64, dtype=torch.int32), 4096)
    for other in (later, noise.roll(1, 0), noise.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.01
    assert torch.equal(noise[3:4], gumbel(torch.tensor([3]), torch.zeros(1, dtype=torch.int32), 4096))
    assert not torch.equal(noise[0], noise[1])


def test_noise_stays_as_it_is():
    """A stored seed draws the same text in the next version, and on another device."""
    noise = gumbel(torch.tensor([42]), torch.tensor([7], dtype=torch.int32), 4)
    assert [round(x, 4) for x in noise[0].tolist()] == [0.5867, 0.7567, -1.4928, -0.3303]


def test_a_row_without_limits_keeps_every_token():
    x = torch.randn(2, 3000)
    lowest = lowest_kept(x, torch.tensor([0, 10]), torch.tensor([1.0, 1.0]))
    assert lowest[0] == float("-inf")
    assert (x[1] >= lowest[1]).sum() == 10


def test_logits_that_are_not_numbers_end_their_row_only():
    logits = torch.randn(4, 50)
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    for params in (SamplingParams(5), SamplingParams(5, temperature=1.0, top_p=0.5, seed=1)):
        rows = rows_of(*[params] * 4)
        token, sound = choose(logits, rows, params.kind)
        assert sound.tolist() == [True, False, False, True]
        rows.advance(token, sound)
        assert rows.report[:, 1].tolist() == [RUNNING, ERROR, ERROR, RUNNING]
        assert rows.report[1:3, 0].tolist() == [-1, -1]
        assert rows.active.tolist() == [True, False, False, True]


def test_a_row_ends_with_a_stop_token_or_at_its_limit_and_then_rests():
    rows = rows_of(SamplingParams(3, stop=(8, 9)), SamplingParams(2), SamplingParams(1, stop=(6,)), SamplingParams(9))
    rows.active[3] = False
    sound, before = torch.ones(4, dtype=torch.bool), rows.token[3].clone()
    rows.advance(torch.tensor([5, 5, 6, 5]), sound)
    assert rows.report.tolist() == [[5, RUNNING], [5, RUNNING], [6, STOP], [-1, RUNNING]]
    rows.advance(torch.tensor([9, 5, 5, 5]), sound)
    assert rows.report.tolist() == [[9, STOP], [5, LENGTH], [-1, RUNNING], [-1, RUNNING]]
    assert not rows.active.any()
    held = rows.position.clone()
    rows.advance(torch.tensor([1, 1, 1, 1]), sound)
    assert torch.equal(rows.position, held) and rows.report[:, 0].eq(-1).all()
    assert rows.token[3] == before and not rows.seen[3, 5], "a resting row has taken a token"
    assert rows.seen[0].nonzero().flatten().tolist() == [1, 5, 9]


def test_a_new_request_in_a_row_finds_nothing_of_the_last():
    rows = rows_of(SamplingParams(3, stop=(8, 9), temperature=1.0, top_k=4), prompts=[[2, 3]])
    rows.advance(torch.tensor([8]), torch.ones(1, dtype=torch.bool))
    fresh = rows_of(SamplingParams(5), prompts=[[7]])
    rows.place(0, Request(1, [7], SamplingParams(5)), torch.tensor([7]))
    for name, t in vars(fresh).items():
        if name not in ("token", "report"):
            assert torch.equal(t, getattr(rows, name)), name


def test_the_kind_of_a_step_is_that_of_the_request_that_asks_for_most():
    greedy, punished = SamplingParams(), SamplingParams(repetition_penalty=1.2)
    drawn, limited = SamplingParams(temperature=0.5), SamplingParams(temperature=0.5, top_p=0.9)
    assert [one.kind for one in (greedy, punished, drawn, limited)] == [GREEDY, DRAWN, DRAWN, LIMITED]
    assert SamplingParams(top_k=5).kind == GREEDY, "without a temperature there is nothing to limit"
    assert [kind_of(many) for many in ((), (greedy,), (greedy, drawn), (limited, greedy, drawn))] == [
        *(GREEDY, GREEDY, DRAWN, LIMITED)
    ]


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (9, 0.8)])
def test_a_row_draws_the_same_whatever_the_kind_of_its_step(top_k, top_p):
    """A greedy row beside one that draws, a drawing one beside one with limits."""
    logits = torch.randn(6, 50)
    one = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, repetition_penalty=1.3, seed=5)
    rows = rows_of(*[SamplingParams()] * 3, *[one] * 3)
    alone = choose(logits[3:], rows.part(3, 6), one.kind)[0]
    assert torch.equal(choose(logits, rows, LIMITED)[0], torch.cat([logits[:3].argmax(-1), alone]))
