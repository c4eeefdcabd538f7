"""A model sharded over two processes says what it says in one, and each of its heads keeps the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensor_parallel_work as work
import tiny
import trimkv
from trimkv.ranks import Part, part_of, ranks_of

ROOT = Path(__file__).parents[1]
WHOLE = ("phi3",)
pytestmark = pytest.mark.slow
gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
several = pytest.mark.skipif(not gloo, reason="this build of torch has no gloo, by which processes on a CPU speak")
CASES = [
    f"{name} {policy} {how}"
    for name, policies in work.POLICIES.items()
    for policy in policies
    for how in (("generate",) if name in WHOLE else ("generate", "engine"))
] + ["llama rg3 generate"]


def run_in_two(folder, *arguments, **variables):
    """Runs a script in two processes; fails if one of them does, or if they wait for each other for ever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "tests"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    with (folder / "said").open("w+") as said:
        started = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            code = started.wait(timeout=120)
        except subprocess.TimeoutExpired:
            started.terminate()  # not killed: a launcher that is leaves its processes behind
            code = started.wait()
        said.seek(0)
        assert code == 0, said.read()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("models")
    work.make(folder)
    one = json.loads(json.dumps(work.work(folder, several=False)))
    run_in_two(folder, work.__file__, folder, CUDA_VISIBLE_DEVICES="")
    return one, [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]


@several
@pytest.mark.parametrize("case", CASES)
def test_two_processes_answer_as_one_and_keep_the_same(results, case):
    one, both = results[0][case], [result["work"][case] for result in results[1]]
    assert both[0]["tokens"] == both[1]["tokens"] == one["tokens"]
    assert len({tuple(tokens) for tokens in one["tokens"]}) > 1, "a model that always says the same proves nothing"
    if case.split()[0] in WHOLE:
        assert both[0]["kept"] == both[1]["kept"] == one["kept"]
        return
    joined = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*(x["kept"] for x in both), strict=True)]
    assert joined == one["kept"]
    if "streaming_llm" not in case:
        assert len({str(head) for layer in one["kept"] for row in layer for head in row}) > 2


@several
def test_each_process_holds_half_of_the_slots_and_says_so(results):
    one, two = results[0], results[1][1]["work"]
    seen = 2 * 2 * 4  # a number per row and layer is everywhere
    assert two["qwen3 trimkv generate"]["bytes"] == (one["qwen3 trimkv generate"]["bytes"] - seen) / 2 + seen
    memory, half = one["qwen3 trimkv engine"]["memory"], two["qwen3 trimkv engine"]["memory"]
    assert half["slots"] == (memory["slots"] - seen) / 2 + seen
    assert half["weights"] < 0.6 * memory["weights"], "embeddings are whole in every process"


@several
def test_draws_threads_cancelling_and_ctrl_c_are_the_same_step_everywhere(results):
    """Only the first process hears Ctrl-C, and the two cancel at different tokens: its word counts."""
    first, second = (result["time"] for result in results[1])
    assert first == second
    assert first["interrupted"]
    assert len({tuple(tokens) for tokens in first["drawn"]}) == 3, "draws without a seed differ from request to request"
    assert [reason for reason, _ in first["left"]] == ["cancelled"] * 2
    assert 3 <= len(first["left"][1][1]) < 10
    assert [reason for reason, _ in first["threads"]] == ["length", "cancelled", "length", "length"]
    assert 6 <= len(first["threads"][1][1]) < 10_000


@several
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("scope", "cannot share a budget of scope layer; use scope head"),
        ("heads", "load the model in one process"),
        ("locret", "choose another policy"),
        ("save", "save gates of a model that is whole"),
        ("fused", "is sharded over processes"),
        ("mqa cache", "1 KV heads, which cannot be shared out over 2 processes"),
        ("mqa engine", "1 KV heads, which cannot be shared out over 2 processes"),
        ("mqa gates", "1 KV heads, which cannot be shared out over 2 processes"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_every_process(results, call, words):
    for result in results[1]:
        assert words in result["refusals"][call]


def test_a_whole_model_has_all_heads_here():
    model = tiny.gated("llama")
    assert ranks_of(model) is None
    assert part_of(model, model.model.layers[0].self_attn, 2) == Part(0, 2, 2)
    assert trimkv.bounded_cache(model, "trimkv", 8).slot_layers[0].facts.first_head == 0


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@several
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def test_the_benchmark_runs_small(tmp_path, device):
    """So that no minute of two GPUs is lost on it."""
    small = "--shape tiny --rows 1 2 --context 20 --budget 16 --chunk 8 --steps 4"
    script = ROOT / "benchmarks" / "tensor_parallel.py"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    run_in_two(tmp_path, script, *small.split(), "--device", device, "--output", tmp_path, **hidden)
    result = json.loads((tmp_path / f"tensor_parallel_tiny_{device}.json").read_text())
    assert result["command"].startswith("torchrun --nproc-per-node 2") and result["processes"] == 2
    assert all(found["tokens"] for found in result["gate"].values())
    for row in result["rows"]:
        one, several = row["one"], row["several"]
        assert several["bytes_per_process"]["slots"] < 0.51 * one["bytes_per_process"]["slots"]
        assert row["times_as_fast"] == pytest.approx(several["tokens_per_second"] / one["tokens_per_second"], rel=1e-2)
        assert device == "cuda" or row["same_first_tokens"] == [32] * one["rows"], "fp32 on a CPU"
