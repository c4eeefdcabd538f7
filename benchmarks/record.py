"""Writes a measurement with what is needed to judge it: hardware, versions, commit, command."""

import json
import shlex
import sys
from pathlib import Path

from trimkv.cli.provenance import environment

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict, folder: Path | None = None) -> dict:
    """Adds the environment, writes results/NAME.json and prints the same JSON as the last line."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    result = {"command": command, "environment": environment(), **result}
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return result
