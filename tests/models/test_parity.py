"""Generations and kept sets are those of the authors' code, recorded by ``tests/peers/authors/parity.sh --record``."""

import json
from pathlib import Path

import pytest

from peers.authors import ours
from peers.authors.cases import all_cases
from peers.authors.compare import summary

RECORDED = json.loads((Path(ours.__file__).parent / "recorded.json").read_text())
CASES = {case.name: case for case in all_cases()}


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_what_the_authors_code_generates_and_keeps(name, tmp_path):
    case, expected = CASES[name], RECORDED["cases"][name]
    folder = tmp_path / f"{case.model}-{case.gate}-{case.seed}"
    model, checksum = ours.load(case, folder)
    assert checksum == RECORDED["weights"][folder.name], "the weights are others than those that were recorded"
    tokens, kept = ours.generate(case, model)
    assert tokens == expected["tokens"]
    found = summary(kept)
    assert found["last"] == expected["last"]
    assert found["digests"] == expected["digests"], "kept sets of an earlier forward"


def test_the_recording_covers_what_it_should():
    """Both codes, all models, gates and strategies; and heads that keep different tokens."""
    cases = [CASES[name] for name in RECORDED["cases"]]
    assert {case.code for case in cases} == {"0.1.5", "0456bc4"}
    assert {case.model for case in cases} == {"qwen2", "qwen3", "llama", "phi3"}
    assert {case.gate for case in cases} == {"rg", "rg2", "rg3"}
    assert {case.strategy for case in cases} == {"alpha", "knorm_alpha"}
    assert any(case.turns > 1 for case in cases) and any(case.recent for case in cases)
    for entry in RECORDED["cases"].values():
        assert len({tuple(head) for layer in entry["last"] for head in layer}) > 2
