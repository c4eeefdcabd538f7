"""A training's folder: never resumed as another training, never overwritten without being told to."""

import json
import shutil

import pytest

import trimkv
from tiny_text import chat_model, save_model
from trimkv.cli import loading
from trimkv.cli.app import run
from trimkv.gates.attach import new_gates
from trimkv.gates.head_sets import new_heads, save_heads

TEXT = "A fox ran over the hill and a hen ran after it. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


def arguments(folder, data, output, *more):
    common = ("--model", folder, "--data", data, "--context", 64, "--budget", 8, "--steps", 4, "--batch-size", 1)
    return [str(part) for part in ("train", *common, "--intermediate-size", 8, "--output", output, *more)]


@pytest.fixture
def train(capsys, folder, text):
    """Runs the command on the tiny model: (exit code, stdout, stderr)."""

    def call(output, *more, data=text):
        capsys.readouterr()
        return run(arguments(folder, data, output, *more)), *capsys.readouterr()

    return call


def contents(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def refused(found, *said):
    code, out, err = found
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("trimkv: error: "), err
    for fragment in said:
        assert fragment in err


def no_model(monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded first"))


@pytest.fixture(scope="module")
def once(folder, tmp_path_factory):
    """A finished training with checkpoints, made once."""
    root = tmp_path_factory.mktemp("once")
    (root / "a.txt").write_text(TEXT)
    assert run(arguments(folder, root / "a.txt", root / "out", "--save-steps", 2)) == 0
    return root / "out"


class TestResume:
    @pytest.fixture
    def trained(self, once, tmp_path):
        return shutil.copytree(once, tmp_path / "out")

    @pytest.mark.parametrize(
        "changed, there, here",
        [
            (("--context", 32), "context is 64 there", "32 here"),
            (("--budget", 4), "budget is 8.0 there", "4.0 here"),
            (("--steps", 3), "steps is 4 there", "3 here"),
            (("--steps", 8), "steps is 4 there", "8 here"),
            (("--seed", 1), "seed is 0 there", "1 here"),
            (("--batch-size", 2), "batch_size is 1 there", "2 here"),
            (("--learning-rate", 0.1), "learning_rate is 0.003 there", "0.1 here"),
            (("--dtype", "bfloat16"), "dtype is float32 there", "bfloat16 here"),
            (("--no-borders",), "borders False here", "data is a.txt of"),
        ],
    )
    def test_other_options(self, train, trained, monkeypatch, changed, there, here):
        no_model(monkeypatch)
        before = contents(trained)
        refused(train(trained, "--resume", *changed), "checkpoint-4", there, here, "--overwrite")
        assert contents(trained) == before

    def test_other_text_in_a_file_of_the_same_name(self, train, trained, text, monkeypatch):
        no_model(monkeypatch)
        text.write_text(TEXT.replace("fox", "dog"))
        size = f"{len(TEXT):,} bytes"
        refused(train(trained, "--resume"), f"data is a.txt of {size}", f"there, a.txt of {size}")

    def test_another_file(self, train, trained, tmp_path):
        (tmp_path / "b.txt").write_text(TEXT)
        refused(train(trained, "--resume", data=tmp_path / "b.txt"), "data is a.txt of 2,880", "there, b.txt of 2,880")

    def test_another_stage_or_other_gates_to_start_from(self, train, trained, tmp_path):
        gates = new_gates(chat_model(num_hidden_layers=2), intermediate_size=8)
        trimkv.save_gates(gates, tmp_path / "start")
        start = ("--gates", tmp_path / "start")
        refused(train(trained, "--resume", *start), "start is none there")
        second = ("--stage", "eviction", "--eviction-budgets", "8,32")
        refused(train(trained, "--resume", *start, *second), "stage is decay there, eviction here")

    def test_other_weights_in_a_folder_of_the_same_name(self, train, trained, folder, tmp_path):
        other = save_model(tmp_path / "other" / "tiny", num_hidden_layers=2, seed=1)
        refused(train(trained, "--resume", "--model", other), "weights is ")
        assert train(trained, "--resume", "--model", shutil.copytree(folder, tmp_path / "moved" / "tiny"))[0] == 0

    def test_what_changes_no_number_may_change(self, train, trained, text, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        moved = text.rename(tmp_path / "elsewhere" / "a.txt")
        before = (trained / "gates.safetensors").read_bytes()
        (trained / "gates.safetensors").unlink()
        code, _, err = train(trained, "--resume", "--save-steps", 1, data=moved)
        assert code == 0, err
        assert (trained / "gates.safetensors").read_bytes() == before

    def test_a_checkpoint_that_does_not_say_what_it_is_of(self, train, trained):
        (trained / "checkpoint-4" / "training.json").unlink()
        refused(train(trained, "--resume"), "checkpoint-4 does not say what training it is of")

    def test_the_record_names_the_data_with_its_hash(self, trained):
        import hashlib

        for name in ("training.json", "checkpoint-2/training.json", "gates.json"):
            found = json.loads((trained / name).read_text())["made_of"]
            digest = hashlib.sha256(TEXT.encode()).hexdigest()
            assert found["data"] == [{"name": "a.txt", "bytes": len(TEXT), "sha256": digest}], name
            assert found["weights"] and found["tokens"]


@pytest.mark.parametrize("save_steps", [0, 2])
def test_provenance_is_of_the_training_that_made_the_gates(train, tmp_path, save_steps):
    """A new training over a finished one, then --resume: once the old gates came back with the new data's name."""
    out, other = tmp_path / "out", tmp_path / "b.txt"
    other.write_text("Something else altogether was written here. " * 60)
    assert train(out, "--save-steps", 2)[0] == 0

    def new(*more):
        return train(out, "--context", 32, "--save-steps", save_steps, *more, data=other)

    before = contents(out)
    refused(new(), "out holds gates for", "(4 steps on a.txt)", "--overwrite")
    refused(new("--resume"), "context is 64 there, 32 here")
    assert contents(out) == before
    code, _, err = new("--overwrite")
    assert code == 0, err
    assert json.loads((out / "gates.json").read_text())["context"] == 32
    made = contents(out)
    if save_steps:
        assert new("--resume")[0] == 0
    else:
        refused(new("--resume"), "no checkpoint to resume")
        assert not list(out.glob("checkpoint-*")), "those of the first training"
    assert contents(out)[out / "gates.safetensors"] == made[out / "gates.safetensors"]


class TestOccupied:
    """Before a model is loaded, and nothing is touched."""

    @pytest.fixture
    def gates(self, tmp_path):
        trimkv.save_gates(new_gates(chat_model(num_hidden_layers=2), intermediate_size=8), tmp_path / "gates", steps=7)
        return tmp_path / "gates"

    def test_gates_are_not_lost(self, train, gates, monkeypatch):
        no_model(monkeypatch)
        before = contents(gates)
        refused(train(gates), "holds gates", "7 steps", "--overwrite")
        refused(train(gates, "--gates", gates), "holds gates")
        refused(train(gates, "--method", "locret"), "--budget means nothing")
        assert contents(gates) == before

    def test_neither_are_heads_nor_published_gates(self, train, tmp_path, monkeypatch):
        no_model(monkeypatch)
        save_heads(new_heads(chat_model(num_hidden_layers=2), "locret", width=8), tmp_path / "heads")
        refused(train(tmp_path / "heads"), "holds heads")
        (tmp_path / "published").mkdir()
        (tmp_path / "published" / "trimkv_weights.pth").write_bytes(b"x")
        refused(train(tmp_path / "published"), "holds gates")

    def test_an_unfinished_training_is_not_lost(self, train, tmp_path, monkeypatch):
        out = tmp_path / "out"
        assert train(out, "--save-steps", 2)[0] == 0
        (out / "gates.json").unlink()
        (out / "gates.safetensors").unlink()
        no_model(monkeypatch)
        refused(train(out, "--save-steps", 2), "unfinished training, saved at step 4; --resume goes on")

    def test_told_to_it_replaces_them(self, train, gates):
        before = contents(gates)
        assert train(gates, "--gates", gates, "--overwrite")[0] == 0
        assert contents(gates)[gates / "gates.safetensors"] != before[gates / "gates.safetensors"]

    def test_in_python_too(self, gates, tmp_path):
        model = chat_model(num_hidden_layers=2)
        before = contents(gates)
        with pytest.raises(ValueError, match="holds gates.safetensors already.*overwrite=True"):
            trimkv.save_gates(new_gates(model, intermediate_size=8), gates)
        assert contents(gates) == before
        trimkv.save_gates(new_gates(model, intermediate_size=16), gates, overwrite=True)
        assert trimkv.load_gates(gates).intermediate_size == 16
        heads = new_heads(model, "locret", width=8)
        save_heads(heads, tmp_path / "heads")
        with pytest.raises(ValueError, match="holds heads.safetensors already"):
            save_heads(heads, tmp_path / "heads")


class TestNothingToLearn:
    """A run that would train nothing is refused before the model is loaded."""

    @pytest.fixture
    def second(self, tmp_path, monkeypatch):
        trimkv.save_gates(new_gates(chat_model(num_hidden_layers=2), intermediate_size=8), tmp_path / "start")
        no_model(monkeypatch)
        return ("--stage", "eviction", "--gates", tmp_path / "start")

    def test_budgets_of_the_second_stage_that_evict_nothing(self, train, second, tmp_path):
        said = ("--eviction-budgets 48,640", "nothing is evicted at 640 slots in a context of 64", "HIGH below 64")
        refused(train(tmp_path / "out", *second), *said)
        refused(train(tmp_path / "out", *second, "--eviction-budgets", "8,64"), "at 64 slots")
        for wrong in ("8", "16,8", "8,8", "8,16,32", "a,b", "0,8"):
            refused(train(tmp_path / "out", *second, "--eviction-budgets", wrong), f"--eviction-budgets {wrong}")
        assert not (tmp_path / "out").exists()

    def test_records_shorter_than_every_budget(self, train, second, tmp_path):
        short = tmp_path / "short.jsonl"
        short.write_text("".join(json.dumps({"text": f"hen {i}"}) + "\n" for i in range(200)))
        said = ("the longest document has 7 tokens, and all fit into 8 slots", "--no-borders")
        refused(train(tmp_path / "out", data=short), "nothing to learn", *said, "--budget")
        budgets = ("--eviction-budgets", "8,32")
        refused(train(tmp_path / "out", *second, *budgets, data=short), *said, "smaller --eviction-budgets")
        assert not (tmp_path / "out").exists()


def test_without_borders_short_records_teach_something(train, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"hen {i}"}) + "\n" for i in range(200)))
    code, _, err = train(tmp_path / "out", "--no-borders", data=short)
    assert code == 0, err
