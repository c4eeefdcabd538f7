"""Advice to install something installs that, whichever shell it is typed in."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from trimkv import extras

SOURCE = Path(extras.__file__).parent


def test_from_a_checkout_the_advice_names_this_python_and_the_checkout(monkeypatch, tmp_path):
    root = tmp_path / "my checkout"
    (root / "src" / "trimkv").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    monkeypatch.setattr(extras, "PACKAGE", root / "src" / "trimkv")
    monkeypatch.setattr(sys, "executable", "/some where/python")
    words = shlex.split(extras.install_extra("train"))
    assert words == ["/some where/python", "-m", "pip", "install", "-e", f"{root}[train]"]


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_without_a_checkout_it_never_looks_this_package_up(monkeypatch, tmp_path, extra):
    """The name trimkv leads to somebody else's release on the public package index."""
    monkeypatch.setattr(extras, "PACKAGE", tmp_path / "site-packages" / "trimkv")
    words = shlex.split(extras.install_extra(extra))
    assert words == [sys.executable, "-m", "pip", "install", *extras.EXTRAS[extra]]


def test_the_extras_are_those_of_the_project():
    project = SOURCE.parent.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("not in a checkout")
    declared = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert {name: tuple(declared[name]) for name in extras.EXTRAS} == extras.EXTRAS


def test_no_other_advice_is_given_in_the_source():
    found = [path.name for path in sorted(SOURCE.rglob("*.py")) if re.search(r"pip install", path.read_text())]
    assert found == ["extras.py"]
