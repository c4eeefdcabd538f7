"""How to install a package that is missing: a command that works wherever it is typed.

"pip install 'trimkv[train]'" would not do. The ``pip`` of a shell may belong to another Python, and the name may lead
to another release on a package index.
"""

import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
EXTRAS = {"train": ("accelerate>=1.10", "datasets>=3"), "viz": ("matplotlib>=3.9",)}  # as in pyproject.toml


def install_extra(extra: str) -> str:
    """The command that installs an optional extra of this package for the running Python.

    From a checkout it names the checkout. Otherwise it names the packages that the extra stands for, so that this
    package is not looked up anywhere.

    Args:
        extra: a key of ``EXTRAS``.
    """
    root = checkout()
    return _pip("-e", f"{root}[{extra}]") if root else install(*EXTRAS[extra])


def install(*packages: str) -> str:
    """The command that installs packages for the running Python."""
    return _pip(*packages)


def checkout() -> Path | None:
    """The source tree that this package runs from; None where it is installed without one."""
    root = PACKAGE.parent.parent
    return root if root / "src" / "trimkv" == PACKAGE and (root / "pyproject.toml").is_file() else None


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *arguments])
