"""``trimkv train`` as a person or a script meets it."""

import json

import pytest

import trimkv
from tiny_text import save_model
from trimkv.cli.app import run

KEYS = {"steps", "tokens", "seconds", "tokens_per_second", "final_kl", "final_capacity", "final_occupancy", "output"}


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
    common = ("--model", folder, "--data", text, "--context", 48, "--batch-size", 2, "--steps", 3, "--json")
    code, out, err = trim(capsys, "train", *common, "--output", tmp_path / "one", "--save-steps", 2)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert set(found) == KEYS and found["steps"] == 3 and found["tokens"] == 3 * 2 * 48
    assert json.loads((tmp_path / "one" / "gates.json").read_text())["data"] == "a.txt"
    code, out, err = trim(capsys, "train", *common, "--output", tmp_path / "one", "--save-steps", 2, "--resume")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["final_kl"] == pytest.approx(found["final_kl"])
    second = ("--stage", "eviction", "--gates", tmp_path / "one", "--output", tmp_path / "two")
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
    common = ("train", "--model", folder, "--output", out_folder)
    for arguments, message in (
        ((), "no data"),
        (("--data", tmp_path / "none.txt"), "none.txt"),
        (("--data", text, "--steps", 1), "tokens"),
        (("--data", text, "--losses", "mse"), "known losses"),
        (("--data", text, "--stage", "eviction"), "--gates"),
        (("--data", text, "--gates", tmp_path / "nowhere", "--steps", 1), "nowhere"),
        (("--data", text, "--output", text), "a file"),
    ):
        code, _, err = trim(capsys, *common, *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, (arguments, err)
        assert not out_folder.exists()
