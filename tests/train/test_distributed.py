"""Two processes train as one with twice the accumulation: the same samples, draws, losses and files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_text import save_model
from trimkv.cli.app import run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(command, **options):
    """Output and errors of a command; one thread each, so that both runs add numbers in the same order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_benchmark_finds_no_difference(tmp_path):
    """Every process draws its rows' own eviction budgets, and what is logged are means over processes."""
    command = [sys.executable, ROOT / "benchmarks" / "ddp_equivalence.py", "--device", "cpu", "--stage", "eviction"]
    out, _ = start([*command, "--steps", "6", "--output", tmp_path])
    found = json.loads(out.splitlines()[-1])
    assert len(found["curves"]["several"]) == 6 and found["environment"]["torch"]
    assert found["curves"]["single"][0]["kl"] > 1e-3
    assert max(found["largest_relative_difference"].values()) < 1e-5, found["largest_relative_difference"]
    assert json.loads(next(tmp_path.glob("*.json")).read_text()) == found


def test_the_command_line_in_two_processes(tmp_path, capsys):
    model, text = save_model(tmp_path / "model"), tmp_path / "a.txt"
    text.write_text("".join(f"Hen {i} met fox {i * i % 97}. " for i in range(400)))
    common = [
        "train",
        "--model",
        model,
        "--data",
        text,
        "--context",
        64,
        "--budget",
        8,
        "--steps",
        6,
        "--save-steps",
        3,
    ]
    common = [str(part) for part in [*common, "--batch-size", 2, "--learning-rate", 0.05, "--json"]]
    out, err = start([*LAUNCH, "2", "-m", "trimkv", *common, "--output", str(tmp_path / "two")])
    reported = [line for line in out.splitlines() if line.startswith("{")]  # torch 2.9 prints lines of its own
    assert len(reported) == 1 and out.strip().endswith(reported[0]), "the first process alone reports"
    found = json.loads(reported[0])
    assert found["steps"] == 6 and found["tokens"] == 6 * 2 * 2 * 64
    assert run([*common, "--accumulation", "2", "--output", str(tmp_path / "one")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == found["tokens"]

    curves = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        curves.append([entry for entry in state["log_history"] if "kl" in entry])
    assert len(curves[0]) == len(curves[1]) == 6
    for single, several in zip(*curves, strict=True):
        for name in ("loss", "kl", "capacity", "occupancy", "grad_norm", "learning_rate"):
            assert several[name] == pytest.approx(single[name], rel=1e-5), name
    assert json.loads((tmp_path / "two" / "gates.json").read_text())["tokens"] == found["tokens"]

    resumed, _ = start([*LAUNCH, "2", "-m", "trimkv", *common, "--resume", "--output", str(tmp_path / "two")])
    assert json.loads(resumed.strip().splitlines()[-1])["final_kl"] == pytest.approx(found["final_kl"])
