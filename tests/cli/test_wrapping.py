"""What a long answer looks like on a terminal."""

import pytest

from trimkv.cli.wrapping import Wrapped

CODE = "```python\nif a_long_condition and another_one:\n    pass\n```\n"


def shown(text: str, width: int, size: int) -> str:
    """The text, arriving in pieces of a size."""
    out = []
    wrapped = Wrapped(out.append, lambda: width)
    for start in range(0, len(text), size):
        wrapped(text[start : start + size])
    wrapped.end()
    return "".join(out)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("one two three four", "one two\nthree four"),
        ("one two thr", "one two thr"),
        ("one two  three", "one two\nthree"),
        ("one\ntwo\n\n  three", "one\ntwo\n\n  three"),
        ("a wordthatislongerthanaline b", "a\nwordthatisl\nongerthanal\nine b"),
        ("漢字漢字漢字漢字", "漢字漢字漢\n字漢字"),
        (f"some words here\n{CODE}some words here", f"some words\nhere\n{CODE}some words\nhere"),
        ("trailing \n", "trailing\n"),
        ("", ""),
    ],
)
def test_lines_end_between_words_and_code_stays_as_it_is(text, expected, size):
    assert shown(text, 11, size) == expected


def test_words_appear_while_the_answer_is_written():
    out = []
    wrapped = Wrapped(out.append, lambda: 80)
    for piece in ("Hel", "lo", " wor", "ld", " "):
        wrapped(piece)
    assert out == ["Hello", " world"]
