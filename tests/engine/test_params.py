"""What a request may ask for is looked at before it is queued: one line says what is wrong, and nobody else notices."""

import fractions

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from alone import BUDGET, CHUNK, alone, long, prompt
from tiny_text import byte_tokenizer, chat_model
from trimkv import Engine, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3")


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, "streaming_llm", BUDGET, rows=2, chunk=CHUNK) as engine:
        yield engine


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [-1, 2**31, 2**70, 10**5000, 5.0, NAN, "5", None, True, [5], np.float32(5), np.bool_(True)]),
        ("temperature", [-0.1, 1e-50, 1e300, NAN, INF, None, "1", True, 1j, [1.0], torch.zeros(2), torch.tensor(True)]),
        ("top_k", [-1, 2000, 1.5, "50", None, True, 10**400]),
        ("top_p", [0, -1, 1.1, 1e-50, NAN, INF, None, "0.9", True, 10**400]),
        ("repetition_penalty", [0, -1, 1e-9, 1e9, NAN, INF, None, "1", True]),
        ("seed", [1.5, NAN, "7", True, [7], torch.zeros(2, dtype=torch.int64)]),
        ("stop", ["\n", ["\n"], [b"\n"], [None], [NAN], [1.0], [[3]], 5, np.int64(5), torch.tensor(5), b"ab", True]),
        ("stop", [[-1], [2**70], [True], {"a": 1}, iter([1]), range(-3, 0), object(), torch.tensor([0.5])]),
        ("ignore_eos", ["no", None, 1, 0.0]),
    ],
)
def test_what_is_no_such_number_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name) as error:
            SamplingParams(**{name: value})
        one_line(error)


def test_a_text_in_stop_is_answered_with_the_way_to_token_ids():
    for stop in ("\n", ["\n"], ("###", 5)):
        with pytest.raises(ValueError, match=r"stop takes token ids.*tokenizer\.encode"):
            SamplingParams(stop=stop)
    with pytest.raises(ValueError, match=r"write stop=\[5\]"):
        SamplingParams(stop=5)


def test_numbers_of_numpy_and_torch_become_plain_ones():
    found = SamplingParams(
        max_new_tokens=np.int32(7),
        temperature=np.float32(0.5),
        top_k=torch.tensor(3),
        top_p=torch.tensor(0.25),
        repetition_penalty=fractions.Fraction(3, 2),
        seed=np.uint64(2**63),
        stop=np.array([5, 6]),
        ignore_eos=np.bool_(True),
    )
    assert found == SamplingParams(7, 0.5, 3, 0.25, 1.5, 2**63, (5, 6), True)
    assert all(type(value) in (int, float, tuple, bool) for value in vars(found).values())
    for stop in ([5, 6], range(5, 7), torch.tensor([5, 6]), [np.int64(5), torch.tensor(6)]):
        assert SamplingParams(stop=stop).stop == (5, 6)
    assert SamplingParams(stop=None).stop == () and SamplingParams(temperature=0).kind == "greedy"


def test_the_ends_of_all_ranges_give_tokens(engine, model):
    """Numbers that a row of the device cannot hold, or whose logits overflow, are not among them."""
    end = alone(model, "streaming_llm", prompt(9), 5)[-1]
    for options in (
        {"temperature": 1e-10, "seed": 1},
        {"temperature": 1e10, "seed": 2**200},
        {"temperature": 1e-10, "repetition_penalty": 1e-3, "top_k": 1, "seed": -(2**200)},
        {"temperature": 1.0, "top_p": 1e-30, "seed": 2**63},
        {"temperature": 0.5, "top_p": 1 - 1e-12, "top_k": 1024, "repetition_penalty": 1000},
        {"max_new_tokens": 2**31 - 1, "stop": [end]},
    ):
        (found,) = engine.generate([prompt(9)], SamplingParams(**{"max_new_tokens": 5, **options}), progress=False)
        assert found.finish_reason in ("length", "stop") and found.tokens, (options, found)


class Broken:
    """Whatever is asked of it fails."""

    def __index__(self):
        raise RuntimeError("broken")

    __len__ = __iter__ = __float__ = item = tolist = __index__


class Unspeakable(Broken):
    __repr__ = Broken.__index__


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "text, a list of token ids, or a list of chat messages"),
        (5, "one number"),
        (np.int64(5), "one number"),
        (torch.tensor(5), "one number"),
        (1.5, "one number"),
        (b"abc", "decode it first"),
        ({1, 2}, "a set, which has no order"),
        ({"input_ids": [1, 2]}, "give its input_ids"),
        ({"role": "user", "content": "hi"}, "give the messages in a list"),
        (iter([1, 2]), "text, a list of token ids"),
        ((n for n in [1, 2]), "text, a list of token ids"),
        (object(), "text, a list of token ids"),
        (Unspeakable(), "Unspeakable"),
        ([], "empty"),
        (torch.empty(1, 0, dtype=torch.long), "empty"),
        ([5, None], "None in it"),
        ([5, 1.5], "1.5 in it"),
        ([5, True], "True in it"),
        ([5, "a"], "'a' in it"),
        ([5, Unspeakable()], "Unspeakable .* in it"),
        ([[5, 6]], r"\[5, 6\] in it"),
        ([NAN], "nan in it"),
        (torch.tensor([1.0, 2.0]), "1.0 in it"),
        (torch.tensor([True]), "True in it"),
        (torch.ones(2, 3, dtype=torch.long), r"\[1, 1, 1\] in it"),
        (np.array([1.5]), "1.5 in it"),
        ([2**70], "outside of 0..127"),
        ([10**5000], "outside of 0..127"),
        ([-1], "outside of 0..127.*-1"),
        (range(10**12), "a prompt of 1,000,000,000,000 tokens"),
        (range(10**30), "text, a list of token ids"),
        ("text", "needs a tokenizer"),
        ([{"role": "user", "content": "hi"}], "need a tokenizer"),
    ],
)
def test_what_is_no_prompt_is_refused(engine, bad, words):
    with pytest.raises(ValueError, match=words) as error:
        engine.add(bad)
    one_line(error)
    assert not engine.busy


def test_prompts_come_as_any_list_of_whole_numbers(engine, model):
    ids = prompt(9)
    expected = alone(model, "streaming_llm", ids, 3)
    kinds = (tuple(ids), torch.tensor(ids), torch.tensor([ids]), np.array(ids, dtype=np.uint8), list(torch.tensor(ids)))
    for given_ids in kinds:
        assert engine.add(given_ids, long(3)).result().tokens == expected
    assert engine.add(range(3, 9), long(3)).result().prompt == tuple(range(3, 9))


@pytest.mark.parametrize("params", [{"max_new_tokens": 5}, 5, "greedy", [SamplingParams()], SamplingParams])
def test_what_is_no_sampling_params_is_refused(engine, params):
    with pytest.raises(ValueError, match="params must be SamplingParams") as error:
        engine.add([5], params)
    one_line(error)
    assert not engine.busy


def test_stop_tokens_that_the_model_does_not_know_are_refused(engine):
    with pytest.raises(ValueError, match=r"stop has tokens outside of 0..127.*128"):
        engine.add([5], SamplingParams(stop=[5, 128]))
    assert not engine.busy


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "a list of prompts"),
        (b"ab", "a list of prompts"),
        (iter([[5]]), "a list of prompts"),
        (torch.tensor([5, 6]), "a list of prompts"),
        ([{"role": "user", "content": "hi"}], "this is one chat"),
    ],
)
def test_generate_takes_a_list_of_prompts(engine, bad, words):
    with pytest.raises(ValueError, match=words) as error:
        engine.generate(bad)
    one_line(error)
    with pytest.raises(ValueError, match="SamplingParams or a list"):
        engine.generate([[5]], {"max_new_tokens": 5})
    with pytest.raises(ValueError, match="params must be SamplingParams, got 5"):
        engine.generate([[5]], [5])
    assert not engine.busy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": True}, "rows must be a whole number"),
        ({"rows": "8"}, "rows must be a whole number"),
        ({"chunk": 8.0}, "chunk must be a whole number"),
        ({"prefixes": -1}, "prefixes must be at least 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"max_prompt_tokens": "9"}, "max_prompt_tokens must be a whole number"),
        ({"compile": "no"}, "compile must be True or False"),
        ({"fused": 1}, "fused must be True or False"),
        ({"fast_start": None}, "fast_start must be True or False"),
        ({"batch_invariant": 0}, "batch_invariant must be True or False"),
        ({"policy": 5}, "policy must be a name"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"budget": "16"}, "budget: tokens must be a whole number"),
        ({"gates": 5}, "gates must be a name"),
        ({"tokenizer": "gpt2"}, "tokenizer must be one of transformers"),
        ({"model": 5}, "model must be a transformers decoder model"),
        ({"model": "/no/such/folder"}, "cannot load /no/such/folder"),
    ],
)
def test_what_no_engine_can_be_made_of_is_refused(model, options, words):
    with pytest.raises(ValueError, match=words) as error:
        Engine(**{"model": model, "policy": "streaming_llm", "budget": BUDGET, **options})
    one_line(error)


def test_an_engine_takes_numbers_of_numpy(model):
    with Engine(model, "streaming_llm", BUDGET, rows=np.int64(2), chunk=np.int32(CHUNK)) as engine:
        assert engine.generate([prompt(9)], long(3), progress=False)[0].tokens == alone(
            model, "streaming_llm", prompt(9), 3
        )


def test_what_a_tokenizer_makes_of_a_text_is_looked_at_too():
    model = chat_model()

    class Strange:
        chat_template = "x"
        made = None

        def __call__(self, text, **options):
            if isinstance(self.made, Exception):
                raise self.made
            return {"input_ids": self.made}

        def decode(self, ids, **options):
            raise TypeError("a token\nthat is none")

        def apply_chat_template(self, messages, **options):
            return "x"

    tokenizer = Strange()
    with Engine(model, "streaming_llm", BUDGET, rows=2, chunk=CHUNK, tokenizer=tokenizer) as engine:
        for made in ([], [1.5], [None], [[5]], [10**6], None, "text", TypeError("no\ntext"), KeyError("x")):
            tokenizer.made = made
            for bad in ("text", [{"role": "user", "content": "text"}]):
                with pytest.raises(ValueError) as error:
                    engine.add(bad)
                one_line(error)
        with pytest.raises(ValueError, match="the tokenizer refuses the prompt"):
            engine.add("text")
        assert not engine.busy
        found = engine.add([5, 6, 7], long(4)).result()  # whose text cannot be made
        assert len(found.tokens) == 4 and "4 new" in repr(found)


def test_a_lone_surrogate_is_a_text_that_the_tokenizer_refuses():
    with Engine(chat_model(), "streaming_llm", BUDGET, tokenizer=byte_tokenizer()) as engine:
        with pytest.raises(ValueError, match="tokenizer refuses") as error:
            engine.add("\ud800")
        one_line(error)


EXTREMES = [2**31, 2**63, 2**64, 10**30, 10**4000, -1, NAN, INF, -INF, 1e-320, 1e-60, 1e60, 1e300]
NUMBERS = st.sampled_from(EXTREMES) | st.integers() | st.floats()
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers(-3, 130)
    | st.sampled_from([object(), Broken(), range(10**9)])
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.lists(st.integers(0, 127), min_size=1, max_size=12)
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
    | st.floats(width=32).map(np.float32)
    | st.integers(-5, 140).map(torch.tensor)
    | st.floats().map(torch.tensor)
    | st.lists(st.integers(0, 127), max_size=5).map(torch.tensor)
    | st.lists(st.floats(), max_size=3).map(np.array)
    | st.lists(st.integers(), max_size=3).map(iter),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = list(SamplingParams.__dataclass_fields__)


@pytest.fixture(scope="module")
def small():
    """An engine, and what a prompt gets from it alone."""
    model = tiny.build("llama", hidden_size=16, num_hidden_layers=1)
    with Engine(model, "streaming_llm", BUDGET, rows=2, chunk=16) as engine:
        yield engine, alone(model, "streaming_llm", prompt(9), 6, chunk=16)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(st.lists(st.integers(0, 127), min_size=1, max_size=12), ANYTHING),
    st.one_of(
        st.tuples(st.sampled_from(FIELDS), NUMBERS).map(lambda one: dict([one])),
        st.tuples(st.sampled_from(FIELDS), ANYTHING).map(lambda one: dict([one])),
        st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
    ),
    st.one_of(st.none(), ANYTHING),
)
def test_nothing_that_one_request_brings_ends_another(small, asked, options, params):
    """Arbitrary values beside a running request: each is refused in one line, or it is served; the other gets the
    tokens that it gets alone."""
    engine, expected = small
    running = engine.add(prompt(9), long(6))
    engine.step(), engine.step(), engine.step()
    mine = [
        served_or_refused(lambda: engine.add(asked, SamplingParams(**options))),
        served_or_refused(lambda: engine.add(asked, params)),
        served_or_refused(lambda: engine.add([5], SamplingParams(**options))),
    ]
    served_or_refused(lambda: engine.cancel(asked))
    served_or_refused(lambda: engine.stream(asked))
    assert running.result().tokens == expected
    end_well(engine, mine)


@pytest.mark.parametrize("name", FIELDS)
def test_no_extreme_number_ends_a_request(small, name):
    engine, expected = small
    for value in EXTREMES:
        running = engine.add(prompt(9), long(6))
        engine.step(), engine.step(), engine.step()
        mine = served_or_refused(lambda value=value: engine.add([5], SamplingParams(**{"temperature": 1, name: value})))
        assert running.result().tokens == expected, (name, value)
        end_well(engine, [mine])


def served_or_refused(call):
    try:
        return call()
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


def end_well(engine, requests) -> None:
    """Each makes three tokens, or all that it asks for."""
    requests = [one for one in requests if one is not None]
    while any(len(one.tokens) < 3 and not one.done for one in requests):
        engine.step()
    for one in requests:
        one.cancel()
        assert one.finish_reason in ("length", "stop", "cancelled"), one
