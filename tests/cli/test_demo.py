"""What the README promises of `make demo`, on the default model."""

import os
import re
from pathlib import Path

import pytest

from trimkv import embedded
from trimkv.cli.app import run

ROOT = Path(__file__).parents[2]


def test_the_readme_quotes_the_line_that_the_demo_ends_with(capsys, monkeypatch):
    if not embedded.is_cached() and os.environ.get("TRIMKV_TEST_DOWNLOAD") == "0":
        pytest.skip("the default model is not in the cache folder and TRIMKV_TEST_DOWNLOAD=0")
    try:
        embedded.fetch()
    except embedded.FetchError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")
    monkeypatch.chdir(ROOT)
    command = re.search(r"^\t\$\(BIN\)/trimkv (generate .*) 2>&1$", Path("Makefile").read_text(), re.MULTILINE).group(1)
    code = run([*command.split(), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 0 and "Keller" in out
    assert err.splitlines()[-1] in Path("README.md").read_text(encoding="utf-8").splitlines()
