import io
import sys

import pytest

from tiny_text import save_model
from trimkv.cli.app import run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model that --model takes."""
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """A chat whose lines are piped in: (exit code, stdout, stderr)."""

    def call(*lines: str, options=(), model=folder):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capsys.readouterr()
        common = ("--model", model, "--budget", 24, "--max-new-tokens", 5, "--temperature", 0)
        code = run([str(argument) for argument in ("chat", *common, *options)])
        return code, *capsys.readouterr()

    return call
