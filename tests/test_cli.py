"""The command line, as a person or a script meets it: on a tiny model in a folder."""

import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM

import trimkv
from tiny_text import CHATML, byte_tokenizer, chat_model, save_model
from trimkv.cache.policies import POLICIES
from trimkv.cli import loading, slow_prompt
from trimkv.cli.answer import Sampling, _Stream, answer
from trimkv.cli.app import run
from trimkv.cli.conversation import Conversation
from trimkv.cli.turns import encode, first_turn, next_turn
from trimkv.engine.interrupt import interruptible
from trimkv.gates.attach import new_gates

GREEDY = Sampling(max_new_tokens=12, temperature=0, top_p=1, repetition_penalty=1)
GENERATE_KEYS = {
    *("text", "model", "policy", "budget", "prompt_tokens", "new_tokens", "peak_tokens_per_head"),
    *("peak_cache_bytes", "full_cache_bytes", "prefill_seconds", "decode_tokens_per_second", "finish_reason"),
    *("peak_tokens_per_head_prefill", "peak_tokens_per_head_decode", "device", "dtype"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def trim(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def generate(trim, folder):
    """`trimkv generate --json` on the tiny model: the object on the last line."""

    def call(*arguments, prompt="Once upon a time there was a fox. " * 3):
        code, out, err = trim("generate", "--model", folder, "--prompt", prompt, "--json", *arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return call


def pipe(monkeypatch, data: bytes) -> None:
    """Puts bytes into standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def command(*arguments):
    return [sys.executable, "-c", "from trimkv.cli import main; main()", *map(str, arguments)]


def test_help_answers_before_torch_could_be_imported():
    script = (
        "import sys\n"
        "from trimkv.cli.app import run\n"
        "assert run(['--help']) == 0 and run(['generate', '--help']) == 0\n"
        "slow = {'torch', 'transformers', 'rich', 'numpy', 'prompt_toolkit'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("generate", "chat", "compare", "policies", "info"):
        assert name in done.stdout
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", ["M of the capacity loss: tokens that each head may retain", "By default a border parts them"]),
        ("generate", ["even gives every layer the same number of slots", "each head keeps for itself"]),
        ("shares", ["A share of 1.5 gives a layer one and a half times the budget"]),
        ("bench", ["The floor of a step is the least time"]),
    ],
)
def test_words_of_our_own_are_explained_where_they_are_used(trim, command, words):
    text = " ".join(trim(command, "--help")[1].split())
    for said in words:
        assert said in text


def test_no_command_shows_the_help(trim):
    code, out, _ = trim()
    assert code == 0 and "Usage: trimkv" in out
    assert trim("--version") == (0, f"trimkv {trimkv.__version__}\n", "")


class TestGenerate:
    def test_scripts_find_the_promised_keys(self, generate, folder):
        found = generate("--budget", 20, "--prefill-chunk", 16, "--max-new-tokens", 9)
        assert set(found) >= GENERATE_KEYS
        assert found["model"] == folder and found["budget"] == 20
        assert found["device"] == "cpu" and found["dtype"] == "float32"
        assert found["new_tokens"] <= 9 and found["finish_reason"] in ("stop", "length")
        assert found["prefill_seconds"] > 0

    def test_a_prompt_that_will_take_minutes_is_announced(self, trim, folder, monkeypatch):
        """--profile paper with a policy that needs every attention weight: once 436 s without a word."""
        monkeypatch.setattr(slow_prompt, "_seconds_of_a_layer", lambda model, tokens: 100.0)
        common = (
            "generate",
            "--model",
            folder,
            "--prompt",
            "a long story " * 300,
            "--max-new-tokens",
            1,
            "--budget",
            20,
        )
        paper = ("--profile", "paper", "--policy")
        code, _, err = trim(*common, *paper, "h2o")
        assert code == 0, err
        assert "each of the 3," in err and "h2o needs every one of these weights: about 7 min" in err
        assert "in chunks of 512 (leave --profile out)" in err
        for fast in ((*paper, "snapkv"), ("--policy", "h2o")):
            assert "attend" not in trim(*common, *fast)[2]
        monkeypatch.setattr(slow_prompt, "_seconds_of_a_layer", lambda model, tokens: 0.01)
        assert "attend" not in trim(*common, *paper, "h2o")[2]

    def test_the_budget_holds(self, generate):
        found = generate("--budget", 20, "--prefill-chunk", 16, "--max-new-tokens", 9)
        assert found["prompt_tokens"] > 100
        assert found["peak_tokens_per_head_decode"] == 20
        assert found["peak_tokens_per_head_prefill"] == 36 == found["peak_tokens_per_head"]
        assert found["peak_cache_bytes"] < found["full_cache_bytes"]

    @pytest.mark.parametrize(
        ("policy", "decode"), [("h2o", 21), ("snapkv", 28), ("r_kv", None), ("streaming_llm", 20), ("keydiff", 20)]
    )
    def test_the_papers_form_reads_a_prompt_whole_and_may_exceed_the_budget(self, generate, policy, decode):
        """SnapKV keeps all it decodes, R-KV holds 128 tokens more before it evicts; both are counted."""
        found = generate("--budget", 20, "--profile", "paper", "--policy", policy, "--max-new-tokens", 9)
        assert found["profile"] == "paper" and found["new_tokens"] == 9
        whole = policy != "keydiff"
        assert found["peak_tokens_per_head_prefill"] == found["prompt_tokens"] - (not whole)
        assert found["peak_tokens_per_head_decode"] == (decode or found["prompt_tokens"] + 8)

    @pytest.mark.parametrize("chunk", [7, 512])
    def test_where_nothing_is_evicted_the_answer_is_the_stock_models(self, generate, folder, chunk):
        tokenizer = byte_tokenizer()
        ids = encode(tokenizer, first_turn(tokenizer, "Tell me a story.", "Be brief."))
        stock = AutoModelForCausalLM.from_pretrained(folder)
        new = stock.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20, pad_token_id=0)[0, len(ids) :]
        found = generate(
            *("--system", "Be brief.", "--prefill-chunk", chunk, "--max-new-tokens", 20), prompt="Tell me a story."
        )
        assert found["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert found["prompt_tokens"] == len(ids) and found["new_tokens"] == len(new)

    def test_the_repetition_penalty_covers_the_prompt_as_in_transformers(self, generate, folder):
        tokenizer = byte_tokenizer()
        stock = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.tensor([tokenizer("abcabcabc").input_ids])
        new = stock.generate(ids, do_sample=False, max_new_tokens=20, repetition_penalty=3.0, pad_token_id=0)
        arguments = ("--no-chat", "--repetition-penalty", 3, "--max-new-tokens", 20)
        found = generate(*arguments, prompt="abcabcabc")
        assert found["text"] == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert found["text"] != generate("--no-chat", "--max-new-tokens", 20, prompt="abcabcabc")["text"]

    def test_a_prompt_of_one_token(self, generate):
        found = generate("--no-chat", "--budget", 5, "--max-new-tokens", 9, prompt="x")
        assert found["prompt_tokens"] == 1 and found["peak_tokens_per_head_prefill"] == 0

    def test_seeds_repeat_and_differ(self, generate):
        drawn = [generate("--temperature", 1, "--seed", seed)["text"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_the_end_token_stops(self, trim, tmp_path):
        path = save_model(tmp_path / "model")
        config = json.loads((path / "generation_config.json").read_text())
        config["eos_token_id"] = list(range(4, 260))
        (path / "generation_config.json").write_text(json.dumps(config))
        code, out, _ = trim("generate", "--model", path, "--prompt", "x", "--json")
        found = json.loads(out)
        assert found["finish_reason"] == "stop" and found["new_tokens"] == 1
        assert found["decode_tokens_per_second"] is None

    def test_people_see_the_answer_and_what_was_saved(self, trim, folder, generate):
        arguments = ("--budget", 20, "--max-new-tokens", 30, "--prefill-chunk", 16)
        prompt = "Once upon a time there was a fox. " * 3
        text = generate(*arguments)["text"]
        code, out, err = trim("generate", "--model", folder, "--prompt", prompt, *arguments)
        assert code == 0
        assert out == text + "\n"  # so that it can be piped on
        assert "held 20 per head · cache" in err.splitlines()[-1] and "% saved)" in err.splitlines()[-1]
        assert "[cut at 30 tokens: --max-new-tokens]" in err
        assert "no trained gates for" in err and "using streaming_llm" in err

    def test_prompts_from_files_and_pipes(self, trim, folder, tmp_path, monkeypatch, generate):
        (tmp_path / "p.txt").write_text("grün", encoding="utf-8-sig")
        common = ("generate", "--model", folder, "--json", "--max-new-tokens", 3)
        expected = generate("--max-new-tokens", 3, prompt="grün")
        _, out, _ = trim(*common, "--prompt-file", tmp_path / "p.txt")
        assert json.loads(out)["text"] == expected["text"]
        (tmp_path / "p.txt.gz").write_bytes(gzip.compress("grün".encode()))
        _, out, _ = trim(*common, "--prompt-file", tmp_path / "p.txt.gz")
        assert json.loads(out)["text"] == expected["text"]
        for form in (["--prompt-file", "-"], []):
            pipe(monkeypatch, "grün".encode())
            _, out, _ = trim(*common, *form)
            assert json.loads(out)["text"] == expected["text"]

    def test_a_prompt_without_an_option(self, trim, folder, generate):
        code, out, err = trim("generate", "hello", "--model", folder, "--json", "--max-new-tokens", 3)
        assert code == 0, err
        assert json.loads(out)["text"] == generate("--max-new-tokens", 3, prompt="hello")["text"]

    def test_gates_that_fit_make_trimkv_the_default(self, trim, folder, tmp_path):
        trimkv.save_gates(new_gates(chat_model(), intermediate_size=8), tmp_path / "gates")
        arguments = ("--model", folder, "--gates", tmp_path / "gates", "--budget", 10, "--max-new-tokens", 3, "--json")
        code, out, err = trim("generate", "--prompt", "hello", *arguments)
        assert code == 0, err
        assert json.loads(out)["policy"] == "trimkv"


class TestWhatAUserCanMend:
    """One line, exit code 2, nothing on stdout, and no waiting for weights first."""

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--prompt", "x", "--policy", "nope"], ["'nope'", "full", "random", "streaming_llm", "trimkv"]),
            (["--prompt", "x", "--policy", "trimkv"], ["needs trained gates", "streaming_llm"]),
            (["--prompt", "x", "--policy", "trimkv", "--gates", "none"], ["--gates none"]),
            (["--prompt", "x", "--policy", "locret"], ["needs trained heads", "none ship for", "streaming_llm"]),
            (["--prompt", "x", "--gates", "./nothing"], ["./nothing", "no such gate set"]),
            (["--prompt", "x", "--budget", "0"], ["at least 1"]),
            (["--prompt", "x", "--budget", "-5"], ["at least 1"]),
            (["--prompt", "x", "--budget", "8", "--sinks", "4", "--recent", "4"], ["no room", "more than 8"]),
            (["--prompt", "x", "--budget", "4"], ["too small", "4 sinks", "at least 5"]),
            (["--prompt", "x", "--sinks", "-1"], ["must not be negative"]),
            (["--prompt", "x", "--buffer", "-1"], ["must not be negative"]),
            (["--prompt", "x", "--budget", "many"], ["--budget", "'many'"]),
            (["--prompt", "x", "--temperature", "-1"], ["--temperature"]),
            (["--prompt", "x", "--temperature", "nan"], ["--temperature"]),
            (["--prompt", "x", "--top-p", "0"], ["--top-p"]),
            (["--prompt", "x", "--top-p", "1.5"], ["--top-p"]),
            (["--prompt", "x", "--top-p", "nan"], ["--top-p"]),
            (["--prompt", "x", "--repetition-penalty", "0"], ["--repetition-penalty"]),
            (["--prompt", "x", "--prefill-chunk", "0"], ["--prefill-chunk"]),
            (["--prompt", "x", "--max-new-tokens", "0"], ["--max-new-tokens"]),
            (["--prompt", "x", "--seed", "-1"], ["--seed"]),
            (["--prompt", "x", "--device", "tpu"], ["--device", "cuda"]),
            (["--prompt", "x", "--dtype", "int4"], ["--dtype", "bfloat16"]),
            (["--prompt", ""], ["prompt is empty"]),
            (["--prompt", " \n\t"], ["prompt is empty"]),
            (["--prompt", "caf\udce9"], ["the prompt: not UTF-8 text"]),
            (["caf\udce9"], ["the prompt: not UTF-8 text"]),
            (["--prompt", "x", "--system", "caf\udce9"], ["--system: not UTF-8 text"]),
            ([], ["no prompt", "standard input is empty", "--prompt-file"]),
            (["--prompt", "x", "--prompt-file", "y"], ["two prompts", "only one of them"]),
            (["--prompt", "x", "y"], ["two prompts", "only one of them"]),
            (["y", "--prompt-file", "y"], ["two prompts", "only one of them"]),
            (["hello", "there"], ["2 words", "quotes"]),
            ([""], ["prompt is empty"]),
            (["--prompt-file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
            (["--prompt-file", "."], [".", "directory"]),
            (["--prompt", "x", "--nonsense"], ["--nonsense"]),
            (["--prompt", "x", "--model", "./nowhere"], ["./nowhere", "no such folder"]),
            (["--prompt", "x", "--model", "a/b/c"], ["a/b/c", "no such folder"]),
            (["--prompt", "x", "--model", ""], ["model's name is empty"]),
        ],
    )
    def test_generate(self, trim, folder, monkeypatch, arguments, said):
        monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        pipe(monkeypatch, b"")
        model = [] if "--model" in arguments else ["--model", folder]
        code, out, err = trim("generate", *model, *arguments)
        _check(code, out, err, said)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, trim, folder):
        _check(*trim("generate", "--model", folder, "--prompt", "x", "--device", "cuda"), ["no CUDA GPU"])

    @pytest.mark.parametrize(
        "name, content, said",
        [
            ("p", b"caf\xe9", "p: not UTF-8 text"),
            ("p", "some words".encode("utf-16"), "p: UTF-16 text; save it as UTF-8"),
            ("p", "some words".encode("utf-16-be"), "p: UTF-16 text; save it as UTF-8"),
            ("p", b"a\0b", "binary"),
            ("p", b" \n", "empty"),
            ("p.gz", b"plain", "p.gz: not a readable gzip file"),
            ("p.gz", gzip.compress(b"cut short " * 1000, mtime=0)[:40], "p.gz: not a readable gzip file"),
        ],
    )
    def test_prompt_files_that_are_no_text(self, trim, folder, tmp_path, monkeypatch, name, content, said):
        (tmp_path / name).write_bytes(content)
        _check(*trim("generate", "--model", folder, "--prompt-file", tmp_path / name), [said])
        if name == "p" and content.strip():
            pipe(monkeypatch, content)
            _check(*trim("generate", "--model", folder), [said.replace("p: ", "standard input: ")])

    @pytest.mark.parametrize("policy", ["trimkv", "locret", "seer_attention_r"])
    def test_a_policy_without_its_training_names_those_that_work(self, trim, folder, policy):
        said = trim("generate", "--model", folder, "--prompt", "x", "--policy", policy)[2]
        named = said.split("no training (")[1].split(")")[0].split(", ")
        assert "h2o" in named and not {"trimkv", "locret", "seer_attention_r"} & set(named)
        for other in named if policy == "locret" else ():
            assert (
                trim("generate", "--model", folder, "--prompt", "x", "--policy", other, "--max-new-tokens", 1)[0] == 0
            )

    def test_gates_that_do_not_fit_the_default_model_call_it_by_its_name(self, trim, folder, tmp_path, monkeypatch):
        """Not by the folder that it was read from."""
        monkeypatch.setattr("trimkv.embedded.fetch", lambda *a: Path(folder))
        trimkv.save_gates(new_gates(chat_model(hidden_size=32), intermediate_size=8), tmp_path / "gates")
        code, out, err = trim("generate", "--prompt", "x", "--gates", tmp_path / "gates")
        _check(code, out, err, ["do not fit smollm2: "])
        assert folder not in err

    def test_gates_of_another_model(self, trim, folder, tmp_path):
        other = chat_model(hidden_size=32)
        other.config._name_or_path = "other/model"
        trimkv.save_gates(new_gates(other, intermediate_size=8), tmp_path / "gates")
        arguments = ("--model", folder, "--prompt", "x", "--gates", tmp_path / "gates")
        _check(*trim("generate", *arguments), ["other/model", folder, "do not fit"])

    def test_gates_that_hold_code(self, trim, folder, tmp_path):
        gates, trap = tmp_path / "gates", tmp_path / "sprung"
        gates.mkdir()
        (gates / "config.json").write_text('{"base_model": "x", "retention_gate": "rg"}')
        (gates / "trimkv_weights.pth").write_bytes(pickle.dumps(Trap(trap)))
        _check(*trim("generate", "--model", folder, "--prompt", "x", "--gates", gates), ["trimkv_weights.pth"])
        assert not trap.exists()

    def test_a_checkpoint_that_holds_code(self, trim, tmp_path):
        path, trap = save_model(tmp_path / "model"), tmp_path / "sprung"
        (path / "model.safetensors").unlink()
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
        code, out, err = trim("generate", "--model", path, "--prompt", "x", "--policy", "random")
        _check(code, out, err, ["cannot load model", str(path)])
        assert not trap.exists()

    @pytest.mark.parametrize(
        "file, content, said",
        [
            ("model.safetensors", b"\x10garbage", "cannot load model"),
            ("model.safetensors", None, "cannot load model"),
            ("config.json", b"{", "cannot load"),
            ("tokenizer.json", b"{", "cannot load the tokenizer"),
        ],
    )
    def test_a_damaged_model(self, trim, tmp_path, file, content, said):
        path = save_model(tmp_path / "model")
        (path / file).unlink()
        if content is not None:
            (path / file).write_bytes(content)
        _check(*trim("generate", "--model", path, "--prompt", "x", "--policy", "random"), [said, str(path)])

    def test_a_checkpoint_without_some_weights(self, trim, tmp_path):
        """transformers would fill in random numbers, and the answer would be noise."""
        from safetensors.torch import load_file, save_file

        path = save_model(tmp_path / "model")
        weights = load_file(path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        code, out, err = trim("generate", "--model", path, "--prompt", "x", "--policy", "random")
        _check(code, out, err, ["lacks 1 weights", "model.layers.1.mlp.up_proj.weight"])

    def test_a_model_that_slots_cannot_serve(self, trim, tmp_path):
        path = save_model(
            tmp_path / "model", architecture="mistral", sliding_window=8, layer_types=["sliding_attention"] * 4
        )
        code, out, err = trim("generate", "--model", path, "--prompt", "x", "--policy", "random")
        _check(code, out, err, ["no full-attention layer"])

    @pytest.mark.parametrize(
        "failure, said",
        [
            (OSError("Name or service not known"), "cannot be reached (Name or service not known)"),
            (
                RepositoryNotFoundError("404", response=SimpleNamespace(status_code=404, headers={}, request=None)),
                "no such model on the Hugging Face hub",
            ),
        ],
    )
    def test_a_hub_id_that_leads_nowhere_is_asked_for_once(self, trim, monkeypatch, failure, said):
        """transformers would retry for a minute, with a line for each try."""
        asked = []

        def model_info(self, name, timeout):
            asked.append(name)
            raise failure

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        _check(*trim("generate", "--prompt", "x", "--model", "some/model"), ["some/model", said])
        assert asked == ["some/model"]

    def test_a_budget_beyond_all_memory(self, trim, folder):
        budget = 2 * 10**13
        code, out, err = trim("generate", "--model", folder, "--prompt", "x", "--policy", "random", "--budget", budget)
        _check(code, out, err, ["out of memory", "--budget"])

    def test_templates(self, trim, tmp_path):
        path = save_model(tmp_path / "model", tokenizer=byte_tokenizer(chat_template=None))
        common = ("--model", path, "--policy", "random")
        _check(*trim("generate", *common, "--prompt", "x", "--chat"), ["no chat template"])
        _check(*trim("generate", *common, "--prompt", "x", "--system", "y"), ["--system needs a chat template"])
        _check(*trim("chat", *common), ["no chat template", "trimkv generate"])

    @pytest.mark.parametrize(
        "arguments, said",
        [
            ([], ["--text"]),
            (["--text", "nowhere.txt"], ["nowhere.txt"]),
            (["--text", "{tmp}/bad.jsonl"], ["bad.jsonl, line 1"]),
            (["--text", "{tmp}/good.txt", "--budgets", "a,b"], ["--budgets"]),
            (["--text", "{tmp}/good.txt", "--budgets", ","], ["--budgets ,", "whole numbers"]),
            (["--text", "{tmp}/good.txt", "--budgets", "64,0"], ["at least 1"]),
            (["--text", "{tmp}/good.txt", "--policies", "full,nope"], ["'nope'", "streaming_llm"]),
            (["--text", "{tmp}/good.txt", "--policies", "trimkv"], ["needs trained gates"]),
            (["--text", "{tmp}/good.txt", "--policies", "random", "--context", "1"], ["--context"]),
            (["--text", "{tmp}/good.txt", "--policies", "random", "--max-sequences", "0"], ["--max-sequences"]),
            (["--text", "{tmp}/good.txt", "--policies", "random"], ["shorter than one sequence of 2048"]),
            (["--text", "{tmp}/good.txt", "--policies", "random", "--output", "no/such/x.json"], ["no/such/x.json"]),
        ],
    )
    def test_compare(self, trim, folder, tmp_path, monkeypatch, arguments, said):
        monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        (tmp_path / "bad.jsonl").write_text("{")
        (tmp_path / "good.txt").write_text("some words")
        arguments = [argument.format(tmp=tmp_path) for argument in arguments]
        _check(*trim("compare", "--model", folder, *arguments), said)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.txt"]


class Trap:
    """A pickle that would leave a file behind if anyone ran it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _check(code, out, err, said):
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("trimkv: error: "), err
    for fragment in said:
        assert fragment in err


class TestFailures:
    def test_a_bug_is_one_line_and_points_to_debug(self, trim, monkeypatch):
        def broken(self):
            raise KeyError("deep inside\nsecond line")

        monkeypatch.setattr("trimkv.embedded.cache_home", lambda: broken(None))
        code, out, err = trim("info")
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 1 and "KeyError" in err and "--debug" in err
        code, _, err = trim("info", "--debug")
        assert code == 1 and "Traceback" in err
        assert trim("--debug", "info")[2] == err

    def test_debug_shows_where_a_users_error_was_found(self, trim):
        code, _, err = trim("generate", "--debug", "--prompt", "")
        assert code == 2 and "Traceback" in err and err.splitlines()[-1] == "trimkv: error: the prompt is empty"

    def test_ctrl_c_is_quiet(self, trim, monkeypatch):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr("trimkv.embedded.cache_home", interrupted)
        code, out, err = trim("info")
        assert (code, out, err.strip()) == (130, "", "")

    @pytest.mark.parametrize("arguments", [["--help"], ["policies"], ["policies", "--json"]])
    def test_a_reader_that_went_away(self, arguments):
        """trimkv ... | head"""
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command(*arguments), stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert done.returncode not in (0, 2) and done.stderr == ""


class TestTurns:
    def test_the_next_turn_is_what_the_template_would_have_written(self):
        tokenizer = byte_tokenizer()
        whole = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ]
        expected = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        assert first_turn(tokenizer, "one", "s") + "two" + next_turn(tokenizer, "three") == expected

    def test_a_template_that_forgets_answers_is_refused(self):
        tokenizer = byte_tokenizer(chat_template="{{ messages[-1]['content'] }}")
        with pytest.raises(ValueError, match="leaves past answers out"):
            next_turn(tokenizer, "hello")


def converse(budget=4096, policy="streaming_llm", **sampling):
    model = chat_model()
    cache = trimkv.bounded_cache(model, policy=policy, budget=budget, chunk=16)
    sampling = Sampling(**{**vars(GREEDY), **sampling})
    return Conversation(model, byte_tokenizer(), cache, sampling, chunk=16, system="sys")


@pytest.fixture
def ctrl_c_counts():
    """Ctrl-C interrupts, also where the tests run in the background of a shell that ignores it for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestConversation:
    def test_every_token_is_fed_exactly_once(self):
        conversation = converse()
        fed = []
        conversation.model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: fed.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
        )
        for message in ("one", "two", "three"):
            conversation.say(message)
        assert fed == conversation.history[:-1]

    def test_later_answers_equal_a_fresh_read_of_the_whole_conversation(self):
        conversation = converse()
        for message in ("one", "two"):
            conversation.say(message)
        again = conversation.say("three")
        history = conversation.history[: -len(again.token_ids)]
        stock = chat_model().generate(torch.tensor([history]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert stock[0, len(history) :].tolist() == again.token_ids

    @pytest.mark.parametrize("ended", [True, False])
    def test_the_end_of_a_turn_is_there_once(self, ended):
        """Whether the model ended its answer itself or was cut short."""
        conversation = converse()
        answered = conversation.say("one").token_ids
        assert 3 not in answered
        if ended:
            conversation.history.append(3)  # drawn, and like every last token not in the cache yet
        conversation.say("two")
        text = conversation.tokenizer.decode(conversation.history)
        answered = conversation.tokenizer.decode(answered)
        assert f"assistant\n{answered}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n" in text

    def test_memory_stays_flat_however_long_the_conversation(self):
        conversation = converse(budget=24)
        sizes, seen = set(), 0
        for number in range(20):
            conversation.say(f"message number {number} with some words in it")
            sizes.add(conversation.cache.nbytes)
            seen = conversation.cache.get_seq_length()
        assert seen > 30 * 24 and len(sizes) == 1
        assert conversation.cache.held_tokens == 24
        assert conversation.cache.peak_tokens <= 24 + 16

    def test_reset_starts_anew_in_the_same_memory(self):
        conversation = converse(budget=24)
        first = conversation.say("hello").token_ids
        conversation.say("and more")
        size = conversation.cache.nbytes
        conversation.reset()
        assert conversation.cache.get_seq_length() == 0 and conversation.cache.nbytes == size
        assert conversation.say("hello").token_ids == first

    @pytest.mark.parametrize("stop_after", [0, 1, 3, 7])
    def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(self, stop_after):
        """Stopped while reading or while writing: nothing is lost, nothing is fed twice."""
        conversation = converse()
        asked = iter(range(1000))
        out = conversation.say(
            "a rather long message that takes several chunks", stopped=lambda: next(asked) >= stop_after
        )
        assert out.finish_reason == "interrupted"
        again = conversation.say("two")
        assert again.finish_reason in ("stop", "length")
        assert conversation.cache.get_seq_length() == len(conversation.history) - 1
        history = conversation.history[: -len(again.token_ids)]
        stock = chat_model().generate(torch.tensor([history]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert stock[0, len(history) :].tolist() == again.token_ids

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, ctrl_c_counts):
        conversation = converse(max_new_tokens=200)
        pressed = []

        def press_once(text):
            if not pressed:
                pressed.append(signal.raise_signal(signal.SIGINT))

        with interruptible() as stopped:
            out = conversation.say("hello", write=press_once, stopped=stopped)
        assert out.finish_reason == "interrupted" and 1 <= len(out.token_ids) < 20
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # as before

    def test_text_arrives_in_pieces_that_make_up_the_answer(self):
        pieces = []
        stream = _Stream(byte_tokenizer(), pieces.append)
        stream.put(torch.tensor([[5, 6, 7]]))  # the prompt
        for token in byte_tokenizer()("Grüße 🦊 und mehr").input_ids:
            stream.put(torch.tensor([token]))
        stream.put(torch.tensor([3]))
        stream.end()
        assert "".join(pieces) == "Grüße 🦊 und mehr"
        assert "🦊" in pieces and len(pieces) == len("Grüße 🦊 und mehr")

    def test_half_a_character_at_the_end_is_not_swallowed(self):
        pieces = []
        stream = _Stream(byte_tokenizer(), pieces.append)
        stream.put(torch.tensor([[5]]))
        for token in byte_tokenizer()("a🦊").input_ids[:-1]:
            stream.put(torch.tensor([token]))
        assert pieces == ["a"]
        stream.end()
        assert "".join(pieces).startswith("a\ufffd")

    @pytest.mark.parametrize("window", [None, 20, 1000])
    def test_the_repetition_penalty_looks_back_as_far_as_its_window(self, window):
        model, history = chat_model(), (torch.arange(60) * 7 % 200 + 10).tolist()
        sampling = Sampling(12, temperature=0, top_p=1, repetition_penalty=4, penalty_window=window)
        cache = trimkv.bounded_cache(model, policy="full")
        got = answer(model, byte_tokenizer(), cache, list(history), sampling, 16).token_ids
        expect = []
        for _ in got:
            logits = model(torch.tensor([history + expect])).logits[0, -1]
            said = sorted({*history[-window if window else 0 :], *expect})
            logits[said] = torch.where(logits[said] > 0, logits[said] / 4, logits[said] * 4)
            expect.append(int(logits.argmax()))
        assert got == expect and len(got) > 3
        if window == 20:
            whole = answer(model, byte_tokenizer(), trimkv.bounded_cache(model, policy="full"), list(history),
                           replace(sampling, penalty_window=None), 16).token_ids  # fmt: skip
            assert whole != got, "or the window would not show"

    def test_sampling_is_not_cut_at_the_50_best_tokens(self):
        """transformers would do so unasked; --top-p 1 --temperature 1 means the model's own distribution."""
        conversation = converse(max_new_tokens=1, temperature=100.0)
        model, drawn = conversation.model, set()
        for _ in range(200):
            cache = trimkv.bounded_cache(model, policy="full")
            drawn |= set(answer(model, conversation.tokenizer, cache, [5], conversation.sampling, 16).token_ids)
        assert len(drawn) > 60


class TestChat:
    def test_a_piped_conversation(self, trim, folder, monkeypatch):
        pipe(monkeypatch, b"one\n\ntwo\n/stats\n/help\n/wat\n/reset\nthree\n/quit\nnever read\n")
        code, out, err = trim("chat", "--model", folder, "--budget", 24, "--max-new-tokens", 5)
        assert code == 0, err
        assert err.count("24 per head · cache") == 4, "three answers and /stats"
        assert "per head" not in out and "/reset" not in out, "answers alone go on through a pipe"
        for fragment in ("the most tokens", "/reset", "unknown command /wat; there are", "everything forgotten"):
            assert fragment in err

    def test_json_at_the_end(self, trim, folder, monkeypatch):
        pipe(monkeypatch, b"one\ntwo")
        code, out, err = trim("chat", "--model", folder, "--budget", 24, "--max-new-tokens", 5, "--json")
        assert code == 0 and len(out.splitlines()) == 1
        found = json.loads(out)
        assert [turn["prompt"] for turn in found["turns"]] == ["one", "two"]
        assert found["seen_tokens"] == found["turns"][-1]["seen_tokens"] > found["turns"][0]["seen_tokens"] > 24
        assert found["held_tokens"] == 24 == found["peak_tokens_per_head_decode"]
        new = encode(byte_tokenizer(), next_turn(byte_tokenizer(), "two"))
        assert len(new) <= found["turns"][1]["prompt_tokens"] <= len(new) + 1

    def test_a_message_that_the_template_refuses_does_not_end_the_chat(self, trim, tmp_path, monkeypatch):
        template = "{% if messages[-1]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
        path = save_model(tmp_path / "model", tokenizer=byte_tokenizer(chat_template=template))
        pipe(monkeypatch, b"good\nbad\ngood\n")
        code, out, err = trim("chat", "--model", path, "--max-new-tokens", 3, "--json")
        assert code == 0 and "refuses this: no" in err
        assert [turn["prompt"] for turn in json.loads(out)["turns"]] == ["good", "good"]


class TestCompare:
    def test_rows_for_scripts_and_a_table_for_people(self, trim, folder, tmp_path):
        for name in "abc":
            (tmp_path / f"{name}.txt").write_text(f"{name} was a small word in a long text. " * 20)
        arguments = (
            *("compare", "--model", folder, "--text", tmp_path / "a.txt", tmp_path / "b.txt"),
            *("--text", tmp_path / "c.txt", "--context", 40, "--policies", "full,streaming_llm,random"),
            *("--budgets", "8,12", "--max-sequences", 4, "--output", tmp_path / "out.json"),
        )
        code, out, err = trim(*arguments, "--json")
        assert code == 0, err
        found = json.loads(out.splitlines()[-1])
        written = json.loads((tmp_path / "out.json").read_text())
        assert {key: written[key] for key in found} == found
        assert written["command"].startswith(f"trimkv compare --model {folder} --text ")
        assert written["environment"]["torch"] and written["environment"]["cpu"] and "commit" in written["environment"]
        assert (written["device"], written["dtype"]) == ("cpu", "float32")
        assert found["context"] == 40 and found["model"] == folder and found["full_perplexity"] > 1
        assert len(found["rows"]) == 6
        for row in found["rows"]:
            assert row["tokens"] == 4 * 39
            assert row["policy"] == "full" or row["peak_tokens_per_head"] == row["budget"]
            assert (row["kl"] < 1e-6) == (row["policy"] == "full")
        code, out, _ = trim(*arguments)
        assert code == 0 and "KL" in out and "streaming_llm" in out
        assert sum("full " in line and "all" in line for line in out.splitlines()) == 1


def test_policies(trim):
    code, out, _ = trim("policies", "--json")
    found = {row["name"]: row for row in json.loads(out)["policies"]}
    assert code == 0 and set(found) >= {"full", "trimkv", "streaming_llm", "random"}
    assert found["trimkv"]["trained"] and found["trimkv"]["needs"] == ["log_beta"]
    assert all(row["source"] and row["description"] for row in found.values())
    assert set(found["h2o"]) >= {"name", "needs", "trained", "source"}


def test_policies_are_a_short_table_and_one_is_explained(trim):
    code, table, _ = trim("policies")
    lines = table.splitlines()
    assert code == 0 and all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[1 : 1 + len(POLICIES)]] == list(POLICIES)
    assert len(lines) == len(POLICIES) + 3
    code, out, _ = trim("policies", "h2o", "snapkv")
    assert code == 0 and "Deviates:" in out and "--profile paper:" in out and "2306.14048" in out
    assert "snapkv" in out and "tova" not in out
    found = json.loads(trim("policies", "h2o", "--json")[1])["policies"]
    assert [row["name"] for row in found] == ["h2o"]
    _check(*trim("policies", "h3o"), ["'h3o'", *POLICIES])


def test_info(trim, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMKV_HOME", str(tmp_path / "home"))
    found = json.loads(trim("info", "--json")[1])
    assert found["versions"]["trimkv"] == trimkv.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["cache_folder"] == str(tmp_path / "home") and found["smollm2_cached"] is False
    code, out, _ = trim("info")
    assert code == 0 and "not fetched yet" in out
    assert not (tmp_path / "home").exists()


def test_info_says_how_large_the_default_model_is_and_how_to_remove_it(trim, monkeypatch, tmp_path):
    model = tmp_path / "my home" / "smollm2"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"x" * 2_500_000)
    (tmp_path / "my home" / "mine.txt").write_text("not ours to remove")
    monkeypatch.setenv("TRIMKV_HOME", str(tmp_path / "my home"))
    found = json.loads(trim("info", "--json")[1])
    assert (found["smollm2_folder"], found["smollm2_bytes"]) == (str(model), 2_500_000)
    monkeypatch.setenv("COLUMNS", "400")
    out = trim("info")[1]
    assert f"2.5 MB, damaged: the next start fetches it again; to remove it: rm -r '{model}'" in out
