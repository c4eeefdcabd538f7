"""``trimkv train`` as a person or a script meets it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import trimkv
from tiny_text import save_model
from trimkv.cli.app import run

SHARED = {"method", "steps", "tokens", "seconds", "tokens_per_second", "final_kl", "final_capacity", "output"}
KEYS = {*SHARED, "final_occupancy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


def trim(capsys, *arguments):
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_two_stages_give_gates_that_generate_with(capsys, folder, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("A fox ran over the hill and a hen ran after it. " * 60)
    common = ("--model", folder, "--data", text, "--context", 64, "--batch-size", 2, "--steps", 3, "--json")
    code, out, err = trim(capsys, "train", *common, "--output", tmp_path / "one", "--save-steps", 2)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert set(found) == KEYS and found["steps"] == 3 and found["tokens"] == 3 * 2 * 64
    assert json.loads((tmp_path / "one" / "gates.json").read_text())["data"] == "a.txt"
    code, out, err = trim(capsys, "train", *common, "--output", tmp_path / "one", "--save-steps", 2, "--resume")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["final_kl"] == pytest.approx(found["final_kl"])
    second = ("--stage", "eviction", "--eviction-budgets", "8,32", "--gates", tmp_path / "one")
    second += ("--output", tmp_path / "two")
    code, out, err = trim(capsys, "train", *common, *second)
    assert code == 0, err
    options = ("--gates", tmp_path / "two", "--policy", "trimkv", "--budget", 16, "--max-new-tokens", 4, "--json")
    code, out, err = trim(capsys, "generate", "--model", folder, "--prompt", "A fox ran over the hill", *options)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["policy"] == "trimkv"
    assert trimkv.load_gates(tmp_path / "two").base_model == folder


def test_what_can_be_mended_is_one_line_and_writes_nothing(capsys, folder, tmp_path):
    text, out_folder = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("short")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    common = ("train", "--model", folder, "--output", out_folder)
    for arguments, message in (
        (("--data", text, "--fast", "--device", "cpu"), "--fast is for a GPU"),
        ((), "no data"),
        (("--data", tmp_path / "none.txt"), "none.txt"),
        (("--data", text, "--steps", 1), "tokens"),
        (("--data", text, "--losses", "mse"), "known losses"),
        (("--data", text, "--stage", "eviction"), "--gates"),
        (("--data", text, "--gates", tmp_path / "nowhere", "--steps", 1), "nowhere"),
        (("--data", text, "--output", text), "a file"),
        (("--data", text, "--output", text / "gates"), "cannot be written"),
        (("--data", tmp_path / "empty.txt"), "empty.txt: the file is empty"),
        (("--data", tmp_path / "blank.jsonl"), "blank.jsonl: the file is empty"),
        (("--data", text, "--context", 64, "--budget", 64), "budget of 64 is never exceeded"),
        (("--data", text, "--context", 64, "--budget", 1000), "budget of 1000 is never exceeded"),
        (("--data", text, "--resume"), "no checkpoint to resume"),
        (("--data", text, "--report-to", "paper"), "known are tensorboard, wandb"),
        (("--data", text, "--budget", "nan"), "--budget"),
        (("--data", tmp_path / "table.csv"), "table.csv: unknown kind of file; expected .txt, .jsonl"),
        (("--data", "./table.csv"), "table.csv: unknown kind of file"),
        (("--data", text, "--resume", "--overwrite"), "choose one"),
        (("--data", text, "--eviction-budgets", "8,16"), "--eviction-budgets means nothing to --stage decay"),
    ):
        code, _, err = trim(capsys, *common, *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, (arguments, err)
        assert not out_folder.exists()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A fox ran over the hill and a hen ran after it. " * 60)
    return path


def settings(folder, text, output, *more):
    common = ("--model", folder, "--data", text, "--output", output, "--context", 64, "--budget", 8, "--json")
    return ("train", *common, "--batch-size", 1, "--steps", 4, "--intermediate-size", 8, *more)


FINAL = {"locret": {"final_regression", "final_smoothness"}, "seer_attention_r": {"final_distillation"}}


def head_settings(folder, text, output, method, *more):
    common = ("--model", folder, "--data", text, "--output", output, "--method", method, "--context", 64)
    return ("train", *common, "--batch-size", 1, "--steps", 4, "--width", 8, *more)


@pytest.mark.parametrize("method", FINAL)
def test_a_baselines_heads_are_trained_resumed_continued_and_used(method, capsys, folder, text, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    size = ("--block-size", 4) if method == "seer_attention_r" else ()
    arguments = head_settings(folder, text, one, method, "--save-steps", 2, *size)
    code, out, err = trim(capsys, *arguments, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert set(found) == SHARED | FINAL[method] and found["method"] == method
    assert found["steps"] == 4 and found["tokens"] == 4 * 64 and found["final_capacity"] is None
    assert (found["final_kl"] is None) == (method == "locret")
    meta = json.loads((one / "heads.json").read_text())
    assert (meta["kind"], meta["width"], meta["data"], meta["base_model"]) == (method, 8, "a.txt", folder)
    warmup, steps = (2000, 3000) if method == "locret" else (20, 800)
    assert meta["settings"]["warmup_steps"] == warmup * 4 // steps  # the published share of the steps
    name = next(iter(FINAL[method]))
    code, out, err = trim(capsys, *arguments, "--resume", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])[name] == pytest.approx(found[name]), err
    code, out, err = trim(capsys, *head_settings(folder, text, two, method, "--gates", one, *size))
    assert code == 0 and name.removeprefix("final_") in out and "4 steps" in out, err
    options = ("--gates", two, "--policy", method, "--budget", 16, "--max-new-tokens", 4, "--json")
    code, out, err = trim(capsys, "generate", "--model", folder, "--prompt", "A fox ran over the hill", *options)
    assert code == 0 and json.loads(out.splitlines()[-1])["policy"] == method, err


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("locret", ["--budget", 32], "--budget means nothing to --method locret"),
        ("locret", ["--stage", "decay"], "--stage"),
        ("seer_attention_r", ["--losses", "kl"], "--losses"),
        ("seer_attention_r", ["--response-only"], "--response-only"),
        ("locret", ["--block-size", 16], "--block-size means nothing to --method locret"),
        ("trimkv", [], "--width means nothing to --method trimkv"),
        ("h2o", [], "--method"),
        ("locret", ["--gates", "./nowhere"], "no heads in nowhere"),
        ("seer_attention_r", ["--width", 7], "must be even"),
        ("locret", ["--resume"], "no checkpoint to resume"),
    ],
)
def test_options_that_a_method_does_not_have(method, arguments, message, capsys, folder, text, tmp_path):
    code, out, err = trim(capsys, *head_settings(folder, text, tmp_path / "out", method), *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == "", err
    assert not (tmp_path / "out").exists()


def test_heads_of_another_method(capsys, folder, text, tmp_path):
    assert trim(capsys, *head_settings(folder, text, tmp_path / "one", "locret", "--save-steps", 2))[0] == 0
    other = head_settings(folder, text, tmp_path / "two", "seer_attention_r", "--gates", tmp_path / "one")
    code, _, err = trim(capsys, *other)
    assert code == 2 and "heads of locret" in err and not (tmp_path / "two").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    for arguments in (
        head_settings(folder, text, tmp_path / "one", "seer_attention_r", "--resume"),
        settings(folder, text, tmp_path / "one", "--resume"),
    ):
        code, _, err = trim(capsys, *arguments)
        assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("method", ["trimkv", *FINAL])
def test_the_live_line_shows_what_is_learnt(method, monkeypatch):
    from types import SimpleNamespace

    from trimkv.cli import training_progress

    said = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda self, task, **what: said.append(what["description"]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    names = {"trimkv": ["kl", "capacity", "occupancy"], "locret": ["regression"], "seer_attention_r": ["kl"]}[method]
    with training_progress.watching(4, 64) as (bar,):
        bar.on_log(None, SimpleNamespace(global_step=1), None, {"loss": 1.0, **dict.fromkeys(names, 0.5)})
        bar.on_log(None, SimpleNamespace(global_step=1), None, {"train_runtime": 1.0})
    assert len(said) == 1 and names[0] in said[0] and "0.5" in said[0]


@pytest.mark.parametrize("architecture", ["bloom", "mamba"])
def test_a_model_without_supported_layers(architecture, capsys, text, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from tiny_text import VOCABULARY, byte_tokenizer

    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 2} if architecture == "bloom" else {"hidden_size": 32}
    sizes |= {"num_hidden_layers": 1} if architecture == "mamba" else {}
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for arguments in (settings, head_settings):
        more = ("locret",) if arguments is head_settings else ()
        code, _, err = trim(capsys, *arguments(tmp_path / "other", text, tmp_path / "out", *more))
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        reason = {"bloom": "computes its attention in its own code", "mamba": "has no full-attention layer"}
        assert reason[architecture] in err and not (tmp_path / "out").exists()


def test_a_report_needs_its_package(capsys, folder, text, tmp_path, monkeypatch):
    there = importlib.util.find_spec

    def find_spec(name, *more):
        return None if name in ("tensorboard", "tensorboardX", "wandb") else there(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for name in ("tensorboard", "wandb"):
        code, _, err = trim(capsys, *settings(folder, text, tmp_path / "out", "--report-to", name))
        assert code == 2 and f"pip install {name}" in err and len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_report_gets_the_curves(capsys, folder, text, tmp_path):
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        pytest.skip("tensorboard is not installed")
    code, _, err = trim(capsys, *settings(folder, text, tmp_path / "out", "--report-to", "tensorboard"))
    assert code == 0, err
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    written = events.read_bytes()
    assert b"train/kl" in written and b"train/capacity" in written


def test_resuming_with_another_model_or_other_gates(capsys, folder, text, tmp_path):
    out = tmp_path / "out"
    assert trim(capsys, *settings(folder, text, out, "--save-steps", 2))[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = save_model(tmp_path / "wide", hidden_size=32)
    twin = shutil.copytree(folder, tmp_path / "twin")
    for model, more, message in (
        (other, (), "model is tiny there, wide here; weights is "),
        (twin, (), "model is tiny there, twin here."),
        (folder, ("--intermediate-size", 16), "intermediate_size is 8 there, 16 here"),
        (folder, ("--kind", "rg3"), "kind is rg there, rg3 here"),
    ):
        code, _, err = trim(capsys, *settings(model, text, out, "--resume", "--save-steps", 2), *more)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    moved = tmp_path / "elsewhere" / "tiny"  # the same name with other sizes
    save_model(moved, hidden_size=32)
    code, _, err = trim(capsys, *settings(moved, text, out, "--resume", "--save-steps", 2))
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("broken", ["optimizer", "gates", "state"])
def test_a_full_disk_loses_no_earlier_checkpoint(broken, capsys, folder, text, tmp_path, monkeypatch):
    """The second checkpoint fails half way; what was saved stays, and the training goes on from it."""
    import safetensors.torch
    from transformers import TrainerState

    whole = tmp_path / "whole"
    assert trim(capsys, *settings(folder, text, whole, "--save-steps", 2))[0] == 0
    expect = trim(capsys, *settings(folder, text, whole, "--save-steps", 2, "--resume"))[1]

    def full(function, position):
        def write(*arguments, **options):
            path = Path(arguments[position])
            if "checkpoint-4" in path.parts[-2]:
                path.write_bytes(b"half of it")
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return write

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if broken == "optimizer":
            patch.setattr(torch, "save", full(torch.save, 1))
        elif broken == "gates":
            patch.setattr(safetensors.torch, "save_file", full(safetensors.torch.save_file, 1))
        else:
            patch.setattr(TrainerState, "save_to_json", full(TrainerState.save_to_json, 1))
        code, _, err = trim(capsys, *settings(folder, text, out, "--save-steps", 2))
    assert code == 2 and "No space left" in err.splitlines()[-1] and "Traceback" not in err, err
    assert {path.name for path in out.iterdir()} == {"checkpoint-2", "training.json"}
    code, printed, err = trim(capsys, *settings(folder, text, out, "--save-steps", 2, "--resume"))
    assert code == 0, err
    final = [json.loads(text.splitlines()[-1])["final_kl"] for text in (printed, expect)]
    assert final[0] == pytest.approx(final[1], rel=1e-5)


def test_a_full_disk_at_the_end_leaves_the_gates_that_were_there(capsys, folder, text, tmp_path, monkeypatch):
    import safetensors.torch

    out = tmp_path / "out"
    assert trim(capsys, *settings(folder, text, out))[0] == 0
    before = {name: (out / name).read_bytes() for name in ("gates.json", "gates.safetensors")}

    def full(tensors, path, **options):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, _, err = trim(capsys, *settings(folder, text, out, "--learning-rate", 0.1, "--overwrite"))
    assert code == 2 and "No space left" in err.splitlines()[-1], err
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not [path.name for path in out.iterdir() if path.name.endswith(".part")]


def test_a_checkpoint_that_a_crash_cut_off_is_passed_over(capsys, folder, text, tmp_path):
    out = tmp_path / "out"
    assert trim(capsys, *settings(folder, text, out, "--save-steps", 2))[0] == 0
    (out / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    code, printed, err = trim(capsys, *settings(folder, text, out, "--save-steps", 2, "--resume"))
    assert code == 0, err
    assert json.loads(printed.splitlines()[-1])["steps"] == 4


def test_python_dash_m_is_the_command(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["trimkv", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("trimkv", run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith("trimkv ")
