"""What two results were made of, and what differs, in words."""

import hashlib

import pytest
import torch

from trimkv import fingerprint


def test_files_are_known_by_their_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    found = fingerprint.of_file(tmp_path / "a")
    assert found == {"name": "a", "bytes": 3000, "sha256": hashlib.sha256(b"abc" * 1000).hexdigest()}
    one = fingerprint.of_folder(tmp_path)
    (tmp_path / "b").write_bytes(b"")
    assert fingerprint.of_folder(tmp_path) != one


def test_tensors_are_known_by_their_bytes():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert fingerprint.of_tensors([one, two]) == fingerprint.of_tensors([one.clone(), two.clone()])
    assert fingerprint.of_tensors([one, two]) != fingerprint.of_tensors([two, one])
    assert fingerprint.of_tensors([one.bfloat16()]) != fingerprint.of_tensors([one])


@pytest.mark.parametrize(
    "then, now, said",
    [
        ({"a": 1, "b": 2}, {"a": 1}, []),
        ({"a": [1, 2]}, {"a": (1, 2)}, []),
        ({"a": 1}, {"a": 2}, ["a is 1 there, 2 here"]),
        ({}, {"a": 2}, ["a is none there, 2 here"]),
        ({"v": {"x": 1, "y": 2}}, {"v": {"x": 1, "y": 3}}, ["v.y is 2 there, 3 here"]),
        (
            {"d": [{"name": "a.txt", "bytes": 1000, "sha256": "0123456789"}]},
            {"d": [{"name": "a.txt", "bytes": 2000, "sha256": "abcdefghij", "borders": False}]},
            ["d is a.txt of 1,000 bytes [01234567] there, a.txt of 2,000 bytes [abcdefgh] borders False here"],
        ),
    ],
)
def test_differences_name_both_sides(then, now, said):
    assert fingerprint.differences(then, now) == said


def test_many_differences_are_one_line():
    found = fingerprint.differences({}, {str(i): i for i in range(9)})
    assert fingerprint.line(found).endswith("2 is none there, 2 here (and 6 more)")
