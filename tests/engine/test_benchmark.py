"""The benchmark of the engine runs from end to end without a GPU, so that a GPU's minutes are not lost on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("extra", [[], ["--sampling"]])
def test_the_gpu_benchmark_runs_small_on_a_cpu(tmp_path, extra):
    small = "--shape tiny --device cpu --budget 16 --chunk 8 --steady 40x2 --steps 4 --requests 3 --rows 2 --longest 60"
    command = [
        sys.executable,
        "engine_gpu.py",
        *small.split(),
        "--outputs",
        "3",
        "9",
        "--output",
        str(tmp_path),
        *extra,
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "engine_gpu.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert [(row["context"], row["batch"]) for row in result["steady"]] == [(40, 2), (32, 2)]
    for row in result["steady"]:
        floor = row["floor_ms"] / row["ms_per_step"]  # both and the fraction are rounded to four places
        assert 0 < row["fraction_of_floor"] == pytest.approx(floor, rel=0.05, abs=1e-4)
    load = result["load"]
    assert load["requests"] == 3 and load["output_tokens"] >= 9
    assert load["inter_token_ms"]["p99"] >= load["inter_token_ms"]["p50"] > 0
