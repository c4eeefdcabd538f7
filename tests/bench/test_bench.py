"""`trimkv bench`: numbers only for what is right, a row for every system, and the keys that scripts rely on."""

import json
import subprocess
import sys

import pytest
import torch

import trimkv
from trimkv.attention import reference
from trimkv.bench import attention, decode, fill, linear, measure, models, prefill, shapes
from trimkv.cli import bench_kinds
from trimkv.cli.app import run
from trimkv.viz.bench import common

CPU = torch.device("cpu")
KEYS = {"system", "ms", "tokens_per_second", "peak_bytes", "floor_ms", "fraction_of_floor"}


@pytest.fixture(scope="module")
def model():
    return models.build("tiny", "cpu", torch.float32)


def options(**changes):
    given = {"contexts": (40,), "batches": (2,), "budget": 16, "steps": 3, "repeat": 1, **changes}
    return decode.Options(**given)


def check_numbers(row):
    assert KEYS <= set(row) and "error" not in row, row
    assert row["ms"] > 0 and row["tokens_per_second"] > 0 and row["peak_bytes"] > 0
    assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_decode_measures_every_system(model):
    rows = list(decode.measure(model, options(contexts=(40, 80)), 1e10))
    assert [(row["system"], row["context"]) for row in rows] == [(s, c) for c in (40, 80) for s in decode.SYSTEMS]
    for row in rows:
        check_numbers(row)
        assert row["tokens_per_second"] == pytest.approx(2 / row["ms"] * 1e3)
    floors = {(row["system"], row["context"]): row["floor_ms"] for row in rows}
    token = models.token_bytes(model)
    assert (floors["full", 80] - floors["full", 40]) == pytest.approx(2 * 40 * token / 1e10 * 1e3)
    assert floors["trimkv", 80] == floors["trimkv", 40] < floors["stock-dynamic", 40]


def test_fused_steps_are_measured_where_they_are_right(model):
    """On a GPU they are what system trimkv is; trimkv-compiled stays what it was."""
    given = options(systems=("full", "trimkv-compiled", "trimkv"), fused=True)
    for row in decode.measure(model, given, 1e10):
        check_numbers(row)
    cache = trimkv.bounded_cache(model, "trimkv", 16, rows=2)
    assert given.step(model, cache, "trimkv-compiled").fused is None and given.step(model, cache, "trimkv").fused


def test_products_of_a_layer_are_measured():
    rows = list(linear.measure(linear.Options("tiny", (1, 3), repeat=1), CPU, torch.float32, 1e10))
    assert [(row["product"], row["batch"], row["system"]) for row in rows] == [
        (name, batch, system) for name in linear.PRODUCTS for batch in (1, 3) for system in linear.SYSTEMS
    ]
    for row in rows:
        check_numbers(row)
    moved = {row["product"]: row["moved_bytes"] for row in rows}
    assert moved["down"] == 96 * 64 * 4 and moved["head"] == 256 * 64 * 4


def test_floors_are_the_bytes_of_the_shape():
    """Qwen3-4B by its published sizes: 4.02 billion weights, 147,456 bytes a token in bf16."""
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(models.config_of("qwen3-4b"), dtype=torch.bfloat16)
        untied = AutoModelForCausalLM.from_config(models.config_of("qwen3-8b"), dtype=torch.bfloat16)
    assert models.token_bytes(model) == 147_456
    assert models.step_weights(model) == pytest.approx(8.04e9, rel=2e-3)
    total = sum(p.nbytes for p in untied.parameters())
    assert models.step_weights(untied) == total - 151_936 * 4096 * 2


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_shape_is_a_configuration(shape):
    config = models.config_of(shape)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    with pytest.raises(ValueError, match="qwen3-4b"):
        models.config_of("gpt-5")


def test_what_is_wrong_gets_no_number(monkeypatch, model):
    """A kernel that forgets the values would be fast."""
    attend = trimkv.attention.slots.attend
    monkeypatch.setattr(trimkv.attention.slots, "attend", lambda *a, **o: 0 * attend(*a, **o))
    rows = {row["system"]: row for row in decode.measure(model, options(), 1e10)}
    assert rows["full"]["ms"] is None and "logits differ" in rows["full"]["error"]
    check_numbers(rows["stock-dynamic"])
    given = prefill.Options((64,), (1,), 16, 16)
    rows = {row["system"]: row for row in prefill.measure(model, given, 1e10)}
    assert "logits differ" in rows["trimkv"]["error"]
    check_numbers(rows["stock-dynamic"])
    given = attention.Options("tiny", (2,), (16,))
    rows = {row["system"]: row for row in attention.measure(given, CPU, torch.float32, 1e10)}
    assert "differs" in rows["trimkv"]["error"]
    check_numbers(rows["sdpa"])


def test_a_system_that_does_not_fit_is_a_row_and_not_a_crash(monkeypatch, model):
    def too_large(model, system, *rest):
        if system == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if system == "stock-static":
            raise RuntimeError("what a compiler says\nin two lines")
        return {"ms": 1.0, "tokens_per_second": 1.0, "floor_ms": 0.5}

    monkeypatch.setattr(decode, "_time", too_large)
    rows = {row["system"]: row for row in decode.measure(model, options(), 1e10)}
    assert rows["full"]["error"] == "out of memory" and rows["full"]["ms"] is None
    assert rows["stock-static"]["error"] == "RuntimeError: what a compiler says in two lines"
    check_numbers(rows["trimkv"])


def test_a_filled_cache_is_one_that_has_read_its_context(model):
    """The next step evicts, and stands where the context ends."""
    cache = trimkv.bounded_cache(model, "trimkv", 16, rows=2)
    fill.bounded(cache, 1000)
    for layer in cache.slot_layers:
        position = layer.store.position
        assert all(len(set(head)) == 16 and max(head) == 999 for row in position.tolist() for head in row)
    with torch.no_grad():
        model(torch.tensor([[3], [4]]), past_key_values=cache)
    assert cache.seen.tolist() == [1001, 1001]
    assert cache.slot_layers[0].store.position.amax() == 1000 and cache.held_tokens == 16
    stock = fill.dynamic(model, 2, 30)
    assert stock.get_seq_length() == 30
    fixed = fill.static(model, 2, 30, 40)
    assert int(fixed.get_seq_length()) == 30 and fixed.layers[0].keys[:, :, 29].abs().sum() > 0


def test_relative_error_of_nan_is_not_small():
    bad = torch.tensor([1.0, float("nan")])
    assert reference.relative_error(bad, torch.ones(2)) == float("inf")


def from_command_line(capsys, *arguments):
    code = run(["bench", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", "--context", "40", "--budget", "16", "--steps", "2"),
        ("prefill", "--context", "64", "--budget", "16", "--chunk", "16"),
        ("attention", "--batch", "1,2", "--budget", "16"),
        ("train", "--context", "32", "--batch", "2", "--budget", "8", "--steps", "4"),
    ],
    ids=lambda a: a[0],
)
def test_the_command_gives_what_was_promised(capsys, tmp_path, arguments):
    path = tmp_path / "result.json"
    result = from_command_line(capsys, *arguments, "--shape", "tiny", "--output", str(path))
    assert {"rows", "device", "copy_bandwidth", "versions", "commit"} <= set(result)
    assert {"torch", "transformers", "trimkv"} <= set(result["versions"])
    for row in result["rows"]:
        check_numbers(row)
    assert json.loads(path.read_text()) == result


DECODE = ("bench", "decode", "--shape", "tiny", "--context", "40", "--budget", "16", "--steps", "2")
DECODE += ("--compare", "full,trimkv", "--output")


def test_a_finished_measurement_is_shown_and_another_one_refused(capsys, tmp_path, monkeypatch):
    path = str(tmp_path / "o.json")
    assert run([*DECODE, path]) == 0
    shown = capsys.readouterr().out
    before = (tmp_path / "o.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(decode, "measure", lambda *a: pytest.fail("measured again"))
        assert run([*DECODE, path]) == 0
        out, err = capsys.readouterr()
        assert out == shown and "holds this measurement, finished" in err
        for changed, said in (
            (("--context", "80"), "context is 40 there, 80 here"),
            (("--compare", "full"), "systems is full, trimkv there, full here"),
            (("--dtype", "bfloat16"), "dtype is float32 there, bfloat16 here"),
        ):
            assert run([*DECODE, path, *changed]) == 2
            out, err = capsys.readouterr()
            assert said in err and "--overwrite" in err and len(err.splitlines()) == 1 and not out
        assert run(["bench", "attention", "--shape", "tiny", "--output", path]) == 2
        assert "command is bench decode there, bench attention here" in capsys.readouterr().err
    assert (tmp_path / "o.json").read_bytes() == before
    assert run([*DECODE, path, "--context", "80", "--overwrite"]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["rows"][0]["context"] == 80
    assert sorted(file.name for file in tmp_path.iterdir()) == ["o.json"]


def test_what_a_kill_left_is_not_a_result(capsys, tmp_path, monkeypatch):
    """Rows grow beside the file; the same measurement begins anew, another one does not touch them."""
    rows = decode.measure

    def killed(*arguments):
        yield next(rows(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decode, "measure", killed)
        assert run([*DECODE, str(tmp_path / "o.json")]) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["o.json.part"]
    assert len(json.loads((tmp_path / "o.json.part").read_text())["rows"]) == 1
    assert run([*DECODE, str(tmp_path / "o.json"), "--context", "80"]) == 2
    assert "o.json.part holds another result: context is 40 there, 80 here" in capsys.readouterr().err
    assert run([*DECODE, str(tmp_path / "o.json")]) == 0
    assert "measured anew" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["o.json"]


@pytest.mark.parametrize("what", ["decode", "prefill", "attention", "train"])
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, RuntimeError])
def test_where_nothing_could_be_measured_there_is_no_result(what, error, capsys, tmp_path, monkeypatch):
    """Once: exit 0, and a file whose only row said what should have been typed."""
    from trimkv.bench import train

    def refuse(*arguments, **options):
        raise error("another size would do")

    module, name = {
        "decode": (decode, "_time"),
        "prefill": (prefill, "_read"),
        "attention": (attention, "decode_step"),
    }.get(what, (train, "_steps"))
    monkeypatch.setattr(module, name, refuse)
    for other in (decode, prefill):
        monkeypatch.setattr(other, "_error", lambda *a: None)
    for name in ("copy_bandwidth", "matmul_rate"):
        monkeypatch.setattr(measure, name, lambda *a: 1e10)
    arguments = ["bench", what, "--shape", "tiny", "--budget", "16", "--output", str(tmp_path / "o.json"), "--json"]
    code = run([*arguments, *(["--context", "40"] if what != "attention" else [])])
    out, err = capsys.readouterr()
    said = "out of memory" if error is torch.OutOfMemoryError else "another size would do"
    assert code == (1 if error is RuntimeError else 2), err
    assert said in err and err.startswith("trimkv: error: no system could be measured") and len(err.splitlines()) == 1
    assert out == "" and not list(tmp_path.iterdir())


def test_a_training_whose_budget_is_never_exceeded(capsys, monkeypatch):
    monkeypatch.setattr(measure, "copy_bandwidth", lambda *a: pytest.fail("measured first"))
    assert run(["bench", "train", "--shape", "tiny", "--context", "128", "--steps", "2"]) == 2
    err = capsys.readouterr().err
    assert "--budget 256 --context 128: a budget of 256 is never exceeded" in err and len(err.splitlines()) == 1


def test_one_system_that_fails_does_not_hide_the_others(capsys, tmp_path, monkeypatch):
    time = decode._time

    def some(model, system, *rest):
        if system == "full":
            raise ValueError("not this one")
        return time(model, system, *rest)

    monkeypatch.setattr(decode, "_time", some)
    assert run([*DECODE, str(tmp_path / "o.json")]) == 0
    assert "not this one" in capsys.readouterr().out
    rows = {row["system"]: row for row in json.loads((tmp_path / "o.json").read_text())["rows"]}
    assert rows["full"]["mendable"] and rows["full"]["ms"] is None
    check_numbers(rows["trimkv"])


@pytest.mark.parametrize("what", bench_kinds.SYSTEMS)
def test_each_kind_has_its_own_help(what, capsys):
    import importlib

    module = importlib.import_module(f"trimkv.bench.{what}")
    assert tuple(bench_kinds.SYSTEMS[what]) == tuple(module.SYSTEMS)
    assert run(["bench", what, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert all(shape in words for shape in shapes.SHAPES) and "floor" in words
    assert all(f"{name} " in words for name in bench_kinds.SYSTEMS[what])
    assert ("--chunk" in words) == (what == "prefill") and ("--fused" in words) == (what == "decode")
    assert ("--steps" in words) == (what in ("decode", "train"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("decode", "--shape", "gpt-5"), "is not one of 'qwen3-0.6b', "),
        (("dekode",), "bench dekode: say what to measure, one of decode, prefill, attention, train"),
        (("--figure", "f.png", "decode"), "options go behind the kind"),
        (("decode", "--compare", "vllm"), "stock-dynamic"),
        (("decode", "--context", "many"), "whole numbers"),
        (("decode", "--context", "0"), "whole numbers"),
        (("decode", "--budget", "16,32"), "one number"),
        (("prefill", "--device", "cuda"), "no CUDA GPU"),
        ((), "one of decode"),
        (("decode", "--output", "no/such/o.json"), "no/such/o.json: cannot be written"),
        (("decode", "--figure", "f.gif"), ".png, .svg, .pdf"),
        (("--from", "missing.json"), "missing.json"),
    ],
)
def test_what_a_person_can_mend_is_one_line(capsys, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_a_figure_shows_where_most_systems_have_numbers():
    rows = [{"system": "full", "context": 100, "batch": b} for b in (1, 4)]
    rows += [{"system": "trimkv", "context": c, "batch": b} for c in (100, 1000) for b in (1, 4, 16)]
    assert common(rows, "context") == ("batch", 4) and common(rows, "batch") == ("context", 100)


def test_drawing_a_saved_result_loads_no_torch(tmp_path):
    rows = [
        {"system": system, "context": context, "batch": batch, "ms": 2.0, "floor_ms": 1.0, "fraction_of_floor": 0.5}
        | {"tokens_per_second": 1e5 / context, "peak_bytes": 10**6 * context}
        for system in ("full", "trimkv")
        for context in (100, 1000)
        for batch in (1, 4)
    ]
    rows.append({"system": "stock-dynamic", "context": 1000, "batch": 4, "ms": None, "error": "out of memory"})
    result = {"rows": rows, "what": "decode", "shape": "tiny", "dtype": "float32", "device": "cpu"}
    result |= {"copy_bandwidth": 1e10, "matmul_rate": 1e10}
    source, figure = tmp_path / "result.json", tmp_path / "figure.svg"
    source.write_text(json.dumps(result))
    program = (
        "import sys\n"
        "from trimkv.cli.app import run\n"
        f"code = run(['bench', '--from', {str(source)!r}, '--figure', {str(figure)!r}])\n"
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    drawn = figure.read_text()
    assert drawn.count("axes_") >= 3 and figure.stat().st_size > 5000
    result["rows"] = rows[:1]
    source.write_text(json.dumps(result))
    assert run(["bench", "--from", str(source), "--figure", str(figure)]) == 2
