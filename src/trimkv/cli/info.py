"""``trimkv info``: what runs here. Meant to be pasted into a bug report."""

import os
import platform
import shlex
import subprocess
from importlib.metadata import version

import click

from .. import __version__
from . import show
from .options import output_options


@click.command(short_help="Show versions, devices, cache folder, gate sets.")
@output_options
def info(as_json: bool):
    """Show versions, devices, the bundled gate sets, and where the default model is kept and how to remove it."""
    found = _look()
    if as_json:
        show.emit(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in found["versions"].items():
        table.add_row(name, value)
    gpus = ", ".join(found["device"]["cuda"]) or "none"
    table.add_row("device", f"CPU with {found['device']['cpu_threads']} threads; CUDA GPUs: {gpus}")
    table.add_row("cache folder", found["cache_folder"])
    table.add_row("default model", _default_model(found))
    table.add_row("bundled gate sets", ", ".join(found["gate_sets"]) or "none yet")
    Console().print(table)


def _default_model(found: dict) -> str:
    """Where the default model is, how large, and how to be rid of it."""
    if not found["smollm2_bytes"]:
        return "smollm2: not fetched yet"
    broken = "" if found["smollm2_cached"] else ", damaged: the next start fetches it again"
    folder = found["smollm2_folder"]
    remove = f"rmdir /s {subprocess.list2cmdline([folder])}" if os.name == "nt" else f"rm -r {shlex.quote(folder)}"
    return f"smollm2: {show.bytes_text(found['smollm2_bytes'])}{broken}; to remove it: {remove}"


def _look() -> dict:
    import torch

    from .. import embedded
    from ..gates import bundled

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "trimkv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "platform": platform.platform(),
        },
        "device": {"default": "cuda" if gpus else "cpu", "cpu_threads": torch.get_num_threads(), "cuda": gpus},
        "cache_folder": str(embedded.cache_home()),
        "smollm2_cached": embedded.is_cached(),
        "smollm2_folder": str(embedded.folder()),
        "smollm2_bytes": embedded.folder_bytes(),
        "gate_sets": sorted(bundled()),
    }
