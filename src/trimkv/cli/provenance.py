"""What is needed to judge a measurement later: hardware, versions, commit."""

import os
import platform
import subprocess
import time
from pathlib import Path


def environment() -> dict:
    """Hardware, versions and commit of this run; the commit is None where the package is not in a git checkout."""
    import torch
    import transformers

    from .. import __version__

    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trimkv": __version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that the package runs from, with "+changes" if its sources have some.

    TRIMKV_COMMIT names it where the sources were copied to a machine without their history.
    """
    if os.environ.get("TRIMKV_COMMIT"):
        return os.environ["TRIMKV_COMMIT"]
    source = Path(__file__).parent.parent
    if not (source.parent.parent / ".git").exists():  # installed: a repository around it is somebody else's
        return None
    commit = _git(source, "rev-parse", "--short", "HEAD")
    return commit and commit + ("+changes" if _git(source, "status", "--porcelain", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
