"""The named recipes read the published columns, and hub datasets stream from where they lie."""

import importlib
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_text import byte_tokenizer, save_model
from trimkv.texts import Text
from trimkv.train import data as data_module
from trimkv.train.corpus import tokenise
from trimkv.train.data import PackedTexts, Source

SCRIPT = Path(__file__).parents[2] / "recipes" / "paper.py"
LONG = "All the roads of the valley lead to the mill. " * 400  # more than 4,096 tokens of four characters
SPLITS = ("train_convqa_raft", "train_convqa_raft_syntactic", "train_narrativeqa_aug_32k", "train_rag_tge_raft")

# A record of each dataset in its published columns, one to leave out, and what a model has to learn from it.
RECORDS = {
    "OpenR1-Math-220k": (
        {
            "problem": "2 + 2?",
            "solution": "It is 4.",
            "answer": "4",
            "problem_type": "Algebra",
            "source": "olympiads",
            "uuid": "a",
            "generations": ["<think>two and two</think> 4"],
            "messages": [
                {"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "<think>\n" + "two and two " * 60 + "\n</think>\n\nIt is 4."},
            ],
        },
        {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]},
        "<think>\n" + "two and two " * 60 + "\n</think>\n\nIt is 4.<|im_end|>",
    ),
    "Synth-Long-SFT32K": (
        {"conversations": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "To the mill."}]},
        {"conversations": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]},
        "To the mill.<|im_end|>",
    ),
    "booksum-complete-cleaned": (
        {"bid": 1, "title": "The Mill", "text": LONG, "summary": [{"source": "a", "text": "Roads lead there."}]},
        {"bid": 2, "title": "Nothing", "text": LONG, "summary": []},
        "Answer: Roads lead there.<|im_end|>",
    ),
    "buddhi-dataset": (
        {"extended_context": LONG, "question": "Where to?", "answer": "The mill."},
        {"extended_context": LONG, "question": "Where to?", "answer": None},
        "Answer: The mill.<|im_end|>",
    ),
    "LongAlpaca-12k": (
        {"instruction": LONG + "Where to?", "input": "", "output": "To the mill.", "file": "a.pdf"},
        {"instruction": "Where to?", "input": None, "output": "", "file": None},
        "To the mill.<|im_end|>",
    ),
}
CONFIGS = {"OpenR1-Math-220k": "default", "booksum-complete-cleaned": "books", "buddhi-dataset": "gpt4"}


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("paper_recipes", SCRIPT)
    module = sys.modules["paper_recipes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(monkeypatch):
    """A hub with two records in every dataset; what was asked of it."""
    asked = []

    def load_dataset(name, config, revision, split, streaming):
        assert streaming and (CONFIGS.get(name.split("/")[-1]) == config)
        asked.append((name, config, revision, split))
        return iter(RECORDS[name.split("/")[-1]][:2])

    import huggingface_hub

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    newest = types.SimpleNamespace(sha="newest")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: newest)
    return asked


def learnt(source):
    """What a model learns of a source."""
    corpus = tokenise(source.texts(), byte_tokenizer(), response_only=True)
    return byte_tokenizer().decode(corpus.ids[corpus.learn].tolist())


@pytest.mark.parametrize("name", ["openr1-math", "long", "longalpaca"])
def test_the_published_columns_become_conversations(name, paper, hub):
    recipe = replace(paper.RECIPES[name], steps=2)
    data, steps = paper.dataset(recipe, byte_tokenizer())
    assert steps == 2 and len(data) == 2 * 4
    assert len(hub) == 0, "nothing is read before it is needed"
    assert all(source.max_tokens >= recipe.config.context for source in data.sources)
    for part, source in zip(recipe.parts, data.sources, strict=True):
        assert learnt(source) == RECORDS[part.folder][2]
        assert hub[-1][0].endswith("/" + part.folder)
    if name == "long":
        assert [split for *_, split in hub] == [*SPLITS, "train", "train"]
    else:
        assert len(hub[0][2]) == 40, "a pinned revision"


def test_the_papers_numbers(paper):
    math, long, alpaca = (paper.RECIPES[name].config for name in ("openr1-math", "long", "longalpaca"))
    assert (math.context, math.budget) == (16384, 512)
    assert (long.context, alpaca.context, alpaca.budget) == (131072, 131072, 2048)
    for config in (math, long, alpaca):
        assert (config.learning_rate, config.warmup_steps, config.losses) == (2e-4, 100, ("kl", "ntp"))
        assert (config.capacity_weight, config.accumulation, config.intermediate_size) == (1.0, 4, 512)


def call(paper, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        paper.main()
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_a_recipe_from_the_command_line(paper, tmp_path, monkeypatch, capsys):
    def texts(path, convert, folder):
        for number, record in enumerate(RECORDS["OpenR1-Math-220k"][:2], 1):
            if (record := convert(record)) is not None:
                yield Text(None, tuple(record["messages"]), path, number)

    monkeypatch.setattr(data_module, "hub_texts", texts)
    model, out = save_model(tmp_path / "tiny"), tmp_path / "out"
    small = ("--model", model, "--output", out, "--context", 200, "--budget", 16, "--intermediate-size", 8)
    code, printed, err = call(paper, monkeypatch, capsys, "openr1-math", *small, "--steps", 2, "--save-steps", 1)
    assert code == 0, err
    assert json.loads(printed.splitlines()[-1])["tokens"] == 2 * 4 * 200
    meta = json.loads((out / "gates.json").read_text())
    assert meta["data"].startswith("open-r1/OpenR1-Math-220k/default@e4e141ec") and meta["settings"]["losses"]
    before = (out / "gates.json").read_bytes()
    code, _, err = call(paper, monkeypatch, capsys, "openr1-math", *small, "--steps", 2)
    assert code == 2 and "holds gates for" in err and "--overwrite" in err and len(err.strip().splitlines()) == 1
    code, _, err = call(paper, monkeypatch, capsys, "openr1-math", *small, "--steps", 1, "--resume")
    assert code == 2 and "steps is 2 there, 1 here" in err.splitlines()[-1] and "Traceback" not in err
    assert (out / "gates.json").read_bytes() == before
    resume = ("--steps", 2, "--resume")
    assert call(paper, monkeypatch, capsys, "openr1-math", *small, *resume)[0] == 0
    code, _, err = call(
        paper, monkeypatch, capsys, "openr1-math", *small, "--accumulation", 5, "--overwrite"
    )  # every sample once: 4
    assert code == 2 and "less than one step" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name, arguments", [("smollm2", ("train",)), ("smollm2_baselines", ())])
def test_the_bundled_sets_recipes_lose_nothing(name, arguments, tmp_path, monkeypatch, capsys):
    """One stage's folder holds something: said before the first stage begins."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    recipe = importlib.import_module(name)
    folder = tmp_path / ("longer" if arguments else "locret/longest")
    folder.mkdir(parents=True)
    (folder / "gates.json").write_text('{"base_model": "smollm2", "steps": 700}')
    monkeypatch.setattr("trimkv.embedded.resolve", lambda model: pytest.fail("the model was looked for first"))
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--data", "texts", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        recipe.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"{folder} holds gates for smollm2 (700 steps)" in err and "--overwrite" in err


def test_a_revision_that_is_not_given_is_pinned(paper, hub):
    from trimkv.train.hub import pin

    assert pin("hub:a/b:train:text") == "hub:a/b@newest:train:text"
    assert pin("a/b/c") == "hub:a/b/c@newest" and pin("hub:a/b@x") == "hub:a/b@x"


def copies(folder, suffix):
    """Snapshots of the datasets' repositories, as a download leaves them."""
    datasets = pytest.importorskip("datasets")
    for name, (good, bad, _) in RECORDS.items():
        place, config = folder / name, CONFIGS.get(name, "default")
        splits = SPLITS if name == "Synth-Long-SFT32K" else ("train",)
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
        for split in splits:
            (place / "data").mkdir(parents=True, exist_ok=True)
            file = place / "data" / f"{split}{suffix}"
            if suffix == ".parquet":
                datasets.Dataset.from_list([good, bad]).to_parquet(file)
            else:
                file.write_text("".join(json.dumps(record) + "\n" for record in (good, bad)))
            lines += [f"  - split: {split}", f"    path: data/{file.name}"]
        (place / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["openr1-math", "long", "longalpaca"])
def test_local_copies_stream_through_the_same_call(name, suffix, paper, tmp_path):
    recipe = replace(paper.RECIPES[name], steps=2)
    data, _ = paper.dataset(recipe, byte_tokenizer(), copies(tmp_path, suffix))
    for part, source in zip(recipe.parts, data.sources, strict=True):
        assert learnt(source) == RECORDS[part.folder][2]


def test_what_is_wrong_with_a_copy_is_one_line(paper, tmp_path):
    folder = copies(tmp_path, ".jsonl")
    name = "LongAlpaca-12k"
    converted = Source(f"hub:Yukang/{name}", folder=folder / name, convert=paper.long_alpaca)
    for source, message in (
        (Source(f"hub:Yukang/{name}:nowhere", folder=folder / name), "cannot be loaded .*nowhere"),
        (Source(f"hub:Yukang/{name}/other", folder=folder / name), "cannot be loaded .*other"),
        (Source(f"hub:Yukang/{name}:train:text", folder=folder / name), "no field text; there are instruction"),
        (Source(f"hub:Yukang/{name}", folder=folder / name), "record 1: no known fields"),
        (replace(converted, convert=paper.buddhi), "no field 'extended_context'; there are instruction"),
        (replace(converted, folder=folder / "no"), "no such folder"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            PackedTexts([source], byte_tokenizer(), 64)[0]
        assert "\n" not in str(error.value)
    (folder / name / "data" / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": ')
    with pytest.raises(ValueError, match="cannot be (read after record|loaded)") as error:
        PackedTexts([converted], byte_tokenizer(), 64)[0]
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    pytest.importorskip("datasets")
    import huggingface_hub

    def offline(*arguments, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(ValueError, match="org/name: cannot be loaded .no route to the hub.") as error:
        PackedTexts(["org/name"], byte_tokenizer(), 64)[0]
    assert "\n" not in str(error.value)
