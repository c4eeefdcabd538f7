"""`make clean` removes what was built and nothing else, and says what it leaves."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.skipif(shutil.which("make") is None or not MAKEFILE.is_file(), reason="no make, or not in a checkout")
@pytest.mark.parametrize("venv", [True, False])
def test_clean(tmp_path, venv):
    root, model = tmp_path / "checkout", tmp_path / "my cache" / "smollm2"
    for folder in ("src/trimkv/__pycache__", "src/trimkv.egg-info", "build", ".venv-newest", ".pytest_cache", "docs"):
        (root / folder).mkdir(parents=True)
    (root / "src" / "trimkv" / "kept.py").write_text("")
    shutil.copy(MAKEFILE, root)
    model.mkdir(parents=True)
    if venv:
        (root / ".venv" / "bin").mkdir(parents=True)
        python = root / ".venv" / "bin" / "python"
        python.write_text(f"#!/bin/sh\necho '{model}'\n")
        python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "clean"], cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    left = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    assert left == ["Makefile", "docs", "src", "src/trimkv", "src/trimkv/kept.py"]
    assert model.is_dir()
    assert (f"rm -r '{model}'" if venv else "TRIMKV_HOME") in done.stdout
